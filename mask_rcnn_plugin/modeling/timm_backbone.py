"""Any timm model (pytorch-image-models) that gives feature maps, as a backbone.

The maps are named after their strides: "res2" has stride 4, "res5" 32. Weights come from a
checkpoint, as for any backbone; `mask_rcnn_plugin.weights.timm_weights` provides timm's.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from omegaconf import OmegaConf
from torch import Tensor, nn

from mask_rcnn_plugin.errors import UserError
from mask_rcnn_plugin.fast.replacement import replace_modules
from mask_rcnn_plugin.modeling.backbone import Norm
from mask_rcnn_plugin.modeling.yaml_keys import require_mask_rcnn_config
from mask_rcnn_plugin.weights.timm_weights import import_timm

_STAGES = {2**n: f"res{n}" for n in range(1, 7)}  # by stride
_NORMS = ("FrozenBN", "BN", "SyncBN")
# What lets a model take images of any size, in the families that ask.
_ANY_SIZE = ({"strict_img_size": False}, {"dynamic_img_size": True, "dynamic_img_pad": True})


class TimmBackbone(Backbone):
    """timm's feature extractor, `features`, as detectron2 calls it; see `timm_backbone`."""

    def __init__(
        self,
        name: str,
        out_features: Sequence[str],
        freeze_at: int,
        norm: str,
        pretrained: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if OmegaConf.is_config(options):  # whose lists timm's models don't take
            options = cast(dict[str, Any], OmegaConf.to_container(options))
        options = options or {}
        with torch.device("meta"):  # only to read what there is
            info = _create(name, **options).feature_info.info
        # Of several with a stride the last; TResNet has one without a name.
        named = (f for f in info if f["module"] and f["reduction"] in _STAGES)
        stages = {_STAGES[f["reduction"]]: f for f in named}
        if norm not in _NORMS or not out_features or not stages.keys() >= {*out_features}:
            raise UserError(
                f"norm is {norm!r} and out_features are {[*out_features]}, must be one of "
                f"{_NORMS} and some of {[*stages]} for timm's {name}"
            )
        self._shapes = {
            stage: ShapeSpec(channels=stages[stage]["num_chs"], stride=stages[stage]["reduction"])
            for stage in sorted(out_features)
        }
        indices = tuple(info.index(stages[stage]) for stage in self._shapes)
        features = _create(name, pretrained=pretrained, out_indices=indices, **options)
        self._is_nhwc = getattr(features, "output_fmt", "NCHW") == "NHWC"
        self._check_any_size(name, features)
        frozen = _first_stages(features, stages, freeze_at) if freeze_at else []
        for module in frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = False
        self.features = _freeze_norm(features, features.modules() if norm == "FrozenBN" else frozen)
        if norm == "SyncBN":
            self.features = import_timm().layers.convert_sync_batchnorm(self.features)

    def _check_any_size(self, name: str, features: nn.Module) -> None:
        """
        Raises:
            UserError: if images must have the size of those that a model was trained on, or if
                padding is missing somewhere, so that maps are not as large as their strides say.
        """
        if next(features.parameters()).is_meta:
            return  # which not all models know
        height, width = (sides * self.size_divisibility for sides in (4, 5))
        try:
            with torch.no_grad():
                maps = self._maps(features.eval(), torch.zeros(1, 3, height, width))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
        else:
            sizes = [tuple(m.shape[1:]) for m in maps.values()]
            wanted = [
                (s.channels, height // s.stride, width // s.stride) for s in self._shapes.values()
            ]
            reason = "" if sizes == wanted else f"its maps are {sizes}, not {wanted}"
        features.train()
        if reason:
            raise UserError(
                f"timm's {name} cannot be a detector's backbone, which must take images of any "
                f"size ({height} x {width}: {reason})"
            )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> for each stage (N, C, H / stride, W / stride)."""
        return self._maps(self.features, x)

    def _maps(self, features: nn.Module, x: Tensor) -> dict[str, Tensor]:
        maps = features(x)
        if self._is_nhwc:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return dict(zip(self._shapes, maps, strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes

    @property
    def size_divisibility(self) -> int:
        return max(shape.stride for shape in self._shapes.values())


def timm_backbone(
    name: str,
    *,
    out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    freeze_at: int = 2,
    norm: str = "FrozenBN",
    pretrained: bool = False,
    fpn_channels: int | None = 256,
    fpn_norm: Norm = "",
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """A backbone of timm, for LazyConfig.

    Args:
        name: of a model, as timm writes it: "convnext_tiny.fb_in1k".
        out_features: stages, by their strides.
        freeze_at: how many stages stay as they were loaded; 2 = stem and res2, 0 = none.
        norm: what batch norm is, in a model that has it: "FrozenBN", or "BN" or "SyncBN" in the
            stages that train.
        pretrained: timm downloads weights each time that the model is built. A training does so
            once by train.init_checkpoint=timm://NAME.
        fpn_channels: output channels of the FPN; None: no FPN.
        fpn_norm: normalisation inside the FPN.
        options: arguments of the model, e.g. {"drop_path_rate": 0.2}.

    Returns:
        detectron2 backbone, called with RGB images (N, 3, H, W) in `timm_normalization`. Its
        feature maps are the stages, or an FPN's: {"p2" ... "p6": strides 4 ... 64}.

    Raises:
        UserError: without timm, on an unknown name, stage, norm or option, and for a model that
            takes images of its own size alone.
    """
    bottom_up = TimmBackbone(name, out_features, freeze_at, norm, pretrained, options)
    return bottom_up if fpn_channels is None else _fpn(bottom_up, fpn_channels, fpn_norm)


def _fpn(bottom_up: Backbone, channels: int, norm: Norm, fuse_type: str = "sum") -> FPN:
    stages = list(bottom_up.output_shape())
    top = LastLevelMaxPool()  # of p5, unless it is told
    top.in_feature = stages[-1].replace("res", "p")
    return FPN(bottom_up, stages, channels, norm, top, fuse_type)


def timm_normalization(name: str, key: Literal["mean", "std"]) -> list[float]:
    """`pixel_mean` or `pixel_std` of a model of timm's, for RGB from 0 to 255.

    Raises:
        UserError: as `timm_backbone`.
    """
    config = _find(name).models.get_pretrained_cfg(name)
    return [255 * value for value in getattr(config, key)]


@BACKBONE_REGISTRY.register()
def build_mask_rcnn_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The model that MODEL.BACKBONE.TIMM_NAME names, for YAML.

    With an FPN over MODEL.FPN.IN_FEATURES if there are any, else it gives
    MODEL.RESNETS.OUT_FEATURES. MODEL.RESNETS.NORM and MODEL.BACKBONE.FREEZE_AT are read too.

    Raises:
        UserError: as `timm_backbone`, and if the images' format, mean or std are another model's.
    """
    require_mask_rcnn_config(cfg, "BACKBONE.NAME")
    model, fpn, name = cfg.MODEL, cfg.MODEL.FPN, cfg.MODEL.BACKBONE.TIMM_NAME
    theirs = (timm_normalization(name, "mean"), timm_normalization(name, "std"))
    wanted = ["RGB", *([round(v, 1) for v in values] for values in theirs)]
    ours = (model.PIXEL_MEAN, model.PIXEL_STD)
    given = [cfg.INPUT.FORMAT, *([round(v, 1) for v in values] for values in ours)]
    if given != wanted:
        keys = "INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD"
        raise UserError(f"{keys} are {given}, must be {wanted} for timm's {name}")
    stages = fpn.IN_FEATURES or model.RESNETS.OUT_FEATURES
    bottom_up = TimmBackbone(name, stages, model.BACKBONE.FREEZE_AT, model.RESNETS.NORM)
    if not fpn.IN_FEATURES:
        return bottom_up
    return _fpn(bottom_up, fpn.OUT_CHANNELS, fpn.NORM, fpn.FUSE_TYPE)


def _find(name: str) -> Any:
    """timm, if it has a model of that name."""
    timm = import_timm()
    with contextlib.suppress(RuntimeError):  # of a tag that the model does not have
        # An old name of a model has no config.
        if timm.is_model(name.partition(".")[0]) and timm.models.get_pretrained_cfg(name):
            return timm
    names = [*timm.list_models(), *timm.list_pretrained()]
    close = get_close_matches(name, names, cutoff=0.3)
    raise UserError(f"timm {timm.__version__} has no model {name!r}; similar names are {close}")


def _create(name: str, **options: Any) -> Any:
    timm = _find(name)
    for flags in (*_ANY_SIZE, {}):
        try:
            return timm.create_model(name, features_only=True, **{**flags, **options})
        except TypeError as error:
            if any(f"'{flag}'" in str(error) for flag in flags):
                continue
            if unknown := [option for option in options if f"'{option}'" in str(error)]:
                raise UserError(f"timm's {name} has no option {unknown[0]!r}: remove it") from error
            raise


def _first_stages(features: nn.Module, stages: dict[str, Any], count: int) -> list[nn.Module]:
    """The modules of the stem and of the stages up to res{count}."""
    # The extractor's names are timm's, but for dots and a prefix.
    names = [f"{n.replace('.', '_')}_".removeprefix("model_") for n, _ in features.named_modules()]
    before = count == 1 and "res1" not in stages  # the stem ends where res2 begins
    last = stages.get("res2" if before else f"res{count}", {"module": "?"})["module"]
    inside = [i for i, n in enumerate(names) if n.startswith(f"{last.replace('.', '_')}_")]
    if not inside:
        raise UserError(f"freeze_at is {count}, but timm does not name res{count}: must be 0")
    return list(features.modules())[: inside[0] if before else inside[-1] + 1]


def _freeze_norm(features: nn.Module, within: Iterable[nn.Module]) -> nn.Module:
    """Batch norm, with the activation that timm has in it, as a fixed map of each channel."""
    frozen = import_timm().layers.freeze_batch_norm_2d
    norms = {m for m in within if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)}
    return replace_modules(features, lambda m: frozen(m) if m in norms else None)
