"""RLE masks against the bool tensor they stand for, in torch and in readers of `pred_masks`."""

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer
from pycocotools import mask as coco_mask
from torch import Tensor

from mask_rcnn_plugin.modeling import RLEMasks

SIZE = (60, 80)
Masks = RLEMasks | Tensor


@pytest.fixture
def bitmaps() -> Tensor:
    """Five overlapping masks: four bars, one with a hole, each of another height, and an empty."""
    masks = torch.zeros(5, *SIZE, dtype=torch.bool)
    for i in range(4):
        masks[i, : 5 * i + 5, 10 : 20 + i] = True
    masks[3, 3:6, 12:15] = False
    return masks


def encoded(bitmaps: Tensor) -> RLEMasks:
    arrays = [np.asfortranarray(b.numpy().astype(np.uint8)) for b in bitmaps]
    return RLEMasks([coco_mask.encode(a) for a in arrays], SIZE)


@pytest.fixture
def masks(bitmaps: Tensor) -> RLEMasks:
    return encoded(bitmaps)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The RLEs that are decoded from now on."""
    calls: list[dict] = []
    decode = coco_mask.decode
    monkeypatch.setattr(coco_mask, "decode", lambda rle: calls.append(rle) or decode(rle))
    return calls


def assert_equal(ours: Any, theirs: Any) -> None:
    """Of one type, shape and dtype, and equal, an RLEMasks being as good as a tensor."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, np.ndarray):
        assert (type(ours), ours.dtype) == (np.ndarray, theirs.dtype)
        assert np.array_equal(ours, theirs)
    elif isinstance(theirs, (list, tuple)):
        assert (type(ours), len(ours)) == (type(theirs), len(theirs))
        for a, b in zip(ours, theirs):
            assert_equal(a, b)
    else:
        assert (type(ours), ours) == (type(theirs), theirs)


