"""COCO persons with keypoints: images that hold none dropped, scale from [640, 800] (Sec. 5)."""

from mask_rcnn_plugin.data.coco import KEYPOINT_MINIVAL, KEYPOINT_TRAINVAL35K

from .data import dataloader, dataset

dataset.train.names = list(KEYPOINT_TRAINVAL35K)
dataset.test.names = list(KEYPOINT_MINIVAL)

dataloader.train.dataset.min_keypoints = 1
dataloader.train.mapper.augmentations[0].short_edge_length = [640, 800]
dataloader.train.mapper.augmentations[0].sample_style = "range"
