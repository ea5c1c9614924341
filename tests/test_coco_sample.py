"""On real images: a few of COCO's, where MASK_RCNN_COCO_SAMPLE names their folder."""

import os
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.evaluation.testing import evaluate
from mask_rcnn_plugin.training import setup_datasets

SAMPLE = os.environ.get("MASK_RCNN_COCO_SAMPLE", "")

pytestmark = pytest.mark.skipif(
    not SAMPLE, reason="MASK_RCNN_COCO_SAMPLE is not set: no real images to test on"
)


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ("table2a_backbone/r50_fpn", "instances.json"),
        ("table2a_backbone/r50_c4", "instances.json"),
        ("table4_keypoints/keypoint_and_mask", "person_keypoints.json"),
    ],
)
def test_real_images_train_and_evaluate(config: str, file: str, tmp_path: Path) -> None:
    root = Path(SAMPLE)
    cfg = get_config(
        f"{config}+synthetic",
        [
            *(f"dataset.{split}.json={root / file}" for split in ("train", "test")),
            *(f"dataset.{split}.images={root / 'images'}" for split in ("train", "test")),
            f"train.output_dir={tmp_path / 'out'}",
            "train.device=cpu",
        ],
    )
    setup_datasets(cfg)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    with EventStorage():
        losses = model(next(iter(instantiate(cfg.dataloader.train))))
    for name, loss in losses.items():
        assert torch.isfinite(loss), name
        assert loss > 0, name
    results = evaluate(cfg, model)
    assert set(results) == set(cfg.dataloader.evaluator.tasks)
