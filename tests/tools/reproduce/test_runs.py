"""Planning and running of rows, with stand-ins for train.py and eval.py."""

import importlib
import os
import re
import textwrap
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import environment
from mask_rcnn_plugin.config import ConfigError
from reproduce.runs import Run, execute, plan

ROIALIGN, SIGMOID = "table2c_roi_layer/roialign_ave", "table2b_mask_loss/sigmoid"
ROIPOOL = "table2c_roi_layer/roipool_max"


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """Folder of stand-ins: they train nothing, and fail for seed 7. Each start is a line in
    `started`."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    script = """
        import json, os, pathlib, sys
        here = pathlib.Path(__file__)
        options = dict(a.split("=") for a in sys.argv if "=" in a)
        arguments = dict(zip(sys.argv, sys.argv[1:]))
        if here.name == "train.py":
            assert "--resume" in sys.argv and arguments["--num-gpus"] == "1"
        else:
            assert pathlib.Path(arguments["--weights"]).read_text() == "weights"
        with open(here.with_name("started"), "a") as file:
            print(here.stem, arguments["--config-file"], options["train.seed"], file=file)
        if options["train.seed"] == "7":
            sys.exit("no luck")
        out = pathlib.Path(options["train.output_dir"])
        (out / "model_final.pth").write_text("weights")
        results = {"segm": {"AP": 12.0}, "threads": os.environ.get("OMP_NUM_THREADS")}
        (out / "results.json").write_text(json.dumps(results))
        """
    for name in ("train.py", "eval.py"):
        (folder / name).write_text(textwrap.dedent(script))
    return folder


def starts(scripts: Path) -> list[str]:
    file = scripts / "started"
    return file.read_text().splitlines() if file.exists() else []


def a_run(folder: Path, seed: int = 0, trained: Run | None = None) -> Run:
    return Run("a", (f"train.seed={seed}",), seed, 3, "float32", folder, trained)


def test_equal_rows_share_a_run_and_seeds_do_not(tmp_path: Path) -> None:
    runs = plan([ROIALIGN, SIGMOID, ROIPOOL], "synthetic", 2, tmp_path)
    assert len(runs) == 6
    assert len(set(runs.values())) == 4
    assert runs[ROIALIGN, 0] == runs[SIGMOID, 0]
    assert runs[ROIALIGN, 0] != runs[ROIPOOL, 0]
    run = runs[ROIALIGN, 1]
    assert (run.config, run.seed) == (f"{ROIALIGN}+ablation", 1)
    assert "train.seed=1" in run.overrides
    assert run.folder.name.startswith("table2c_roi_layer.roialign_ave-seed1-")


def folder(*overrides: str, scale: str = "synthetic") -> Path:
    """Of the run of a row with some changes."""
    return plan([ROIPOOL], scale, 1, Path("runs"), overrides)[ROIPOOL, 0].folder


def test_another_setting_is_another_run() -> None:
    assert folder() == folder()
    assert folder("train.max_iter=7") != folder()
    assert folder(scale="coco") != folder()
    changed = plan([ROIPOOL], "synthetic", 1, Path("runs"), ["train.max_iter=7"])
    assert changed[ROIPOOL, 0].max_iter == 7


def test_a_run_made_under_the_name_of_an_equal_row_is_found(tmp_path: Path) -> None:
    first = plan([SIGMOID], "synthetic", 1, tmp_path)[SIGMOID, 0]
    first.folder.mkdir()
    assert plan([ROIALIGN], "synthetic", 1, tmp_path)[ROIALIGN, 0].folder == first.folder


def test_wrong_overrides_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'train.max_iter'"):
        plan([ROIPOOL], "synthetic", 1, tmp_path, ["train.max_iters=7"])


def test_what_no_weight_depends_on_makes_no_other_run() -> None:
    assert folder("train.log_period=7", "train.checkpointer.period=7") == folder()
    assert folder("dataloader.train.num_workers=2") == folder()


def test_another_drawing_is_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = folder()
    monkeypatch.setattr("mask_rcnn_plugin.data.synthetic.VERSION", 99)
    assert folder() != before


def test_rows_that_differ_in_their_test_set_are_trained_once(tmp_path: Path) -> None:
    minival, test_dev = "table2a_backbone/r101_fpn", "table1_main/r101_fpn"
    runs = plan([minival, test_dev], "coco", 1, tmp_path)
    assert runs[minival, 0].trained is None
    assert runs[test_dev, 0].trained == runs[minival, 0]
    assert runs[minival, 0].max_iter == runs[test_dev, 0].max_iter == 160_000
    # on drawn images the test set is the same one
    runs = plan([minival, test_dev], "synthetic", 1, tmp_path)
    assert runs[minival, 0] == runs[test_dev, 0]


def test_a_test_set_waits_for_its_training(tmp_path: Path, scripts: Path) -> None:
    training = a_run(tmp_path / "training")
    runs = [a_run(tmp_path / "test", trained=training), training]
    assert execute(runs, scripts, jobs=2, num_gpus=1) == []
    assert starts(scripts) == ["train a 0", "eval a 0"]


def test_a_log_file_gets_a_line_for_each_run_and_no_progress_bar(
    tmp_path: Path, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [a_run(tmp_path / "runs" / str(seed), seed) for seed in (1, 2)]
    assert execute(runs, scripts, jobs=1, num_gpus=1) == []
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines()] == ["a seed 1", "a seed 2"]
    assert err == ""


def test_a_test_set_of_a_failed_training_is_not_tried(tmp_path: Path, scripts: Path) -> None:
    training = a_run(tmp_path / "training", seed=7)
    test = a_run(tmp_path / "test", trained=training)
    assert execute([training, test], scripts, jobs=2, num_gpus=1) == [training, test]
    assert starts(scripts) == ["train a 7"]


def test_only_what_is_not_done_is_run(tmp_path: Path, scripts: Path) -> None:
    def go(seeds: int) -> list[Run]:
        runs = plan([SIGMOID, ROIALIGN, ROIPOOL], "synthetic", seeds, tmp_path / "runs")
        assert execute(runs.values(), scripts, jobs=1, num_gpus=1) == []
        return list(dict.fromkeys(runs.values()))

    runs = go(1)
    first = [f"train {SIGMOID}+ablation 0", f"train {ROIPOOL}+ablation 0"]
    assert starts(scripts) == first
    assert all(run.done and run.results()["segm"]["AP"] == 12 for run in runs)
    assert "torch 2" in runs[0].environment()
    go(1)
    assert starts(scripts) == first
    go(2)
    assert starts(scripts)[2:] == [line.replace(" 0", " 1") for line in first]


def test_a_checkout_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", fail)
    importlib.reload(environment)  # it may keep the function that it imports
    assert re.search(r"mask_rcnn_plugin \d+\.\d+", environment.environment())


def test_a_failed_run_is_told_and_tried_again(
    tmp_path: Path, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [a_run(tmp_path / "runs" / str(seed), seed) for seed in (7, 8)]
    assert execute(runs, scripts, jobs=1, num_gpus=1) == [runs[0]]
    assert not runs[0].done
    assert runs[1].done
    console = runs[0].folder / "console.txt"
    assert f"a seed 7: failed with exit code 1, see {console}" in capsys.readouterr().out
    assert "no luck" in console.read_text()
    assert execute(runs, scripts, jobs=1, num_gpus=1) == [runs[0]]
    assert starts(scripts) == ["train a 7", "train a 8", "train a 7"]


def test_an_ap_that_coco_does_not_define_is_no_zero(
    tmp_path: Path, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = scripts / "train.py"
    train.write_text(train.read_text().replace("12.0}", "None}, 'bbox': {'AP': 0.04}"))
    assert execute([a_run(tmp_path / "run")], scripts, jobs=1, num_gpus=1) == []
    assert "a seed 0: mask AP n/a, box AP 0.0 in" in capsys.readouterr().out


def test_an_interruption_leaves_nothing_behind_and_the_same_call_goes_on(
    tmp_path: Path, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "endless"
    endless.mkdir()
    pid = endless / "pid"
    (endless / "train.py").write_text(
        "import os, pathlib, signal\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "signal.pause()\n"
    )

    def interrupt(seconds: float) -> None:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    run = a_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("reproduce.runs.time.sleep", interrupt)
        with pytest.raises(SystemExit, match="interrupted; the same command continues"):
            execute([run], endless, jobs=1, num_gpus=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not run.done
    spent = run.seconds()
    assert spent > 0
    assert execute([run], scripts, jobs=1, num_gpus=1) == []
    assert run.done
    assert run.seconds() > spent


def test_jobs_share_the_cores_of_a_cpu(
    tmp_path: Path, scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    run = a_run(tmp_path / "run")
    execute([run], scripts, jobs=2, num_gpus=1)
    assert run.results()["threads"] == "3"
