"""Every stage of the benchmark at a small size: detectron2's answers and ours are the same."""

from pathlib import Path

import pytest
import torch

from benchmark.made_up_detections import made_up_ground_truth
from benchmark.stages import STAGES, Peers, evaluation_row, made_up_masks, picture

SMALL = [name for name in STAGES if name != "evaluation"]  # minutes; has a test of its own


@pytest.fixture(scope="module")
def peers() -> Peers:
    with torch.no_grad():
        peers = Peers("cpu", size=(96, 128), detections=20, training_side=64)
    for model in (peers.stock, peers.trainable):
        model.roi_heads.batch_size_per_image = 32
    return peers


@pytest.mark.parametrize("stage", SMALL)
def test_results_agree(stage: str, peers: Peers) -> None:
    names = []
    with torch.no_grad():
        for row in STAGES[stage](peers):
            names.append(row.name)
            results = {name: run() for name, run in row.runs.items()}
            assert {"detectron2", "plugin"} <= results.keys()
            assert results["plugin"] is not results["detectron2"]
            if row.allowed is not None:
                assert row.difference(results["plugin"], results["detectron2"]) <= row.allowed
    assert len(set(names)) == len(names) > 0


def test_evaluations_agree_and_say_how_far_they_are_apart(tmp_path: Path) -> None:
    row = evaluation_row(tmp_path, made_up_ground_truth(images=20, objects=150, categories=10))
    theirs, ours = row.runs["detectron2"](), row.runs["plugin"]()
    assert 10 < theirs["segm"]["AP"] < theirs["bbox"]["AP"] < 60
    assert row.difference(ours, theirs) <= row.allowed
    ours["segm"]["AP75"] += 0.25
    assert row.difference(ours, theirs) == pytest.approx(0.25)


def test_torchvision_does_the_same_work(peers: Peers) -> None:
    with torch.no_grad():
        image = peers.stock.preprocess_image(peers.batch).tensor
        theirs = list(peers.torchvision.backbone(image).values())
        for ours, other in zip(peers.stock.backbone(image).values(), theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-4 * float(ours.abs().max()))
        (found,) = peers.run_torchvision()
        (stock,) = peers.stock(peers.batch)
    assert len(found["boxes"]) == len(stock["instances"]) == 20


def test_a_picture_may_be_narrow() -> None:
    assert picture((640, 64)).shape == (3, 640, 64)


def test_made_up_masks_lie_in_the_image() -> None:
    probs, boxes = made_up_masks(200, (100, 300), "cpu")
    assert probs.shape == (200, 28, 28)
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([300, 100])).all()
    assert (probs > 0.5).flatten(1).any(dim=1).all()
