"""Run a training script on rows of configs/, one after the other in one process.

    python run_rows.py SCRIPT OUT ROW [ROW ...]

SCRIPT is detectron2's tools/lazyconfig_train_net.py or train.py. Each row trains and evaluates in
OUT/ROW, at toy size. A row that fails is named on standard output with its traceback, and the
others go on.
"""

import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import detectron2  # noqa: F401  which loads DETECTRON2_ENV_MODULE, as it does in the script
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

# What all rows have, in hydra's grammar, which detectron2's script reads.
_TOY = {
    "train.device": "cpu",
    "train.init_checkpoint": "",  # so nothing may be frozen
    "model.backbone.norm": "BN",
    "model.backbone.freeze_at": 0,
    "train.max_iter": 2,
    "train.seed": 1,
    "train.log_period": 1,
    "train.channels_last": False,
    "dataloader.train.total_batch_size": 2,
    "dataloader.train.num_workers": 0,
    "dataloader.test.num_workers": 0,
    "dataloader.train.mapper.augmentations.0.short_edge_length": [56, 64],
    "dataloader.test.mapper.augmentations.0.short_edge_length": 64,
    "dataset.test.max_detections": 10,
    "model.roi_heads.box_predictor.test_score_thresh": 0.0,
    "model.proposal_generator.pre_nms_topk": [50, 50],
    "model.proposal_generator.post_nms_topk": [20, 20],
    "model.roi_heads.batch_size_per_image": 8,
}
_NARROW = {  # where they are there
    "model.backbone.fpn_channels": 16,
    "model.roi_heads.box_head.fc_dims": [16, 16],
    "model.roi_heads.mask_head.conv_dims": [16],
    "model.roi_heads.mask_head.fc_dims": [16],
    "model.roi_heads.keypoint_head.conv_dims": [16],
}
_TIMM = {  # smaller models of the same families
    "convnext_tiny": {"model.backbone.name": "convnext_atto"},
    "swin_tiny": {"model.backbone.options": "{embed_dim:24,depths:[1,1,1,1]}"},
    "efficientnet_lite0": {},
}


def toy_overrides(file: str) -> list[str]:
    cfg: Any = LazyConfig.load(file)
    changes = {
        **_TOY,
        **{k: v for k, v in _NARROW.items() if OmegaConf.select(cfg, k) is not None},
    }
    if "width" in cfg.model.backbone:
        network, _, features = cfg.model.backbone.name.split("-")
        depth, width = (10, 8) if network == "ResNet" else (50, 16)
        changes["model.backbone.name"] = f"{network}-{depth}-{features}"
        changes["model.backbone.width"] = width
    else:
        changes |= _TIMM[Path(file).stem]
    return [f"{key}={value}".replace(" ", "") for key, value in changes.items()]


def main() -> None:
    script, out, *rows = sys.argv[1:]
    failed = False
    for row in rows:
        file = str(sys.modules["mask_rcnn_plugin.config"].CONFIG_DIR / f"{row}.py")
        config = row if script.endswith("/train.py") else file
        changes = [*toy_overrides(file), f"train.output_dir={out}/{row}"]
        sys.argv = [script, "--config-file", config, *changes]
        try:
            runpy.run_path(script, run_name="__main__")
        except (Exception, SystemExit):
            failed = True
            print(f"FAILED {row}\n{traceback.format_exc()}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