# What needs no mask decoded, by what comes out.
CHOICES: dict[str, Callable[[Masks], Any]] = {
    "slice": lambda m: m[1:3],
    "every other": lambda m: m[::2],
    "slice beyond the end": lambda m: m[-2:100],
    "bool tensor": lambda m: m[torch.arange(len(m)) % 2 == 0],
    "bool tensor and the rest": lambda m: m[torch.arange(len(m)) % 2 == 0, ...],
    "no true": lambda m: m[torch.zeros(len(m), dtype=torch.bool)],
    "no index": lambda m: m[torch.zeros(0, dtype=torch.int64)],
    "empty list": lambda m: m[[]],
    "bool list": lambda m: m[[True] * len(m)],
    "bool array": lambda m: m[np.arange(len(m)) < 1],
    "all": lambda m: m[...],
    "cat": lambda m: torch.cat([m[1:], m[:0], m[:1]]),
    "cpu": lambda m: m.cpu(),
    "to a device": lambda m: m.to(device="cpu"),
    "to bool": lambda m: m.to(torch.bool),
    "detach": lambda m: m.detach(),
    "clone": lambda m: m.clone(),
    "contiguous": lambda m: m.contiguous(),
    "as_tensor": torch.as_tensor,
    "as BitMasks have it": lambda m: BitMasks(m).tensor,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "to another process": lambda m: pickle.loads(ForkingPickler.dumps(m)),
}
CHOICES_OF_SOME = {
    "long tensor": lambda m: m[torch.tensor([3, 0, 3])],
    "list": lambda m: m[[2, -1]],
    "array": lambda m: m[np.array([1, 2])],
}
SUMS: dict[str, Callable[[Masks], Any]] = {
    "shape": lambda m: (m.shape, m.size(0), m.dim(), m.ndim, m.numel()),
    "dtype and device": lambda m: (m.dtype, m.device, m.is_cuda, m.is_floating_point()),
    "length": len,
    "attributes": lambda m: (hasattr(m, "to"), hasattr(m, "polygons"), m.requires_grad),
    "areas": lambda m: m.sum(dim=(1, 2)),
    "areas by axis": lambda m: m.sum(axis=(-1, -2), keepdim=True),
    "float areas": lambda m: torch.sum(m, (2, 1), dtype=torch.float32),
    "sum": lambda m: m.sum(),
    "sum over three dimensions": lambda m: m.sum((0, 1, 2)),
    "any": lambda m: m.any(),
    "any of a function": torch.any,
    "any pixel of each": lambda m: m.any(dim=(1, 2)),
    "any pixel of each, kept": lambda m: torch.any(m, dim=(-2, -1), keepdim=True),
}
OPERATIONS: dict[str, Callable[[Masks], Any]] = {
    "union": lambda m: m.any(dim=0),
    "union by axis": lambda m: m.any(axis=0),
    "union of a function": lambda m: torch.any(m, dim=-3, keepdim=True),
    "any along a row": lambda m: m.any(-1),
    "sum over the masks": lambda m: m.sum(0),
    "all": lambda m: m.all(),
    "all of all": lambda m: m[:, :, :],
    "column": lambda m: m[:, 10:20, 5],
    "pixel": lambda m: m[:, 3, 12],
    "pixels": lambda m: m[:, torch.tensor([3, 4]), torch.tensor([12, 13])],
    "last column": lambda m: m[..., -1],
    "new axis": lambda m: m[:, None],
    "bool image": lambda m: m[torch.ones(m.shape, dtype=torch.bool)],
    "numpy": lambda m: m.numpy(),
    "SAHI's": lambda m: m.cpu().detach().numpy(),
    "asarray": np.asarray,
    "asarray of another dtype": lambda m: np.asarray(m, dtype=np.uint8),
    "from_dlpack": torch.from_dlpack,
    "as_tensor of another dtype": lambda m: torch.as_tensor(m, dtype=torch.float32),
    "iteration": list,
    "unbind": torch.unbind,
    "tolist": lambda m: m.tolist(),
    "float": lambda m: m.float(),
    "to a dtype": lambda m: m.to(torch.uint8),
    "to a device and dtype": lambda m: m.to("cpu", torch.float16),
    "flatten": lambda m: m.flatten(),
    "flattened masks": lambda m: m.flatten(1),
    "permute": lambda m: m.permute(1, 2, 0),
    "unsqueeze": lambda m: m.unsqueeze(1),
    "comparison with a number": lambda m: m > 0,
    "comparison": lambda m: m == m,
    "and": lambda m: m & torch.ones(SIZE, dtype=torch.bool),
    "or, from the right": lambda m: torch.zeros(SIZE, dtype=torch.bool) | m,
    "not": lambda m: ~m,
    "product": lambda m: m * 2.5,
    "where": lambda m: torch.where(m, 1, -1),
    "nonzero": lambda m: m.nonzero(),
    "stack": lambda m: torch.stack([m, m]),
    "cat with another dtype": lambda m: torch.cat([m, torch.ones(1, *SIZE, dtype=torch.int32)]),
    "cat after another dtype": lambda m: torch.cat([torch.ones(1, *SIZE, dtype=torch.int32), m]),
    "cat along another dimension": lambda m: torch.cat([m, m], dim=1),
    "equal": lambda m: torch.equal(m, m.float().bool()),
}
ONE = {
    "first": lambda m: m[0],
    "last": lambda m: m[-1],
    "NumPy's integer": lambda m: m[np.int64(2)],
    "tensor of an integer": lambda m: m[torch.tensor(2)],
    "pixels of one": lambda m: m[3, 2:10, 5:14],
    "column of one": lambda m: m[0, 10:20, 5],
}


@pytest.mark.parametrize(
    "operation", (CHOICES | SUMS | OPERATIONS).values(), ids=CHOICES | SUMS | OPERATIONS
)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_answers_as_a_tensor(
    bitmaps: Tensor, operation: Callable[[Masks], Any], count: int
) -> None:
    assert_equal(operation(encoded(bitmaps[:count])), operation(bitmaps[:count]))


@pytest.mark.parametrize("operation", (CHOICES_OF_SOME | ONE).values(), ids=CHOICES_OF_SOME | ONE)
def test_indexing(masks: RLEMasks, bitmaps: Tensor, operation: Callable[[Masks], Any]) -> None:
    assert_equal(operation(masks), operation(bitmaps))


