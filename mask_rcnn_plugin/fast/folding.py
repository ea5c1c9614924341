"""Frozen batch norm as part of its convolution.

Frozen, batch normalisation is an affine map of each channel, scale * conv(x) + shift, hence a
convolution with a scaled weight and a bias. Scaling the weight costs nothing; the pass over the
activation, which detectron2 makes, is gone. The gradient to the weight is the same.
"""

from typing import Any, TypeVar

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Module = TypeVar("Module", bound=nn.Module)

_BATCH_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


class FrozenBNConv2d(Conv2d):
    """detectron2's `Conv2d` followed by its `FrozenBatchNorm2d`, as one convolution.

    Weight and statistics are kept apart, under detectron2's names, so that checkpoints load and the
    weight trains as before.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d):  # somebody replaced it
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        x = self._conv_forward(x, self.weight * scale[:, None, None, None], shift)
        return x if self.activation is None else self.activation(x)


def fold_frozen_batch_norm(module: Module) -> Module:
    """Make every `Conv2d` of a module that has a frozen batch norm a `FrozenBNConv2d`, in place.

    Parameters and state dict stay what they are.
    """
    for conv in module.modules():
        if type(conv) is Conv2d and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.__class__ = FrozenBNConv2d  # the same attributes, another forward
    return module


def fold_batch_norm_for_inference(module: Module) -> Module:
    """Fold batch norm, frozen or not, into the convolutions for good, in place.

    The statistics leave the state dict: checkpoints no longer load, and the module cannot train.

    Args:
        module: in evaluation mode, when batch norm is the same affine map for every input.
    """
    for conv in module.modules():
        if isinstance(conv, Conv2d) and isinstance(conv.norm, _BATCH_NORMS):
            norm: Any = conv.norm
            if norm.running_mean is None:
                continue  # has the statistics of each batch, in evaluation too
            mean, var = norm.running_mean, norm.running_var
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, mean, var, norm.eps, norm.weight, norm.bias
            )
            conv.norm = None
            if isinstance(conv, FrozenBNConv2d):
                conv.__class__ = Conv2d
    return module
