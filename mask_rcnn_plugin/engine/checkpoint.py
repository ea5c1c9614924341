"""Weights in and out."""

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from mask_rcnn_plugin.errors import UserError


class WeightsError(UserError):
    """Weights that do not exist or do not fit the model; the message says which and how."""


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, which tells weights to start from and weights to go on with apart.

    What a training starts from may fit the model in part, as an ImageNet backbone does. What is
    evaluated or resumed must cover the whole model: detectron2 would leave what does not fit at
    random, with a warning.
    """

    _strict = False
    _path = ""

    def load_strictly(self, path: str) -> None:
        """Load a model's weights for inference.

        Args:
            path: what `resolve_weights` returns.

        Raises:
            WeightsError: if the file cannot be read, or if a parameter of the model is missing from
                it or has another shape, e.g. because the config has another number of classes or a
                branch more.
        """
        self._strict = True
        try:
            self.load(path, checkpointables=[])
        except WeightsError:
            raise
        except Exception as error:  # whatever unpickling or downloading comes up with
            raise WeightsError(f"weights {path} cannot be loaded: {error!r}") from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As fvcore's, but what is resumed must cover the model.

        Raises:
            WeightsError: as `load_strictly`, for a checkpoint of another model.
        """
        self._strict = resume and self.has_checkpoint()
        return super().resume_or_load(path, resume=resume)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: Any) -> Any:
        # fvcore calls it before it touches the optimizer.
        incompatible = super()._load_model(checkpoint)
        if self._strict:
            _check_complete(self._path, incompatible)
        return incompatible


def _check_complete(path: str, incompatible: Any) -> None:
    wrong = incompatible.incorrect_shapes
    missing = [k for k in incompatible.missing_keys if k not in {w[0] for w in wrong}]
    shapes = [f"{k}: {list(got)} in the file, {list(want)} in the model" for k, got, want in wrong]
    if missing or shapes:
        raise WeightsError(
            f"weights {path} do not fit the model of this config; "
            + "; ".join(
                ([f"missing: {_some(missing)}"] if missing else [])
                + ([f"other shapes: {_some(shapes)}"] if shapes else [])
            )
        )


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
