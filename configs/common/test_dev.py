"""Testing on test-dev (Tables 1, 3 and 4), whose annotations only COCO's server has.

The training ends with a submission file instead of an AP, without evaluations on the way. To get an
AP here, test on minival: 'dataset.test.names=[coco_2014_minival]' (for persons
keypoints_coco_2014_minival).
"""

from omegaconf import DictConfig

from mask_rcnn_plugin.data.coco import TEST_DEV


def use_test_dev(dataset: DictConfig, train: DictConfig, names: tuple[str, ...] = TEST_DEV) -> None:
    dataset.test.names = list(names)
    train.eval_period = 0  # at the end
