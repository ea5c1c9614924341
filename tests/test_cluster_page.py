"""The commands of docs/cluster.md are ones that work."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.training.batch_scaling import fit_batch

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "cluster.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"\b(train|eval)\.py ", line)
]


def test_the_batch_script_is_valid() -> None:
    [script] = [block for block in BLOCKS if block.startswith("#!/bin/bash")]
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--signal=USR1@120" in script


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word in ("train.py", "eval.py"))
    monkeypatch.setattr(sys, "argv", words[script:])
    args = runpy.run_path(str(REPOSITORY / words[script]))["parse_args"]()
    get_config(args.config, args.overrides)


def test_all_commands_are_found() -> None:
    assert len(COMMANDS) == 6


def test_the_shown_scaling_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    [overrides] = re.findall(r"`(.*train\.reference_batch_size=16)`", PAGE)
    fit_batch(get_config("table2a_backbone/r50_fpn", overrides.split()))
    assert f"```\n{capsys.readouterr().out}```" in PAGE
