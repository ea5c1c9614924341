import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

# Before torch, and for the processes that tests start too. The tests' tensors are small: threads
# that wait for each other are slow beside other work, and add up in another order.
os.environ["OMP_NUM_THREADS"] = "1"
# Before detectron2: whoever has COCO starts no training on it, and downloads no weights, here.
os.environ["DETECTRON2_DATASETS"] = os.devnull

import mask_rcnn_plugin  # noqa: F401, I001  before anything of detectron2's, see compat.py

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.data.synthetic import write_dataset
from mask_rcnn_plugin.training import setup_datasets

# What processes that tests fork find imported. Neither detectron2 nor the plugin: what they do when
# they are imported, they do in each process.
multiprocessing.set_forkserver_preload(
    [
        *("torch", "torchvision", "torch.distributed.run", "torch.utils.tensorboard"),
        *("cv2", "matplotlib.pyplot", "pycocotools.mask", "PIL.Image", "tabulate", "tqdm"),
        *("fvcore.common.config", "iopath.common.file_io", "omegaconf"),
    ]
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers for a test, whichever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """A program that a test runs sets up the log; the next test's `caplog` sees it as before."""
    names = ("mask_rcnn_plugin", "detectron2", "fvcore", "train_stages")
    before = [(log, log.propagate, log.level, log.handlers[:]) for log in map(getLogger, names)]
    yield
    for log, propagate, level, handlers in before:
        log.propagate, log.handlers = propagate, handlers
        log.setLevel(level)
    setup_logger.cache_clear()  # the next program sets it up again


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn COCO-format dataset: 12 images to train, 6 to validate, 64 px."""
    root = tmp_path_factory.mktemp("data") / "toy"
    write_dataset(root, train=12, val=6, size=64, seed=0)
    return root


@pytest.fixture(scope="session")
def run_python(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs what `python -W ignore ...` would, see forked.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))  # other processes import it too
        run_forked = importlib.import_module("forked").run_forked

        def run(*command: object, **settings: Any) -> subprocess.CompletedProcess[str]:
            folder = tmp_path_factory.mktemp("outputs")
            return run_forked([str(part) for part in command], folder, **settings)

        yield run


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """A block in which the system refuses to write files beyond so many bytes."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limit


@pytest.fixture
def toy_overrides(toy_dataset: Path, tmp_path: Path) -> list[str]:
    """Overrides that train NAME+synthetic on the toy dataset, for two steps."""
    return [
        f"dataset.synthetic.root={toy_dataset}",
        "dataset.synthetic.train=12",
        "dataset.synthetic.val=6",
        "dataset.synthetic.size=64",
        "dataloader.train.total_batch_size=2",
        "train.max_iter=2",
        "train.device=cpu",
        f"train.output_dir={tmp_path / 'out'}",
    ]


@pytest.fixture(scope="session")
def trained(toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves of a model that finds boxes, masks and keypoints of 20 things in any
    image. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = get_config(
        "table5_multitask/keypoint_and_mask+synthetic",
        [
            f"dataset.train.json={toy_dataset}/train.json",
            f"dataset.train.images={toy_dataset}/train",
            f"dataset.test.json={toy_dataset}/val.json",
            f"dataset.test.images={toy_dataset}/val",
            "model.roi_heads.box_predictor.test_score_thresh=0.0",
            "train.device=cpu",
        ],
    )
    setup_datasets(cfg)
    torch.manual_seed(0)
    torch.save({"model": instantiate(cfg.model).state_dict()}, folder / "model_final.pth")
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    return folder


@pytest.fixture
def demo(trained: Path, toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a photo and, in output/demo, what a training leaves."""
    shutil.copytree(trained, tmp_path / "output" / "demo")
    photo = cv2.imread(str(toy_dataset / "val" / "000000.jpg"))
    for folder in (tmp_path, tmp_path / "output" / "demo"):
        cv2.imwrite(str(folder / "photo.jpg"), cv2.resize(photo, (700, 700)))  # some tiles
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def redraw() -> Callable[..., None]:
    """Draws a module's parameters and batch-norm statistics anew, far from initialisation."""

    def draw(module: nn.Module, gain: float = 1.5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, value in module.state_dict().items():
            fan_in = value[0].numel() if value.dim() > 1 else 1
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var") or (name.endswith("norm.weight")):
                noise = 0.5 + noise.abs()
            elif value.dim() > 1:
                noise *= gain / fan_in**0.5
            elif value.dim() == 1:
                noise *= 0.3
            else:
                continue
            value.copy_(noise)

    return draw


@pytest.fixture
def assert_near() -> Callable[..., None]:
    """Two tensors agree to a part of the largest value, or of `least` if that is larger."""

    def check(
        ours: Tensor, theirs: Tensor, what: str = "", least: float = 0.0, tolerance: float = 1e-5
    ) -> None:
        assert ours.shape == theirs.shape, what
        assert ours.dtype == theirs.dtype, what
        if theirs.numel():
            error = (ours.double() - theirs.double()).abs().max()
            assert error <= tolerance * max(theirs.abs().max(), least), f"{what}: off by {error}"

    return check


@pytest.fixture
def assert_same_training(assert_near: Callable[..., None]) -> Callable[..., None]:
    """Two models' losses, and the gradients of all their parameters and of `inputs`, agree."""

    def check(
        ours: tuple[nn.Module, dict[str, Tensor], list[Tensor]],
        theirs: tuple[nn.Module, dict[str, Tensor], list[Tensor]],
    ) -> None:
        (model, losses, inputs), (their_model, their_losses, their_inputs) = ours, theirs
        assert losses.keys() == their_losses.keys()
        for name, loss in losses.items():
            assert their_losses[name] > 0.01, f"{name} says nothing"
            assert_near(loss, their_losses[name], name)
        sum(losses.values()).backward()
        sum(their_losses.values()).backward()
        their_parameters = dict(their_model.named_parameters())
        # A softmax over cells does not feel the last bias: its gradient is rounding alone.
        grads = [q.grad for q in their_parameters.values() if q.grad is not None]
        least = 0.1 * max(grad.abs().max().item() for grad in grads)
        for name, p in model.named_parameters():
            q = their_parameters.pop(name)
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                assert_near(p.grad, q.grad, name, least)
        assert not their_parameters
        for x, y in zip(inputs, their_inputs, strict=True):
            assert y.grad.abs().max() > 0
            assert_near(x.grad, y.grad, "input")

    return check


@pytest.fixture
def assert_idle() -> Callable[..., None]:
    """A loss is zero and its gradient a zero for every trainable parameter."""

    def check(loss: Tensor, module: nn.Module) -> None:
        module.zero_grad()
        assert loss.item() == 0
        loss.backward()
        for name, p in module.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, name
                assert p.grad.eq(0).all(), name

    return check


@pytest.fixture
def ground_truth() -> Callable[..., Instances]:
    """Three objects of classes 0, 2, 1 in a 96 x 128 image: a square, a triangle, a bar."""

    def make(count: int = 3, image_size: tuple[int, int] = (96, 128)) -> Instances:
        polygons = [
            [10, 10, 50, 10, 50, 50, 10, 50],
            [60, 80, 100, 80, 80, 20],
            [5, 60, 45, 60, 45, 85, 5, 85],
        ]
        boxes = torch.tensor([[10.0, 10, 50, 50], [60, 20, 100, 80], [5, 60, 45, 85]])
        keypoints = torch.tensor(
            [
                [[20.0, 15, 2], [49, 30, 1], [0, 0, 0]],
                [[80, 21, 2], [100, 80, 2], [90, 70, 1]],
                [[10, 61, 1], [30, 84, 2], [44.5, 62, 2]],
            ]
        )
        return Instances(
            image_size,
            gt_boxes=Boxes(boxes[:count]),
            gt_classes=torch.tensor([0, 2, 1])[:count],
            gt_masks=PolygonMasks([[p] for p in polygons[:count]]),
            gt_keypoints=Keypoints(keypoints[:count]),
        )

    return make


@pytest.fixture
def proposals(ground_truth: Callable[..., Instances]) -> Callable[..., Instances]:
    """Proposals of one image as the heads get them in training: boxes beside the objects."""

    def make(count: int = 3) -> Instances:
        instances = ground_truth(count)
        shift = torch.tensor([[2.0, -3, 4, 1], [-5, 2, 3, -4], [1, 1, -2, 3]])[:count]
        if not count:  # as detectron2 gives an image without positives
            return Instances(
                (96, 128),
                proposal_boxes=Boxes(torch.zeros(0, 4)),
                gt_classes=torch.zeros(0, dtype=torch.int64),
            )
        instances.proposal_boxes = Boxes(instances.gt_boxes.tensor + shift)
        return instances

    return make


@pytest.fixture
def stock_meta_arch() -> Callable[[nn.Module], nn.Module]:
    """Puts detectron2's meta-architecture around a model's parts."""

    def build(model: nn.Module) -> nn.Module:
        return GeneralizedRCNN(
            backbone=model.backbone,
            proposal_generator=model.proposal_generator,
            roi_heads=model.roi_heads,
            pixel_mean=model.pixel_mean.flatten().tolist(),
            pixel_std=model.pixel_std.flatten().tolist(),
        ).eval()

    return build


@pytest.fixture
def scripted_fields() -> dict[str, type]:
    """The fields of `Instances` that detectron2's scripting has to be told."""
    return {
        "proposal_boxes": Boxes,
        "objectness_logits": Tensor,
        "pred_boxes": Boxes,
        "scores": Tensor,
        "pred_classes": Tensor,
        "pred_masks": Tensor,
        "pred_keypoints": Tensor,
    }
