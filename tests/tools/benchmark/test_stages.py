"""Every stage of the benchmark at a small size: detectron2's answers and ours are the same."""

import pytest
import torch

from benchmark.stages import STAGES, Peers, made_up_masks

SMALL = [name for name in STAGES if name != "evaluation"]  # minutes; has tests of its own


@pytest.fixture(scope="module")
def peers() -> Peers:
    with torch.no_grad():
        peers = Peers("cpu", size=(128, 160), detections=20, training_side=128)
    for model in (peers.stock, peers.trainable):
        model.roi_heads.batch_size_per_image = 32
    return peers


@pytest.mark.parametrize("stage", SMALL)
def test_results_agree(stage: str, peers: Peers) -> None:
    names = []
    with torch.no_grad():
        for row in STAGES[stage](peers):
            names.append(row.name)
            if "compiled" in row.name:
                continue  # see test_optimize.py
            results = {name: run() for name, run in row.runs.items()}
            assert {"detectron2", "plugin"} <= results.keys()
            if row.allowed is not None:
                assert row.difference(results["plugin"], results["detectron2"]) <= row.allowed
    assert len(set(names)) == len(names) > 0


def test_as_many_detections_as_asked(peers: Peers) -> None:
    assert len(peers.found) == 20
    assert len(peers.proposals[0]) > 100
    (instances,) = peers.given(1203)
    assert instances.pred_classes.max() > 80


def test_torchvision_does_the_same_work(peers: Peers) -> None:
    with torch.no_grad():
        theirs = list(peers.torchvision.backbone(peers.image).values())
        for ours, other in zip(peers.stock.backbone(peers.image).values(), theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-4 * float(ours.abs().max()))
        (found,) = peers.torchvision(peers.torchvision_batch)
    assert len(found["boxes"]) == 20


def test_made_up_masks_lie_in_the_image() -> None:
    probs, boxes = made_up_masks(200, (100, 300), "cpu")
    assert probs.shape == (200, 28, 28)
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor([300, 100])).all()
    assert (probs > 0.5).flatten(1).any(dim=1).all()
