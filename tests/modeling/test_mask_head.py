"""Mask heads: parity with detectron2's, the k-th mask alone, empty inputs, both front ends."""

from collections.abc import Callable

import pytest
import torch
from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead, build_mask_head
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mask_rcnn_plugin import add_mask_rcnn_config
from mask_rcnn_plugin.modeling import MaskRCNNFCNHead, MaskRCNNMLPHead
from mask_rcnn_plugin.modeling.mask_loss import IndependentMasks, MultinomialMasks

Check = Callable[..., None]
Make = Callable[..., Instances]

SHAPE = ShapeSpec(channels=6, height=7, width=7)


def fcn(num_classes: int = 3, loss_type: str = "sigmoid", **kwargs: object) -> MaskRCNNFCNHead:
    kwargs = {"conv_dims": [8, 8], **kwargs}
    return MaskRCNNFCNHead(SHAPE, num_classes=num_classes, loss_type=loss_type, **kwargs)


def mlp(num_classes: int = 3, loss_type: str = "sigmoid", **kwargs: object) -> MaskRCNNMLPHead:
    kwargs = {"fc_dims": [16, 12], "mask_side": 14, **kwargs}
    return MaskRCNNMLPHead(SHAPE, num_classes=num_classes, loss_type=loss_type, **kwargs)


HEADS = pytest.mark.parametrize("make", [fcn, mlp])
LOSSES = pytest.mark.parametrize("loss_type", ["sigmoid", "softmax"])
NUMBERS_OF_CLASSES = pytest.mark.parametrize("num_classes", [1, 3])


def detections(*classes: list[int]) -> list[Instances]:
    return [
        Instances((96, 128), pred_classes=torch.tensor(of_image, dtype=torch.int64))
        for of_image in classes
    ]


