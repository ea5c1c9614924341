import io
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from omegaconf import DictConfig
from torch import nn

import train
from mask_rcnn_plugin.data import annotation_file, coco
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.fast.folding import fold_frozen_batch_norm
from mask_rcnn_plugin.training import checkpoint
from mask_rcnn_plugin.training.checkpoint import SaveError
from mask_rcnn_plugin.training.preemption import EXIT_CODE
from mask_rcnn_plugin.training.preflight import check_datasets
from train import do_train


class Losses(HookBase):
    """What each step computed, as it was, before any smoothing."""

    def __init__(self) -> None:
        self.of: dict[int, dict[str, float]] = {}

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        names = [name for name in latest if "loss" in name or name == "lr"]
        self.of[self.trainer.iter] = {name: latest[name][0] for name in names}


class Stop(HookBase):
    """Ends a training after an iteration as a signal does."""

    def __init__(self, iteration: int, number: signal.Signals | None = None) -> None:
        self.iteration, self.number = iteration, number

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration and self.number:
            os.kill(os.getpid(), self.number)

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration and not self.number:
            raise KeyboardInterrupt


def test_the_training_set_is_decoded_once(
    build: Any, monkeypatch: pytest.MonkeyPatch, toy_dataset: Path
) -> None:
    """By registration, count of epochs, check and loader, and is gone before the first step."""
    decode, decoded = annotation_file.decode_document, list[str]()
    for module in (annotation_file, coco):
        counted = lambda file: decoded.append(file) or decode(file)  # noqa: E731
        monkeypatch.setattr(module, "decode_document", counted)
    cfg = build("out", f"dataset={toy_dataset}", "train.epochs=1")
    file = cfg.dataset.train.json
    train.complete(cfg)
    check_datasets(cfg, "a config")
    assert annotation_file.kept_document(file)
    with pytest.raises(KeyboardInterrupt):
        train.do_train(cfg, extra_hooks=[Stop(0)])
    assert (decoded.count(file), annotation_file.kept_document(file)) == (1, None)


def test_losses_are_those_of_detectron2s_own_trainer(build: Any, score: Any) -> None:
    """In the order of tools/lazyconfig_train_net.py, with `SimpleTrainer`."""
    score(1.0)
    plain = ("train.max_iter=3", "train.channels_last=False", "train.amp.enabled=False")
    ours, theirs = Losses(), Losses()
    do_train(build("ours", *plain), extra_hooks=[ours])
    cfg = build("theirs", *plain)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    stock = SimpleTrainer(model, instantiate(cfg.dataloader.train), optimizer)
    stock.register_hooks([hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)), theirs])
    stock.train(0, 3)
    assert ours.of.keys() == theirs.of.keys() == {0, 1, 2}
    for iteration, losses in theirs.of.items():
        assert ours.of[iteration] == pytest.approx(losses, rel=1e-7)
    assert ours.of[2]["total_loss"] != ours.of[0]["total_loss"]


