"""The RoI layer of every branch of a model at once (Tables 2d and 6)."""

from omegaconf import DictConfig


def use_roi_layer(model: DictConfig, pooler_type: str, aggregation: str) -> None:
    """Set the poolers of all branches that the model has; see `RoIPooler`."""
    for branch in ("box", "mask", "keypoint"):
        if f"{branch}_pooler" in model.roi_heads:
            pooler = model.roi_heads[f"{branch}_pooler"]
            pooler.pooler_type, pooler.aggregation = pooler_type, aggregation
