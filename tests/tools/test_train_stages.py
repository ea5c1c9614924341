"""tools/train_stages.py, end to end on a few images."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).parent.parent.parent
CONFIG = ["--config-file", "table2a_backbone/r50_fpn+synthetic"]
SCRIPT = "tools/train_stages.py"


def run(script: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / script), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def toy(root: Path) -> list[str]:
    return [
        f"dataset.synthetic.root={root}",
        *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
        *("model.backbone.width=16", "train.device=cpu"),
    ]


def training(root: Path) -> list[str]:
    return [
        *("dataloader.train.total_batch_size=2", "train.max_iter=2", "train.checkpointer.period=1"),
        *toy(root),
    ]


def weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    model = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in model.items() if k.startswith(prefix)}


def results(folder: Path) -> dict[str, Any]:
    """results.json but for the time that it took."""
    content = json.loads((folder / "results.json").read_text())
    assert content.pop("ms_per_image") > 0
    return content


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def four_steps(toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the script ran; output at its default place."""
    folder = tmp_path_factory.mktemp("four_steps")
    done = run(SCRIPT, "--regime", "4step", *CONFIG, *training(toy_dataset), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "| bbox   |" in done.stdout
    return folder


OUTPUT = Path("output/table2a_backbone/r50_fpn+synthetic-4step")


def test_4step_ends_in_one_model_on_the_backbone_of_stage_2(four_steps: Path) -> None:
    out = four_steps / OUTPUT
    stages = {
        s: out / s / "model_final.pth" for s in ("1_rpn", "2_detector", "3_rpn", "4_detector")
    }
    backbone = weights(out / "model_final.pth", "backbone.")
    assert same(backbone, weights(stages["2_detector"], "backbone."))
    for stage in ("3_rpn", "4_detector"):
        kept = weights(stages[stage], "backbone.")
        # Frozen batch normalisation need not have the counter; running statistics it has.
        missing = {k for k in backbone.keys() - kept.keys() if "num_batches_tracked" not in k}
        assert not missing
        assert any("running_mean" in k for k in kept)
        assert all(torch.equal(v, backbone[k]) for k, v in kept.items())
    assert not same(backbone, weights(stages["1_rpn"], "backbone."))

    rpn = weights(out / "model_final.pth", "proposal_generator.")
    assert same(rpn, weights(stages["3_rpn"], "proposal_generator."))
    first_step = weights(out / "3_rpn" / "model_0000000.pth", "proposal_generator.")
    assert not any(torch.equal(rpn[k], first_step[k]) for k in rpn)
    heads = weights(out / "model_final.pth", "roi_heads.")
    assert same(heads, weights(stages["4_detector"], "roi_heads."))
    before = weights(stages["2_detector"], "roi_heads.")
    assert not any(torch.equal(heads[k], before[k]) for k in heads)


def test_rpn_stages_report_recall(four_steps: Path) -> None:
    for stage in ("1_rpn", "3_rpn"):
        results = json.loads((four_steps / OUTPUT / stage / "results.json").read_text())
        assert {"AR@100", "AR@1000"} <= results["box_proposals"].keys()
        assert "box proposal recall" in results["evaluator"]
    log = (four_steps / OUTPUT / "log.txt").read_text()
    assert f"{OUTPUT}/1_rpn: finished. box_proposals AR@100" in log


def test_the_one_model_detects_what_its_heads_did_on_the_proposals(four_steps: Path) -> None:
    out = four_steps / OUTPUT
    one, heads = (
        json.loads((folder / "coco_instances_results.json").read_text())
        for folder in (out, out / "4_detector")
    )
    assert len(one) > 6
    assert [d["image_id"] for d in one] == [d["image_id"] for d in heads]
    assert [d["score"] for d in one] == pytest.approx([d["score"] for d in heads], abs=1e-4)
    for a, b in zip(one, heads):
        assert a["bbox"] == pytest.approx(b["bbox"], abs=0.01)


def test_each_stage_has_its_config(four_steps: Path) -> None:
    def proposals(stage: str) -> set[str]:
        text = (four_steps / OUTPUT / stage / "config.yaml").read_text()
        return set(re.findall(r"[\w+/-]*\.pkl", text))

    rpns = ("1_rpn", "3_rpn")
    first, second = ({f"{OUTPUT}/{r}/proposals/{n}_0.pkl" for n in ("train", "test")} for r in rpns)
    assert proposals("2_detector") == first
    assert proposals("4_detector") == second
    assert proposals("1_rpn") == proposals("3_rpn") == set()


def test_eval_runs_the_one_model(four_steps: Path, toy_dataset: Path) -> None:
    done = run(
        *("eval.py", *CONFIG, "--weights", f"{OUTPUT}/model_final.pth", "--output", "evaluated"),
        *toy(toy_dataset),
        cwd=four_steps,
    )
    assert done.returncode == 0, done.stderr
    assert results(four_steps / "evaluated") == results(four_steps / OUTPUT)


def test_a_second_run_only_prints_the_result(four_steps: Path, toy_dataset: Path) -> None:
    def written() -> dict[Path, int]:
        files = (f for f in (four_steps / OUTPUT).rglob("*.p??") if f.is_file())
        return {f: f.stat().st_mtime_ns for f in files}

    before = written()
    done = run(SCRIPT, "--regime", "4step", *CONFIG, *training(toy_dataset), cwd=four_steps)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished already") == 5
    assert "Start inference" not in done.stdout
    assert "| bbox   |" in done.stdout
    assert written() == before


def test_another_regime_in_the_same_folder_is_refused(four_steps: Path, toy_dataset: Path) -> None:
    done = run(
        *(SCRIPT, "--regime", "separate", *CONFIG, *training(toy_dataset)),
        f"train.output_dir={OUTPUT}",
        cwd=four_steps,
    )
    assert done.returncode == 2
    assert "holds stages of another training" in done.stderr.splitlines()[-1]
    assert "regime: '4step' there, 'separate' here" in done.stderr


def test_separate_trains_on_the_proposals_of_its_rpn(toy_dataset: Path, tmp_path: Path) -> None:
    done = run(SCRIPT, "--regime", "separate", *CONFIG, *training(toy_dataset), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = Path("output/table2a_backbone/r50_fpn+synthetic-separate")
    assert f"Loading proposals from: {out}/1_rpn/proposals/train_0.pkl" in done.stdout
    assert f"{out}/2_detector/model_final.pth: the model" in done.stdout
    model = tmp_path / out / "2_detector" / "model_final.pth"
    assert not weights(model, "proposal_generator.")
    rpn = tmp_path / out / "1_rpn" / "model_final.pth"
    assert not same(weights(model, "backbone."), weights(rpn, "backbone."))

    evaluated = run(
        *("eval.py", *CONFIG, "--weights", str(model), "--output", "evaluated"),
        *("model.proposal_generator=null", *toy(toy_dataset)),
        f"dataloader.test.dataset.proposal_files=[{out}/1_rpn/proposals/test_0.pkl]",
        "dataloader.test.mapper.precomputed_proposal_topk=50",
        cwd=tmp_path,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert results(tmp_path / "evaluated") == results(tmp_path / out / "2_detector")


def test_a_mistake_ends_with_2_one_line_and_nothing_written(tmp_path: Path) -> None:
    done = run(SCRIPT, "--regime", "4step", "--config-file", "table2a/r50", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("train_stages.py: no config 'table2a/r50'")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["--regime", "joint", *CONFIG], {}, "invalid choice: 'joint'"),
        (
            ["--regime", "4step", *CONFIG, "--num-gpus", "99", "train.device=cuda"],
            {},
            " GPUs that torch can use" if not torch.cuda.is_available() else "99 processes",
        ),
        (["--regime", "4step", *CONFIG], {"WORLD_SIZE": "8"}, "WORLD_SIZE is set, RANK"),
    ],
)
def test_wrong_arguments(
    args: list[str],
    env: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *args])
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(REPOSITORY / SCRIPT), run_name="__main__")
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_separate_on_keypoints_and_a_test_set_without_annotations(
    toy_dataset: Path, tmp_path: Path
) -> None:
    content = json.loads((toy_dataset / "person_keypoints_val.json").read_text())
    del content["annotations"]
    file = tmp_path / "image_info_test-dev2017.json"
    file.write_text(json.dumps(content))
    done = run(
        *(SCRIPT, "--regime", "separate"),
        *("--config-file", "table4_keypoints/keypoint_and_mask+synthetic"),
        *training(toy_dataset),
        *(f"dataset.test.json={file}", f"dataset.test.images={toy_dataset / 'val'}"),
        "train.output_dir=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    submitted = (tmp_path / "out" / "2_detector" / "submission").rglob("*.zip")
    assert {f.parent.name for f in submitted} == {"bbox", "segm", "keypoints"}
    assert not (tmp_path / "out" / "1_rpn" / "submission").exists()
