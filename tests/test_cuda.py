"""On a GPU what is computed on a CPU: `pytest -m cuda`, by `make gpu-check`.

Without a GPU the same tests run on the CPU, under CUDA's rules where nothing needs a real one
(benchmark/cuda_rules.py), so that they are sound on the day there is one.
"""

import copy
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import train
from benchmark import counts, gpu
from benchmark.cuda_rules import CudaRules
from benchmark.stages import boxes_lost
from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import get_config, optimize_for_inference
from mask_rcnn_plugin.training import setup_datasets

REPOSITORY = Path(__file__).parent.parent
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
NAMES = list(reversed(counts.ROWS))  # keypoints, which have masks too, first
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Without TF32, as the CPU computes."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def on_devices(*cases: Any) -> list[Any]:
    """The first case under CUDA's rules, all of them on a GPU."""
    real = [pytest.param("cuda", *case, marks=pytest.mark.cuda) for case in cases]
    return [pytest.param("pretended", *cases[0]), *real]


@pytest.fixture(params=["pretended", CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """ "cuda": CUDA's rules on a CPU, or a GPU. Either draws the CPU's random numbers."""
    rand = torch.rand

    def of_the_host(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return rand(*size, **options).to(device)

    monkeypatch.setattr(torch, "rand", of_the_host)
    if request.param == "cuda":
        yield "cuda"
    else:
        with CudaRules():
            yield "cuda"


@functools.cache
def made(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A narrow model on the CPU that finds things, not to be changed, and its images."""
    images = counts.batch("keypoint" in name)
    model = instantiate(get_config(*counts.ROWS[name]).model)
    draw_like_trained(model, images, num_candidates=20 * counts.DETECTIONS)
    return model, images


# Training.


def step(
    name: str, device: str, dtype: torch.dtype | None = None, layout: Any = CONTIGUOUS
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of a step, on the CPU."""
    model, images = made(name)
    model = copy.deepcopy(model).to(device, memory_format=layout).train()
    return losses_and_gradients(model, images, device, dtype)


def losses_and_gradients(
    model: nn.Module, images: list[dict[str, Any]], device: str, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    with EventStorage(), torch.autocast(device, dtype, enabled=dtype is not None):
        losses = model(images)
    sum(losses.values()).backward()  # not scaled: those of float16 are large enough here
    parameters = [(k, p) for k, p in model.named_parameters() if p.grad is not None]
    gradients = {k: p.grad.detach().float().cpu() for k, p in parameters}
    return {k: loss.detach().float().cpu() for k, loss in losses.items()}, gradients


on_cpu = functools.cache(functools.partial(step, device="cpu"))


def assert_same_step(
    ours: tuple[dict[str, Tensor], dict[str, Tensor]],
    theirs: tuple[dict[str, Tensor], dict[str, Tensor]],
    of_losses: float,
    of_gradients: float,
) -> None:
    """To a part of each loss, and of the length of all gradients together."""
    (losses, gradients), (their_losses, their_gradients) = ours, theirs
    assert losses.keys() == their_losses.keys()
    for name, loss in their_losses.items():
        assert loss > 0.01, f"{name} says nothing"
        assert abs(losses[name] - loss) <= of_losses * loss, f"{name}: {losses[name]}, not {loss}"
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    flat, their_flat = (
        torch.cat([gradients[k].flatten() for k in sorted(gradients)])
        for gradients in (gradients, their_gradients)
    )
    assert (flat - their_flat).norm() <= of_gradients * their_flat.norm()


@pytest.mark.parametrize(
    ("device", "name", "layout"),
    on_devices(*product(NAMES, (CHANNELS_LAST, CONTIGUOUS))),
    indirect=["device"],
    ids=str,
)
def test_losses_and_gradients(name: str, layout: torch.memory_format, device: str) -> None:
    assert_same_step(step(name, device, layout=layout), on_cpu(name), 0.01, 0.02)


@pytest.mark.parametrize(
    ("device", "name", "dtype"), on_devices(*product(NAMES, HALF)), indirect=["device"]
)
def test_losses_in_half_precision(name: str, dtype: str, device: str) -> None:
    """Rounding chooses other boxes: near, not the same."""
    assert_same_step(step(name, device, HALF[dtype]), on_cpu(name), 0.2, 0.3)


@pytest.mark.parametrize("where", ["cpu", CUDA])
def test_a_compiled_backbone_has_the_same_losses(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "cpu":  # traced, but run as it is: kernels take minutes to make
        dynamo = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **k: dynamo(f, backend="eager", **k))
    elif not shutil.which("gcc") and not shutil.which("clang"):
        pytest.skip("torch.compile needs a C compiler")
    model, images = made("masks")
    model = copy.deepcopy(model).to(where).train()
    compiled = copy.deepcopy(model)
    compiled.get_submodule("backbone").compile(dynamic=True)
    expected = losses_and_gradients(model, images, where)
    assert_same_step(losses_and_gradients(compiled, images, where), expected, 0.01, 0.02)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_takes_the_same_steps(kind: Any, device: str) -> None:
    weights = []
    for where, is_fused in (("cpu", False), (device, True)):
        torch.manual_seed(0)
        layer = nn.Linear(20, 30).to(where)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.01, fused=is_fused, **options)
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.linspace(-1, 1, 20).to(where)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach().cpu())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


# Inference.


def detections(model: nn.Module, images: list[dict[str, Any]]) -> list[Instances]:
    """On the CPU."""
    with torch.no_grad():
        return [result["instances"].to("cpu") for result in model.eval()(images)]


@functools.cache
def expected_detections(name: str) -> list[Instances]:
    model, images = made(name)
    return detections(copy.deepcopy(model), images)


def assert_same_detections(
    ours: list[Instances], theirs: list[Instances], is_exact: bool = True
) -> None:
    """But for what rounding decides: some boxes, pixels and points; in half precision, more."""
    lost, least_iou, pixels, points = (0.03, 0.99, 1e-3, 0.05) if is_exact else (0.6, 0.8, 0.1, 0.7)
    for i, j in zip(ours, theirs, strict=True):
        assert len(j) > 20
        assert j.get_fields().keys() <= i.get_fields().keys()
        assert i.pred_boxes.tensor.isfinite().all()
        assert i.scores.isfinite().all()
        assert boxes_lost(i, j) <= lost
        assert abs(len(i) - len(j)) <= lost * len(j)
        iou = pairwise_iou(j.pred_boxes, i.pred_boxes) * (j.pred_classes[:, None] == i.pred_classes)
        best, indices = iou.max(dim=1)
        of_theirs = (best > least_iou).nonzero()[:, 0].tolist()
        of_ours = indices[of_theirs].tolist()
        assert len(of_theirs) >= (1 - lost) * len(j)
        assert len(of_theirs) > 10
        if j.has("pred_masks"):
            masks, their_masks = np.asarray(i.pred_masks), np.asarray(j.pred_masks)
            assert (masks[of_ours] != their_masks[of_theirs]).mean() <= pixels
        if j.has("pred_keypoints"):
            assert i.pred_keypoints.isfinite().all()
            moved = (i.pred_keypoints[of_ours] - j.pred_keypoints[of_theirs])[..., :2].abs()
            assert (moved > 0.5).any(dim=2).float().mean() <= points


@pytest.mark.parametrize(
    ("device", "name", "mask_format"),
    on_devices(*product(NAMES, ("rle", "bitmap"))),
    indirect=["device"],
)
def test_detections(name: str, mask_format: str, device: str) -> None:
    model, images = made(name)
    model = copy.deepcopy(model).to(device)
    model.mask_format = mask_format  # type: ignore[assignment]
    assert_same_detections(detections(model, images), expected_detections(name))


@pytest.mark.parametrize(
    ("device", "name", "dtype", "layout"),
    on_devices(*product(NAMES, (*HALF, None), (CHANNELS_LAST, CONTIGUOUS))),
    indirect=["device"],
    ids=str,
)
def test_detections_of_an_optimized_model(
    name: str, dtype: str | None, layout: torch.memory_format, device: str
) -> None:
    model, images = made(name)
    model = copy.deepcopy(model).to(device)
    fast = optimize_for_inference(
        model, channels_last=layout == CHANNELS_LAST, dtype=HALF[dtype] if dtype else None
    )
    ours = detections(fast, images)
    assert_same_detections(ours, expected_detections(name), dtype is None)


# Waits.


@pytest.mark.parametrize(
    ("where", "name", "what"), on_devices(*product(NAMES, ("training step", "inference")))
)
def test_cuda_reports_the_waits_that_were_counted(
    where: str, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `torch.cuda.set_sync_debug_mode`. It reports copies too, from memory that isn't pinned."""
    model, images = made(name)
    count = counts.training_step if what == "training step" else counts.inference
    counted = count(copy.deepcopy(model), images)[0]
    with CudaRules() if where == "pretended" else nullcontext():
        if where == "pretended":
            monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
            for kind in ("wait", "copy"):
                monkeypatch.setattr(CudaRules, kind, report_a_wait)
        seen = gpu.waits_of(model, images, what)
    allowed = counted.waits.total() + counted.copies.total()
    lines = "\n".join(f"  {n:5d}  {line}" for line, n in seen.most_common())
    assert 0 < seen.total() <= allowed, f"reported:\n{lines}\ncounted:\n{counted.lines()}"
    if where == "pretended":
        assert seen == counted.waits + counted.copies


def report_a_wait(rules: CudaRules) -> None:
    warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


# Parts that can be put back, train.py, NCCL.


@pytest.mark.parametrize(
    ("device", "kind"),
    on_devices(
        *zip(kind for kinds in ({**gpu.KEYPOINT_PARTS, **gpu.PARTS}).values() for kind in kinds)
    ),
    indirect=["device"],
)
def test_a_part_put_back_is_detectron2s(kind: type, device: str) -> None:
    name = "masks and keypoints"
    model, images = made(name)
    stock = gpu.with_stock(model, kind).to(device)
    assert not any(type(module) is kind for module in stock.modules())
    assert_same_detections(detections(stock, images), expected_detections(name))


class Losses(HookBase):
    """Of each iteration; the training ends after the one at `last`."""

    def __init__(self, last: int = 99) -> None:
        self.of: dict[int, dict[str, float]] = {}
        self.last = last

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.of[self.trainer.iter] = {k: latest[k][0] for k in ("total_loss", "lr")}
        if self.trainer.iter == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["cpu", CUDA])
def test_a_resumed_training_goes_on_as_one_without_a_break(
    where: str, toy_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in CUDA have no fixed order, so weights differ by rounding from the first step on."""
    monkeypatch.setattr(train, "do_test", lambda cfg, model: {"segm": {"AP": 1.0}})
    keys = ["train.max_iter=4", "train.checkpointer.period=2", "train.amp.enabled=False"]
    keys += ["optimizer.lr=0.0001", "train.seed=-1", "dataloader.train.seed=5"]

    def run(folder: str, hook: Losses, resume: bool = False) -> None:
        output = f"train.output_dir={tmp_path / folder}"
        overrides = [*toy_overrides, *keys, output, f"train.device={where}"]
        cfg = get_config("table4_keypoints/keypoint_and_mask+synthetic", overrides)
        Path(cfg.train.output_dir).mkdir(exist_ok=True)
        setup_datasets(cfg)
        torch.manual_seed(77 if resume else 0)
        np.random.seed(77 if resume else 0)
        train.do_train(cfg, resume=resume, extra_hooks=[hook])

    whole, first, second = Losses(), Losses(last=1), Losses()
    run("whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run("halves", first)
    run("halves", second, resume=True)
    assert list(second.of) == [2, 3]
    ours = {**first.of, **second.of}
    assert ours.keys() == whole.of.keys()
    total = [of["total_loss"] for of in whole.of.values()]
    tolerance = 0.02
    assert max(total) > (1 + 2 * tolerance) * min(total)  # other images, other losses
    for iteration, expected in whole.of.items():
        assert ours[iteration] == pytest.approx(expected, rel=tolerance), iteration


@pytest.mark.parametrize("where", ["cpu", CUDA])
def test_two_steps_of_train_py(
    where: str, toy_overrides: list[str], tmp_path: Path, run_python: Run
) -> None:
    """On all GPUs that there are; with an evaluation at the end."""
    gpus = torch.cuda.device_count() if where == "cuda" else 1
    command = ["train.py", "--config-file", "table4_keypoints/keypoint_and_mask+synthetic"]
    command += ["--num-gpus", str(gpus), *toy_overrides, f"train.device={where}"]
    command += [f"dataloader.train.total_batch_size={2 * gpus}", "train.log_period=1"]
    done = run_python(REPOSITORY / command[0], *command[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model_final.pth").is_file()
    assert f"device {where}" in done.stdout


ALONE = """
import sys
import mask_rcnn_plugin
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

device = sys.argv[1]
backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
ones = torch.ones(3, device=device)
dist.all_reduce(ones)
assert ones.tolist() == [1, 1, 1]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).to(device)
image = torch.randn(1, 3, 8, 8, device=device)
expected = torch.autograd.grad(model(image).sum(), list(model.parameters()))
ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
ddp(image).sum().backward()
for parameter, gradient in zip(model.parameters(), expected):
    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)
dist.destroy_process_group()
print("done over", backend)
"""


@pytest.mark.parametrize("where", ["cpu", CUDA])
def test_a_group_of_one_process(where: str, tmp_path: Path, run_python: Run) -> None:
    """As train.py makes one of several."""
    done = run_python("-c", ALONE, where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done over" in done.stdout
