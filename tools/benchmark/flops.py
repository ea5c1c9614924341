"""Floating-point operations of the model, and how near the machine's limit they are computed."""

import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.utils.analysis import FlopCountAnalysis

from benchmark.stages import Peers
from benchmark.timing import interleave, matmul_flops


class Flops(NamedTuple):
    """All of them in 10^9 (a second), a multiplication with its addition counted as two.

    Attributes:
        total: of the whole model, and by part of it.
        limit: what a large matrix product reaches a second.
        achieved: `total` by the time of each model. The plugin's is the rate of the operations that
            it was asked for: it needs fewer of them, so that this may exceed the limit.
        mask_share: of the time of each model, what it takes longer than without its mask branch;
            the paper says "about 20%" of the box model's (Sec. 3.1).
    """

    total: dict[str, float]
    limit: float
    achieved: dict[str, float]
    mask_share: dict[str, float]


def measure_flops(p: Peers, rounds: int) -> Flops:
    """Count by fvcore, on detectron2's model, and time each model's fastest round."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counter = FlopCountAnalysis(p.stock, p.batch)
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_module = counter.by_module()
    parts = ("backbone", "proposal_generator", "roi_heads.box_head", "roi_heads.mask_head")
    total = {"whole model": 2e-9 * counter.total()}
    # The counter wraps the model; a Counter has zeros for names that it doesn't know.
    total.update({part: 2e-9 * by_module[f"model.{part}"] for part in parts})
    achieved, share = {}, {}
    for name, model in (("detectron2", p.stock), ("plugin", p.plugin)):
        runs = {"whole": partial(model, p.batch), "boxes": partial(_without_masks, model, p.batch)}
        ms = {key: min(measured.ms) for key, measured in interleave(runs, rounds, p.device).items()}
        achieved[name] = total["whole model"] / (ms["whole"] / 1000)
        share[name] = 1 - ms["boxes"] / ms["whole"]
    limit = 1e-9 * matmul_flops(p.device, torch.float32)
    return Flops(total, limit, achieved, share)


def _without_masks(model: Any, batch: Any) -> Any:
    model.roi_heads.mask_on = False
    try:
        return model(batch)
    finally:
        model.roi_heads.mask_on = True
