"""Training and inference steps on a GPU: detectron2, the plugin, the plugin without each part.

Unlike the stages, variants are measured one after the other, each with nothing else on the device.
One that fails becomes a row with its error; the others' measurements are kept.
"""

import copy
import gc
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from benchmark.counts import ROWS, batch, peers
from benchmark.cuda_rules import source_line
from benchmark.peers import with_stock
from benchmark.timing import PeakMemory
from mask_rcnn_plugin import get_config, optimize_for_inference
from mask_rcnn_plugin.fast.folding import FrozenBNConv2d
from mask_rcnn_plugin.modeling import (
    MaskRCNN,
    MaskRCNNAnchorGenerator,
    MaskRCNNBoxPredictor,
    MaskRCNNFCNHead,
    MaskRCNNKeypointHead,
    MaskRCNNROIHeads,
    MaskRCNNRPN,
    RoIPooler,
)
from mask_rcnn_plugin.training.guarded_trainer import GuardedTrainer

OBJECTS = 8
_FULL = ["model.proposal_generator.post_nms_topk=[1000,1000]", "dataset.test.max_detections=100"]
MODELS = {
    "masks": ("table2a_backbone/r50_fpn", _FULL),
    "masks and keypoints": ("table4_keypoints/keypoint_and_mask", _FULL),
}
# Urgencies of variants; those of keypoints have 2 more.
BASIC, PART, COMPILED = 0, 1, 4
# Variants: name, urgency, options of `training_step` or `inference`.
_LAST, _COMPILED = {"channels_last": True}, {"is_compiled": True}
_STOCK = {"is_guarded": False}
VARIANTS: dict[str, list[tuple[str, int, dict[str, Any]]]] = {
    "training": [
        ("detectron2", BASIC, _STOCK | {"is_fused": None}),
        ("detectron2 tuned", COMPILED, _STOCK | _LAST | _COMPILED),
        ("plugin", BASIC, {}),
        ("plugin, channels-last", BASIC, _LAST),
        ("plugin, compiled backbone", COMPILED, _COMPILED),
        ("plugin without fused SGD", PART, {"is_fused": None}),
    ],
    "inference": [
        ("detectron2", BASIC, {}),
        ("detectron2 tuned", COMPILED, _LAST | _COMPILED),
        ("plugin", BASIC, {}),
        ("plugin, optimized", BASIC, {"optimized": {}}),
        ("plugin, optimized, channels-last", BASIC, {"optimized": _LAST}),
        ("plugin, optimized, compiled", COMPILED, {"optimized": {"compile": True}}),
    ],
}
# Of the plugin's classes, in whose place detectron2's are put.
PARTS: dict[str, tuple[type, ...]] = {
    "RPN": (MaskRCNNRPN, MaskRCNNAnchorGenerator),
    "sampling": (MaskRCNNROIHeads,),
    "box predictor": (MaskRCNNBoxPredictor,),
    "pooler": (RoIPooler,),
    "mask head": (MaskRCNNFCNHead,),
    "inputs and results": (MaskRCNN,),
    "folded batch norm": (FrozenBNConv2d,),
}
KEYPOINT_PARTS: dict[str, tuple[type, ...]] = {"keypoint head": (MaskRCNNKeypointHead,)}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
# On a GPU. On a CPU, for a dry run, everything is called once.
WARM_UP, ROUNDS, CALLS = 3, 3, 5

Run = Callable[[], Any]


class Variant(NamedTuple):
    """One way to do it.

    row: its "model" of `MODELS`, "what", "training" or "inference", "precision" and "variant".
    build: puts what it needs on the device, and returns what is timed: a step of all images.
    urgency: the least first, as time may not be enough for all.
    """

    row: dict[str, str]
    build: Callable[[], Run]
    urgency: int


def variants(device: str, size: tuple[int, int]) -> Iterator[Variant]:
    """All that is measured, of images of (height, width)."""
    for model, (config, overrides) in MODELS.items():
        images = batch("keypoint" in model, size, OBJECTS)
        models = peers(get_config(config, overrides).model, images)
        parts = PARTS if model == "masks" else KEYPOINT_PARTS
        for what, precision in itertools.product(VARIANTS, PRECISIONS):
            every = [(*variant, ()) for variant in VARIANTS[what]]
            every += [(f"plugin without {part}", PART, {}, kinds) for part, kinds in parts.items()]
            if model != "masks":  # later; compiling takes minutes, once is enough
                every = [(n, u + 2, *more) for n, u, *more in every if u < COMPILED]
            for name, urgency, *more in every:
                row = {"model": model, "what": what, "precision": precision, "variant": name}
                dtype = PRECISIONS[precision]
                build = partial(_build, what, models, images, device, dtype, name, *more)
                yield Variant(row, build, urgency)


def _build(
    what: str,
    models: dict[str, nn.Module],
    images: list[dict[str, Any]],
    device: str,
    dtype: torch.dtype | None,
    name: str,
    options: dict[str, Any],
    kinds: tuple[type, ...],
) -> Run:
    model = with_stock(models["plugin" if name.startswith("plugin") else "detectron2"], *kinds)
    make = training_step if what == "training" else inference
    return make(model, images, device, dtype, **options)


