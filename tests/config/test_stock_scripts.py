"""Every row trains and evaluates under detectron2's own script, unchanged, on COCO's names.

`tools/install_detectron2.py` lays the script in share/detectron2/tools of the environment;
DETECTRON2_TOOLS names another folder, such as that of a clone.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import LazyConfig
from detectron2.data.datasets.builtin_meta import (
    COCO_CATEGORIES,
    COCO_PERSON_KEYPOINT_NAMES,
)
from PIL import Image

from mask_rcnn_plugin import list_configs

TOOLS = Path(os.environ.get("DETECTRON2_TOOLS", f"{sys.prefix}/share/detectron2/tools"))
SCRIPT = TOOLS / "lazyconfig_train_net.py"
ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).with_name("run_rows.py")
PARTS = 3  # processes
SIDE = 64

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason=f"{SCRIPT} is not installed")


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO's folders, with two images in each of the splits that the rows name."""
    root = tmp_path_factory.mktemp("datasets")
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    person = {"id": 1, "name": "person", "keypoints": list(COCO_PERSON_KEYPOINT_NAMES)}
    rng = np.random.default_rng(0)
    splits = {
        "train2014": ("train2014", "train2014"),
        "valminusminival2014": ("val2014", "valminusminival2014"),
        "minival2014": ("val2014", "minival2014"),
        "test-dev2017": ("test2017", None),
    }
    (root / "coco" / "annotations").mkdir(parents=True)
    for number, (split, (folder, annotated)) in enumerate(splits.items()):
        images, annotations = [], []
        (root / "coco" / folder).mkdir(exist_ok=True)
        for image in (2 * number + 1, 2 * number + 2):
            file = f"{image:012d}.jpg"
            pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "coco" / folder / file)
            images.append({"id": image, "file_name": file, "height": SIDE, "width": SIDE})
            for category, x in ((1, 4), (18, 30)):
                y, w, h = 6, 26, 40
                points = [[x + 2 + k, y + 2 + 2 * k, 2] for k in range(17)]
                annotations.append(
                    {
                        "id": len(annotations) + 100 * image,
                        "image_id": image,
                        "category_id": category,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                        "keypoints": [float(v) for p in points for v in p],
                        "num_keypoints": 17,
                    }
                )
        write(
            root,
            f"image_info_{split}" if not annotated else f"instances_{annotated}",
            images,
            things,
            annotations if annotated else None,
        )
        if annotated:
            people = [a for a in annotations if a["category_id"] == 1]
            write(root, f"person_keypoints_{annotated}", images, [person], people)
    return root


def write(root: Path, name: str, images: list, categories: list, annotations: list | None) -> None:
    content = {"images": images, "categories": categories}
    if annotations is not None:
        content["annotations"] = annotations
    (root / "coco" / "annotations" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def run(run_python: Callable[..., Any], coco: Path) -> Callable[..., str]:
    """Runs a program on `coco`; returns standard output."""

    def run(*command: object) -> str:
        env = {
            **os.environ,
            "DETECTRON2_DATASETS": str(coco),
            "DETECTRON2_ENV_MODULE": "mask_rcnn_plugin.env",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        done = run_python(*command, env=env, cwd=coco)
        assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("part", range(PARTS))
def test_rows_train_and_evaluate(part: int, run: Callable[..., str], tmp_path: Path) -> None:
    without_timm = find_spec("timm") is None
    rows = [r for r in list_configs() if not (without_timm and r.startswith("backbones/"))]
    rows = rows[part::PARTS]
    run(ROWS, SCRIPT, tmp_path, *rows)
    for row in rows:
        folder = tmp_path / row
        cfg = LazyConfig.load(str(folder / "config.yaml"))
        first, *_, last = metrics(folder)
        assert np.isfinite(first["total_loss"]), row
        assert ("loss_mask" in first) == ("mask_head" in cfg.model.roi_heads), row
        assert ("loss_keypoint" in first) == ("keypoint_head" in cfg.model.roi_heads), row
        assert (folder / "model_final.pth").is_file(), row
        assert (folder / "coco_instances_results.json").is_file(), row
        is_scored = not cfg.dataset.test.names[0].endswith("test-dev")
        for task in cfg.dataloader.evaluator.tasks:
            assert (f"{task}/AP" in last) == is_scored, row


def test_train_py_gives_the_same_losses(run: Callable[..., str], tmp_path: Path) -> None:
    rows = ["table2a_backbone/r50_fpn", "table2a_backbone/r50_c4", "table5_multitask/keypoint_only"]
    run(ROWS, SCRIPT, tmp_path / "theirs", *rows)
    run(ROWS, ROOT / "train.py", tmp_path / "ours", *rows)
    for row in rows:
        ours, theirs = (metrics(tmp_path / name / row)[:2] for name in ("ours", "theirs"))
        assert [line["iteration"] for line in ours] == [0, 1]
        losses = {key for line in theirs for key in line if "loss" in key}
        for name in losses:
            expected = pytest.approx([line[name] for line in theirs], rel=1e-5)
            assert [line[name] for line in ours] == expected, (row, name)