@pytest.mark.parametrize(
    "operation", (CHOICES | CHOICES_OF_SOME).values(), ids=CHOICES | CHOICES_OF_SOME
)
def test_what_keeps_whole_masks_keeps_them_encoded(
    masks: RLEMasks, decodings: list[dict], operation: Callable[[Masks], Any]
) -> None:
    assert isinstance(operation(masks), RLEMasks)
    assert not decodings


@pytest.mark.parametrize("operation", SUMS.values(), ids=SUMS)
def test_what_needs_no_pixels_decodes_none(
    masks: RLEMasks, decodings: list[dict], operation: Callable[[Masks], Any]
) -> None:
    operation(masks)
    assert not decodings


@pytest.mark.parametrize(
    "operation", [*ONE.values(), lambda m: m.any(dim=0), lambda m: next(iter(m))]
)
def test_what_needs_one_bitmap_decodes_one(
    masks: RLEMasks, decodings: list[dict], operation: Callable[[Masks], Any]
) -> None:
    assert type(operation(masks)) is Tensor
    assert len(decodings) == 1


@pytest.mark.parametrize("index", [5, -6, [0, 5], torch.tensor([True] * 3), (0, 60), 1.5])
def test_a_wrong_index_is_torchs_error(masks: RLEMasks, bitmaps: Tensor, index: object) -> None:
    with pytest.raises(IndexError):
        bitmaps[index]
    with pytest.raises(IndexError):
        masks[index]


def set_data(masks: Masks) -> None:
    masks.data = torch.zeros(5, *SIZE, dtype=torch.bool)


IMPOSSIBLE: dict[str, Callable[[Masks], Any]] = {
    "an assignment": lambda m: m.__setitem__(0, False),
    "not": lambda m: m.logical_not_(),
    "and": lambda m: m.__iand__(torch.zeros(SIZE, dtype=torch.bool)),
    "or": lambda m: m.__ior__(torch.ones(SIZE, dtype=torch.bool)),
    "product": lambda m: m.__imul__(2),
    "copy": lambda m: m.copy_(torch.ones(SIZE)),
    "resize": lambda m: m.resize_(0),
    "data": set_data,
    "Python function": lambda m: m.apply_(lambda _: False),
    "Python function of two": lambda m: m.map_(torch.ones(5, *SIZE), lambda *_: False),
    "Python function of three": lambda m: m.map2_(m.float(), m.float(), lambda *_: False),
    "out": lambda m: torch.logical_not(torch.zeros(5, *SIZE), out=m),
    "one out of two": lambda m: torch.max(
        torch.zeros(2, 5, *SIZE, dtype=torch.bool), 0, out=(m, torch.zeros(5, *SIZE).long())
    ),
    "one of a list": lambda m: torch._foreach_zero_([torch.ones(2), m]),
    "address": lambda m: m.data_ptr(),
    "storage": lambda m: m.untyped_storage(),
    "shared memory": lambda m: m.share_memory_(),
}


