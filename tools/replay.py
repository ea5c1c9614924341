#!/usr/bin/env python
"""Repeat a step whose loss or gradient was not finite, and find where in the model it broke.

    python tools/replay.py output/CONFIG/nonfinite/iteration_0012345_rank3_0.pth \\
        --config-file CFG [the training's key=value ...]

FILE is what the training wrote: the batch, and the weights and random state before the step. This
repeats the step and prints the images with their ground truth, each loss then and now, the first
module whose output is not finite and the parameters without a finite gradient. train.device=cpu
repeats on a CPU what broke on a GPU. A mistake in the arguments ends the run with exit code 2 and
one line.
"""

import argparse
import math
from collections.abc import Iterator
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

import torch
from detectron2.config import instantiate
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from tabulate import tabulate
from torch import Tensor, nn

from mask_rcnn_plugin.config.device import device_of
from mask_rcnn_plugin.errors import UserError, mistakes_in_one_line
from mask_rcnn_plugin.training import setup_datasets
from mask_rcnn_plugin.training.guarded_trainer import build_trainer
from mask_rcnn_plugin.training.nonfinite import read_batch
from mask_rcnn_plugin.training.random_states import set_random_state


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "file", metavar="FILE", help="a file in nonfinite/ of the training's output folder"
    )
    parser.add_argument("--config-file", dest="config", required=True, metavar="CFG")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    return parser.parse_intermixed_args()


def replay(cfg: DictConfig, content: dict[str, Any]) -> None:
    """Do the step of a file and print what happens."""
    model: nn.Module = instantiate(cfg.model).to(device_of(cfg))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        some = " ".join(str(error).split())[:200]
        raise UserError(
            "the file's weights do not fit this config's model, give the training's config: "
            f"{some} ..."
        ) from error
    # Not the running statistics, which the training's forward pass has changed already.
    broken = [name for name, p in model.named_parameters() if not all_finite(p)]
    if broken:
        print(f"Weights that were not finite before the step: {broken[:5]} of {len(broken)}\n")
    first: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, output, name=name: None if all_finite(output) else first.append(name)
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = build_trainer(cfg, model, [content["batch"]], optimizer)
    set_random_state(content["random"])
    with EventStorage():
        losses = trainer.backward(content["batch"])

    print(tabulate(describe(content["batch"]), headers="keys"))
    rows = [[name, content["losses"].get(name), loss.item()] for name, loss in losses.items()]
    print(f"\n{tabulate(rows, headers=['loss', 'in the training', 'repeated'])}")
    gradients = [name for name, p in model.named_parameters() if not all_finite(p.grad)]
    if first:
        print(f"\nThe first module whose output is not finite: {first[0]}")
    if gradients:
        print(f"\nParameters with non-finite gradients: {gradients[:5]} of {len(gradients)}")
    if not (broken or first or gradients or any(not math.isfinite(row[2]) for row in rows)):
        print(
            "\nEverything is finite here: the failure may need the training's device and precision "
            "or, if only the gradient was not finite, the batch of another rank."
        )


def all_finite(value: Any) -> bool:
    """Whether all floating-point tensors inside something that a module returns are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(all_finite, value))
    if isinstance(value, Instances):
        return all_finite(value.get_fields())
    return all_finite(value.tensor) if hasattr(value, "tensor") else True


def describe(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line for each image of a batch."""
    for image in batch:
        instances: Instances | None = image.get("instances")
        line = {"image": image["file_name"], "pixels": "x".join(map(str, image["image"].shape[1:]))}
        if instances is not None and len(instances):
            boxes = instances.gt_boxes.tensor
            sides = boxes[:, 2:] - boxes[:, :2]
            line |= {
                "instances": len(instances),
                "sides of boxes": f"{sides.min():.1f} to {sides.max():.1f}",
                "coordinates": f"{boxes.min():.1f} to {boxes.max():.1f}",
                "classes": sorted(set(instances.gt_classes.tolist())),
            }
        yield line


def main() -> None:
    args = parse_args()
    with mistakes_in_one_line():
        content = read_batch(args.file)
        cfg = get_config(args.config, args.overrides)
        setup_datasets(cfg)
        print(
            f"iteration {content['iteration']}, learning rate {content['lr']:.3g}, repeated on "
            f"{device_of(cfg)}\n"
        )
        replay(cfg, content)


if __name__ == "__main__":
    main()
