"""The RoI layers of a model (Tables 2d and 6)."""

from omegaconf import DictConfig


def poolers(model: DictConfig) -> list[DictConfig]:
    """One for each branch, or the only one of a C4 model."""
    return [part for name, part in model.roi_heads.items() if name.endswith("pooler")]


def use_roi_layer(model: DictConfig, pooler_type: str, aggregation: str) -> None:
    """Set all poolers of a model; see `RoIPooler`."""
    for pooler in poolers(model):
        pooler.pooler_type, pooler.aggregation = pooler_type, aggregation
