#!/usr/bin/env python
"""Check COCO-format datasets before training on them.

    python tools/check_dataset.py --json my/train.json --images my/images
    python tools/check_dataset.py --json my/train.json --images my/images --fix my/train_clean.json
    python tools/check_dataset.py --config-file table2a_backbone/r50_fpn \\
        dataset.train.json=my/train.json dataset.train.images=my/images \\
        dataset.test.json=my/val.json dataset.test.images=my/images

With a config, as train.py takes it, both of its sets are checked, also against each other and the
model. Errors would stop a training or spoil it; warnings do neither. The exit code is 1 if there is
an error, else 0; 2 for a mistake in the arguments, or if --fix would leave nothing.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# First: the plugin makes detectron2 importable on current Pillow and NumPy.
from mask_rcnn_plugin import get_config  # isort: split

from detectron2.config import instantiate

from mask_rcnn_plugin.data.check import Findings, check_file, clean
from mask_rcnn_plugin.data.check.findings import total
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.errors import counted, mistakes_in_one_line
from mask_rcnn_plugin.training.preflight import check_sets
from mask_rcnn_plugin.training.setup import images_left, setup_datasets


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", metavar="FILE", help="an annotation file")
    what.add_argument(
        "--config-file", dest="config", metavar="CFG", help="a config, as train.py takes it"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--no-images", action="store_true", help="do not open images, only check that they exist"
    )
    parser.add_argument(
        "--fix",
        metavar="OUT",
        help="write a copy of FILE with wrong entries repaired or left out, and list them",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    args = parser.parse_intermixed_args()
    if args.json and not args.images:
        parser.error("--json needs --images, the folder of the images")
    if args.json and args.overrides:
        parser.error(f"{args.overrides[0]!r} changes a config: give one with --config-file")
    if args.config and (args.images or args.fix):
        parser.error("--images and --fix go with --json, one file at a time")
    if args.fix is not None and Path(args.fix).exists():  # so does "", the current folder
        parser.error(f"--fix is {args.fix!r}, which exists: give the name of a new file")
    return args


def refusal(start: Callable[[], object]) -> str:
    """What a training would stop with."""
    try:
        start()
    except DatasetError as error:
        return str(error)
    return ""


def check(args: argparse.Namespace, folder: str) -> bool:
    """Print what is found; whether there is no error. `dataset.split` is written to `folder`."""
    open_images = not args.no_images
    if args.json:
        found = [check_file(args.json, args.images, open_images=open_images)]
        together = Findings()
    else:
        cfg = get_config(args.config, args.overrides)
        if cfg.dataset.split:
            cfg.train.output_dir = folder
        refused = refusal(lambda: setup_datasets(cfg))
        if cfg.dataset.folder or cfg.dataset.split:  # where the sets are is what is wrong
            raise DatasetError(refused)
        found, together = check_sets(cfg, args.overrides, open_images=open_images)
        if not refused and not total([together, *(c.findings for c in found)], "error"):
            load = images_left(cfg)(lambda: instantiate(cfg.dataloader.train.dataset))
            refused = refusal(load)
        if refused:
            together.add("refused", text=refused)
    for checked in found:
        print(f"{checked.json_file}: {checked.size()}\n\n{checked.findings.table()}\n")
    if together:
        print(f"Training set, test set and model together\n\n{together.table()}\n")
    if args.fix:
        done = clean(found[0], args.fix)
        print(f"{args.fix}: written")
        for what, count in sorted(done.items()):
            print(f"  {count:7} {what}")
    everything = [*(checked.findings for checked in found), together]
    errors, warnings = (total(everything, severity) for severity in ("error", "warning"))
    counts = [counted(errors, "error", "errors"), counted(warnings, "warning", "warnings")]
    print(", ".join(counts) + ("" if open_images else "; images not opened"))
    return errors == 0


def main() -> None:
    args = parse_args()
    with mistakes_in_one_line(), tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if check(args, folder) else 1)


if __name__ == "__main__":
    main()
