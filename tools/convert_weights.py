#!/usr/bin/env python
"""Convert weights from and to torchvision, and to safetensors.

    python tools/convert_weights.py --from torchvision maskrcnn.pth output/converted/model_final.pth
    python tools/convert_weights.py --from torchvision resnet50.pth output/resnet50.pth
    python tools/convert_weights.py --to torchvision output/converted/model_final.pth back.pth
    python tools/convert_weights.py output/mine/model_best.pth output/shared/model_final.safetensors

torchvision's are ResNets, and Faster, Mask and Keypoint R-CNNs on a ResNet with an FPN; the weights
tell which. A detector gets a config.yaml beside its weights, so that the folder can be loaded as a
model. A file whose name ends with .safetensors is in that format. Nothing is overwritten.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchvision.models import detection

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.config import CONFIG_DIR, flatten
from mask_rcnn_plugin.data.metadata import keep_metadata
from mask_rcnn_plugin.errors import UserError, mistakes_in_one_line
from mask_rcnn_plugin.inference.predictor import find_config
from mask_rcnn_plugin.weights.classes import NO_CLASS
from mask_rcnn_plugin.weights.files import save_safetensors
from mask_rcnn_plugin.weights.loader import read_weights
from mask_rcnn_plugin.weights.torchvision import EPS, from_torchvision, to_torchvision

# Rows whose models have masks, keypoints.
ROWS = {
    (False, False): "table3_box/faster_rcnn_r101_fpn",
    (True, False): "table2a_backbone/r50_fpn",
    (False, True): "table5_multitask/keypoint_only",
    (True, True): "table5_multitask/keypoint_and_mask",
}
# Files whose models torchvision runs with an eps of 0.
PUBLISHED = [
    Path(getattr(detection, f"{kind}RCNN_ResNet50_FPN_Weights").COCO_V1.url).name
    for kind in ("Faster", "Mask", "Keypoint")
]
# Where models with the same weights differ.
FIXED = re.compile("anchor_generator|box2box_transform|_pooler|in_features")
# What a row must have of +torchvision to start from a backbone.
SETTINGS = [
    *("model.input_format", "model.pixel_mean", "model.pixel_std"),
    *("model.backbone.stride_in_1x1", "model.backbone.name"),
]


def config_of(weights: dict[str, Tensor], names: list[str] | None) -> DictConfig:
    """The config of a detector.

    Args:
        weights: torchvision's, converted.
        names: of its classes. Where there are none, those of 90 classes are COCO's by their ids.

    Raises:
        UserError: if no config has such a model, or there is not a name for each class.
    """
    count = max(1, len(weights.get("roi_heads.box_predictor.cls_score.bias", ())) - 1)
    keypoints = len(weights.get("roi_heads.keypoint_head.score_lowres.bias", ()))
    data, row = "keypoints_coco_2017" if keypoints else "coco_2017", row_of(weights)
    overrides = [
        *(f"dataset.train.names=[{data}_train]", f"dataset.test.names=[{data}_val]"),
        *(f"model.backbone.name={backbone(weights)}", f"model.roi_heads.num_classes={count}"),
        *([f"model.roi_heads.keypoint_head.num_keypoints={keypoints}"] if keypoints else ()),
    ]
    cfg = get_config(f"{row}+torchvision", overrides)
    if names and len(names) != count:
        raise UserError(f"--names lists {len(names)}, must list {count}, one for each class")
    keep_metadata(cfg, f"{data}_val")
    known = cfg.dataset.metadata.thing_classes
    of_id = dict(zip(cfg.dataset.metadata.get("category_ids", range(1, len(known) + 1)), known))
    if names and keypoints == 17:
        cfg.dataset.metadata.update(thing_classes=names, category_ids=[*range(1, count + 1)])
    elif names or count != max(of_id) or keypoints not in (0, 17):
        cfg.dataset.metadata = {"thing_classes": names} if names else None
    else:
        ids = [*range(1, count + 1)]
        names = [of_id.get(i, NO_CLASS) for i in ids]
        cfg.dataset.metadata.update(thing_classes=names, category_ids=ids)
    check_shapes(weights, lambda: instantiate(cfg.model), "model")
    return cfg


def check_shapes(weights: dict[str, Tensor], build: Callable[[], nn.Module], part: str) -> None:
    """
    Raises:
        UserError: if a model cannot be built, or has other weights.
    """
    try:
        with torch.device("meta"):
            model = build().state_dict()
    except ValueError as error:  # of a backbone's depth
        raise UserError(f"no config has the {part} of these weights: {error}") from error
    for name, value in model.items():
        here, there = list(value.shape), list(getattr(weights.get(name), "shape", ()))
        if here != there:
            raise UserError(
                f"no config has the {part} of these weights: {name} is {there or 'missing'}, must "
                f"be {here}"
            )


def row_of(weights: dict[str, Tensor]) -> str:
    """One that has a detector's branches."""
    branches = ("mask_head.predictor.bias", "keypoint_head.score_lowres.bias")
    masks, keypoints = (f"roi_heads.{bias}" in weights for bias in branches)
    return ROWS[masks, keypoints]


