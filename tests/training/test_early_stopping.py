import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from train import do_train

STOP = ("train.early_stopping.metric=segm/AP", "train.early_stopping.patience=2")
EACH = ("train.max_iter=9", "train.eval_period=1")


def final(cfg: DictConfig) -> dict[str, Any]:
    return torch.load(Path(cfg.train.output_dir) / "model_final.pth", weights_only=True)


@pytest.fixture
def stopped_at(build: Any, score: Any) -> Callable[..., int]:
    """The iteration whose evaluation ends a training with these scores."""

    def run(scores: list[float], *overrides: str) -> int:
        left = score(*scores)
        cfg = build("out", *STOP, *EACH, *overrides)
        results = do_train(cfg)
        assert results == {"segm": {"AP": pytest.approx(scores[-len(left) - 1], nan_ok=True)}}
        return int(final(cfg)["iteration"])

    return run


def test_it_ends_after_so_many_evaluations_without_a_gain(
    stopped_at: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert stopped_at([5.0, 7.0, 6.0, 7.0, 50.0]) == 3  # equal is no gain
    (line,) = [r.message for r in caplog.records if r.name.endswith("early_stopping")]
    for part in ("after iteration 3", "segm/AP", "last 2 evaluations", "7.000 after iteration 1"):
        assert part in line
    assert "Exception during training" not in caplog.text


def test_small_gains_count_up_from_the_best(stopped_at: Any) -> None:
    scores = [float("nan"), 1.0, 1.4, 1.6, float("nan"), 1.7, 9.0]
    assert stopped_at(scores, "train.early_stopping.min_delta=0.5") == 5


def test_without_a_metric_all_iterations_are_done(build: Any, score: Any) -> None:
    score(*[1.0] * 4)
    cfg = build("out", "train.max_iter=4", "train.eval_period=1", "train.early_stopping=null")
    do_train(cfg)
    assert final(cfg)["iteration"] == 3


def test_an_interruption_changes_nothing(build: Any, score: Any, interrupt: Any) -> None:
    scores = [5.0, 7.0, 6.0, 6.5, 50.0]
    score(*scores)
    whole = build("whole", *STOP, *EACH)
    do_train(whole)
    score(*scores[:3])
    with pytest.raises(KeyboardInterrupt):
        do_train(build("halves", *STOP, *EACH), extra_hooks=[interrupt(2)])
    left = score(*scores[2:])  # the one that may have been lost is made again
    halves = build("halves", *STOP, *EACH)
    do_train(halves, resume=True)
    assert left == [50.0]
    assert final(whole)["iteration"] == final(halves)["iteration"] == 3
    assert all(torch.equal(v, final(halves)["model"][k]) for k, v in final(whole)["model"].items())
    best = torch.load(Path(halves.train.output_dir) / "model_best.pth", weights_only=True)
    assert (best["metric"], best["score"], best["iteration"]) == ("segm/AP", 7.0, 1)


def test_a_resume_of_one_that_has_ended_trains_on_only_with_more_patience(
    build: Any, score: Any
) -> None:
    score(5.0, 4.0, 3.0)
    do_train(build("out", *STOP, *EACH))
    score(3.0)
    cfg = build("out", *STOP, *EACH)
    do_train(cfg, resume=True)
    assert final(cfg)["iteration"] == 2
    assert (Path(cfg.train.output_dir) / "last_checkpoint").read_text() == "model_final.pth"
    score(3.0, 2.0, 1.0)
    cfg = build("out", *STOP, *EACH, "train.early_stopping.patience=4")
    do_train(cfg, resume=True)
    assert final(cfg)["iteration"] == 4


def test_scores_of_another_batch_stay_in_their_order(
    build: Any, score: Any, interrupt: Any
) -> None:
    score(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    reference = ("train.reference_batch_size=4", "dataloader.train.total_batch_size=4")
    with pytest.raises(KeyboardInterrupt):
        do_train(build("out", *STOP, *EACH, *reference), extra_hooks=[interrupt(5)])
    left = score(7.0, 8.0, 9.0, 10.0, 9.0, 9.0, 50.0)  # after iterations that were there before
    larger = ("train.reference_batch_size=8", "dataloader.train.total_batch_size=8")
    cfg = build("out", *STOP, *EACH, *larger)
    do_train(cfg, resume=True)
    assert left == [50.0]
    scores = final(cfg)["trainer"]["hooks"]["EarlyStopping"]["scores"]
    assert list(scores)[-6:] == [2, 3, 4, 5, 6, 7]
    assert list(scores) == sorted(scores)
