"""Keeps detectron2 (release 0.6 up to today's main) running on current NumPy and Pillow.

Each entry restores one name that detectron2 still uses and a library has dropped, and only where
the name is gone: nothing that exists is ever replaced. `apply` is called before anything of
detectron2's is imported, so a program that imports the plugin first needs no care of its own; one
that imports `detectron2.data` first on a library too new for it fails there, before the plugin
could help (setting DETECTRON2_ENV_MODULE=mask_rcnn_plugin.env makes the order irrelevant).

Private names of detectron2's that the plugin uses, and that a new version may move:

* `utils.comm._LOCAL_PROCESS_GROUP` and `._get_global_gloo_group`, set by training/launch.py: who
  shares a machine, and a gloo group with the run's time-out;
* `DetectionCheckpointer._load_file`, `._load_model` and `._log_incompatible_keys`, overridden in
  weights/loader.py to read a file safely, refuse weights that do not fit, and log one line, and
  `._parsed_url_during_load`, set there, which newer versions read;
* `SimpleTrainer._data_loader_iter` in training/guarded_trainer.py, for several batches a step;
* `COCOEvaluator._coco_api`, `._cpu_device`, `._derive_coco_results`, `._distributed`,
  `._do_evaluation`, `._kpt_oks_sigmas`, `._logger`, `._max_dets_per_image`, `._metadata`,
  `._output_dir`, `._predictions` and `._tasks` in evaluation/evaluator.py, which writes predictions
  and computes AP itself;
* `DatasetMapper._transform_annotations`, overridden in data/mapper.py to leave bad instances out,
  and `data.detection_utils._apply_exif_orientation`, to turn an image as it is read;
* `config.defaults._C` in env.py: what `get_cfg` copies;
* the logger "detectron2.checkpoint.c2_model_loading", silenced while weights are matched.
"""

import warnings

import numpy as np
from PIL import Image

# detectron2.data.transforms.transform names Image.LINEAR in a signature: without it, importing
# detectron2.data fails on Pillow >= 10. It was an alias of BILINEAR.
_PILLOW_ALIASES = {"LINEAR": Image.Resampling.BILINEAR}

# Aliases of the builtins, removed in NumPy 1.24. Without `int`, detectron2.data.build fails when it
# counts the classes of a training set; without `bool` (back in NumPy 2), PolygonMasks and the
# visualizer fail; `float`, `object` and `str` serve its other evaluators and datasets.
_NUMPY_ALIASES = {"int": int, "float": float, "bool": bool, "object": object, "str": str}

# What torch says, once a process, of lines of detectron2's that are as they should be.
_WARNINGS = (
    ("torch.meshgrid: in an upcoming release", "torch.functional"),
    ("The given NumPy array is not writable", "detectron2.data.detection_utils"),
    ("Creating a tensor from a list of numpy.ndarrays", "detectron2.structures.keypoints"),
)


def apply() -> None:
    """Add the missing names, and leave out warnings that nobody can act on. Safe to call twice."""
    for message, module in _WARNINGS:
        warnings.filterwarnings("ignore", message, UserWarning, module)
    for name, value in _PILLOW_ALIASES.items():
        if not hasattr(Image, name):
            setattr(Image, name, value)
    for name, builtin in _NUMPY_ALIASES.items():
        # Not hasattr: NumPy's __getattr__ answers some of the removed names with a warning.
        if name not in vars(np):
            setattr(np, name, builtin)
