"""detectron2 as `make setup` installs it, before the plugin has mended anything (compat.py)."""

from collections.abc import Callable
from pathlib import Path

import pytest

# Not installed: the compiled operators, and what the export to Caffe2 asks for.
IMPORT_ALL = """
import importlib, pkgutil
import detectron2

def names(package):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        yield module.name
        if module.ispkg:
            yield from names(importlib.import_module(module.name))

count = 0
for name in names(detectron2):
    try:
        importlib.import_module(name)
        count += 1
    except ImportError as error:
        absent = "_C" if "_C" in error.msg else error.name
        assert absent in ("_C", "caffe2", "onnx"), (name, error)
assert count > 150, count
"""

MODEL_ZOO = """
import glob, os
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.projects import deeplab, panoptic_deeplab, point_rend

mask_rcnn = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
assert cfg.SOLVER.MAX_ITER == 270000                               # its own
assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"      # of its _BASE_

root = os.path.dirname(os.path.dirname(mask_rcnn))
configs = glob.glob(root + "/**/*.yaml", recursive=True)
configs += glob.glob(root + "/COCO-InstanceSegmentation/*.py") + glob.glob(root + "/new*/*.py")
assert len(configs) > 80, len(configs)
for path in configs:
    model_zoo.get_config(os.path.relpath(path, root))

cfg = get_cfg()
point_rend.add_pointrend_config(cfg)
assert cfg.MODEL.POINT_HEAD.NAME == "StandardPointHead"
"""

# A square of 4 x 4 in an image of 8 x 8, cut by a window of 4 x 8: what is left of its area is
# what is left of its width.
CROP = """
import numpy as np
from detectron2.data import detection_utils, transforms
from detectron2.structures import BoxMode

square = {
    "bbox": [2, 2, 6, 6],
    "bbox_mode": BoxMode.XYXY_ABS,
    "segmentation": [np.array([2.0, 2, 6, 2, 6, 6, 2, 6])],
    "category_id": 0,
    "iscrowd": 0,
}
np.random.seed(0)
lefts = set()
for _ in range(40):
    image = transforms.AugInput(np.zeros((8, 8, 3), np.uint8))
    crop = transforms.RandomCrop("absolute", (8, 4))(image)
    assert image.image.shape == (8, 4, 3)
    left = crop.transforms[0].x0 if hasattr(crop, "transforms") else crop.x0
    instance = detection_utils.transform_instance_annotations(dict(square), [crop], (8, 4))
    masks = detection_utils.annotations_to_instances([instance], (8, 4), "polygon").gt_masks
    assert masks.area().item() == 4 * (min(6, left + 4) - max(2, left)), left
    lefts.add(left)
assert lefts == {0, 1, 2, 3, 4}, lefts
"""

# Counting the classes, drawing, and a mapper that skips an image.
DATA = """
import numpy as np
from detectron2.data import MapDataset, MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils.visualizer import ColorMode, Visualizer

dicts = list(get_detection_dataset_dicts("coco_2017_train", filter_empty=False))
image = np.zeros((64, 64, 3), np.uint8)
for mode in ColorMode:
    drawn = Visualizer(image, MetadataCatalog.get("coco_2017_train"), instance_mode=mode)
    assert drawn.draw_dataset_dict(dicts[0]).get_image().any()

skipping = MapDataset(["good", "bad"], lambda name: name if name == "good" else None)
assert [skipping[0], skipping[1]] == ["good", "good"]
"""

# Masks of polygons, and the evaluation of a row of four pixels.
SEGMENTATION = """
import sys
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.structures import PolygonMasks
from PIL import Image

square = np.array([0.0, 0, 2, 0, 2, 2, 0, 2])
assert PolygonMasks([[square]]).nonempty().tolist() == [True]

truth = np.array([[0, 0, 1, 1]], dtype=np.uint8)
Image.fromarray(truth).save(sys.argv[1])
DatasetCatalog.register("pixels", lambda: [{"file_name": "x", "sem_seg_file_name": sys.argv[1]}])
MetadataCatalog.get("pixels").set(stuff_classes=["a", "b"], ignore_label=255)
evaluator = SemSegEvaluator("pixels", distributed=False)
evaluator.reset()
guess = torch.tensor([[[1.0, 1, 1, 0]], [[0, 0, 0, 1]]])     # a a a b
evaluator.process([{"file_name": "x"}], [{"sem_seg": guess}])
results = evaluator.evaluate()["sem_seg"]
assert results["pACC"] == 75
assert abs(results["mIoU"] - 100 * (2 / 3 + 1 / 2) / 2) < 1e-9
"""

# torch's schedulers go into a checkpoint; group norm in the heads of RetinaNet and FCOS.
ENGINE = """
import torch
import detectron2.export
from detectron2.engine import hooks
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.fcos import FCOSHead

def scheduler():
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 1.0), 1)

saved, loaded = scheduler(), scheduler()
saved.last_epoch = 12
state = hooks.LRScheduler(scheduler=saved).state_dict()
hooks.LRScheduler(scheduler=loaded).load_state_dict(state)
assert loaded.last_epoch == 12

FCOSHead(input_shape=[ShapeSpec(channels=32)], num_classes=2, conv_dims=[32], norm="GN")
"""


@pytest.mark.parametrize(
    "code",
    [IMPORT_ALL, MODEL_ZOO, CROP, DATA, SEGMENTATION, ENGINE],
    ids=["import-all", "model-zoo", "crop", "data", "segmentation", "engine"],
)
def test_detectron2_works_without_the_plugin(
    code: str, run_stock: Callable[..., str], coco: Path, tmp_path: Path
) -> None:
    last = "import sys; assert 'mask_rcnn_plugin' not in sys.modules"
    run_stock("-c", f"{code}\n{last}", tmp_path / "file.png", DETECTRON2_DATASETS=coco)
