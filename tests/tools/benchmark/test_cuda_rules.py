"""CUDA's rules, as `CudaRules` keeps them."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmark.cuda_rules import CudaError, CudaRules, on_cuda


@pytest.fixture
def cuda() -> Iterator[CudaRules]:
    with CudaRules() as rules:
        yield rules


def test_tensors_answer_for_their_device(cuda: CudaRules) -> None:
    host = torch.ones(3)
    there = host.to("cuda")
    assert (there.device.type, there.is_cuda, there.is_cpu) == ("cuda", True, False)
    assert (host.device.type, host.is_cuda, host.is_cpu) == ("cpu", False, True)
    for made in (
        torch.zeros(2, device="cuda"),
        torch.arange(3, device=there.device),
        torch.zeros_like(there),
        there.new_ones(2),
        there[1:],
        there.detach(),
        there * 2 + host.cuda(),
        torch.tensor([1.0], device="cuda"),
        nn.Linear(3, 2).to("cuda").weight,
    ):
        assert made.device.type == "cuda"
    for made in (there.cpu(), there.to("cpu"), there.to(host)):
        assert made.device.type == "cpu"
        assert made.equal(host)
    there.zero_()
    assert host.tolist() == [1, 1, 1]


def test_gradients_are_there(cuda: CudaRules) -> None:
    layer = nn.Linear(3, 2).to("cuda")
    layer(torch.ones(4, 3, device="cuda")).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, host: there + host,
        lambda there, host: torch.cat([there, host]),
        lambda there, host: host.add_(there),
        lambda there, host: torch.where(there > 0, there, host),
    ],
)
def test_mixing_is_refused(cuda: CudaRules, mix: object) -> None:
    there, host = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(CudaError, match=r"same device.*\(3,\)"):
        mix(there, host)  # type: ignore[operator]
    assert (there + torch.tensor(1.0)).is_cuda  # a number is allowed
    assert there[torch.tensor([0, 2])].is_cuda  # and so are indices


def test_numpy_is_refused(cuda: CudaRules) -> None:
    there = torch.ones(3, device="cuda")
    for convert in (Tensor.numpy, np.asarray):
        with pytest.raises(TypeError, match="cuda:0"):
            convert(there)
    assert there.cpu().numpy().tolist() == [1, 1, 1]


WAITS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.all()),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "write to a mask": lambda x: x.index_put_((x > 0,), torch.ones(3, device="cuda")),
    "write one of the device to a mask": lambda x: x.index_put_((x > 0,), x[0]),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda")),
    "host": lambda x: torch.zeros(3).copy_(x),
}
NO_WAITS = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "fill a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "topk": lambda x: x.topk(2),
    "gather": lambda x: x.gather(0, torch.zeros(2, dtype=torch.int64, device="cuda")),
    "shape": lambda x: len(x),
    "to": lambda x: x.to("cuda"),
    "repeat": lambda x: x.repeat_interleave(
        torch.ones(3, dtype=torch.int64, device="cuda"), output_size=3
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_counted(cuda: CudaRules, name: str) -> None:
    x = torch.ones(3, device="cuda")
    with cuda.counted() as cost:
        WAITS[name](x)
    assert cost.waits.total() == 1


@pytest.mark.parametrize("name", NO_WAITS)
def test_no_wait_is_counted(cuda: CudaRules, name: str) -> None:
    x = torch.ones(3, device="cuda")
    with cuda.counted() as cost:
        NO_WAITS[name](x)
    assert cost.totals()[:2] == (0, 0)


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: torch.ones(3).to("cuda"),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.as_tensor(np.zeros(3), device="cuda"),
        lambda x: x.new_tensor([1, 2]),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x[[0, 2]],
    ],
)
def test_a_copy_is_counted(cuda: CudaRules, copy: object) -> None:
    x = torch.ones(3, device="cuda")
    with cuda.counted() as cost:
        copy(x)  # type: ignore[operator]
    assert cost.totals()[:2] == (0, 1)


def test_operators_are_counted_but_for_views(cuda: CudaRules) -> None:
    x = torch.ones(3, 2, device="cuda")
    with cuda.counted() as cost:
        x.t()[1:].view(-1)[None].expand(4, -1)
        torch.empty(3, device="cuda")
        torch.ones(3) * 2  # on the host
    assert cost.totals() == (0, 0, 0)
    with cuda.counted() as cost:
        torch.zeros(3, device="cuda").add_(1).mul(2)
    assert dict(cost.kinds) == {"zeros": 1, "add_": 1, "mul": 1}
    with cuda.counted() as cost:
        x.requires_grad_()
        (x * 2).sum().backward()
    assert cost.operators["gradients"] == 1  # of mul; the sum's is a view


def test_lines_name_where(cuda: CudaRules) -> None:
    from detectron2.structures import PolygonMasks

    from mask_rcnn_plugin.modeling.mask_loss import mask_targets

    polygon = [np.array([0.0, 0, 8, 0, 8, 8])]
    with cuda.counted() as cost:
        mask_targets([PolygonMasks([polygon])], [torch.tensor([[0.0, 0, 8, 8]], device="cuda")], 4)
    assert "mask_loss.py" in cost.lines()
    assert "mask_targets" in cost.lines()
    assert cost.waits.total() == 1


def test_afterwards_all_is_as_before() -> None:
    autocast = torch.autocast
    with CudaRules():
        there = torch.ones(2).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert (there[None] @ there[:, None]).dtype == torch.bfloat16
    assert torch.autocast is autocast
    assert on_cuda(there)
    assert there.device.type == "cpu"
