"""Mask R-CNN (He et al., 2017) as a detectron2 plugin.

Importing the package registers its backbone, RoI heads, mask heads, keypoint head and
meta-architecture with detectron2. See README.md for the two ways to use them (LazyConfig, YAML).

Shape glossary, used by every docstring of the package:

    N       images of a batch
    C       channels
    H, W    height and width of an image or feature map; said which where it matters
    R       regions of interest (RoIs), of all images of the batch together
    K       classes without background; in the keypoint branch, keypoint types
    M       side of a square mask or keypoint heatmap, in cells
    P       side of a square pooled RoI feature, in cells ("bins")

Boxes are float tensors (x0, y0, x1, y1) in image pixels, continuous coordinates: pixel (i, j)
covers [j, j + 1] x [i, i + 1], so its centre is at (j + 0.5, i + 0.5). The same half-pixel
convention holds for the cells of feature maps and masks.

A tensor called `logits` holds values before sigmoid or softmax; `probs` holds probabilities.
`gt_*` is ground truth, `pred_*` a prediction.
"""

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mask_rcnn_plugin.inference.predictor import Predictor, load

_spec = find_spec("detectron2")
if _spec is None or _spec.origin is None:  # a mere folder of that name is no detectron2
    raise ImportError(
        "mask_rcnn_plugin needs detectron2, which is not on the package index. From a clone of "
        "this repository run `python tools/install_detectron2.py`, or build detectron2 from source "
        "by its own installation guide (facebookresearch/detectron2, INSTALL.md)."
    )

from mask_rcnn_plugin import compat  # noqa: E402

compat.apply()

with warnings.catch_warnings():
    # detectron2 scripts some functions while it is imported; torch 2.14 deprecates scripting.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")
    from mask_rcnn_plugin import modeling  # registers everything

from mask_rcnn_plugin.config import add_mask_rcnn_config, get_config, list_configs  # noqa: E402
from mask_rcnn_plugin.inference.optimize import optimize_for_inference  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Predictor",
    "add_mask_rcnn_config",
    "get_config",
    "list_configs",
    "load",
    "modeling",
    "optimize_for_inference",
]


def __getattr__(name: str) -> Any:
    if name in ("Predictor", "load"):  # with all that reads images, only when asked for
        from mask_rcnn_plugin.inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