def training_step(
    model: nn.Module,
    images: list[dict[str, Any]],
    device: str,
    dtype: torch.dtype | None,
    *,
    is_guarded: bool = True,
    is_fused: bool | None = True,
    channels_last: bool = False,
    is_compiled: bool = False,
) -> Run:
    """A step of a trainer: detectron2's, or the plugin's, guarded, in half precision always."""
    _place(model, device, channels_last, is_compiled).train()
    # A learning rate of 0 does the same work, and losses stay as they are.
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, fused=is_fused)
    data = itertools.repeat(images)
    trainer: Any = SimpleTrainer(model, data, optimizer)
    if is_guarded or dtype is not None:
        trainer = GuardedTrainer(model, data, optimizer, device=device, dtype=dtype)
    trainer.iter, trainer.storage = 0, EventStorage()

    def run() -> None:
        with trainer.storage:
            trainer.run_step()
            trainer.storage.step()  # statistics are due now and then

    return run


def inference(
    model: nn.Module,
    images: list[dict[str, Any]],
    device: str,
    dtype: torch.dtype | None,
    *,
    optimized: dict[str, Any] | None = None,
    channels_last: bool = False,
    is_compiled: bool = False,
) -> Run:
    """Detections of all images together; `optimized` is of `optimize_for_inference`."""
    _place(model, device, channels_last, is_compiled).eval()
    if optimized is not None:
        model, dtype = optimize_for_inference(model, dtype=dtype, **optimized), None

    @torch.no_grad()
    def run() -> Any:
        with torch.autocast(device, dtype, enabled=dtype is not None):
            return model(images)

    return run


def _place(model: nn.Module, device: str, channels_last: bool, is_compiled: bool) -> nn.Module:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    if is_compiled:
        model.get_submodule("backbone").compile(dynamic=True)
    return model


def measure(build: Callable[[], Run], device: str) -> dict[str, Any]:
    """Milliseconds a call, median and range of the rounds, and the most memory that it all held;
    or the error that ended it."""
    is_cuda = device != "cpu"
    warm_up, rounds, calls = (WARM_UP, ROUNDS, CALLS) if is_cuda else (0, 1, 1)
    try:
        with PeakMemory(device) as peak:
            run = build()
            _seconds(run, warm_up, is_cuda)
            ms = [1000 * _seconds(run, calls, is_cuda) for _ in range(rounds)]
    except Exception as error:  # whatever it is, the others are measured
        message = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {message}"}
    finally:
        run = None  # type: ignore[assignment]
        gc.collect()
        if is_cuda:
            with suppress(RuntimeError):  # an error of CUDA's, which is in the row already
                torch.cuda.empty_cache()
    times = {"ms": round(median(ms), 2), "ms_range": [round(min(ms), 2), round(max(ms), 2)]}
    return times | {"peak_mib": peak.mib and round(peak.mib)}


def _seconds(run: Run, calls: int, is_cuda: bool) -> float:
    """Of a call, the device's work included."""
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / max(1, calls)


def measured(device: str, size: tuple[int, int], minutes: float) -> Iterator[list[dict[str, Any]]]:
    """What is measured so far, after each variant; those that time was not enough for say so.

    Args:
        minutes: after which no variant is begun; the models are made before.
    """
    found: dict[int, dict[str, Any]] = {}
    every = list(variants(device, size))
    ends = time.monotonic() + 60 * minutes
    for n in sorted(range(len(every)), key=lambda n: every[n].urgency):
        result: dict[str, Any] = {"error": "not run: out of time"}
        if time.monotonic() < ends:
            result = measure(every[n].build, device)
        found[n] = every[n].row | result
        yield [found[key] for key in sorted(found)]


# What CUDA itself says of waits.


@contextmanager
def waits_seen() -> Iterator[Counter[str]]:
    """How often CUDA says that the host waits for it, by the line of detectron2's or ours.

    These are waits and copies from memory that is not pinned, for which it waits too.
    """
    seen: Counter[str] = Counter()

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA" in str(message):
            seen[source_line()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits_of(model: nn.Module, images: list[dict[str, Any]], what: str) -> Counter[str]:
    """`waits_seen` in what `counts.training_step` or `counts.inference` count, on the GPU."""
    model = copy.deepcopy(model).to("cuda")
    if what == "inference":
        run = inference(model, images, "cuda", None)
    else:
        parameters = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, foreach=True)

        def run() -> None:
            optimizer.zero_grad()
            sum(model(images).values()).backward()
            optimizer.step()

    with EventStorage():
        run()  # makes what is kept
        with waits_seen() as seen:
            run()
    return seen


def waits() -> list[dict[str, Any]]:
    """Of the rows of `counts.counts`: waits seen, and the plugin's lines."""
    found = []
    for name, (config, overrides) in ROWS.items():
        images = batch("keypoint" in name)
        models = peers(get_config(config, overrides).model, images)
        for what in ("training step", "inference"):
            seen = {peer: waits_of(model, images, what) for peer, model in models.items()}
            totals = {peer: lines.total() for peer, lines in seen.items()}
            row = {"name": f"{what}, {name}", "seen": totals, "lines": dict(seen["plugin"])}
            found.append(row)
    return found
