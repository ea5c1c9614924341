"""The stages of Mask R-CNN as detectron2 and the plugin compute them, on the same weights.

Each stage is a function of `Peers` that yields `Row`s: ways to do one thing, by peer, and how far
the plugin's result is from detectron2's.
"""

import contextlib
import copy
import io
import itertools
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
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.layers import ShapeSpec, paste_masks_in_image
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead, MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, pairwise_iou
from detectron2.structures.keypoints import heatmaps_to_keypoints
from detectron2.utils.events import EventStorage
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from benchmark import made_up_detections as made_up
from benchmark.peers import stock_detectron2, torchvision_twin
from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.evaluation import coco_results
from mask_rcnn_plugin.fast.keypoint_decoding import decode_keypoints
from mask_rcnn_plugin.inference.optimize import optimize_for_inference
from mask_rcnn_plugin.modeling import MaskRCNNFCNHead, MaskRCNNKeypointHead, encode_masks
from mask_rcnn_plugin.modeling.mask_loss import mask_targets
from mask_rcnn_plugin.training.train_loop import Trainer

DETECTIONS = 100
PROPOSALS = 1000
CLASSES = 80
MANY_CLASSES = 1203  # LVIS

Runs = dict[str, Callable[[], Any]]


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: what is measured.
        runs: by peer: "detectron2" as it comes, "plugin", perhaps "detectron2 tuned", with the
            options of PyTorch that the plugin takes in this row, and "torchvision".
        difference: of the plugin's result from detectron2's.
        unit: what the difference is.
        allowed: how large it may be; None: it is shown only.
        is_long: measured once, at the first call.
    """

    name: str
    runs: Runs
    difference: Callable[[Any, Any], float]
    unit: str
    allowed: float | None
    is_long: bool = False


class Peers:
    """ResNet-50-FPN with RoIAlign of 4 points a bin, 1000 proposals and 100 detections an image.

    Args:
        device: "cpu" or "cuda".
        size: height and width of the image.
        detections: most detections an image.
        training_side: height and width of the two images of a training step.
    """

    def __init__(
        self,
        device: str,
        size: tuple[int, int] = (800, 1088),
        detections: int = DETECTIONS,
        training_side: int = 512,
    ) -> None:
        self.device, self.size, self.detections = device, size, detections
        self.training_side = training_side
        # The stride of a bottleneck where torchvision has it, so that all three do the same work.
        config = get_config(
            "table2a_backbone/r50_fpn",
            [
                "model.backbone.stride_in_1x1=False",
                f"model.proposal_generator.post_nms_topk=[{PROPOSALS},{PROPOSALS}]",
                f"dataset.test.max_detections={detections}",
                f"model.roi_heads.num_classes={CLASSES}",
            ],
        ).model
        self.batch = [{"image": picture(size), "height": size[0], "width": size[1]}]
        self.stock = stock_detectron2(config)
        draw_like_trained(self.stock, self.batch, num_candidates=10 * detections)
        self.trainable = instantiate(config)
        self.trainable.load_state_dict(self.stock.state_dict())
        predictor = self.trainable.roi_heads.box_predictor
        predictor.test_score_thresh = self.stock.roi_heads.box_predictor.test_score_thresh
        self.stock.to(device).eval()
        self.trainable.to(device).eval()

    @cached_property
    def plugin(self) -> Any:
        return optimize_for_inference(self.trainable)

    @cached_property
    def bf16(self) -> Any:
        return optimize_for_inference(self.trainable, dtype=torch.bfloat16)

    @cached_property
    def compiled(self) -> Any:
        return optimize_for_inference(self.trainable, compile=True)

    @cached_property
    def tuned(self) -> Any:
        """detectron2's model, channels-last."""
        return copy.deepcopy(self.stock).to(memory_format=torch.channels_last)

    @cached_property
    def tuned_compiled(self) -> Any:
        """The same with a compiled backbone."""
        model = copy.deepcopy(self.tuned)
        model.backbone.compile(dynamic=True)
        return model

    @cached_property
    def torchvision(self) -> Any:
        twin = torchvision_twin(self.stock, self.detections, min(self.size))
        return twin.to(self.device).eval()

    @cached_property
    def torchvision_batch(self) -> list[Tensor]:
        image: Any = self.batch[0]["image"]
        return [image.to(self.device).float()]

    @cached_property
    def image(self) -> Tensor:
        """The batch as the backbone gets it."""
        return self.stock.preprocess_image(self.batch).tensor

    @cached_property
    def features(self) -> dict[str, Any]:
        models = {"detectron2": self.stock, "plugin": self.plugin, "torchvision": self.torchvision}
        return {name: model.backbone(self.image) for name, model in models.items()}

    @cached_property
    def proposals(self) -> list[Instances]:
        """detectron2's, for all."""
        images = self.stock.preprocess_image(self.batch)
        return self.stock.proposal_generator(images, self.features["detectron2"])[0]

    @cached_property
    def found(self) -> Instances:
        """detectron2's detections, without masks."""
        heads = self.stock.roi_heads
        return heads._forward_box(self.features["detectron2"], self.proposals)[0]

    def given(self, num_classes: int = CLASSES) -> list[Instances]:
        """The detections again, of classes drawn from `num_classes`."""
        generator = torch.Generator().manual_seed(1)
        classes = torch.randint(num_classes, (len(self.found),), generator=generator)
        return [
            Instances(
                self.size,
                pred_boxes=Boxes(self.found.pred_boxes.tensor.clone()),
                pred_classes=classes.to(self.device),
            )
        ]


