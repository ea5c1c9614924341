"""Planning and running of rows, with a stand-in for train.py."""

import json
import os
import textwrap
from pathlib import Path

import pytest

from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.reproduction import Run, execute, plan

ROIALIGN, SIGMOID = "table2c_roi_layer/roialign_ave", "table2b_mask_loss/sigmoid"
ROIPOOL = "table2c_roi_layer/roipool_max"


@pytest.fixture
def train_script(tmp_path: Path) -> Path:
    """Trains nothing; fails for seed 7. Each start is a line in `started`, beside it."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, os, pathlib, sys
            assert sys.argv[1] == "--config-file" and "--resume" in sys.argv
            assert sys.argv[sys.argv.index("--num-gpus") + 1] == "1"
            options = dict(a.split("=") for a in sys.argv if "=" in a)
            with open(pathlib.Path(__file__).with_name("started"), "a") as file:
                print(sys.argv[2], options["train.seed"], file=file)
            if options["train.seed"] == "7":
                sys.exit("no luck")
            out = pathlib.Path(options["train.output_dir"])
            (out / "metrics.json").write_text('{"iteration": 2}\\n')
            results = {"segm": {"AP": 12.0}, "threads": os.environ.get("OMP_NUM_THREADS")}
            (out / "results.json").write_text(json.dumps(results))
            """
        )
    )
    return script


def starts(script: Path) -> list[str]:
    file = script.with_name("started")
    return sorted(file.read_text().splitlines()) if file.exists() else []


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


def test_another_setting_is_another_run(tmp_path: Path) -> None:
    def folder(*overrides: str, scale: str = "synthetic") -> Path:
        return plan([ROIPOOL], scale, 1, tmp_path, overrides)[ROIPOOL, 0].folder

    assert folder() == folder()
    assert folder("train.max_iter=7") != folder()
    assert folder(scale="coco") != folder()
    assert plan([ROIPOOL], "synthetic", 1, tmp_path, ["train.max_iter=7"])[ROIPOOL, 0].max_iter == 7


def test_a_run_made_under_the_name_of_an_equal_row_is_found(tmp_path: Path) -> None:
    first = plan([SIGMOID], "synthetic", 1, tmp_path)[SIGMOID, 0]
    first.folder.mkdir()
    assert plan([ROIALIGN], "synthetic", 1, tmp_path)[ROIALIGN, 0].folder == first.folder


def test_wrong_overrides_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'train.max_iter'"):
        plan([ROIPOOL], "synthetic", 1, tmp_path, ["train.max_iters=7"])


def test_only_what_is_not_done_is_run(tmp_path: Path, train_script: Path) -> None:
    def go(seeds: int) -> list[Run]:
        runs = plan([SIGMOID, ROIALIGN, ROIPOOL], "synthetic", seeds, tmp_path / "runs")
        assert execute(runs.values(), train_script, jobs=2, num_gpus=1) == []
        return list(dict.fromkeys(runs.values()))

    runs = go(1)
    assert starts(train_script) == [f"{SIGMOID}+ablation 0", f"{ROIPOOL}+ablation 0"]
    assert all(run.done and run.results()["segm"]["AP"] == 12 for run in runs)
    assert 0 < runs[0].seconds() < 60
    go(1)
    assert len(starts(train_script)) == 2
    go(2)
    assert starts(train_script)[1::2] == [f"{SIGMOID}+ablation 1", f"{ROIPOOL}+ablation 1"]


def test_a_failed_run_is_told_and_tried_again(
    tmp_path: Path, train_script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        Run("a", (f"train.seed={seed}",), seed, 3, tmp_path / "runs" / str(seed)) for seed in (7, 8)
    ]
    assert execute(runs, train_script, jobs=1, num_gpus=1) == [runs[0]]
    assert not runs[0].done
    assert runs[1].done
    console = runs[0].folder / "console.txt"
    assert f"a seed 7: failed with exit code 1, see {console}" in capsys.readouterr().out
    assert "no luck" in console.read_text()
    assert execute(runs, train_script, jobs=1, num_gpus=1) == [runs[0]]
    assert starts(train_script) == ["a 7", "a 7", "a 8"]


def test_an_interruption_leaves_nothing_behind_and_the_same_call_goes_on(
    tmp_path: Path, train_script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = tmp_path / "endless.py"
    endless.write_text(
        "import os, pathlib, signal\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "signal.pause()\n"
    )
    pid = tmp_path / "pid"

    def interrupt(seconds: float) -> None:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    run = Run("a", ("train.seed=0",), 0, 3, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("mask_rcnn_plugin.reproduction.time.sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            execute([run], endless, jobs=1, num_gpus=1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert not run.done
    assert execute([run], train_script, jobs=1, num_gpus=1) == []
    assert run.done


def test_jobs_share_the_cores_of_a_cpu(
    tmp_path: Path, train_script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    run = Run("a", ("train.seed=0",), 0, 3, tmp_path / "run")
    execute([run], train_script, jobs=2, num_gpus=1)
    assert run.results()["threads"] == "3"


def test_iteration_is_read_while_it_is_being_written(tmp_path: Path) -> None:
    run = Run("a", (), 0, 100, tmp_path)
    assert run.iteration() == 0
    file = tmp_path / "metrics.json"
    line = json.dumps({"iteration": 19, "loss": 1.0}) + "\n"
    file.write_text(line * 500)
    assert run.iteration() == 20
    file.write_text(line + '{"iterat')
    assert run.iteration() == 20
    file.write_text('{"iterat')
    assert run.iteration() == 0