@pytest.mark.parametrize("write", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_rle_masks_cannot_do_names_the_other_format(
    masks: RLEMasks, bitmaps: Tensor, write: Callable[[Masks], Any]
) -> None:
    with pytest.raises(RuntimeError, match='mask_format="bitmap"'):
        write(masks)
    assert torch.equal(masks, bitmaps)


def test_a_bitmap_is_a_copy(masks: RLEMasks, bitmaps: Tensor) -> None:
    masks[0][:] = True
    masks.tensor[:] = True
    assert torch.equal(masks, bitmaps)


def test_other_tensors_may_be_written_from_masks(masks: RLEMasks, bitmaps: Tensor) -> None:
    canvas = torch.zeros(5, *SIZE, dtype=torch.bool)
    canvas |= masks
    assert torch.equal(canvas, bitmaps)
    counts = torch.zeros(5, *SIZE)
    counts[masks] = 7
    assert counts.sum() == 7 * bitmaps.sum()


def test_decoded_tensors_are_plain_and_contiguous(masks: RLEMasks, bitmaps: Tensor) -> None:
    for ours, theirs in [(masks.tensor, bitmaps), (masks[3], bitmaps[3]), (masks.any(0), None)]:
        assert type(ours) is Tensor
        assert ours.is_contiguous()
        assert theirs is None or torch.equal(ours, theirs)


def test_device_is_that_of_decoded_masks(masks: RLEMasks, bitmaps: Tensor) -> None:
    moved = masks.to("meta")
    assert isinstance(moved, RLEMasks)
    assert moved.device.type == "meta"
    for part in (moved[1:], moved[0], moved.any(dim=0), moved.sum((1, 2)), moved > 0, moved.tensor):
        assert part.device.type == "meta"
    assert np.array_equal(np.asarray(moved), bitmaps.numpy())
    assert torch.equal(copy.deepcopy(moved).to("cpu"), bitmaps)


@pytest.mark.parametrize("weights_only", [False, True])
def test_saved_and_loaded(masks: RLEMasks, bitmaps: Tensor, weights_only: bool) -> None:
    file = io.BytesIO()
    torch.save({"masks": masks, "none": masks[:0]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    assert isinstance(loaded["masks"], RLEMasks)
    assert torch.equal(loaded["masks"], bitmaps)
    assert loaded["none"].shape == (0, *SIZE)


def test_under_inference_mode(masks: RLEMasks, bitmaps: Tensor) -> None:
    with torch.inference_mode():
        chosen = encoded(bitmaps)[1:]
        assert torch.equal(chosen.float(), bitmaps[1:].float())
    assert torch.equal(chosen.any(dim=0), bitmaps[1:].any(dim=0))


@pytest.mark.parametrize("count", [0, 1, 255, 256, 1000])
def test_as_many_masks_as_there_are(bitmaps: Tensor, count: int) -> None:
    """Parts of pycocotools count the masks of a call in a uint8."""
    bitmaps = bitmaps[torch.arange(count) % 5]
    masks = encoded(bitmaps)
    assert masks.sum((1, 2)).tolist() == bitmaps.sum((1, 2)).tolist()
    assert torch.equal(masks.any(dim=0), bitmaps.any(dim=0))
    assert torch.equal(masks, bitmaps)


def test_size_of_the_image(masks: RLEMasks) -> None:
    assert RLEMasks(masks.rles).shape == (5, *SIZE)
    assert RLEMasks([], SIZE).shape == (0, *SIZE)
    assert RLEMasks([]).shape == (0, 0, 0)
    with pytest.raises(ValueError, match=r"\(60, 80\).*\(80, 60\)"):
        RLEMasks(masks.rles, (80, 60))


def instances_of(masks: Masks) -> Instances:
    n = len(masks)
    boxes = torch.tensor([[10.0, 0, 20, 30], [11, 2, 30, 40], [12, 1, 14, 9]])
    return Instances(
        SIZE,
        pred_boxes=Boxes(boxes[torch.arange(n) % 3]),
        scores=torch.linspace(0.9, 0.3, n),
        pred_classes=torch.arange(n) % 2,
        pred_masks=masks,
    )


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_field_of_instances(bitmaps: Tensor, count: int) -> None:
    def fields(masks: Masks) -> list[Masks]:
        instances = instances_of(masks)
        chosen = [
            instances[instances.scores > 0.6],
            instances[:0],
            instances.to("cpu"),
            copy.deepcopy(instances),
            pickle.loads(pickle.dumps(instances)),
            Instances.cat([instances[1:], instances[:0], instances[:1]]),
            Instances.cat([instances[:0], instances[:0]]),
            *(instances[i] for i in range(count)),
        ]
        return [c.pred_masks for c in chosen]

    ours = fields(encoded(bitmaps[:count]))
    assert all(isinstance(m, RLEMasks) for m in ours)
    assert_equal(ours, fields(bitmaps[:count]))


def test_as_many_masks_as_instances(masks: RLEMasks) -> None:
    instances = instances_of(masks)
    with pytest.raises(AssertionError):
        instances.pred_masks = masks[:2]


@pytest.fixture
def metadata() -> Any:
    colors = [(255, 0, 0), (0, 128, 255)]
    return MetadataCatalog.get("mask_rle_test").set(thing_classes=["a", "b"], thing_colors=colors)


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)


def undrawn() -> np.ndarray:
    """The image as the visualizer gives it back, which older matplotlibs move by a pixel."""
    return Visualizer(image()).get_output().get_image()


@pytest.mark.parametrize("mode", list(ColorMode))
@pytest.mark.parametrize("count", [0, 1, 5])
def test_visualizer_draws_the_same(
    bitmaps: Tensor, metadata: Any, mode: ColorMode, count: int
) -> None:
    def draw(masks: Masks) -> np.ndarray:
        np.random.seed(0)  # colours are drawn at random
        visualizer = Visualizer(image(), metadata, instance_mode=mode)
        return visualizer.draw_instance_predictions(instances_of(masks)).get_image()

    ours = draw(encoded(bitmaps[:count]))
    assert np.array_equal(ours, draw(bitmaps[:count]))
    assert (ours != undrawn()).any() == (count > 0 or mode == ColorMode.IMAGE_BW)


@pytest.mark.parametrize("count", [0, 5])
def test_overlay_instances_draws_the_same(bitmaps: Tensor, count: int) -> None:
    def draw(masks: Masks) -> np.ndarray:
        colors = [[i / 5, 0.5, 1 - i / 5] for i in range(count)]
        visualizer = Visualizer(image())
        return visualizer.overlay_instances(masks=masks, assigned_colors=colors).get_image()

    ours = draw(encoded(bitmaps[:count]))
    assert np.array_equal(ours, draw(bitmaps[:count]))
    assert (ours != undrawn()).any() == (count > 0)


@pytest.mark.parametrize("mode", [ColorMode.IMAGE, ColorMode.IMAGE_BW])
def test_video_visualizer_draws_the_same(bitmaps: Tensor, metadata: Any, mode: ColorMode) -> None:
    def draw(masks: Masks) -> list[np.ndarray]:
        np.random.seed(0)
        video = VideoVisualizer(metadata, mode)
        frames = [masks, masks[1:], masks[:0]]
        return [
            video.draw_instance_predictions(image(), instances_of(m)).get_image() for m in frames
        ]

    ours = draw(encoded(bitmaps))
    assert_equal(ours, draw(bitmaps))
    assert (ours[0] != ours[1]).any()


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list")
@pytest.mark.parametrize("name", ["BBoxIOUTracker", "IOUWeightedHungarianBBoxIOUTracker"])
def test_trackers_give_the_same(bitmaps: Tensor, name: str) -> None:
    tracking = pytest.importorskip("detectron2.tracking")

    def track(masks: Masks) -> list[tuple[Any, ...]]:
        tracker = getattr(tracking, name)(
            video_height=SIZE[0],
            video_width=SIZE[1],
            max_num_instances=10,
            max_lost_frame_count=2,
            min_box_rel_dim=0.02,
            min_instance_period=0,
            track_iou_threshold=0.5,
        )
        first, second = instances_of(masks[:3]), instances_of(masks[1:3])
        frames = [tracker.update(frame) for frame in (first, second[:1], second)]
        return [(f.ID, f.pred_masks, f.pred_boxes.tensor) for f in frames]

    ours = track(encoded(bitmaps))
    assert_equal(ours, track(bitmaps))
    assert [len(masks) for _, masks, _ in ours] == [3, 3, 3]  # kept though lost


@pytest.mark.parametrize("count", [0, 5])
def test_supervision_reads_the_same(bitmaps: Tensor, count: int) -> None:
    supervision = pytest.importorskip("supervision")

    def read(masks: Masks) -> Any:
        return supervision.Detections.from_detectron2({"instances": instances_of(masks)})

    ours, theirs = read(encoded(bitmaps[:count])), read(bitmaps[:count])
    assert ours == theirs
    assert_equal(ours.mask, theirs.mask)


@pytest.mark.parametrize("count", [0, 5])
def test_stock_coco_json_is_the_same(bitmaps: Tensor, count: int) -> None:
    ours = instances_to_coco_json(instances_of(encoded(bitmaps[:count])), 7)
    assert ours == instances_to_coco_json(instances_of(bitmaps[:count]), 7)
    assert len(ours) == count