@pytest.mark.parametrize(
    ("num_classes", "conv_dims", "conv_norm"),
    [(3, [8, 8, 10], ""), (1, [8, 8], ""), (3, [8], ""), (3, [32, 32], "GN")],
)
def test_fcn_parity_in_training(
    num_classes: int,
    conv_dims: list[int],
    conv_norm: str,
    redraw: Check,
    proposals: Make,
    assert_same_training: Check,
) -> None:
    arguments = {"num_classes": num_classes, "conv_dims": conv_dims, "conv_norm": conv_norm}
    theirs = MaskRCNNConvUpsampleHead(SHAPE, **arguments, loss_weight=2.5)
    redraw(theirs)
    ours = MaskRCNNFCNHead(SHAPE, **arguments, loss_weight=2.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    batch = [proposals(2), proposals(0), proposals(3)]
    x = torch.randn(5, 6, 7, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    with EventStorage():
        expected = theirs(y, batch)
    assert_same_training((ours, ours(x, batch), [x]), (theirs, expected, [y]))


@pytest.mark.parametrize("num_classes", [1, 3])
def test_fcn_parity_in_inference(num_classes: int, redraw: Check, assert_near: Check) -> None:
    theirs = MaskRCNNConvUpsampleHead(SHAPE, num_classes=num_classes, conv_dims=[8, 8]).eval()
    redraw(theirs)
    ours = fcn(num_classes).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 6, 7, 7, generator=torch.Generator().manual_seed(1))
    assert_near(ours.layers(x), theirs.layers(x))
    classes = [[0, 0], [], [0, 0]] if num_classes == 1 else [[2, 0], [], [1, 2]]
    result, expected = ours(x, detections(*classes)), theirs(x, detections(*classes))
    for i, j in zip(result, expected, strict=True):
        assert_near(i.pred_masks, j.pred_masks)
    assert (expected[0].pred_masks - 0.5).abs().max() > 0.3


@HEADS
@NUMBERS_OF_CLASSES
def test_masks_of_single_classes_are_those_of_all(
    make: Callable[..., nn.Module], num_classes: int, redraw: Check, assert_near: Check
) -> None:
    head = make(num_classes)
    redraw(head)
    features = head.features(torch.randn(4, 6, 7, 7)).detach().requires_grad_()
    classes = torch.tensor([2, 0, 1, 2]) % num_classes
    every = head.all_maps(features)
    assert every.shape == (4, num_classes, 14, 14)
    one = head.class_maps(features, classes)
    assert one.abs().max() > 1
    expected = every[torch.arange(4), classes]
    assert_near(one, expected)
    inputs = [features, head.predictor.weight, head.predictor.bias]
    weights = torch.randn(one.shape)
    for ours, theirs in zip(
        torch.autograd.grad((one * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
    ):
        assert theirs.abs().max() > 0.1
        assert_near(ours, theirs)


def test_mlp_layers_by_hand(redraw: Check) -> None:
    head = mlp()
    redraw(head)
    x = torch.randn(2, 6, 7, 7)
    hidden = (x.reshape(2, 294) @ head.mask_fc1.weight.T + head.mask_fc1.bias).clamp(min=0)
    hidden = (hidden @ head.mask_fc2.weight.T + head.mask_fc2.bias).clamp(min=0)
    out = hidden @ head.predictor.weight.T + head.predictor.bias
    torch.testing.assert_close(head.layers(x), out.reshape(2, 3, 14, 14))


@pytest.mark.parametrize("fc_dims", [[], [32], [32, 32, 32]])
def test_mlp_widths(fc_dims: list[int]) -> None:
    head = mlp(fc_dims=fc_dims)
    inputs = [6 * 7 * 7, *fc_dims]
    expected = {f"mask_fc{i + 1}.weight": (d, inputs[i]) for i, d in enumerate(fc_dims)}
    expected["predictor.weight"] = (3 * 14 * 14, inputs[-1])
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items() if k.endswith("weight")}
    assert shapes == expected
    # Each output of the last layer has a cell of its own: class, row, column.
    nn.init.zeros_(head.predictor.weight)
    head.predictor.bias.data = torch.arange(3 * 14 * 14.0)
    logits = head.layers(torch.randn(1, 6, 7, 7))
    assert logits[0, 2, 5, 11] == 2 * 196 + 5 * 14 + 11


@HEADS
def test_sigmoid_gradient_reaches_the_rois_own_class_only(
    make: Callable[..., nn.Module], redraw: Check, proposals: Make
) -> None:
    head = make(num_classes=4)
    redraw(head)
    batch = [proposals(2)]  # of classes 0 and 2
    head(torch.randn(2, 6, 7, 7), batch)["loss_mask"].backward()
    for p in (head.predictor.weight, head.predictor.bias):
        by_class = p.grad.reshape(4, -1)
        assert by_class[[1, 3]].eq(0).all()
        assert by_class[[0, 2]].ne(0).any(dim=1).all()


@HEADS
def test_softmax_gradient_reaches_every_class_and_background(
    make: Callable[..., nn.Module], redraw: Check, proposals: Make
) -> None:
    head = make(4, "softmax")
    redraw(head)
    head(torch.randn(2, 6, 7, 7), [proposals(2)])["loss_mask"].backward()
    assert head.predictor.bias.grad.reshape(5, -1).ne(0).any(dim=1).all()


def constant_maps(head: nn.Module, values: list[float]) -> None:
    """Makes the logits of each class the same number everywhere."""
    nn.init.zeros_(head.predictor.weight)
    cells = head.predictor.bias.numel() // len(values)
    head.predictor.bias.data = torch.tensor(values).repeat_interleave(cells)


def full_and_empty(batch: Instances) -> list[Instances]:
    """Two RoIs: a square that fills its box, called class 2, and an object outside its box."""
    batch.gt_classes = torch.tensor([2, 0])
    batch.proposal_boxes = Boxes(torch.tensor([[10.0, 10, 50, 50], [0, 0, 20, 20]]))
    return [batch]


@HEADS
def test_sigmoid_loss_by_hand(make: Callable[..., nn.Module], proposals: Make) -> None:
    head = make(loss_weight=3.0)
    constant_maps(head, [4.0, -5.0, -2.0])
    loss = head(torch.randn(2, 6, 7, 7), full_and_empty(proposals(2)))["loss_mask"]
    inside, outside = nn.functional.softplus(torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(loss, 3 * (inside + outside) / 2)


@HEADS
def test_softmax_loss_by_hand(make: Callable[..., nn.Module], proposals: Make) -> None:
    head = make(3, "softmax", loss_weight=3.0)
    values = [4.0, -5.0, -2.0, 1.0]
    constant_maps(head, values)
    loss = head(torch.randn(2, 6, 7, 7), full_and_empty(proposals(2)))["loss_mask"]
    log_probs = torch.tensor(values).log_softmax(0)
    torch.testing.assert_close(loss, -3 * (log_probs[2] + log_probs[3]) / 2)


@HEADS
@pytest.mark.parametrize(("loss_type", "background"), [("sigmoid", []), ("softmax", [0.5])])
def test_inference_by_hand(
    make: Callable[..., nn.Module], loss_type: str, background: list[float]
) -> None:
    head = make(3, loss_type).eval()
    values = torch.tensor([4.0, -5.0, 1.0, *background])
    constant_maps(head, values.tolist())
    results = head(torch.randn(3, 6, 7, 7), detections([2], [], [0, 1]))
    probs = values.softmax(0) if background else values.sigmoid()
    assert [i.pred_masks.shape for i in results] == [(n, 1, 14, 14) for n in (1, 0, 2)]
    got = torch.cat([i.pred_masks for i in results])
    torch.testing.assert_close(got, probs[[2, 0, 1]].view(3, 1, 1, 1).expand_as(got))


@HEADS
@LOSSES
def test_class_agnostic_head_serves_every_class(
    make: Callable[..., nn.Module], loss_type: str, redraw: Check, proposals: Make
) -> None:
    head = make(1, loss_type)
    redraw(head)
    x, batch = torch.randn(3, 6, 7, 7), [proposals(3)]
    loss = head(x, batch)["loss_mask"]
    batch[0].gt_classes = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(loss, head(x, batch)["loss_mask"])
    head.eval()
    several, zeros = head(x, detections([2, 0, 1])), head(x, detections([0, 0, 0]))
    torch.testing.assert_close(several[0].pred_masks, zeros[0].pred_masks)


@HEADS
@LOSSES
@NUMBERS_OF_CLASSES
@pytest.mark.parametrize("images", [1, 2])
def test_no_positive_roi(
    make: Callable[..., nn.Module],
    loss_type: str,
    num_classes: int,
    images: int,
    proposals: Make,
    assert_idle: Check,
) -> None:
    head = make(num_classes, loss_type)
    losses = head(torch.zeros(0, 6, 7, 7), [proposals(0)] * images)
    assert_idle(losses["loss_mask"], head)


@HEADS
@LOSSES
@NUMBERS_OF_CLASSES
def test_no_detection(make: Callable[..., nn.Module], loss_type: str, num_classes: int) -> None:
    head = make(num_classes, loss_type).eval()
    results = head(torch.zeros(0, 6, 7, 7), detections([], []))
    assert [i.pred_masks.shape for i in results] == [(0, 1, 14, 14)] * 2


@HEADS
def test_image_without_positives_beside_one_with(
    make: Callable[..., nn.Module], redraw: Check, proposals: Make
) -> None:
    head = make()
    redraw(head)
    x = torch.randn(3, 6, 7, 7)
    alone = head(x, [proposals(3)])["loss_mask"]
    beside = head(x, [proposals(0), proposals(3), proposals(0)])["loss_mask"]
    torch.testing.assert_close(alone, beside, rtol=0, atol=0)


@HEADS
@LOSSES
def test_bfloat16_autocast(
    make: Callable[..., nn.Module], loss_type: str, redraw: Check, proposals: Make
) -> None:
    head = make(3, loss_type)
    redraw(head, gain=1.0)
    x, batch = torch.randn(3, 6, 7, 7), [proposals(3)]
    exact = head(x, batch)["loss_mask"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(x, batch)["loss_mask"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


@HEADS
def test_unknown_loss_type(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="loss_type is 'bce', must be one of"):
        make(3, "bce")


def test_fcn_needs_a_deconvolution() -> None:
    with pytest.raises(ValueError, match="conv_dims is empty"):
        fcn(conv_dims=[])


def test_mlp_needs_height_and_width() -> None:
    with pytest.raises(ValueError, match="need its height and width"):
        MaskRCNNMLPHead(ShapeSpec(channels=6), num_classes=3)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("head", "keys", "lazy"),
    [
        (MaskRCNNFCNHead, ["NUM_CONV", 4, "CONV_DIM", 8], {"conv_dims": [8] * 5}),
        (MaskRCNNFCNHead, ["NUM_CONV", 0, "CONV_DIM", 8], {"conv_dims": [8]}),
        (
            MaskRCNNFCNHead,
            ["NUM_CONV", 1, "CONV_DIM", 32, "NORM", "GN"],
            {"conv_dims": [32, 32], "conv_norm": "GN"},
        ),
        (MaskRCNNMLPHead, ["FC_DIMS", [16, 12]], {"fc_dims": [16, 12], "mask_side": 14}),
        (MaskRCNNMLPHead, ["FC_DIMS", []], {"fc_dims": [], "mask_side": 14}),
    ],
)
@LOSSES
@pytest.mark.parametrize("agnostic", [False, True])
def test_yaml_and_lazy_config_give_equal_heads(
    head: type, keys: list[object], lazy: dict[str, object], loss_type: str, agnostic: bool
) -> None:
    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    cfg.MODEL.ROI_MASK_HEAD.NAME = head.__name__
    cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.LOSS_TYPE = loss_type
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = agnostic
    for key, value in zip(keys[::2], keys[1::2]):
        cfg.MODEL.ROI_MASK_HEAD[key] = value
    from_yaml = build_mask_head(cfg, SHAPE)
    from_lazy = instantiate(
        LazyCall(head)(
            input_shape=LazyCall(ShapeSpec)(channels=6, height=7, width=7),
            num_classes=1 if agnostic else 5,
            loss_type=loss_type,
            **lazy,
        )
    )
    assert type(from_yaml) is type(from_lazy) is head
    assert shapes(from_yaml) == shapes(from_lazy)
    masks = {"sigmoid": IndependentMasks, "softmax": MultinomialMasks}[loss_type]
    x, classes = torch.randn(2, 6, 7, 7), 1 if agnostic else 5
    for built in (from_yaml, from_lazy):
        assert type(built.masks) is masks
        maps = built.all_maps(built.features(x))
        assert maps.shape == (2, classes + (loss_type == "softmax"), 14, 14)
        assert built.layers(x).shape == (2, classes, 14, 14)


def test_predictor_sees_relu_features(redraw: Check) -> None:
    head = fcn()
    redraw(head)
    features: Tensor = head.features(torch.randn(2, 6, 7, 7))
    assert features.shape == (2, 8, 14, 14)
    assert features.min() == 0


def cost(head: nn.Module, training: bool) -> tuple[int, int]:
    """Multiplications of the head on 6 RoIs, and the largest tensor made on the way."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            out = func(*args, **(kwargs or {}))
            # An activation, or its gradient: the weights themselves have K rows.
            if isinstance(out, Tensor) and out.shape[:1] == (6,):
                self.numel = max(self.numel, out.numel())
            return out

    head.train(training)
    x = torch.randn(6, 6, 7, 7, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 2, 1, 2, 0, 3])
    with FlopCounterMode(display=False) as flops, Largest() as largest:
        if training:
            maps = head.masks.maps(head, head.features(x), classes)
            head.masks.loss(maps, torch.ones(6, 14, 14), classes).backward()
        else:
            head(x, detections(classes.tolist()))
    return flops.get_total_flops(), largest.numel


@HEADS
@pytest.mark.parametrize("training", [True, False])
def test_cost_does_not_grow_with_the_number_of_classes(
    make: Callable[..., nn.Module], training: bool
) -> None:
    few, many = (cost(make(num_classes=k), training) for k in (4, 400))
    assert few[0] > 10_000
    assert many == few


def test_computing_every_class_would_grow() -> None:
    x = torch.randn(6, 8, 14, 14)
    flops = []
    for k in (4, 400):
        with FlopCounterMode(display=False) as counter:
            fcn(num_classes=k).all_maps(x)
        flops.append(counter.get_total_flops())
    assert flops[1] == 100 * flops[0]
