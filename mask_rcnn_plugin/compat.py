"""Keeps detectron2 (release 0.6 up to today's main) running on current NumPy and Pillow.

Each entry restores one name that detectron2 still uses and a library has dropped, and only where
the name is gone: nothing that exists is ever replaced. `apply` is called before anything of
detectron2's is imported, so a program that imports the plugin first needs no care of its own; one
that imports `detectron2.data` first on a library too new for it fails there, before the plugin
could help (setting DETECTRON2_ENV_MODULE=mask_rcnn_plugin.env makes the order irrelevant).
"""

import numpy as np
from PIL import Image

# detectron2.data.transforms.transform names Image.LINEAR in a signature: without it, importing
# detectron2.data fails on Pillow >= 10. It was an alias of BILINEAR.
_PILLOW_ALIASES = {"LINEAR": Image.Resampling.BILINEAR}

# Aliases of the builtins, removed in NumPy 1.24. Without `int`, detectron2.data.build fails when it
# counts the classes of a training set; without `bool` (back in NumPy 2), PolygonMasks and the
# visualizer fail; `float`, `object` and `str` serve its other evaluators and data sets.
_NUMPY_ALIASES = {"int": int, "float": float, "bool": bool, "object": object, "str": str}


def apply() -> None:
    """Add the missing names. Safe to call more than once."""
    for name, value in _PILLOW_ALIASES.items():
        if not hasattr(Image, name):
            setattr(Image, name, value)
    for name, builtin in _NUMPY_ALIASES.items():
        # Not hasattr: NumPy's __getattr__ answers some of the removed names with a warning.
        if name not in vars(np):
            setattr(np, name, builtin)
