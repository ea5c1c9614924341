"""Stock detectron2 programs and the orders in which things may be imported."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

FPN_YAML = """
MODEL:
  META_ARCHITECTURE: MaskRCNN
  DEVICE: cpu
  MASK_ON: true
  KEYPOINT_ON: true
  BACKBONE: {NAME: build_mask_rcnn_resnet_backbone}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    OUT_FEATURES: [res2, res3, res4, res5]
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6]}
  ROI_HEADS: {NAME: MaskRCNNROIHeads, IN_FEATURES: [p2, p3, p4, p5]}
  ROI_BOX_HEAD:
    NAME: FastRCNNConvFCHead
    NUM_FC: 1
    FC_DIM: 16
    POOLER_RESOLUTION: 7
    POOLER_TYPE: RoIPool
  ROI_MASK_HEAD:
    NAME: MaskRCNNMLPHead
    FC_DIMS: [16, 16]
    LOSS_TYPE: softmax
    OUTPUT_FORMAT: bitmap
    POOLER_TYPE: RoIAlign
    POOLER_AGGREGATION: max
    POOLER_SAMPLING_RATIO: 2
  ROI_KEYPOINT_HEAD:
    NAME: MaskRCNNKeypointHead
    CONV_DIMS: [8, 8]
    POOLER_TYPE: RoIWarp
    POOLER_SAMPLING_RATIO: 2
"""

C4_YAML = """
MODEL:
  META_ARCHITECTURE: MaskRCNN
  DEVICE: cpu
  MASK_ON: true
  BACKBONE: {NAME: build_mask_rcnn_resnet_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64}
  ROI_HEADS: {NAME: MaskRCNNC4ROIHeads}
  ROI_BOX_HEAD: {POOLER_RESOLUTION: 7, POOLER_TYPE: RoIAlign, POOLER_SAMPLING_RATIO: 2}
  ROI_MASK_HEAD: {NAME: MaskRCNNFCNHead, NUM_CONV: 0, CONV_DIM: 16}
"""

BUILD = """
import sys
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
heads = build_model(cfg).roi_heads
for part in (heads, heads.mask_head, getattr(heads, "keypoint_head", None)):
    print(type(part).__name__)
print(heads.mask_head.loss_type)
"""

KEYS = """
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
import detectron2.data
assert get_cfg().MODEL.ROI_MASK_HEAD.LOSS_TYPE == "sigmoid"
assert "MaskRCNN" in META_ARCH_REGISTRY
assert "keypoints_coco_2017_test-dev" in detectron2.data.DatasetCatalog.list()
"""


@pytest.fixture(scope="session")
def run(run_python: Callable[..., Any]) -> Callable[..., str]:
    """Runs code in a process of its own; returns standard output."""

    def run(code: str, *arguments: object, env_module: str | None = None) -> str:
        env = {k: v for k, v in os.environ.items() if k != "DETECTRON2_ENV_MODULE"}
        if env_module:
            env["DETECTRON2_ENV_MODULE"] = env_module
        done = run_python("-c", code, *arguments, cwd=ROOT, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        (FPN_YAML, ["MaskRCNNROIHeads", "MaskRCNNMLPHead", "MaskRCNNKeypointHead", "softmax"]),
        (C4_YAML, ["MaskRCNNC4ROIHeads", "MaskRCNNFCNHead", "NoneType", "sigmoid"]),
    ],
)
def test_stock_program_builds_our_models(
    tmp_path: Path, yaml: str, parts: list[str], run: Callable[..., str]
) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(yaml)
    assert run(BUILD, file, env_module="mask_rcnn_plugin.env").split() == parts


def test_environment_variable_with_the_plugin_imported_first(run: Callable[..., str]) -> None:
    run(f"import mask_rcnn_plugin\n{KEYS}", env_module="mask_rcnn_plugin.env")


@pytest.mark.parametrize(
    "imports",
    [
        "import mask_rcnn_plugin, detectron2",
        "import detectron2, mask_rcnn_plugin",
        "import detectron2.config, mask_rcnn_plugin",
    ],
)
def test_import_order_does_not_matter(imports: str, run: Callable[..., str]) -> None:
    run(
        f"{imports}\n"
        "from detectron2.config import get_cfg\n"
        "from detectron2.modeling import META_ARCH_REGISTRY\n"
        "import detectron2.data\n"
        "assert 'MaskRCNN' in META_ARCH_REGISTRY\n"
        "cfg = get_cfg()\n"
        "assert 'LOSS_TYPE' not in cfg.MODEL.ROI_MASK_HEAD\n"
        "mask_rcnn_plugin.add_mask_rcnn_config(cfg)\n"
        "assert cfg.MODEL.ROI_MASK_HEAD.LOSS_TYPE == 'sigmoid'\n"
    )
