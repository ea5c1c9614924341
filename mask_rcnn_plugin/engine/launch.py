"""The command line of the programs that train a config, on one or more GPUs."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.engine import launch
from omegaconf import DictConfig

from mask_rcnn_plugin.config_print import add_print_arguments, print_config
from mask_rcnn_plugin.errors import UserError


def parse_training_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line: the parser's own arguments, `config`, `num_gpus`, `overrides`.

    Raises:
        SystemExit: with exit code 2 and one line on standard error, if something is wrong; with 0
            if the config was only to be printed.
    """
    parser.add_argument(
        "--config-file",
        dest="config",
        required=True,
        metavar="CFG",
        help="short name or path of a config, with overlays behind a plus: NAME+synthetic",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of this machine to use")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    add_print_arguments(parser)
    args = parser.parse_intermixed_args()
    try:
        if print_config(args):
            parser.exit()
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    visible = torch.cuda.device_count()
    if args.num_gpus < 1 or (args.num_gpus > 1 and args.num_gpus > visible):
        parser.error(f"--num-gpus is {args.num_gpus}, must be from 1 to the {visible} visible GPUs")
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        if int(os.environ.get(variable, 1)) > 1:
            parser.error(
                f"{variable} is {os.environ[variable]}: this starts its processes itself, "
                "use --num-gpus, not torchrun or srun with several tasks"
            )
    return args


def launch_training(
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], DictConfig],
    run: Callable[[argparse.Namespace, DictConfig], None],
) -> None:
    """Run a prepared config in one process for each GPU.

    Args:
        args: from `parse_training_args`.
        prepare: gives the config, checked as far as possible without building anything; each
            process calls it, for its catalogs.
        run: what each process does.

    Raises:
        SystemExit: with exit code 2 and one line on standard error, for a `UserError`.
    """
    try:
        cfg = prepare(args)
        # Spawned processes have catalogs of their own and prepare themselves.
        alone = cfg if args.num_gpus == 1 else None
        launch(_run, args.num_gpus, dist_url="auto", args=(args, prepare, run, alone))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def _run(
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], DictConfig],
    run: Callable[[argparse.Namespace, DictConfig], None],
    cfg: DictConfig | None,
) -> None:
    run(args, cfg or prepare(args))