def picture(size: tuple[int, int], seed: int = 0) -> Tensor:
    """Coloured blobs of all sizes: uint8 (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.zeros(3, *size)
    for cells in (6, 24, 96):
        coarse = torch.randn(1, 3, cells, cells * size[1] // size[0], generator=generator)
        blobs += F.interpolate(coarse, size=size, mode="bicubic")[0]
    return (128 + 40 * blobs).clamp(0, 255).to(torch.uint8)


# How far two results are apart.


def largest_difference(ours: Any, theirs: Any) -> float:
    """Of a tensor or several: the largest difference over the largest value."""
    if isinstance(theirs, Tensor):
        difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        return float(difference)
    if isinstance(theirs, dict):
        return max(largest_difference(ours[k], theirs[k]) for k in theirs)
    return max(largest_difference(a, b) for a, b in zip(ours, theirs, strict=True))


def boxes_lost(ours: Instances, theirs: Instances) -> float:
    """Share of detectron2's boxes that have none of the same class at IoU > 0.95 among ours."""
    if not (len(ours) and len(theirs)):
        return float(len(theirs) > 0)
    iou = pairwise_iou(theirs.pred_boxes, ours.pred_boxes)
    iou = iou * (theirs.pred_classes[:, None] == ours.pred_classes)
    return 1 - float((iou.amax(dim=1) > 0.95).float().mean())


def proposals_lost(ours: Any, theirs: Any) -> float:
    iou = pairwise_iou(theirs[0][0].proposal_boxes, ours[0][0].proposal_boxes)
    return 1 - float((iou.amax(dim=1) > 0.95).float().mean())


