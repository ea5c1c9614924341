"""detectron2's own scripts, and detectron2 without the plugin, in the environment of `make setup`.

tools/install_detectron2.py lays upstream's scripts below the environment. Where detectron2 was
installed in another way there are none, and the tests are skipped.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

TOOLS = Path(sys.prefix) / "share" / "detectron2" / "tools"


@pytest.fixture(autouse=True, scope="session")
def completed_detectron2() -> None:
    if not TOOLS.is_dir():
        pytest.skip(f"no {TOOLS}: detectron2 is not from tools/install_detectron2.py")


@pytest.fixture(scope="session")
def coco(toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset's boxes and masks under COCO's names, for $DETECTRON2_DATASETS."""
    root = tmp_path_factory.mktemp("datasets")
    annotations = root / "coco" / "annotations"
    annotations.mkdir(parents=True)
    for split in ("train", "val"):
        (root / "coco" / f"{split}2017").symlink_to(toy_dataset / split)
        content = json.loads((toy_dataset / f"{split}.json").read_text())
        things = [category for category in COCO_CATEGORIES if category["isthing"]]
        content["categories"] = [{"id": thing["id"], "name": thing["name"]} for thing in things]
        for annotation in content["annotations"]:
            annotation.pop("keypoints", None)
            annotation.pop("num_keypoints", None)
        (annotations / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def run_stock(run_python: Callable[..., Any]) -> Callable[..., str]:
    """Runs Python without what the tests' own environment does to detectron2; returns stdout."""

    def run(*arguments: object, **variables: object) -> str:
        env = {k: v for k, v in os.environ.items() if k != "DETECTRON2_ENV_MODULE"}
        env |= {name: str(value) for name, value in variables.items()}
        done = run_python(*arguments, env=env)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_tool(run_stock: Callable[..., str], coco: Path) -> Callable[..., str]:
    """Runs a script of detectron2's as README says, on the toy COCO; returns stdout."""

    def run(name: str, *arguments: object) -> str:
        return run_stock(
            *(TOOLS / name, *arguments),
            DETECTRON2_ENV_MODULE="mask_rcnn_plugin.env",
            DETECTRON2_DATASETS=coco,
        )

    return run
