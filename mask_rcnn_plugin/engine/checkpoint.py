"""Weights in and out."""

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer


class WeightsError(ValueError):
    """Weights that do not exist or do not fit the model; the message says which and how."""


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which can insist that the weights cover the whole model."""

    _incompatible: Any

    def load_strictly(self, path: str) -> None:
        """Load a model's weights for inference.

        Args:
            path: what `resolve_weights` returns.

        Raises:
            WeightsError: if a parameter of the model is missing from the file or has another shape,
                e.g. because the config has another number of classes or a branch more.
        """
        self.load(path, checkpointables=[])
        wrong = self._incompatible.incorrect_shapes
        missing = [k for k in self._incompatible.missing_keys if k not in {w[0] for w in wrong}]
        shapes = [
            f"{k}: {list(got)} in the file, {list(want)} in the model" for k, got, want in wrong
        ]
        if missing or shapes:
            raise WeightsError(
                f"weights {path} do not fit the model of this config; "
                + "; ".join(
                    ([f"missing: {_some(missing)}"] if missing else [])
                    + ([f"other shapes: {_some(shapes)}"] if shapes else [])
                )
            )

    def _load_model(self, checkpoint: Any) -> Any:
        self._incompatible = super()._load_model(checkpoint)
        return self._incompatible


def _some(items: list[str], limit: int = 5) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def resolve_weights(weights: str) -> str:
    """What to load for a user's `--weights` or `train.init_checkpoint`.

    Args:
        weights: a file; an address that detectron2 resolves (detectron2://..., catalog://...,
            https://...), which is downloaded by the loading; or a model-zoo name such as
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x", where detectron2 has its model_zoo.

    Returns:
        A path or address for `Checkpointer.load`.

    Raises:
        WeightsError: if there is no such file or zoo model.
    """
    if "://" in weights or Path(weights).is_file():
        return weights
    if weights.startswith("COCO-") or weights.startswith("LVIS"):
        try:
            from detectron2 import model_zoo
        except ImportError as error:
            raise WeightsError(
                f"weights {weights!r} name a model of detectron2's zoo, but this detectron2 has no "
                "usable detectron2.model_zoo: give the downloaded file or a detectron2:// address"
            ) from error
        try:
            return model_zoo.get_checkpoint_url(weights.removesuffix(".yaml") + ".yaml")
        except RuntimeError as error:
            raise WeightsError(f"weights {weights!r}: {error}") from error
    folder = Path(weights).parent
    if folder.is_dir():
        there = sorted(f.name for f in folder.iterdir() if f.suffix in (".pth", ".pkl", ".pyth"))
        raise WeightsError(f"weights file {weights!r} does not exist; {folder} has {there}")
    raise WeightsError(f"weights file {weights!r} does not exist, nor does its folder {folder}")
