"""The number of operations of the model, by hand."""

import torch

from benchmark.flops import measure_flops
from benchmark.stages import Peers


def test_parts_add_up_and_are_those_of_the_layers() -> None:
    with torch.no_grad():
        p = Peers("cpu", size=(128, 160), detections=20)
        flops = measure_flops(p, rounds=1)
    total = dict(flops.total)
    whole = total.pop("whole model")
    assert 0.9 * whole < sum(total.values()) <= whole
    # Two layers on each proposal.
    box = 2e-9 * len(p.proposals[0]) * (256 * 7 * 7 * 1024 + 1024 * 1024)
    assert abs(total["roi_heads.box_head"] / box - 1) < 1e-3
    # Four 3x3 convolutions at 14 x 14, the deconvolution to 28 x 28, the predictor of 80 classes.
    mask = 2e-9 * 20 * (4 * 14**2 * 9 * 256**2 + 28**2 * (256**2 + 80 * 256))
    assert abs(total["roi_heads.mask_head"] / mask - 1) < 1e-3
    assert flops.limit > 1
    assert set(flops.achieved) == set(flops.mask_share) == {"detectron2", "plugin"}
    assert all(share < 1 for share in flops.mask_share.values())
