"""What is measured: parts of Mask R-CNN and the whole, by detectron2, torchvision and the plugin.

A stage is a function of `Peers` that yields each `Comparison`: ways to do one thing on the same
weights, and how far the plugin's result is from detectron2's.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec, paste_masks_in_image
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, Instances, PolygonMasks, pairwise_iou
from detectron2.utils.events import EventStorage
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from benchmark.made_up_detections import as_text, made_up_ground_truth, made_up_predictions
from benchmark.peers import stock_detectron2, torchvision_twin
from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import get_config, optimize_for_inference
from mask_rcnn_plugin.data.coco import register_coco_dataset
from mask_rcnn_plugin.evaluation import MaskRCNNCOCOEvaluator
from mask_rcnn_plugin.evaluation.evaluator import Task
from mask_rcnn_plugin.evaluation.predictions import coco_results
from mask_rcnn_plugin.modeling import MaskRCNNFCNHead, encode_masks
from mask_rcnn_plugin.training.guarded_trainer import GuardedTrainer

CLASSES = 80
MANY_CLASSES = 1203  # LVIS

Runs = dict[str, Callable[[], Any]]


class Comparison(NamedTuple):
    """Ways to do one thing: one line of the table.

    runs: by peer: "detectron2" as it comes, "plugin", perhaps "torchvision" and "detectron2 tuned",
        with the options of PyTorch that the plugin takes in this row. Where "detectron2
        channels-last" is there too, the faster of the two stands for detectron2.
    difference: of the plugin's result from detectron2's, in `unit`.
    allowed: how large it may be; None where only trained weights would agree: it is shown only.
    once: measured by a single call.
    """

    name: str
    runs: Runs
    difference: Callable[[Any, Any], float]
    unit: str
    allowed: float | None
    once: bool = False


class Peers:
    """ResNet-50-FPN with RoIAlign of 4 points a bin and 1000 proposals an image.

    Args:
        size: height and width of the image.
        training_side: height and width of the two images of a training step.
    """

    def __init__(
        self,
        device: str,
        size: tuple[int, int] = (800, 1088),
        detections: int = 100,
        training_side: int = 512,
    ) -> None:
        self.device, self.size, self.detections = device, size, detections
        self.training_side = training_side
        overrides = [
            # The stride of a bottleneck where torchvision has it: all three do the same work.
            "model.backbone.stride_in_1x1=False",
            "model.proposal_generator.post_nms_topk=[1000,1000]",
            f"dataset.test.max_detections={detections}",
            f"model.roi_heads.num_classes={CLASSES}",
        ]
        config = get_config("table2a_backbone/r50_fpn", overrides).model
        self.batch: list[Any] = [{"image": picture(size), "height": size[0], "width": size[1]}]
        self.stock = stock_detectron2(config)
        draw_like_trained(self.stock, self.batch, num_candidates=10 * detections)
        self.trainable = instantiate(config)
        self.trainable.load_state_dict(self.stock.state_dict())
        threshold = self.stock.roi_heads.box_predictor.test_score_thresh
        self.trainable.roi_heads.box_predictor.test_score_thresh = threshold
        self.stock.to(device).eval()
        self.trainable.to(device).eval()

    @cached_property
    def torchvision(self) -> Any:
        twin = torchvision_twin(self.stock, self.detections, min(self.size))
        return twin.to(self.device).eval()

    def run_torchvision(self) -> list[dict[str, Tensor]]:
        return self.torchvision([self.batch[0]["image"].to(self.device).float()])


# What the models get.


def picture(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Coloured blobs of all sizes: uint8 (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.zeros(3, *size)
    for cells in (6, 24, 96):
        coarse = torch.randn(1, 3, cells, max(1, cells * size[1] // size[0]), generator=generator)
        blobs += F.interpolate(coarse, size=size, mode="bicubic")[0]
    return (128 + 40 * blobs).clamp(0, 255).to(torch.uint8)


def ground_truth(size: tuple[int, int], count: int, seed: int) -> Instances:
    """Ellipses of 24 corners, of random classes."""
    rng = np.random.default_rng(seed)
    height, width = size
    sides = np.exp(rng.uniform(np.log(0.1), np.log(0.6), (count, 2))) * (width, height)
    corners = rng.uniform(0, 1, (count, 2)) * ((width, height) - sides)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outlines = corners[:, None] + (circle + 1) / 2 * sides[:, None]
    boxes = np.concatenate([corners, corners + sides], axis=1)
    return Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
        gt_classes=torch.from_numpy(rng.integers(0, CLASSES, count)),
        gt_masks=PolygonMasks([[outline.ravel()] for outline in outlines]),
    )


def made_up_masks(count: int, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    """Blobs as a trained network gives them, in boxes with sides log-uniform from 16 to 600 px.

    Returns:
        probabilities (R, 28, 28) and boxes (R, 4), XYXY, inside an image of `size`.
    """
    generator = torch.Generator().manual_seed(0)
    limits = torch.tensor([size[1], size[0]])
    sides = torch.exp(torch.rand(count, 2, generator=generator) * math.log(600 / 16)) * 16
    sides = torch.minimum(sides, limits)
    corners = torch.rand(count, 2, generator=generator) * (limits - sides)
    coarse = torch.randn(count, 1, 7, 7, generator=generator) * 2
    bump = 4 - 8 * (torch.linspace(-1, 1, 28)[:, None] ** 2 + torch.linspace(-1, 1, 28) ** 2)
    logits = F.interpolate(coarse, size=(28, 28), mode="bicubic")[:, 0] + bump
    return logits.sigmoid().to(device), torch.cat([corners, corners + sides], dim=1).to(device)


def boxes_lost(ours: Instances, theirs: Instances) -> float:
    """Share of detectron2's boxes that have none of the same class at IoU > 0.95 among ours."""
    if not (len(ours) and len(theirs)):
        return float(len(theirs) > 0)
    iou = pairwise_iou(theirs.pred_boxes, ours.pred_boxes)
    iou = iou * (theirs.pred_classes[:, None] == ours.pred_classes)
    return 1 - float((iou.amax(dim=1) > 0.95).float().mean())


