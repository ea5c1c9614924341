"""COCO instances: trainval35k and minival, shorter edge 800 (Sec. 3.1, 4)."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from omegaconf import OmegaConf

from mask_rcnn_plugin.data.coco import MINIVAL, TRAINVAL35K
from mask_rcnn_plugin.data.loader import build_train_loader
from mask_rcnn_plugin.data.mapper import MaskRCNNDatasetMapper
from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator

# `names` are detectron2's; a file of your own goes in `json` and its folder of images in `images`.
# Without names there is no test set: nothing is evaluated.
dataset = OmegaConf.create(
    dict(
        train=dict(names=list(TRAINVAL35K), json="", images=""),
        test=dict(
            names=list(MINIVAL),
            json="",
            images="",
            max_detections=100,  # an image; Sec. 3.1. More than 100 count in AP too
        ),
        folder=None,  # of your own data; finds json and images of both sets in it
        split=None,  # share of the training set's images to test on, where there is no test set
        synthetic=None,  # what to draw, see the overlay of that name
        metadata=None,  # names of classes and keypoints, which a training writes here
    )
)

_shorter_edge, _longest_edge = 800, 1333

dataloader = OmegaConf.create({})
dataloader.train = L(build_train_loader)(
    dataset=L(get_detection_dataset_dicts)(names="${dataset.train.names}", filter_empty=True),
    mapper=L(MaskRCNNDatasetMapper)(
        is_train=True,
        augmentations=[
            L(T.ResizeShortestEdge)(
                short_edge_length=[_shorter_edge],
                max_size=_longest_edge,
                sample_style="choice",
            ),
            L(T.RandomFlip)(horizontal=True),
        ],
        image_format="${model.input_format}",
        use_instance_mask=True,
        use_keypoint=False,
        resize="pillow",  # or "opencv": much faster, the same pixels to rounding where enlarged
    ),
    total_batch_size=16,  # 2 images on each of 8 GPUs
    num_workers=4,
    # Images with a class that fewer than this share of all images have are repeated (Gupta et al.,
    # 2019: 0.001): sqrt(repeat_threshold / f) times an epoch, f: share of the image's rarest class.
    repeat_threshold=0.0,
    max_unreadable=100,  # images left out in a process since its start; more are an error
)
dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="${dataset.test.names}", filter_empty=False),
    mapper=L(MaskRCNNDatasetMapper)(
        is_train=False,
        augmentations=[
            L(T.ResizeShortestEdge)(short_edge_length=_shorter_edge, max_size=_longest_edge)
        ],
        image_format="${model.input_format}",
        resize="pillow",
    ),
    num_workers=4,
)
dataloader.evaluator = L(MaskRCNNCOCOEvaluator)(
    dataset_name="${dataset.test.names}",
    tasks=["bbox", "segm"],
    output_dir="${train.output_dir}",
    max_detections="${dataset.test.max_detections}",
    official=False,  # True: pycocotools even where a faster backend is installed
)