def test_a_compiled_backbone_trains_alike_and_is_resumed(
    build: Any, score: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced but run as it is, as kernels take minutes to make; see the next test for these."""
    traced: list[Any] = []

    def compile_(function: Any, **options: Any) -> Any:
        assert options == {"dynamic": True}
        traced.append(function)
        return dynamo(function, backend="eager", **options)

    dynamo = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    score(*[1.0] * 2)
    keys = ("train.max_iter=3", "train.checkpointer.period=2")
    on = (*keys, "train.compile_backbone=true")
    plain, compiled, resumed = Losses(), Losses(), Losses()
    do_train(build("plain", *keys), extra_hooks=[plain])
    assert not traced
    with pytest.raises(KeyboardInterrupt):
        do_train(build("compiled", *on), extra_hooks=[compiled, Stop(1)])
    assert len(traced) == 1
    cfg = build("compiled", *on)
    saved = torch.load(Path(cfg.train.output_dir) / "model_0000001.pth", weights_only=True)
    assert saved["model"].keys() == instantiate(cfg.model).state_dict().keys()
    do_train(build("compiled", *on), resume=True, extra_hooks=[resumed])
    assert resumed.of.keys() == {2}
    for iteration, losses in {**compiled.of, **resumed.of}.items():
        assert losses == pytest.approx(plain.of[iteration], rel=1e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_convolutions_with_frozen_batch_norm_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    norms = [FrozenBatchNorm2d(4) for _ in range(2)]
    convs = [Conv2d(c, 4, 3, padding=1, norm=n, activation=F.relu) for c, n in zip((3, 4), norms)]
    net = fold_frozen_batch_norm(nn.Sequential(*convs))
    gradients = []
    for compiled in (False, True):
        if compiled:
            net.compile(dynamic=True)
        for side in (12, 16):
            net.zero_grad()
            net(torch.ones(2, 3, side, side)).square().mean().backward()
            gradients += [p.grad.clone() for p in net.parameters()]
    half = len(gradients) // 2
    for ours, expected in zip(gradients[half:], gradients[:half]):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_losses_after_a_resume_are_those_of_an_uninterrupted_training(
    build: Any, score: Any
) -> None:
    score(*[1.0] * 9)
    whole, first, second = Losses(), Losses(), Losses()
    do_train(build("whole", "train.max_iter=6"), extra_hooks=[whole])
    interrupted = ("train.max_iter=6", "train.checkpointer.period=3", "train.eval_period=2")
    with pytest.raises(KeyboardInterrupt):
        do_train(build("halves", *interrupted), extra_hooks=[first, Stop(3)])
    cfg = build("halves", *interrupted)
    torch.manual_seed(77)
    np.random.seed(77)
    do_train(cfg, resume=True, extra_hooks=[second])
    assert list(second.of) == [4, 5]  # iteration 3 was saved for its evaluation
    assert {"loss_mask", "loss_rpn_cls", "total_loss", "lr"} <= second.of[4].keys()
    assert {**first.of, **second.of} == whole.of
    weights = [
        torch.load(Path(cfg.train.output_dir).parent / run / "model_final.pth", weights_only=True)
        for run in ("whole", "halves")
    ]
    assert all(torch.equal(v, weights[1]["model"][k]) for k, v in weights[0]["model"].items())
    assert weights[0]["loader"] == weights[1]["loader"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_after_the_step_and_exits_with_the_code(
    number: signal.Signals, build: Any, score: Any, caplog: pytest.LogCaptureFixture
) -> None:
    left = score(1.0)
    before = signal.getsignal(number)
    cfg = build("out", "train.max_iter=3")
    with pytest.raises(SystemExit) as ended:
        do_train(cfg, extra_hooks=[Stop(1, number)])
    assert ended.value.code == EXIT_CODE == 75
    assert f"Ended by {number.name} after iteration 1, exit code 75" in caplog.text
    assert signal.getsignal(number) == before
    assert (Path(cfg.train.output_dir) / "last_checkpoint").read_text() == "model_0000001.pth"
    assert left == [1.0]  # not evaluated
    losses = Losses()
    do_train(build("out", "train.max_iter=3"), resume=True, extra_hooks=[losses])
    assert list(losses.of) == [2]
    assert left == []


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_the_resume(
    build: Any, score: Any
) -> None:
    left = score(1.0)
    with pytest.raises(SystemExit):
        do_train(build("out"), extra_hooks=[Stop(1, signal.SIGTERM)])
    assert left == [1.0]
    assert do_train(build("out"), resume=True) == {"segm": {"AP": 1.0}}


def test_a_signal_breaks_an_evaluation_off_with_everything_saved(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(cfg: DictConfig, model: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation went on")

    monkeypatch.setattr(train, "do_test", evaluate)
    cfg = build("out", "train.max_iter=3", "train.eval_period=1")
    with pytest.raises(SystemExit) as ended:
        do_train(cfg)
    assert ended.value.code == EXIT_CODE
    assert (Path(cfg.train.output_dir) / "last_checkpoint").read_text() == "model_0000000.pth"

    seen: list[int] = []
    monkeypatch.setattr(train, "do_test", lambda *_: {"segm": {"AP": float(len(seen))}})

    class Note(HookBase):
        def before_train(self) -> None:
            seen.append(self.trainer.storage.latest()["segm/AP"][1])

    do_train(cfg, resume=True, extra_hooks=[Note()])
    assert seen == [0]  # the one broken off is made up for, as of its own iteration


def test_a_signal_in_the_evaluation_after_the_last_step_leaves_it_to_the_resume(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "do_test", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    cfg = build("out", "train.eval_period=0")
    with pytest.raises(SystemExit) as ended:
        do_train(cfg)
    assert ended.value.code == EXIT_CODE
    assert (Path(cfg.train.output_dir) / "last_checkpoint").read_text() == "model_final.pth"
    monkeypatch.setattr(train, "do_test", lambda *_: {"segm": {"AP": 1.0}})
    assert do_train(cfg, resume=True) == {"segm": {"AP": 1.0}}


def test_a_signal_while_the_log_is_written_ends_an_evaluation_without_an_error(
    build: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Signalled(io.RawIOBase):
        """A stream whose flush a signal meets."""

        signals = [signal.SIGTERM] * 2

        def writable(self) -> bool:
            return True

        def write(self, content: Any) -> int:
            while self.signals:
                os.kill(os.getpid(), self.signals.pop())
            return len(content)

    handler = logging.StreamHandler(io.TextIOWrapper(io.BufferedWriter(Signalled())))
    monkeypatch.setattr(
        train, "do_test", lambda *_: logging.getLogger("mask_rcnn_plugin").warning("evaluating")
    )
    logger = logging.getLogger("mask_rcnn_plugin")
    monkeypatch.setattr(logger, "handlers", [handler, *logger.handlers])  # pytest's may be there
    with pytest.raises(SystemExit) as ended:
        do_train(build("out", "train.max_iter=3", "train.eval_period=1"))
    assert ended.value.code == EXIT_CODE
    assert "Logging error" not in capsys.readouterr().err
    assert "Ended by SIGTERM during an evaluation, exit code 75" in caplog.text


def test_a_loader_of_another_kind_trains_but_its_place_is_not_known(
    build: Any, score: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = build("out")
    cfg.dataloader.train._target_ = build_detection_train_loader
    for argument in ("max_unreadable", "seed", "repeat_threshold"):
        cfg.dataloader.train.pop(argument, None)
    score(1.0)
    do_train(cfg)
    assert "has no state_dict: a resume will not know which images" in caplog.text


def test_an_error_in_the_last_step_starts_no_evaluation(build: Any, score: Any) -> None:
    left = score(1.0)
    cfg = build("out")

    class Fail(HookBase):
        def before_step(self) -> None:
            if self.trainer.iter == 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        do_train(cfg, extra_hooks=[Fail()])
    assert left == [1.0]
    assert not (Path(cfg.train.output_dir) / "model_final.pth").exists()


def best(cfg: DictConfig) -> tuple[str, float, int]:
    file = torch.load(Path(cfg.train.output_dir) / "model_best.pth", weights_only=True)
    assert file["model"]
    return file["metric"], file["score"], file["iteration"]


def test_the_best_model_is_kept_over_resumes(build: Any, score: Any) -> None:
    keep = ("train.best_metric=segm/AP", "train.eval_period=1")
    score(5.0, 50.0, float("nan"), 20.0)
    with pytest.raises(KeyboardInterrupt):
        do_train(build("out", *keep, "train.max_iter=3"), extra_hooks=[Stop(1)])
    cfg = build("out", *keep, "train.max_iter=4")
    assert best(cfg) == ("segm/AP", 50.0, 1)
    score(50.0, 5.0, 6.0)  # the one that the end may have prevented is made up for
    do_train(cfg, resume=True)
    assert best(cfg) == ("segm/AP", 50.0, 1)
    output = Path(cfg.train.output_dir)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    score(60.0)
    do_train(build("out", *keep, "train.max_iter=4"), resume=True)
    assert best(cfg) == ("segm/AP", 60.0, 3)


def test_an_unknown_metric_is_an_error_that_loses_nothing(
    build: Any, score: Any, caplog: pytest.LogCaptureFixture
) -> None:
    score(5.0, 6.0)
    cfg = build("out", "train.best_metric=segm/AP-a", "train.eval_period=1")
    do_train(cfg)
    assert "metric 'segm/AP-a' is not in the evaluation, which has ['segm/AP']" in caplog.text
    assert (Path(cfg.train.output_dir) / "model_final.pth").exists()
    assert not (Path(cfg.train.output_dir) / "model_best.pth").exists()


def test_pruning_goes_on_after_a_resume_and_spares_the_final_and_the_tagged(
    build: Any, score: Any
) -> None:
    score(1.0, 1.0)
    keep = ("train.checkpointer.period=1", "train.checkpointer.max_to_keep=1")
    with pytest.raises(KeyboardInterrupt):
        do_train(build("out", *keep, "train.max_iter=9"), extra_hooks=[Stop(3)])
    cfg = build("out", *keep, "train.max_iter=6")
    output = Path(cfg.train.output_dir)

    def there() -> list[str]:
        return sorted(path.stem for path in output.glob("*.pth"))

    assert there() == ["model_0000003"]
    (output / "model_0000008.pth").write_bytes(b"damaged, from a time before")
    do_train(cfg, resume=True)
    assert there() == ["model_0000004", "model_0000008", "model_final"]
    do_train(build("out", *keep, "train.max_iter=8"), resume=True)
    assert there() == ["model_0000006", "model_0000008", "model_final"]


def full(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A disk without room for these files."""
    save = torch.save

    def save_if_room(data: Any, file: Any) -> None:
        if any(name in str(getattr(file, "name", "")) for name in names):
            raise OSError(28, os.strerror(28))
        save(data, file)

    monkeypatch.setattr(checkpoint.torch, "save", save_if_room)


def test_a_full_disk_is_logged_and_the_training_goes_on(
    build: Any, score: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(1.0)
    full(monkeypatch, "model_0000001")
    cfg = build("out", "train.max_iter=3", "train.checkpointer.period=1")
    do_train(cfg)
    (error,) = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert "model_0000001.pth cannot be written: [Errno 28] No space left on device" in error
    there = sorted(path.stem for path in Path(cfg.train.output_dir).glob("*.pth*"))
    assert there == ["model_0000000", "model_final"]


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_signal_without_room_to_save_is_an_error_not_the_code_to_go_on(
    evaluating: bool, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "do_test", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {})
    full(monkeypatch, "model_0000001")
    extra_hooks = [] if evaluating else [Stop(1, signal.SIGTERM)]
    with pytest.raises(SaveError, match="model_0000001.pth cannot be written"):
        do_train(build("out", "train.max_iter=3", "train.eval_period=2"), extra_hooks=extra_hooks)


def test_no_room_for_the_final_checkpoint_is_an_error(
    build: Any, score: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = score(1.0)
    full(monkeypatch, "model_final")
    cfg = build("out", "train.checkpointer.period=1")
    with pytest.raises(SaveError, match="model_final.pth cannot be written"):
        do_train(cfg)
    assert left == [1.0]
    monkeypatch.undo()
    score(1.0)
    losses = Losses()
    do_train(build("out", "train.checkpointer.period=1"), resume=True, extra_hooks=[losses])
    assert list(losses.of) == [1]


def test_a_training_set_without_an_annotated_image_is_an_error(
    build: Any, toy_dataset: Path, tmp_path: Path
) -> None:
    content = json.loads((toy_dataset / "train.json").read_text())
    (tmp_path / "none.json").write_text(json.dumps({**content, "annotations": []}))
    cfg = build("out", f"dataset.train.json={tmp_path / 'none.json'}")
    with pytest.raises(DatasetError, match=r"training set \['.*none\.json'\]"):
        do_train(cfg)


def test_a_training_goes_without_a_test_set(build: Any) -> None:
    cfg = build(
        "alone",
        "dataset.test.names=[]",
        "dataset.test.json=",
        "dataset.test.images=",
        "train.best_metric=segm/AP",
    )
    assert do_train(cfg) == {}
    assert (Path(cfg.train.output_dir) / "model_final.pth").is_file()