def backbone(weights: dict[str, Tensor]) -> str:
    """What configs name it: "ResNet-50-FPN"."""
    convolutions = [w for n, w in weights.items() if re.search(r"res\d\.\d+\.conv\d\.weight$", n)]
    is_grouped = any(w.shape[2] == 3 and w.shape[0] > 2 * w.shape[1] for w in convolutions)
    return f"{'ResNeXt' if is_grouped else 'ResNet'}-{2 + len(convolutions)}-FPN"


def settings_of(weights: dict[str, Tensor]) -> str:
    """What to add to a row with an FPN so that it starts from a backbone's weights.

    Raises:
        UserError: if no row has such a backbone.
    """
    name = backbone(weights)
    cfg = get_config(f"{ROWS[True, False]}+torchvision", [f"model.backbone.name={name}"])
    check_shapes(weights, lambda: instantiate(cfg.model.backbone).bottom_up, "backbone")
    values = {key: OmegaConf.select(cfg, key) for key in SETTINGS}
    return " ".join(f"{key}={value}".replace(" ", "") for key, value in values.items())


def check_is_torchvisions(config: str, weights: dict[str, Tensor]) -> None:
    """
    Raises:
        UserError: if a config's model is not torchvision's.
    """
    cfg = get_config(config)
    before = flatten(cfg, resolve=True)
    LazyConfig.load(str(CONFIG_DIR / "overlays" / "torchvision.py"), "overlay")(cfg)
    after = flatten(cfg, resolve=True)
    # What its constructors have, and no overlay changes.
    plain = flatten(get_config(f"{row_of(weights)}+torchvision"), resolve=True)
    after |= {k: v for k, v in plain.items() if k in after and FIXED.search(k)}
    keys = sorted(k for k in after if before.get(k) != after[k] and k.startswith("model."))
    if others := [f"{key}={before.get(key)}" for key in keys[:3]]:
        raise UserError(
            f"{config} is not a torchvision model, as it has {', '.join(others)}: +torchvision "
            "turns a row into one, to train"
        )


def convert(args: argparse.Namespace) -> str:
    """Write the files, and return a line that says what they are for."""
    if args.output.suffix not in (".pth", ".pyth", ".safetensors"):
        raise UserError(f"OUT is {args.output}, must end with .pth or .safetensors")
    if (args.names or args.eps is not None) and not args.source:
        raise UserError("--names and --eps go with --from torchvision")
    weights, cfg, output = read_weights(args.input), None, args.output
    config, done = Path(args.input).with_name("config.yaml"), f"{output} is written"
    if args.source:
        eps = args.eps
        if eps is None:
            eps = 0.0 if Path(args.input).name in PUBLISHED else EPS
        weights = from_torchvision(weights, eps=eps)
        if "stem.conv1.weight" in weights:
            settings = settings_of(weights)
            done += f", a backbone to start from: train.init_checkpoint={output} {settings}"
        else:
            cfg = config_of(weights, args.names)
            done += f" for an eps of {eps:g}, and config.yaml beside it: --weights takes the file"
    elif args.target:
        if "roi_heads.box_predictor.cls_score.bias" in weights:
            check_is_torchvisions(find_config(args.input), weights)
        weights = to_torchvision(weights)
    elif config.is_file():
        cfg = get_config(str(config))
    write(output, weights, cfg, config)
    return done


def write(output: Path, weights: dict[str, Tensor], cfg: DictConfig | None, known: Path) -> None:
    """Write weights and, but for one that is `known`, the config beside them."""
    config = output.with_name("config.yaml")
    files = [output, config] if cfg and config != known else [output]
    for file in files:
        if file.exists():
            raise UserError(f"{file} already exists, and is not overwritten")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".safetensors":
            metadata: Any = OmegaConf.to_container(cfg.dataset) if cfg else {}
            save_safetensors(output, weights, metadata.get("metadata") or {})
        else:
            with atomic_write(output) as part:
                torch.save(weights, part)
        if cfg and config in files:
            cfg.train.update(output_dir=str(output.parent), init_checkpoint=str(output))
            LazyConfig.save(cfg, str(config))
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    library = parser.add_mutually_exclusive_group()
    library.add_argument("--from", dest="source", choices=["torchvision"], help="library of IN")
    library.add_argument("--to", dest="target", choices=["torchvision"], help="library of OUT")
    parser.add_argument(
        "--names",
        type=lambda text: text.split(","),
        help="names of a detector's classes, in order: ring,disk (default: COCO's, if they fit)",
    )
    parser.add_argument(
        "--eps",
        type=float,
        help="eps of batch norm in a torchvision detector; 0 for one that was built with weights="
        "COCO_V1, even if it was trained further (default: 0 for the published files, else 1e-5)",
    )
    parser.add_argument("input", metavar="IN", help="file, address or model-zoo name")
    parser.add_argument("output", metavar="OUT", type=Path, help="a file that is not there yet")
    with mistakes_in_one_line():
        print(convert(parser.parse_args()))


if __name__ == "__main__":
    main()
