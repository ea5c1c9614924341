"""The keys that a YAML config needs for the plugin's heads."""

from detectron2.config import CfgNode


def add_mask_rcnn_config(cfg: CfgNode) -> None:
    """Add the plugin's keys to a detectron2 YAML config; those that are there keep their values.

    MODEL.ROI_MASK_HEAD.LOSS_TYPE: "sigmoid" or "softmax" (Table 2b).
    MODEL.ROI_MASK_HEAD.FC_DIMS: hidden widths of `MaskRCNNMLPHead` (Table 2e).
    MODEL.ROI_MASK_HEAD.OUTPUT_FORMAT: "bitmap" or "rle", what `MaskRCNN` returns.
    MODEL.ROI_{BOX,MASK,KEYPOINT}_HEAD.POOLER_AGGREGATION: "ave" or "max" (Table 2c).

    detectron2's own MODEL.ROI_{BOX,MASK,KEYPOINT}_HEAD.POOLER_TYPE also takes "RoIPool", "RoIWarp"
    and "RoIAlign" with the plugin's RoI heads.
    """
    model = cfg.MODEL
    for node, key, value in [
        (model.ROI_MASK_HEAD, "LOSS_TYPE", "sigmoid"),
        (model.ROI_MASK_HEAD, "FC_DIMS", [1024, 1024]),
        (model.ROI_MASK_HEAD, "OUTPUT_FORMAT", "bitmap"),
        (model.ROI_BOX_HEAD, "POOLER_AGGREGATION", "ave"),
        (model.ROI_MASK_HEAD, "POOLER_AGGREGATION", "ave"),
        (model.ROI_KEYPOINT_HEAD, "POOLER_AGGREGATION", "ave"),
    ]:
        node.setdefault(key, value)


def require_mask_rcnn_config(cfg: CfgNode) -> None:
    """
    Raises:
        KeyError: if `add_mask_rcnn_config` was not called on a YAML config.
    """
    if "LOSS_TYPE" not in cfg.MODEL.ROI_MASK_HEAD:
        raise KeyError(
            "this config has not the plugin's keys: call mask_rcnn_plugin.add_mask_rcnn_config(cfg)"
            " after get_cfg(), or set DETECTRON2_ENV_MODULE=mask_rcnn_plugin.env"
        )
