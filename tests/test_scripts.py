"""train.py, eval.py and the demo, end to end on a few images."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import demo
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.errors import UserError

REPOSITORY = Path(__file__).parent.parent
CONFIG = "table4_keypoints/keypoint_and_mask+synthetic"


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run(run_python: Run) -> Run:
    """Runs a script of the repository in `cwd`."""
    return lambda script, *args, cwd: run_python(REPOSITORY / script, *args, cwd=cwd)


def own_dataset(root: Path) -> list[str]:
    """The toy dataset as a user's own, on a CPU-size model but without the overlay's drawing."""
    return [
        f"dataset.{split}.{key}={root / name}{suffix}"
        for split, name in (("train", "train"), ("test", "val"))
        for key, suffix in (("json", ".json"), ("images", ""))
    ]


@pytest.fixture(scope="module")
def trained(toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which `python train.py` ran for 3 iterations without a GPU, output in out/."""
    folder = tmp_path_factory.mktemp("trained")
    command = [
        *(sys.executable, str(REPOSITORY / "train.py"), "--config-file", CONFIG),
        *own_dataset(toy_dataset),
        *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
        f"dataset.synthetic.root={toy_dataset}",
        *("dataloader.train.total_batch_size=2", "train.max_iter=3"),
        *("train.checkpointer.period=2", "train.log_period=1", "train.output_dir=out"),
    ]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, env=no_gpu, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_training_writes_everything(trained: Path) -> None:
    out = trained / "out"
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert {"iteration", "total_loss", "loss_mask", "loss_keypoint", "lr"} <= metrics[0].keys()
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert (out / "model_0000001.pth").is_file()
    # What was asked for, for a resume on another machine; what it was on this one.
    assert get_config(str(out / "config.yaml")).train.device == "cuda"
    assert "device cpu" in (out / "log.txt").read_text()
    # Pictures of the first batch, and of the test set.
    assert cv2.imread(str(out / "train_batch.jpg")).shape == (480, 960, 3)
    assert len(list((out / "pictures" / "3").glob("*.jpg"))) == 4
    results = json.loads((out / "results.json").read_text())
    assert list(results) == [
        *("dataset", "bbox", "keypoints", "segm", "evaluator", "ms_per_image"),
    ]
    assert results["ms_per_image"] > 0
    assert results["dataset"].endswith("val.json")
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-person"} <= results["segm"].keys()


def test_the_commands_that_a_training_ends_with_work(
    run: Run, trained: Path, toy_dataset: Path
) -> None:
    lines = (trained / "out" / "log.txt").read_text().splitlines()
    start = [i for i, line in enumerate(lines) if "The model is out/model_final.pth" in line][-1]
    results = json.loads((trained / "out" / "results.json").read_text())
    assert f"segm/AP {results['segm']['AP']:.2f}" in lines[start]
    evaluate, predict = (
        shlex.split(line.partition(": python ")[2]) for line in lines[start + 1 : start + 3]
    )
    assert (evaluate[0], predict[0], predict.pop()) == ("eval.py", "tools/predict.py", "PHOTO")
    for command in (
        [*evaluate, "--output", "again", "train.device=cpu"],
        [*predict, next((toy_dataset / "val").glob("*")), "train.device=cpu"],
    ):
        done = run(*command, cwd=trained)
        assert done.returncode == 0, done.stderr
    assert (trained / "again" / "results.json").is_file()
    assert (trained / "output" / "predictions" / "predictions.json").is_file()


def test_tensorboard_reads_the_events(trained: Path) -> None:
    events = EventAccumulator(str(trained / "out"))
    events.Reload()
    assert {"total_loss", "loss_mask", "segm/AP"} <= set(events.Tags()["scalars"])
    assert set(events.Tags()["images"]) == {"train_batch", *(f"test/{i}" for i in range(4))}


@pytest.mark.parametrize("name", ["model_0000004.pth", "model_final.pth", "model_best.pth"])
def test_a_folder_with_anothers_checkpoints_is_refused(name: str, tmp_path: Path) -> None:
    """Without `last_checkpoint` too: they would be pruned as ours, or ours as older ones."""
    cfg = get_config(CONFIG, [f"train.output_dir={tmp_path}"])
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="holds a training run: add --resume"):
        train.prepare(Namespace(resume=False), cfg)


def test_frozen_layers_need_weights_at_the_start_not_at_a_resume(tmp_path: Path) -> None:
    images = [f"dataset.{split}.json=no.json" for split in ("train", "test")]
    overrides = [*images, f"train.output_dir={tmp_path}", "train.init_checkpoint="]
    cfg = get_config("table2a_backbone/r50_fpn", overrides)
    with pytest.raises(UserError, match="model.backbone.freeze_at=0"):
        train.prepare(Namespace(resume=True), cfg)
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(UserError, match=r"no\.json"):  # what is looked at next
        train.prepare(Namespace(resume=True), cfg)