def masks_that_differ(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    return sum(a["counts"] != b["counts"] for a, b in zip(ours, theirs)) / len(theirs)


def soft_mask_difference(ours: list[Instances], theirs: list[Instances]) -> float:
    return largest_difference(ours[0].pred_masks, theirs[0].pred_masks)


# Stages.


def backbone(p: Peers) -> Iterator[Row]:
    runs: Runs = {
        "detectron2": lambda: p.stock.backbone(p.image),
        "detectron2 tuned": lambda: p.tuned.backbone(p.image),
        "plugin": lambda: p.plugin.backbone(p.image),
        "torchvision": lambda: p.torchvision.backbone(p.image),
    }
    unit = "of the largest feature"
    yield Row("backbone + FPN", runs, largest_difference, unit, 1e-4)
    compiled = {
        **runs,
        "detectron2 tuned": lambda: p.tuned_compiled.backbone(p.image),
        "plugin": lambda: p.compiled.backbone(p.image),
    }
    yield Row("backbone + FPN, compiled", compiled, largest_difference, unit, 1e-4)
    half = {
        **runs,
        "detectron2 tuned": _autocast(p, lambda: p.tuned.backbone(p.image)),
        "plugin": lambda: p.bf16.backbone(p.image),
    }
    yield Row("backbone + FPN, bf16", half, largest_difference, unit, 0.1)


def _autocast(p: Peers, run: Callable[[], Any]) -> Callable[[], Any]:
    def in_bfloat16() -> Any:
        with torch.autocast(p.device, torch.bfloat16):
            return run()

    return in_bfloat16


def rpn(p: Peers) -> Iterator[Row]:
    images = p.stock.preprocess_image(p.batch)
    as_torchvision, _ = p.torchvision.transform(p.torchvision_batch)
    runs: Runs = {
        "detectron2": lambda: p.stock.proposal_generator(images, p.features["detectron2"]),
        "plugin": lambda: p.plugin.proposal_generator(images, p.features["plugin"]),
        "torchvision": lambda: p.torchvision.rpn(as_torchvision, p.features["torchvision"]),
    }
    yield Row("RPN", runs, proposals_lost, "of the proposals lost", 0.01)


def box(p: Peers) -> Iterator[Row]:
    boxes = [p.proposals[0].proposal_boxes.tensor]

    def torchvision_box() -> Any:
        heads, features = p.torchvision.roi_heads, p.features["torchvision"]
        pooled = heads.box_roi_pool(features, boxes, [p.size])
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return heads.postprocess_detections(logits, deltas, boxes, [p.size])

    def detections(model: Any, features: Any) -> Instances:
        return model.roi_heads._forward_box(features, p.proposals)[0]

    runs: Runs = {
        "detectron2": lambda: detections(p.stock, p.features["detectron2"]),
        "plugin": lambda: detections(p.plugin, p.features["plugin"]),
        "torchvision": torchvision_box,
    }
    yield Row("box branch", runs, boxes_lost, "of the boxes lost", 0.01)


def mask(p: Peers) -> Iterator[Row]:
    heads, detections = p.torchvision.roi_heads, p.given()[0]

    def torchvision_mask() -> Any:
        boxes = [detections.pred_boxes.tensor]
        pooled = heads.mask_roi_pool(p.features["torchvision"], boxes, [p.size])
        logits = heads.mask_predictor(heads.mask_head(pooled))
        return logits.sigmoid()[torch.arange(len(logits)), detections.pred_classes + 1]

    runs = {**mask_runs(p, CLASSES), "torchvision": torchvision_mask}
    unit = "of the probability"
    yield Row(f"mask branch, {CLASSES} classes", runs, soft_mask_difference, unit, 1e-4)
    runs = mask_runs(p, MANY_CLASSES)
    yield Row(f"mask branch, {MANY_CLASSES} classes", runs, soft_mask_difference, unit, 1e-4)


def mask_runs(p: Peers, num_classes: int) -> Runs:
    """The mask branch on the detections, without pasting."""
    theirs, ours = mask_heads(num_classes)
    return _branch_runs(p, "mask", theirs, ours, p.given(num_classes))


def mask_heads(num_classes: int) -> tuple[nn.Module, nn.Module]:
    """detectron2's mask head and the plugin's, on the same weights."""
    shape = ShapeSpec(channels=256, height=14, width=14)
    torch.manual_seed(0)
    theirs = MaskRCNNConvUpsampleHead(shape, num_classes=num_classes, conv_dims=[256] * 5)
    theirs.predictor.weight.data.mul_(100)  # away from 1/2 everywhere
    ours = MaskRCNNFCNHead(shape, num_classes=num_classes, conv_dims=[256] * 5)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _branch_runs(
    p: Peers, branch: str, theirs: nn.Module, ours: nn.Module, given: list[Instances]
) -> Runs:
    """A branch with heads of its own, on given detections."""
    runs: Runs = {}
    for name, model, head in (("detectron2", p.stock, theirs), ("plugin", p.trainable, ours)):
        heads = copy.deepcopy(model.roi_heads)
        pooler = copy.deepcopy(heads.mask_pooler)
        setattr(heads, f"{branch}_on", True)
        setattr(heads, f"{branch}_in_features", heads.mask_in_features)
        setattr(heads, f"{branch}_pooler", pooler)
        setattr(heads, f"{branch}_head", head.to(p.device))
        heads.eval()
        if name == "plugin":
            heads = optimize_for_inference(heads)
        forward = getattr(heads, f"_forward_{branch}")
        instances = copy.deepcopy(given)  # the branch adds its field
        runs[name] = partial(forward, p.features[name], instances)
    return runs


def keypoint(p: Peers) -> Iterator[Row]:
    shape = ShapeSpec(channels=256, height=14, width=14)
    arguments: dict[str, Any] = {"num_keypoints": 17, "conv_dims": [512] * 8}
    torch.manual_seed(0)
    theirs = KRCNNConvDeconvUpsampleHead(shape, **arguments)
    theirs.score_lowres.weight.data.mul_(100)
    ours = MaskRCNNKeypointHead(shape, **arguments)
    ours.load_state_dict(theirs.state_dict())
    runs = _branch_runs(p, "keypoint", theirs, ours, p.given())

    def moved(a: list[Instances], b: list[Instances]) -> float:
        apart = (a[0].pred_keypoints - b[0].pred_keypoints)[..., :2].abs().amax(dim=-1)
        return float((apart > 1).float().mean())

    yield Row("keypoint branch", runs, moved, "of the points moved by a pixel", 0.01)


def masks_to_rle(p: Peers) -> Iterator[Row]:
    probs, boxes = made_up_masks(p.detections, p.size, p.device)

    def theirs() -> list[dict[str, Any]]:
        bitmaps = paste_masks_in_image(probs, boxes, p.size).cpu().numpy()
        return [
            {**rle, "counts": rle["counts"].decode("ascii")}
            for rle in (coco_mask.encode(np.asfortranarray(b, dtype=np.uint8)) for b in bitmaps)
        ]

    runs: Runs = {"detectron2": theirs, "plugin": lambda: encode_masks(probs, boxes, p.size)}
    yield Row("masks to RLE", runs, masks_that_differ, "of the masks differ", 1e-3)


def made_up_masks(count: int, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor]:
    """Blobs as a trained network gives them, in boxes with sides log-uniform from 16 to 600 px.

    Returns:
        probabilities (R, 28, 28) and boxes (R, 4) inside an image of `size`.
    """
    generator = torch.Generator().manual_seed(0)
    limits = torch.tensor([size[1], size[0]])
    sides = torch.exp(torch.rand(count, 2, generator=generator) * np.log(600 / 16)) * 16
    sides = torch.minimum(sides, limits)
    corners = torch.rand(count, 2, generator=generator) * (limits - sides)
    coarse = torch.randn(count, 1, 7, 7, generator=generator) * 2
    bump = 4 - 8 * (torch.linspace(-1, 1, 28)[:, None] ** 2 + torch.linspace(-1, 1, 28) ** 2)
    logits = F.interpolate(coarse, size=(28, 28), mode="bicubic")[:, 0] + bump
    return logits.sigmoid().to(device), torch.cat([corners, corners + sides], dim=1).to(device)


def keypoint_decode(p: Peers) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    _, boxes = made_up_masks(p.detections, p.size, p.device)
    # One peak a map, somewhere, on a smooth ground.
    cells = torch.arange(56.0)
    peak = torch.rand(2, p.detections, 17, 1, generator=generator) * 56
    far = (cells - peak[0])[..., None, :] ** 2 + (cells - peak[1])[..., None] ** 2
    coarse = torch.randn(p.detections, 17, 14, 14, generator=generator)
    logits = F.interpolate(coarse, size=(56, 56), mode="bicubic") + 10 * torch.exp(-far / 18)
    logits = logits.to(p.device)
    runs: Runs = {
        "detectron2": lambda: heatmaps_to_keypoints(logits, boxes)[:, :, [0, 1, 3]],
        "plugin": lambda: decode_keypoints(logits, boxes),
    }
    difference = lambda a, b: float((a - b).abs().max())  # noqa: E731
    yield Row("keypoint decoding", runs, difference, "px or score", 1e-3)


def targets(p: Peers) -> Iterator[Row]:
    """Mask targets of one training image: 128 RoIs around 8 objects."""
    instances = ground_truth(p.size, 8, seed=0)
    rois = 128
    which = torch.arange(rois) % len(instances)
    noise = torch.randn(rois, 4, generator=torch.Generator().manual_seed(0)) * 5
    boxes = Boxes(instances.gt_boxes.tensor[which] + noise)
    boxes.clip(p.size)
    polygons = instances.gt_masks[which]
    height, width = p.size
    bitmaps = BitMasks.from_polygon_masks(polygons, height, width).to(p.device)
    on_device = boxes.tensor.to(p.device)
    for name, masks in (("polygons", polygons), ("bitmaps", bitmaps)):
        runs: Runs = {
            "detectron2": partial(masks.crop_and_resize, on_device, 28),
            "plugin": partial(mask_targets, [masks], [on_device], 28),
        }
        differ = lambda a, b: float((a.cpu() != b.cpu()).float().mean())  # noqa: E731
        yield Row(f"mask targets, {name}", runs, differ, "of the cells differ", 0.0)


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


def model(p: Peers) -> Iterator[Row]:
    runs: Runs = {
        "detectron2": lambda: p.stock(p.batch)[0]["instances"],
        "detectron2 tuned": lambda: p.tuned(p.batch)[0]["instances"],
        "plugin": lambda: p.plugin(p.batch)[0]["instances"],
        "torchvision": lambda: p.torchvision(p.torchvision_batch),
    }
    unit = "of the boxes lost"
    yield Row("whole model", runs, boxes_lost, unit, 0.01)
    compiled = {
        **runs,
        "detectron2 tuned": lambda: p.tuned_compiled(p.batch)[0]["instances"],
        "plugin": lambda: p.compiled(p.batch)[0]["instances"],
    }
    yield Row("whole model, compiled", compiled, boxes_lost, unit, 0.01)
    half = {
        **runs,
        "detectron2 tuned": _autocast(p, runs["detectron2 tuned"]),
        "plugin": lambda: p.bf16(p.batch)[0]["instances"],
    }
    # Random weights are harder on rounding than trained ones, see --trained.
    yield Row("whole model, bf16", half, boxes_lost, unit, None)
    to_results: Runs = {
        "detectron2": lambda: instances_to_coco_json(p.stock(p.batch)[0]["instances"], 0),
        "plugin": lambda: coco_results(p.plugin(p.batch)[0]["instances"], 0),
    }
    fewer = lambda a, b: abs(len(a) - len(b)) / len(b)  # noqa: E731
    yield Row("whole model, to COCO results", to_results, fewer, "of the number of results", 0.01)


def training(p: Peers) -> Iterator[Row]:
    """A step of 2 images: losses, gradients, SGD."""
    size = (p.training_side, p.training_side)
    batch = [
        {"image": picture(size, seed), "instances": ground_truth(size, 8, seed)} for seed in (0, 1)
    ]

    def step(model: nn.Module, half: bool) -> Callable[[], float]:
        stock = model is p.stock
        model = copy.deepcopy(model).train()
        # A rate of 0 does the same work and leaves both models what they are.
        optimizer = torch.optim.SGD(
            [q for q in model.parameters() if q.requires_grad], lr=0.0, momentum=0.9
        )
        arguments = (model, itertools.repeat(batch), optimizer)
        if half or not stock:
            dtype = torch.bfloat16 if half else None
            trainer = Trainer(*arguments, device=p.device, dtype=dtype)
        else:
            trainer = SimpleTrainer(*arguments)
        trainer.iter = 0

        def run() -> float:
            torch.manual_seed(0)  # the same RoIs are sampled
            with EventStorage() as trainer.storage:
                trainer.run_step()
                return trainer.storage.latest()["total_loss"][0]

        return run

    channels_last = copy.deepcopy(p.trainable).to(memory_format=torch.channels_last)
    loss = lambda a, b: abs(a - b) / b  # noqa: E731
    with torch.enable_grad():
        theirs = step(p.stock, False)
        for name, ours, tuned, half, allowed in (
            ("training step", channels_last, p.tuned, False, 1e-3),
            ("training step, contiguous", p.trainable, None, False, 1e-3),
            ("training step, bf16", channels_last, p.tuned, True, 0.05),
        ):
            runs: Runs = {"detectron2": theirs, "plugin": step(ours, half)}
            if tuned:
                runs["detectron2 tuned"] = step(tuned, half)
            yield Row(name, runs, loss, "of the loss", allowed)


def evaluation(p: Peers) -> Iterator[Row]:
    """COCO's AP of 5,000 images with 36,000 objects and 100 detections each, boxes and masks."""
    with tempfile.TemporaryDirectory() as folder:
        truth = made_up.made_up_ground_truth()
        dataset = made_up.register_made_up(Path(folder), truth)
        stock = made_up.stock_evaluator(dataset, made_up.made_up_predictions(truth))
        ours = made_up.our_evaluator(dataset, made_up.made_up_predictions(truth))
        runs: Runs = {"detectron2": _silent(stock.evaluate), "plugin": _silent(ours.evaluate)}

        def apart(a: Any, b: Any) -> float:
            return max(
                abs(a[task][key] - b[task][key])
                for task in b
                for key in b[task]
                if not math.isnan(b[task][key])
            )

        name = f"COCO evaluation, {ours.backend} beside pycocotools"
        yield Row(name, runs, apart, "AP", 1e-10, is_long=True)


def _silent(run: Callable[[], Any]) -> Callable[[], Any]:
    """Without what pycocotools prints."""

    def silently() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return run()

    return silently


STAGES: dict[str, Callable[[Peers], Iterator[Row]]] = {
    "backbone": backbone,
    "rpn": rpn,
    "box": box,
    "mask": mask,
    "keypoint": keypoint,
    "masks-to-rle": masks_to_rle,
    "keypoint-decode": keypoint_decode,
    "mask-targets": targets,
    "model": model,
    "training": training,
    "evaluation": evaluation,
}
