"""What a step costs a GPU besides arithmetic: waits, copies, operators, counted on a CPU."""

from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Keypoints
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmark.cuda_rules import Cost, CudaRules
from benchmark.peers import stock_detectron2
from benchmark.stages import ground_truth, picture
from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import get_config

SIDE = 320
IMAGES = 2
OBJECTS = 4
DETECTIONS = 100
# Counts don't depend on widths, and are soon there.
NARROW = [
    "model.backbone.width=8",
    "model.proposal_generator.post_nms_topk=[1000,1000]",
    f"dataset.test.max_detections={DETECTIONS}",
]
NARROW_FPN = [*NARROW, "model.backbone.fpn_channels=16", "model.roi_heads.box_head.fc_dims=[32,32]"]
NARROW_MASK = "model.roi_heads.mask_head.conv_dims=[16,16,16,16,16]"
NARROW_KEYPOINT = "model.roi_heads.keypoint_head.conv_dims=[16,16,16,16,16,16,16,16]"
ROWS = {
    "masks": ("table2a_backbone/r50_fpn", [*NARROW_FPN, NARROW_MASK]),
    "masks and keypoints": (
        "table4_keypoints/keypoint_and_mask",
        [*NARROW_FPN, NARROW_MASK, NARROW_KEYPOINT],
    ),
}


def batch(
    has_keypoints: bool = False, size: tuple[int, int] = (SIDE, SIDE), objects: int = OBJECTS
) -> list[dict[str, Any]]:
    """Images with ground truth, as detectron2's mapper gives them."""
    items = []
    for seed in range(IMAGES):
        target = ground_truth(size, objects, seed)
        if has_keypoints:
            target.gt_classes.zero_()
            target.gt_keypoints = _keypoints(target.gt_boxes, seed)
        item = {"image": picture(size, seed), "instances": target}
        items.append(item | {"height": size[0], "width": size[1]})
    return items


def _keypoints(boxes: Boxes, seed: int, count: int = 17) -> Keypoints:
    """Visible ones, anywhere in each box."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(len(boxes), count, 2, generator=generator)
    corners = boxes.tensor[:, None]
    xy = corners[..., :2] + places * (corners[..., 2:] - corners[..., :2])
    return Keypoints(torch.cat([xy, torch.full((*xy.shape[:2], 1), 2.0)], dim=2))


def training_step(model: nn.Module, images: list[dict[str, Any]]) -> tuple[Cost, dict[str, Tensor]]:
    """Of a step in which no statistics are due, with its losses; the trainer's own is not in it."""
    with CudaRules() as cuda, torch.enable_grad():
        model.to("cuda").train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, foreach=True)
        with EventStorage():
            for _ in range(2):  # a first step makes what is kept
                optimizer.zero_grad()
                with cuda.counted() as cost:
                    losses = model(images)
                    sum(losses.values()).backward()
                    optimizer.step()
        return cost, {name: loss.detach().cpu() for name, loss in losses.items()}


@torch.no_grad()
def inference(model: nn.Module, images: list[dict[str, Any]]) -> tuple[Cost, list[Any]]:
    """Of a batch, with its results."""
    with CudaRules() as cuda:
        model.to("cuda").eval()
        for _ in range(2):
            with cuda.counted() as cost:
                results = model(images)
        return cost, [result["instances"].to("cpu") for result in results]


def peers(config: DictConfig, images: list[dict[str, Any]]) -> dict[str, Any]:
    """A config's model of detectron2's classes, which finds things, and of the plugin's."""
    stock, ours = stock_detectron2(config), instantiate(config)
    draw_like_trained(stock, images, num_candidates=20 * DETECTIONS)
    ours.load_state_dict(stock.state_dict())
    ours.roi_heads.box_predictor.test_score_thresh = stock.roi_heads.box_predictor.test_score_thresh
    return {"detectron2": stock, "plugin": ours}


def counts() -> list[dict[str, Any]]:
    """Training and inference of detectron2's model and the plugin's, not optimised."""
    rows = []
    for name, (config, overrides) in ROWS.items():
        images = batch("keypoint" in name)
        models = peers(get_config(config, overrides).model, images)
        for what, count in (("training step", training_step), ("inference", inference)):
            costs = {peer: count(model, images)[0] for peer, model in models.items()}
            numbers = {peer: cost.totals() for peer, cost in costs.items()}
            rows.append({"name": f"{what}, {name}", "counts": numbers})
    return rows
