"""What numbers were measured on, as pages name it."""

import os
import platform
from pathlib import Path

import torch


def environment() -> str:
    """Hardware and versions in one line, e.g. "2 cores of AMD EPYC, torch 2.14.1, Python 3.11"."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{len(os.sched_getaffinity(0))} cores of {_processor()}"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
