"""Frozen batch norm as part of its convolution.

Frozen batch normalisation is an affine map of each channel, scale * conv(x) + shift, and so a
convolution with a scaled weight and a bias. Scaling the weight costs nothing, and saves
detectron2's pass over the activation. The gradient with respect to the weight is the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mask_rcnn_plugin.fast.replacement import Module, conv_like, replace_modules

_BATCH_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenBNConv2d(Conv2d):
    """detectron2's `Conv2d` followed by its `FrozenBatchNorm2d`, as one convolution.

    The weight and the statistics stay apart, under detectron2's names, so that checkpoints load and
    the weight trains as before. Scale and shift are kept until the statistics change in a way that
    torch counts (`load_state_dict`, `copy_`, another buffer) or `train` or `eval` is called;
    writes to a tensor's `data` in between go unnoticed.
    """

    # Statistics, their versions, and what was computed of them.
    _kept: tuple[tuple[Tensor, ...], list[int], Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d):  # somebody replaced it
            return super().forward(x)
        scale, shift = self._affine(norm)
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def train(self, mode: bool = True) -> "FrozenBNConv2d":
        self._kept = None
        return super().train(mode)

    def _affine(self, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, computed anew where the statistics have changed."""
        statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        is_kept = not (
            torch.jit.is_tracing()
            or torch.compiler.is_compiling()
            or torch.is_inference_mode_enabled()  # its tensors can't be trained with
            or any(x.is_inference() for x in statistics)
        )
        if is_kept and self._kept is not None:
            known, versions, scale, shift = self._kept
            if all(
                old is new and version == new._version
                for old, new, version in zip(known, statistics, versions)
            ):
                return scale, shift
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if is_kept:
            self._kept = statistics, [x._version for x in statistics], scale, shift
        return scale, shift

    def __prepare_scriptable__(self) -> Conv2d:
        """What `torch.jit.script` compiles in its place."""
        return conv_like(self, Conv2d, self.norm)


def fold_frozen_batch_norm(module: Module) -> Module:
    """Put a `FrozenBNConv2d` in the place of each `Conv2d` that has a frozen batch norm.

    Args:
        module: changed in place, unless it is such a `Conv2d` itself.

    Returns:
        `module`, or what takes its place; with the same parameters and state dict.
    """

    def folded(conv: nn.Module) -> nn.Module | None:
        if type(conv) is Conv2d and isinstance(conv.norm, FrozenBatchNorm2d):
            return conv_like(conv, FrozenBNConv2d, conv.norm)
        return None

    return replace_modules(module, folded)


def fold_batch_norm_for_inference(module: Module) -> Module:
    """Fold batch norm, frozen or not, into the convolutions for good.

    The statistics leave the state dict: checkpoints no longer load, and the module can't train.

    Args:
        module: in evaluation mode, in which batch norm is the same affine map for every input.
            Changed in place, unless it is a convolution itself.

    Returns:
        `module`, or what takes its place.
    """

    def folded(conv: nn.Module) -> nn.Module | None:
        if type(conv) not in (Conv2d, FrozenBNConv2d) or not isinstance(conv.norm, _BATCH_NORMS):
            return None
        norm: Any = conv.norm
        if norm.running_mean is None:
            return None  # uses the statistics of each batch, in evaluation mode too
        new = conv_like(conv, Conv2d, norm=None)
        new.weight, new.bias = fuse_conv_bn_weights(
            new.weight, new.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
            norm.bias,
        )  # fmt: skip
        return new

    return replace_modules(module, folded)
