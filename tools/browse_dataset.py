#!/usr/bin/env python
"""Look at the training images as the model gets them, with their boxes, masks and keypoints.

    python tools/browse_dataset.py --config-file table2a_backbone/r50_fpn dataset=my/data
    python tools/browse_dataset.py --config-file CFG dataset=my/data --count 100

Draws random images, augmented as in a training, on pages of 16 in --output, and prints the files on
each page, row by row. What looks wrong here, such as a flipped label, is learned wrong there.
"""

import argparse
import random
import sys
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

from detectron2.config import instantiate
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from mask_rcnn_plugin.data.mapper import ImageError
from mask_rcnn_plugin.data.metadata import metadata_of
from mask_rcnn_plugin.errors import counted, mistakes_in_one_line
from mask_rcnn_plugin.evaluation.pictures import draw_inputs
from mask_rcnn_plugin.training.setup import images_left, setup_datasets

PAGE = 16


def browse(cfg: DictConfig, count: int, output: Path) -> list[Path]:
    """Write pages of `count` images; one that cannot be read is reported in a line."""
    setup_datasets(cfg)
    with images_left(cfg):
        images = instantiate(cfg.dataloader.train.dataset)
    mapper, metadata = instantiate(cfg.dataloader.train.mapper), metadata_of(cfg)
    output.mkdir(parents=True, exist_ok=True)
    pages: list[Path] = []
    batch = []
    chosen = random.sample(images, min(count, len(images)))
    for i, image in enumerate(tqdm(chosen, unit="image", disable=None), start=1):
        try:
            batch.append(mapper(image))
        except ImageError as error:
            tqdm.write(str(error), file=sys.stderr)
        if len(batch) == PAGE or (batch and i == len(chosen)):
            pages.append(output / f"{len(pages):03d}.jpg")
            Image.fromarray(draw_inputs(batch, metadata, cfg.model.input_format)).save(pages[-1])
            tqdm.write(f"{pages[-1]}: {', '.join(Path(b['file_name']).name for b in batch)}")
            batch = []
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        dest="config",
        required=True,
        metavar="CFG",
        help="a config, as train.py takes it",
    )
    parser.add_argument(
        "--count", type=int, default=PAGE, metavar="N", help="images to draw (default: 16)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/browse"),
        metavar="DIR",
        help="default: output/browse",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    args = parser.parse_intermixed_args()
    if args.count < 1:
        parser.error(f"--count is {args.count}, must be 1 or more")
    seed_all_rng(args.seed)
    with mistakes_in_one_line():
        pages = browse(get_config(args.config, args.overrides), args.count, args.output)
    print(f"{args.output}: {counted(len(pages), 'page', 'pages')}")


if __name__ == "__main__":
    main()