# The stages.


def mask(p: Peers) -> Iterator[Comparison]:
    """The mask branch on given boxes and features, without pasting."""
    _, boxes = made_up_masks(p.detections, p.size, p.device)
    generator = torch.Generator().manual_seed(0)
    shapes = {f"p{level}": (1, 256, *(side >> level for side in p.size)) for level in range(2, 6)}
    features = {k: torch.randn(s, generator=generator).to(p.device) for k, s in shapes.items()}
    layouts = {
        "detectron2": features,
        "plugin": {k: f.to(memory_format=torch.channels_last) for k, f in features.items()},
    }

    shape = ShapeSpec(channels=256, height=14, width=14)

    def difference(ours: list[Instances], theirs: list[Instances]) -> float:
        return float((ours[0].pred_masks - theirs[0].pred_masks).abs().max())

    for classes in (CLASSES, MANY_CLASSES):
        kinds = torch.randint(classes, (len(boxes),), generator=generator).to(p.device)
        torch.manual_seed(0)
        stock, ours = (copy.deepcopy(m.roi_heads) for m in (p.stock, p.trainable))
        stock.mask_head = MaskRCNNConvUpsampleHead(shape, num_classes=classes, conv_dims=[256] * 5)
        stock.mask_head.predictor.weight.data.mul_(100)  # away from 1/2 everywhere
        ours.mask_head = MaskRCNNFCNHead(shape, num_classes=classes, conv_dims=[256] * 5)
        ours.mask_head.load_state_dict(stock.mask_head.state_dict())
        stock, ours = stock.to(p.device).eval(), ours.to(p.device).eval()
        peers = {"detectron2": stock, "plugin": optimize_for_inference(ours)}
        runs: Runs = {}
        for name, heads in peers.items():
            given = Instances(p.size, pred_boxes=Boxes(boxes), pred_classes=kinds)
            runs[name] = partial(heads._forward_mask, layouts[name], [given])
        yield Comparison(
            f"mask branch, {classes} classes", runs, difference, "of the probability", 1e-4
        )


