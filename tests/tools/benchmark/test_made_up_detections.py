"""The made-up data is what it says."""

import json
from collections import Counter

import torch
from pycocotools import mask as coco_mask

from benchmark.made_up_detections import made_up_ground_truth, made_up_predictions


def test_ground_truth_has_the_sizes_asked_for_and_a_seed() -> None:
    content = made_up_ground_truth(images=50, objects=700, categories=9, seed=4)
    annotations = content["annotations"]
    assert (len(content["images"]), len(annotations), len(content["categories"])) == (50, 700, 9)
    crowds = [a for a in annotations if a["iscrowd"]]
    assert 0 < len(crowds) < 30
    assert all(len(a["segmentation"]) == 1 for a in annotations if not a["iscrowd"])
    assert len(Counter(a["image_id"] for a in annotations)) < 50
    assert min(a["area"] for a in annotations) < 32**2
    assert max(a["area"] for a in annotations) > 96**2
    assert content == made_up_ground_truth(images=50, objects=700, categories=9, seed=4)
    assert content != made_up_ground_truth(images=50, objects=700, categories=9, seed=5)
    json.dumps(content)


def test_a_crowd_is_the_mask_of_its_area() -> None:
    content = made_up_ground_truth(images=50, objects=700, categories=9, seed=4)
    for annotation in content["annotations"]:
        if annotation["iscrowd"]:
            rle = annotation["segmentation"]
            assert coco_mask.area(rle) == annotation["area"]
            assert coco_mask.toBbox(rle).tolist() == annotation["bbox"]


def test_predictions_of_an_image_do_not_depend_on_the_others() -> None:
    content = made_up_ground_truth(images=8, objects=60)
    everything = list(made_up_predictions(content, detections=20))
    assert len({float(output["instances"].scores.sum()) for _, output in everything}) == 8
    content["images"] = content["images"][5:6]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 6]
    ((image, output),) = made_up_predictions(content, detections=20)
    assert image == everything[5][0] == {"image_id": 6, "height": 480, "width": 640}
    ours, again = output["instances"], everything[5][1]["instances"]
    assert len(ours) == len(ours.pred_masks) == 20
    assert torch.equal(ours.pred_boxes.tensor, again.pred_boxes.tensor)
    assert ours.pred_masks.rles == again.pred_masks.rles
    width_and_height = torch.tensor([640.0, 480.0, 640.0, 480.0])
    assert (ours.pred_boxes.tensor >= 0).all()
    assert (ours.pred_boxes.tensor <= width_and_height).all()