@pytest.fixture
def own_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained`, to change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_resume_goes_on_and_a_second_start_does_not_overwrite(
    run: Run, own_run: Path, toy_dataset: Path
) -> None:
    args = [
        *("train.py", "--config-file", CONFIG, f"dataset.synthetic.root={toy_dataset}"),
        *own_dataset(toy_dataset),
        *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
        *("dataloader.train.total_batch_size=2", "train.device=cpu", "train.output_dir=out"),
        *("train.log_period=1", "train.eval_period=0"),
    ]
    again = run(*args, "train.max_iter=3", cwd=own_run)
    assert again.returncode == 2
    assert "out already holds a training run: add --resume" in again.stderr

    resumed = run(*args, "--resume", "train.max_iter=5", cwd=own_run)
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from iteration 3" in resumed.stdout
    checkpoint = torch.load(own_run / "out" / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 4


def test_evaluation_gives_the_numbers_of_the_training(
    run: Run, trained: Path, toy_dataset: Path
) -> None:
    args = (
        *("eval.py", "--config-file", CONFIG, "--weights", "out/model_0000001.pth"),
        f"dataset.synthetic.root={toy_dataset}",
        *own_dataset(toy_dataset),
        *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
        *("train.device=cpu", "--official"),
        "model.roi_heads.box_predictor.test_score_thresh=0",  # after 3 iterations
    )
    drawn = ("--visualize", "3", "--report")
    done = run(*args, "--output", "evaluated", *drawn, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert f"{Path('evaluated', 'report', 'index.html')}: " in done.stdout.splitlines()[-1]
    check_report(trained / "evaluated")
    assert "| task " in done.stdout
    assert "paper" not in done.stdout
    results = json.loads((trained / "evaluated" / "results.json").read_text())
    assert {"bbox", "segm", "keypoints"} <= results.keys()
    assert results["evaluator"] == f"pycocotools {version('pycocotools')}"
    assert f"computed by {results['evaluator']}\n" in done.stdout
    predictions = json.loads((trained / "evaluated" / "coco_instances_results.json").read_text())
    assert predictions
    pictures = sorted((trained / "evaluated" / "pictures").iterdir())
    assert len(pictures) == 3
    height, width, _ = cv2.imread(str(pictures[0])).shape
    assert (height, width) == (480, 960)

    plain = run(*args, "--output", "plain", "--no-optimize", cwd=trained)
    assert plain.returncode == 0, plain.stderr
    expected = json.loads((trained / "plain" / "coco_instances_results.json").read_text())
    assert len(predictions) == len(expected)
    for ours, theirs in zip(predictions, expected):
        assert ours["image_id"] == theirs["image_id"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)


def check_report(output: Path) -> None:
    """The report has the results' numbers, and a picture for each mistake that it shows."""
    results = json.loads((output / "results.json").read_text())
    with (output / "report" / "classes.csv").open(newline="") as lines:
        rows = {row["task"]: row for row in csv.DictReader(lines) if row["class"][0] == "("}
    for task in ("bbox", "segm", "keypoints"):
        assert float(rows[task]["AP"]) == pytest.approx(results[task]["AP"], abs=1e-9)
    page = (output / "report" / "index.html").read_text()
    pictures = {f"pictures/{file.name}" for file in (output / "report" / "pictures").iterdir()}
    assert pictures == set(re.findall(r'<img src="(pictures/[^"]+)"', page))
    assert pictures


def test_predictions_are_scored_again_after_a_failure(
    run: Run, trained: Path, toy_dataset: Path
) -> None:
    args = [
        *("--config-file", CONFIG, f"dataset.synthetic.root={toy_dataset}"),
        *own_dataset(toy_dataset),
        *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
        *("train.device=cpu", "--weights", "out/model_0000001.pth"),
        "model.roi_heads.box_predictor.test_score_thresh=0",  # after 3 iterations
    ]
    sound = run("eval.py", *args, "--output", "sound", cwd=trained)
    assert sound.returncode == 0, sound.stderr

    # A scoring that fails, as a broken backend would.
    (trained / "failing.py").write_text(
        "import runpy, sys\n"
        "from mask_rcnn_plugin.evaluation import evaluator\n"
        "def fail(*args, **kwargs): raise OverflowError('out of bounds')\n"
        "evaluator.evaluate_tasks = fail\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    failing = trained / "failing.py"
    failed = run(failing, REPOSITORY / "eval.py", *args, "--output", "failed", cwd=trained)
    assert failed.returncode == 1
    assert "OverflowError" in failed.stderr
    [command] = [line for line in failed.stdout.splitlines() if "--predictions" in line]
    _, script, *arguments = shlex.split(command[command.index("python ") :])
    assert not (trained / "failed" / "results.json").exists()

    again = run(script, *arguments, "--report", cwd=trained)
    assert again.returncode == 0, again.stderr
    check_report(trained / "failed")
    results, expected = (
        json.loads((trained / folder / "results.json").read_text())
        for folder in ("failed", "sound")
    )
    assert results.pop("ms_per_image") is None
    del expected["ms_per_image"]
    assert results == expected
    assert results["bbox"]["AP50"] is not None


def test_predictions_that_are_none_leave_nothing_behind(
    run: Run, toy_dataset: Path, tmp_path: Path
) -> None:
    args = ["eval.py", "--config-file", "table2a_backbone/r50_fpn", *own_dataset(toy_dataset)]
    wrong = ["--predictions", toy_dataset / "val.json", "--output", "out"]
    done = run(*args, *wrong, cwd=tmp_path)
    assert done.returncode == 2
    assert "val.json' cannot be read" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_benchmark_compares_precisions_on_a_trained_model(run: Run, trained: Path) -> None:
    arguments = ("--stage", "bf16", "--trained", "out", "--json", "bf16.json")
    done = run("tools/benchmark.py", *arguments, cwd=trained)
    assert done.returncode == 0, done.stderr
    bf16 = json.loads((trained / "bf16.json").read_text())["bf16"]
    assert bf16["images"] == 6
    assert bf16["boxes"] > 0
    assert bf16["found"] > 0.5
    assert f"of the {bf16['boxes']} detections in 6 images are found again" in done.stdout


def test_a_test_set_without_annotations_gives_a_submission(
    run: Run, trained: Path, toy_dataset: Path
) -> None:
    content = json.loads((toy_dataset / "val.json").read_text())
    del content["annotations"]
    (trained / "image_info_test-dev2017.json").write_text(json.dumps(content))
    done = run(
        *("eval.py", "--config-file", CONFIG, "--weights", "out/model_0000001.pth"),
        *("--output", "unscored", "train.device=cpu", "--report"),
        *(
            "dataset.test.json=image_info_test-dev2017.json",
            f"dataset.test.images={toy_dataset}/val",
        ),
        cwd=trained,
    )
    assert done.returncode == 0, done.stderr
    submitted = [f.name for f in sorted((trained / "unscored" / "submission").rglob("*.zip"))]
    assert submitted == [
        "detections_test-dev2017_mask-rcnn_results.zip",
        "person_keypoints_test-dev2017_mask-rcnn_results.zip",
        "detections_test-dev2017_mask-rcnn_results.zip",
    ]
    results = json.loads((trained / "unscored" / "results.json").read_text())
    assert "bbox" not in results
    assert results["evaluator"].startswith("none: ")
    assert not (trained / "unscored" / "report").exists()
    assert "no report" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config-file", "table2a/r50"], "no config 'table2a/r50'"),
        (["--config-file", "table2a_backbone/r50_fpn", "train.max_iters=1"], "did you mean"),
        (["--config-file", "table2a_backbone/r50_fpn"], "coco_2014_train"),
        (
            ["--config-file", "table2a_backbone/r50_fpn", "dataset.train.json=no.json"],
            "annotation file 'no.json' does not exist",
        ),
        (
            ["--config-file", "table2a_backbone/r50_fpn", "train.init_checkpoint=no.pth"],
            "weights file 'no.pth' does not exist",
        ),
        (
            ["--config-file", "table2a_backbone/r50_fpn", "--num-gpus", "99", "train.device=cuda"],
            "torch finds no GPU" if not torch.cuda.is_available() else "99 processes",
        ),
    ],
)
def test_train_mistakes_end_with_2_one_line_and_nothing_written(
    run: Run, tmp_path: Path, args: list[str], message: str
) -> None:
    done = run("train.py", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config-file", "nothing", "--weights", "x"], "no config 'nothing'"),
        (
            ["--config-file", "table2a_backbone/r50_fpn", "--weights", "no.pth"],
            "weights file 'no.pth' does not exist",
        ),
        (["--config-file", "table2a_backbone/r50_fpn"], "--weights"),
        (["--config-file", "table2a_backbone/r50_fpn", "--predictions", "no.json"], "no.json"),
        (
            [
                *("--config-file", "table2a_backbone/r50_fpn", "--weights", __file__),
                *("--confidence-threshold", "50"),
            ],
            "--confidence-threshold is 50",
        ),
        (
            [
                *("--config-file", "table2a_backbone/r50_fpn", "--weights", __file__, "--report"),
                "dataloader.evaluator.tasks=[box_proposals]",
            ],
            "box_proposals",
        ),
        (
            [
                "--config-file",
                "table2a_backbone/r50_fpn",
                "--weights",
                __file__,
                "train.devise=cpu",
            ],
            "did you mean 'train.device'",
        ),
        (
            ["--config-file", "table2a_backbone/r50_fpn", "--weights", __file__],
            "coco_2014_minival",
        ),
    ],
)
def test_eval_mistakes_end_with_2_one_line_and_nothing_written(
    run: Run, tmp_path: Path, args: list[str], message: str
) -> None:
    done = run("eval.py", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_eval_on_no_image_is_one_line(run: Run, trained: Path, toy_dataset: Path) -> None:
    content = json.loads((toy_dataset / "val.json").read_text())
    empty = trained / "empty.json"
    empty.write_text(json.dumps({**content, "images": [], "annotations": []}))
    done = run(
        *("eval.py", "--config-file", CONFIG, "--weights", "out/model_0000001.pth"),
        *("--output", "empty", *own_dataset(toy_dataset), f"dataset.test.json={empty}"),
        cwd=trained,
    )
    assert done.returncode == 2
    assert f"test set ['{empty}']: Dataset '{empty}' is empty!" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_eval_refuses_weights_of_another_model(run: Run, trained: Path, toy_dataset: Path) -> None:
    done = run(
        *("eval.py", "--config-file", "table2a_backbone/r50_c4+synthetic"),
        *("--weights", "out/model_0000001.pth", "--output", "wrong"),
        *(f"dataset.synthetic.root={toy_dataset}", "dataset.synthetic.train=12"),
        *("dataset.synthetic.val=6", "dataset.synthetic.size=64", "train.device=cpu"),
        cwd=trained,
    )
    assert done.returncode == 2
    assert "do not fit the model of this config" in done.stderr.splitlines()[-1]
    assert not (trained / "wrong").exists()


def test_resume_refuses_a_checkpoint_of_another_model(
    run: Run, own_run: Path, toy_dataset: Path
) -> None:
    before = (own_run / "out" / "config.yaml").read_text()
    done = run(
        *("train.py", "--config-file", "table2a_backbone/r50_c4+synthetic", "--resume"),
        *(f"dataset.synthetic.root={toy_dataset}", "dataset.synthetic.train=12"),
        *("dataset.synthetic.val=6", "dataset.synthetic.size=64", "train.device=cpu"),
        *("train.output_dir=out", "dataloader.train.total_batch_size=2"),
        cwd=own_run,
    )
    assert done.returncode == 2
    assert "do not fit the model of this config" in done.stderr.splitlines()[-1]
    assert (own_run / "out" / "config.yaml").read_text() == before


@pytest.mark.parametrize("own", [[], ["dataset.test.json=val.json", "dataset.test.images=."]])
def test_the_papers_numbers_stand_beside_cocos_only(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "table4_keypoints/keypoint_and_mask"
    cfg = get_config(name, [*own, f"train.output_dir={tmp_path}"])
    (tmp_path / "results.json").write_text('{"evaluator": "one"}')
    metrics = dict.fromkeys(("AP", "AP50", "AP75", "APm", "APl"), 50.0)
    args = Namespace(config=name, visualize=0, report=False, predictions=tmp_path)
    import_module("eval").report(args, cfg, {"keypoints": metrics})
    out = capsys.readouterr().out
    assert ("| keypoints (paper) | 63.1" in out) == (not own)
    assert ("paper: Table 4, keypoint & mask: keypoint AP 63.1" in out) == (not own)


def test_a_demo_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = []
    quick, trained = (tmp_path / "output" / name for name in ("demo_quick", "demo/model_final.pth"))
    trained.parent.mkdir(parents=True)
    trained.touch()  # by a demo that was not quick

    def do_train(cfg: Any, *, resume: bool, extra_hooks: Any) -> None:
        resumed.append((resume, (quick / "kept").is_file()))
        quick.mkdir(parents=True, exist_ok=True)
        (quick / "kept").touch()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # as `Preemption`, after saving
        signal.raise_signal(signal.SIGINT)  # Ctrl-C

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "setup_datasets", lambda cfg: None)
    monkeypatch.setattr(demo, "do_train", do_train)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for arguments in ([], ["--resume"], []):
            monkeypatch.setattr(sys, "argv", ["demo.py", "--quick", *arguments])
            with pytest.raises(SystemExit, match="75"):
                demo.main()
            assert "make demo DEMO_ARGS=--resume" in capsys.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert resumed == [(False, False), (True, True), (False, False)]
    assert trained.is_file()


@pytest.mark.parametrize("script", ["train.py", "eval.py", "tools/demo.py", "tools/reproduce.py"])
def test_help(run: Run, tmp_path: Path, script: str) -> None:
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "usage:" in done.stdout
