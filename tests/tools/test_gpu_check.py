"""tools/gpu_check.py end to end on a CPU, with small models: what a GPU will be asked to run."""

import json
import os
import re
import select
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_check
import pytest
import torch

from benchmark import gpu
from benchmark.counts import NARROW_KEYPOINT, NARROW_MASK
from benchmark.report import to_markdown

TINY = [
    "model.backbone.name=ResNet-18-FPN",
    "model.backbone.width=8",
    "model.backbone.fpn_channels=16",
    "model.proposal_generator.post_nms_topk=[30,30]",
    "model.roi_heads.box_head.fc_dims=[16,16]",
    "model.roi_heads.batch_size_per_image=16",
    NARROW_MASK,
]
KEYPOINTS = ("table4_keypoints/keypoint_and_mask", [*TINY, NARROW_KEYPOINT])


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)  # that takes minutes
    models = {"masks": ("table2a_backbone/r50_fpn", TINY), "masks and keypoints": KEYPOINTS}
    monkeypatch.setattr(gpu, "MODELS", models)
    counted = {"name": "training step, masks", "counts": {"plugin": (5, 3, 999)}}
    monkeypatch.setattr(gpu_check, "counts", lambda: [counted])  # of test_gpu_costs.py
    return gpu_check


def run(tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    arguments = ["--device", "cpu", "--size", "64", "64", "--folder", str(folder), "--no-tests"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, *more])
    tool.main()
    return json.loads((folder / "gpu_check_dry_run.json").read_text())


@pytest.mark.parametrize(("precision", "parts"), [("fp32", gpu.PARTS), ("bf16", {})])
def test_every_variant_is_measured(
    precision: str,
    parts: dict[str, Any],
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "PRECISIONS", {precision: gpu.PRECISIONS[precision]})
    monkeypatch.setattr(gpu, "PARTS", parts)
    report = run(tool, tmp_path, monkeypatch, "--minutes", "60")
    rows = report["gpu"]["rows"]
    assert not [row for row in rows if "error" in row]
    assert all(row["ms"] > 0 for row in rows)
    of = Counter((row["model"], row["what"], row["precision"]) for row in rows)
    for what in ("training", "inference"):
        assert of["masks", what, precision] == 6 + len(parts)
        assert of["masks and keypoints", what, precision] == 5
    page = (tmp_path / "gpu_check_dry_run.md").read_text()
    assert page == to_markdown(report)
    for row in rows:
        assert re.search(rf"^\| {row['variant']} +\| [\d<]", page, re.MULTILINE), row
    assert re.search(r"training step, masks +\| plugin +\| 5 +\| 3 +\| 999 +\| not run", page)


def test_what_there_is_no_time_for_is_said(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(tool, tmp_path, monkeypatch, "--minutes", "0")
    assert {row["error"] for row in report["gpu"]["rows"]} == {"not run: out of time"}
    assert "not run: out of time" in (tmp_path / "gpu_check_dry_run.md").read_text()


STEP = {"model": "masks", "what": "training", "precision": "fp32"}


def test_a_failed_measurement_is_a_row_and_an_exit_code(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise RuntimeError("CUDA out of | memory\nmore")

    failing = gpu.Variant({**STEP, "variant": "plugin"}, fail, 0)
    monkeypatch.setattr(gpu, "variants", lambda device, size: [failing])
    with pytest.raises(SystemExit, match=r"training of plugin.*out of \| memory"):
        run(tool, tmp_path, monkeypatch)
    assert "RuntimeError: CUDA out of / memory" in (tmp_path / "gpu_check_dry_run.md").read_text()


def test_the_most_urgent_comes_first() -> None:
    order: list[str] = []

    def variant(name: str, urgency: int) -> gpu.Variant:
        row = {**STEP, "variant": name}
        return gpu.Variant(row, lambda: lambda: order.append(name), urgency)

    every = [variant("slow", 4), variant("a", 0), variant("part", 1), variant("b", 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "variants", lambda device, size: every)
        *_, last = gpu.measured("cpu", (64, 64), float("inf"))
    assert list(dict.fromkeys(order)) == ["a", "b", "part", "slow"]
    assert [row["variant"] for row in last] == ["slow", "a", "part", "b"]


def test_tests_marked_cuda_are_run_and_counted(tool: ModuleType, tmp_path: Path) -> None:
    marked = "import pytest\npytestmark = pytest.mark.cuda\n"
    outcomes = "def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no')\n"
    (tmp_path / "test_x.py").write_text(marked + outcomes)
    (tmp_path / "test_y.py").write_text("import nothing_of_that_name\n")
    found = tool.run_tests(tmp_path, tmp_path)
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert len(found["failed"]) == 1
    assert "test_b" in found["failed"][0]


def test_what_a_test_leaves_running_is_ended(tool: ModuleType, tmp_path: Path) -> None:
    """It would keep the GPU's memory, and compete with the measurements."""
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    code = f"import signal; file = open({str(alive)!r}, 'w'); print(flush=True); signal.pause()"
    (tmp_path / "test_x.py").write_text(
        "import subprocess, sys\nimport pytest\n\n@pytest.mark.cuda\ndef test_a():\n"
        f"    child = subprocess.Popen([sys.executable, '-c', {code!r}], stdout=subprocess.PIPE)\n"
        "    child.stdout.readline()\n"
    )
    assert tool.run_tests(tmp_path, tmp_path)["counts"]["passed"] == 1
    assert select.select([reader], [], [], 60)[0], "its pipe is still open"
    os.close(reader)


def test_waits_are_seen_by_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA warns of, with CUDA's words, wherever torch is when it does."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu.waits_seen() as seen:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)
        warnings.warn("of other things", stacklevel=1)
    assert seen == {"elsewhere": 2}
    assert modes == ["warn", "default"]


def test_without_a_gpu_it_says_so(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit) as end:
        tool.parse_args()
    assert end.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


def test_the_page_shows_what_cuda_reports_beside_the_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {"detectron2": torch.nn.Identity(), "plugin": torch.nn.ReLU()}
    line = "mask_rcnn_plugin/x.py:7 f"
    monkeypatch.setattr(gpu, "peers", lambda config, images: models)
    monkeypatch.setattr(
        gpu,
        "waits_of",
        lambda model, images, what: Counter({line: 3 if model is models["plugin"] else 70}),
    )
    waits = [
        row | {"counts": {"detectron2": [71, 24, 1580], "plugin": [4, 3, 955]}}
        for row in gpu.waits()
    ]
    assert [row["name"] for row in waits] == [
        f"{what}, {name}"
        for name in ("masks", "masks and keypoints")
        for what in ("training step", "inference")
    ]
    tests = {"counts": {"passed": 1, "failed": 1, "skipped": 0}, "failed": ["tests.test_b"]}
    found = {"size": [64, 64], "images": 2, "rows": [], "waits": waits, "tests": tests}
    made = {"command": "c", "environment": "e", "versions": "v", "gpu": found}
    page = to_markdown(json.loads(json.dumps(made)))
    assert re.search(r"inference, masks +\| detectron2 +\| 71 +\| 24 +\| 1,580 +\| 70 ", page)
    assert re.search(r"inference, masks +\| plugin +\| 4 +\| 3 +\| 955 +\| 3 ", page)
    assert f"* `3 {line}`" in page
    assert "* `tests.test_b`" in page
