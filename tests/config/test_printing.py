"""--print-config and --diff: what is on the screen, and that nothing else happens."""

import argparse
import os
import runpy
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mask_rcnn_plugin.config import deciding, flatten, get_config
from mask_rcnn_plugin.config.printing import print_config
from mask_rcnn_plugin.training.launch import parse_program_args

SIGMOID, SOFTMAX = "table2b_mask_loss/sigmoid", "table2b_mask_loss/softmax"


@pytest.fixture
def screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> "Screen":
    monkeypatch.chdir(tmp_path)
    yield Screen(monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


class Screen:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *args: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a script."""
        self._monkeypatch.setattr("sys.argv", ["train.py", "--config-file", *args])
        with pytest.raises(SystemExit) as end:
            parse_program_args(argparse.ArgumentParser(prog="train.py"))
        return (end.value.code or 0, *self._capsys.readouterr())


def test_printed_config_is_the_whole_one(screen: Screen) -> None:
    code, out, err = screen(f"{SOFTMAX}+synthetic", "--print-config", "train.max_iter=7")
    assert (code, err) == (0, "")
    assert out.startswith(f"# {SOFTMAX}+synthetic train.max_iter=7: as loaded")
    printed = OmegaConf.create(out)
    assert printed.train.checkpointer.period == 7  # follows train.max_iter
    assert printed.model._target_ == "mask_rcnn_plugin.modeling.meta_arch.MaskRCNN"
    cfg = get_config(f"{SOFTMAX}+synthetic", ["train.max_iter=7"])
    assert flatten(printed) == flatten(cfg, resolve=True)


def test_of_several_processes_the_first_one_prints(
    screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    printed = []
    for rank in ("0", "1"):
        for key, value in {**elastic, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(key, value)
        printed.append([screen(SOFTMAX, option) for option in ("--print-config", "--help")])
    assert all(out for _, out, _ in printed[0])
    assert printed[1] == [(0, "", "")] * 2


def test_diff_has_what_differs_and_no_more(screen: Screen) -> None:
    code, out, err = screen(SOFTMAX, "--diff", SIGMOID, "+mine=3", "dataset.train.names=[a, b, c]")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"dataloader.evaluator.output_dir: 'output/{SIGMOID}' -> 'output/{SOFTMAX}'",
        "dataloader.train.dataset.names.0: 'coco_2014_train' -> 'a'",
        "dataloader.train.dataset.names.1: 'coco_2014_valminusminival' -> 'b'",
        "dataloader.train.dataset.names.2: (not set) -> 'c'",
        "dataset.train.names.0: 'coco_2014_train' -> 'a'",
        "dataset.train.names.1: 'coco_2014_valminusminival' -> 'b'",
        "dataset.train.names.2: (not set) -> 'c'",
        "mine: (not set) -> 3",
        "model.roi_heads.mask_head.loss_type: 'sigmoid' -> 'softmax'",
        f"train.output_dir: 'output/{SIGMOID}' -> 'output/{SOFTMAX}'",
    ]
    assert screen(SOFTMAX, "--diff", SOFTMAX) == (0, "", "")
    assert (
        "dataset.synthetic: (not set) -> None"
        in screen(SOFTMAX, "--diff", f"{SIGMOID}+synthetic")[1].splitlines()
    )


def test_a_config_is_printed_without_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse_args = runpy.run_path(str(Path(__file__).parents[2] / "eval.py"))["parse_args"]
    given = ["eval.py", "--config-file", SOFTMAX]
    for extra, code in [("--print-config", 0), (f"--diff={SIGMOID}", 0), ("train.seed=1", 2)]:
        monkeypatch.setattr("sys.argv", [*given, extra])
        with pytest.raises(SystemExit) as end:
            parse_args()
        assert (end.value.code or 0) == code, extra
    assert "--weights" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "args",
    [
        (SOFTMAX, "--print-config", "train.max_iters=7"),
        (SOFTMAX, "--diff", "table2b_mask_loss/sigmod"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(screen: Screen, args: tuple[str, ...]) -> None:
    code, out, err = screen(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("train.py: no ")
    assert "did you mean" in err


def test_a_base_that_is_empty_starts_no_training(screen: Screen) -> None:
    code, out, err = screen(SOFTMAX, "--diff", "")
    assert (code, out) == (2, "")
    assert err.startswith("train.py: no config ''; ")


def test_a_reader_that_goes_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as | head does
    args = argparse.Namespace(config=SOFTMAX, overrides=[], print_config=True, diff=None)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert print_config(args)


def test_what_changes_nothing_decides_nothing() -> None:
    """So a training goes on that began before there were these keys."""
    before = deciding(get_config(SIGMOID))
    new = ("train.ema", "train.early_stopping", "train.epochs", "train.loggers")
    new += ("dataset.folder", "dataset.split", "dataset.metadata")
    assert [key for key in before if key.startswith(new)] == []
    idle = ["train.ema.decay=0.5", "train.early_stopping.patience=3", "train.loggers=[]"]
    cfg = get_config(SIGMOID, idle)
    cfg.dataset.metadata = {"thing_classes": ["cat"]}
    assert deciding(cfg) == before


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("train.ema.enabled=True", {"train.ema.enabled", "train.ema.decay"}),
        (
            "train.early_stopping.metric=segm/AP",
            {f"train.early_stopping.{key}" for key in ("metric", "patience", "min_delta")},
        ),
        ("train.epochs=2", {"train.epochs"}),
        ("dataset.split=0.1", {"dataset.split"}),
    ],
)
def test_what_changes_a_training_decides(override: str, keys: set[str]) -> None:
    now = deciding(get_config(SIGMOID, [override]))
    assert now.keys() - deciding(get_config(SIGMOID)).keys() == keys
