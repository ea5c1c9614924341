"""What numbers were measured on, as pages name it."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import mask_rcnn_plugin


def environment() -> str:
    """Hardware and versions in one line.

    E.g. "2 cores of AMD EPYC, torch 2.14.1, Python 3.11.7, mask_rcnn_plugin 0.1.0 (1a2b3c4)".
    """
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{len(os.sched_getaffinity(0))} cores of {_processor()}"
    python = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{device}, {python}, mask_rcnn_plugin {mask_rcnn_plugin.__version__}{_commit()}"


def _commit() -> str:
    """Of the checkout, with a "+" if something was changed since; "" if this is none."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=False)
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
