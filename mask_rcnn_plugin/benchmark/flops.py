"""Floating-point operations of the model, and how near the machine's limit they are computed."""

import warnings
from typing import NamedTuple

import torch
from detectron2.utils.analysis import FlopCountAnalysis

from mask_rcnn_plugin.benchmark.stages import Peers, mask_runs, masks_to_rle
from mask_rcnn_plugin.benchmark.timing import interleave, matmul_flops


class Flops(NamedTuple):
    """All of them in 10^9 (a second), a multiplication with its addition counted as two.

    Attributes:
        total: of the whole model, and by part of it.
        limit: what a large matrix product reaches a second.
        achieved: what each model reaches a second.
        mask_share: of the time of each model, what the mask branch takes, from pooling to bitmaps
            (detectron2) or RLE (plugin). "Mask R-CNN adds about 20%" (Sec. 3.1).
    """

    total: dict[str, float]
    limit: float
    achieved: dict[str, float]
    mask_share: dict[str, float]


def measure_flops(p: Peers, rounds: int) -> Flops:
    """Count by fvcore, on detectron2's model, and time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counter = FlopCountAnalysis(p.stock, p.batch)
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_module = counter.by_module()
    parts = ("backbone", "proposal_generator", "roi_heads.box_head", "roi_heads.mask_head")
    total = {"whole model": 2e-9 * counter.total()}
    # The counter wraps the model; a Counter has zeros for names that it doesn't know.
    total.update({part: 2e-9 * by_module[f"model.{part}"] for part in parts})
    branch, (encoding,) = mask_runs(p, 80), masks_to_rle(p)
    runs = {"detectron2": lambda: p.stock(p.batch), "plugin": lambda: p.plugin(p.batch)}
    whole = interleave(runs, rounds, p.device)
    achieved, share = {}, {}
    for name, measured in whole.items():
        achieved[name] = total["whole model"] / (measured.median_ms / 1000)
        mask = interleave(
            {"branch": branch[name], "encoding": encoding.runs[name]}, rounds, p.device
        )
        share[name] = sum(m.median_ms for m in mask.values()) / measured.median_ms
    limit = 1e-9 * matmul_flops(p.device, torch.float32)
    return Flops(total, limit, achieved, share)