def masks_to_rle(p: Peers) -> Iterator[Comparison]:
    probs, boxes = made_up_masks(p.detections, p.size, p.device)

    def theirs() -> list[dict[str, Any]]:
        bitmaps = paste_masks_in_image(probs, boxes, p.size).cpu().numpy()
        return [as_text(coco_mask.encode(np.asfortranarray(b, dtype=np.uint8))) for b in bitmaps]

    def differ(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
        return sum(a["counts"] != b["counts"] for a, b in zip(ours, theirs)) / len(theirs)

    runs: Runs = {"detectron2": theirs, "plugin": lambda: encode_masks(probs, boxes, p.size)}
    yield Comparison("masks to RLE", runs, differ, "of the masks differ", 1e-3)


def model(p: Peers) -> Iterator[Comparison]:
    def detect(model: Any) -> Callable[[], Instances]:
        return lambda: model(p.batch)[0]["instances"]

    tuned = detect(copy.deepcopy(p.stock).to(memory_format=torch.channels_last))
    ours = optimize_for_inference(p.trainable)
    half = optimize_for_inference(p.trainable, dtype=torch.bfloat16)

    def autocast() -> Instances:
        with torch.autocast(p.device, torch.bfloat16):
            return tuned()

    stock: Runs = {"detectron2": detect(p.stock), "torchvision": p.run_torchvision}
    unit = "of the boxes lost"
    runs: Runs = {**stock, "detectron2 tuned": tuned, "plugin": detect(ours)}
    yield Comparison("whole model", runs, boxes_lost, unit, 0.01)
    runs = {**stock, "detectron2 tuned": autocast, "plugin": detect(half)}
    yield Comparison("whole model, bf16", runs, boxes_lost, unit, None)


def training(p: Peers) -> Iterator[Comparison]:
    """A step of 2 images: losses, gradients, SGD."""
    size = (p.training_side, p.training_side)
    batch = [
        {"image": picture(size, seed), "instances": ground_truth(size, 8, seed)} for seed in (0, 1)
    ]

    def step(model: nn.Module, layout: torch.memory_format, trainer: Any) -> Callable[[], float]:
        model = copy.deepcopy(model).to(memory_format=layout).train()
        # A learning rate of 0 does the same work and leaves both models what they are.
        parameters = [q for q in model.parameters() if q.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
        built = trainer(model, itertools.repeat(batch), optimizer)
        built.iter = 0

        def run() -> float:
            torch.manual_seed(0)
            with torch.enable_grad(), EventStorage() as built.storage:
                built.run_step()
                return built.storage.latest()["total_loss"][0]

        return run

    exact = partial(GuardedTrainer, device=p.device)
    half = partial(GuardedTrainer, device=p.device, dtype=torch.bfloat16)
    contiguous, channels_last = torch.contiguous_format, torch.channels_last

    def loss(model: nn.Module, dtype: torch.dtype | None = None) -> float:
        """Of all anchors and proposals: which are sampled of them is left to chance."""
        model = copy.deepcopy(model).train()
        for sampling in (model.proposal_generator, model.roi_heads):
            sampling.batch_size_per_image, sampling.positive_fraction = 10**6, 1.0
        with EventStorage(), torch.autocast(p.device, dtype, enabled=dtype is not None):
            return float(sum(model(batch).values()))

    def difference(dtype: torch.dtype | None) -> float:
        return abs(loss(p.trainable, dtype) / loss(p.stock) - 1)

    stock: Runs = {
        "detectron2": step(p.stock, contiguous, SimpleTrainer),
        "detectron2 channels-last": step(p.stock, channels_last, SimpleTrainer),
    }
    runs: Runs = {**stock, "plugin": step(p.trainable, channels_last, exact)}
    yield Comparison("training step", runs, lambda *_: difference(None), "of the loss", 1e-3)
    runs = {
        **stock,
        "detectron2 tuned": step(p.stock, channels_last, half),
        "plugin": step(p.trainable, channels_last, half),
    }
    yield Comparison(
        "training step, bf16", runs, lambda *_: difference(torch.bfloat16), "of the loss", 0.05
    )


def evaluation(p: Peers) -> Iterator[Comparison]:
    """COCO's AP of 5,000 images with 36,000 objects and 100 detections each, boxes and masks."""
    with tempfile.TemporaryDirectory() as folder:
        yield evaluation_row(Path(folder), made_up_ground_truth())


def evaluation_row(folder: Path, truth: dict[str, Any]) -> Comparison:
    """The AP of made-up predictions for a ground truth, on the masks' RLE alike."""
    dataset = register(folder, truth)
    tasks: tuple[Task, ...] = ("bbox", "segm")
    stock = COCOEvaluator(dataset, tasks, distributed=False, use_fast_impl=False)
    ours = MaskRCNNCOCOEvaluator(dataset, tasks, distributed=False)
    stock.reset()
    ours.reset()
    for image, output in made_up_predictions(truth):
        ours.process([image], [output])
        results = coco_results(output["instances"], image["image_id"])
        stock._predictions.append({"image_id": image["image_id"], "instances": results})

    def silent(evaluator: COCOEvaluator) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            return evaluator.evaluate()

    def apart(ours: Any, theirs: Any) -> float:
        every = [(theirs[task][k], ours[task][k]) for task in theirs for k in theirs[task]]
        return max(abs(a - b) for a, b in every if not math.isnan(a))

    runs: Runs = {"detectron2": partial(silent, stock), "plugin": partial(silent, ours)}
    name = f"COCO evaluation, {ours.backend} beside pycocotools"
    return Comparison(name, runs, apart, "AP", 1e-10, once=True)


def register(folder: Path, truth: dict[str, Any]) -> str:
    """Write a ground truth to a file and register it; its name in detectron2's catalogs."""
    file = folder / "made_up.json"
    file.write_text(json.dumps(truth))
    return register_coco_dataset(str(file), str(folder))


STAGES: dict[str, Callable[[Peers], Iterator[Comparison]]] = {
    "mask": mask,
    "masks-to-rle": masks_to_rle,
    "model": model,
    "training": training,
    "evaluation": evaluation,
}
