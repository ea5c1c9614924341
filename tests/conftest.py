import os
from pathlib import Path

import pytest
import torch

import mask_rcnn_plugin  # noqa: F401  before anything of detectron2's, see compat.py
from mask_rcnn_plugin.data.synthetic import write_dataset

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker a core


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn COCO-format dataset: 12 images to train, 6 to validate, 64 px."""
    root = tmp_path_factory.mktemp("data") / "toy"
    write_dataset(root, train=12, val=6, size=64, seed=0, progress=False)
    return root


@pytest.fixture
def toy_overrides(toy_dataset: Path, tmp_path: Path) -> list[str]:
    """Overrides that train NAME+synthetic on the toy dataset, for two steps."""
    return [
        f"dataset.synthetic.root={toy_dataset}",
        "dataset.synthetic.train=12",
        "dataset.synthetic.val=6",
        "dataset.synthetic.size=64",
        "dataloader.train.total_batch_size=2",
        "train.max_iter=2",
        "train.device=cpu",
        f"train.output_dir={tmp_path / 'out'}",
    ]
