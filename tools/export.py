#!/usr/bin/env python
"""Export a model to a file for other programs: TorchScript, ONNX or torch.export.

    python tools/export.py --weights output/demo --format onnx --output demo.onnx --verify 6
    python tools/export.py --weights a.pth --config-file table2a_backbone/r50_fpn \\
        --format torchscript --output a.ts --verify 20 --images photos

The file takes an image of any size; docs/export.md describes its inputs, outputs and metadata. With
--verify it is compared with the model on images of three sizes, one of them without detections if
a blank image has none.

The exit code is 0 if the file was written, 1 if its outputs differed from the model's and it was
removed, and 2 for a mistake in the arguments or a model that the format cannot express.
"""

import argparse
import os
import sys
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import Predictor, get_config  # isort: split

from predict import add_model_arguments, parse_with_files, photos

from mask_rcnn_plugin.atomic_write import atomic_write
from mask_rcnn_plugin.errors import UserError, mistakes_in_one_line, print_mistake
from mask_rcnn_plugin.inference.export import (
    FORMATS,
    Run,
    load_exported,
    require_libraries,
    write_exported,
)
from mask_rcnn_plugin.inference.predictor import find_config, find_weights
from mask_rcnn_plugin.inference.verification import ExportMismatchError, example_images, verify


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, metavar="FILE", required=True)
    parser.add_argument(
        "--verify", type=int, default=0, metavar="N", help="compare with the model on N images"
    )
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="FILE",
        help="images, folders or patterns to verify with (default: drawn ones)",
    )  # fmt: skip
    args = parse_with_files(parser, "images")
    if args.verify and args.verify < 3:
        parser.error(f"--verify is {args.verify}, must be 3 or more: images of three sizes")
    if args.images and not args.verify:
        parser.error("--images are for --verify: give --verify N too")
    return args


def load(file: str, format: str) -> Run:
    """
    Raises:
        ExportMismatchError: if a runtime refuses the file.
    """
    try:
        return load_exported(file, format)
    except Exception as error:  # a runtime's own kinds, of an operator it lacks
        reason = str(error).strip().partition("\n")[0]
        raise ExportMismatchError(f"the file does not load: {reason}") from error


def run(args: argparse.Namespace) -> None:
    require_libraries(args.format)
    if os.path.exists(args.output) and not args.output.is_file():
        raise UserError(f"--output {args.output} is not a file: give a file or a new name")
    weights = find_weights(args.weights)
    cfg = get_config(args.config or find_config(weights), args.overrides)
    files = photos(args.images, "--images")
    predictor = Predictor.from_config(cfg, weights, device="cpu", optimize=False)
    images = example_images(predictor, files, max(1, args.verify))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.output) as file:
            write_exported(predictor, args.format, file, next(iter(images.values())))
            file.flush()
            if args.verify:
                print(verify(predictor, load(file.name, args.format), images))
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {error}") from error
    print(f"{args.output}: {args.format}, {args.output.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    with mistakes_in_one_line():
        try:
            run(parse_args())
        except ExportMismatchError as error:
            print_mistake(f"{error}; the file is not kept")
            sys.exit(1)


if __name__ == "__main__":
    main()
