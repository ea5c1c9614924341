"""NMS as `torch.export` follows it, against torchvision's."""

import pytest
import torch
from torchvision.ops import batched_nms

from mask_rcnn_plugin.fast.proposals import nms_in_groups


@pytest.mark.parametrize("count", [0, 1, 2, 60])
def test_nms_of_an_exported_program_keeps_the_same(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    corners = torch.rand(count, 2, 2) * 40
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    scores, groups = torch.rand(count), torch.randint(3, (count,))
    if count > 2:  # left out: of no size, below all others
        boxes[:2], scores[:2] = 0.0, -torch.inf
    kept = nms_in_groups(boxes, scores, groups, 0.3)
    expected = batched_nms(boxes, scores, groups, 0.3)
    assert set(kept.tolist()) == set(expected.tolist())
    assert torch.equal(scores[kept], scores[expected])
    assert count < 3 or 5 < len(kept) < count
