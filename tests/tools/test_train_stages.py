"""tools/train_stages.py, end to end on a few images."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import instantiate
from torch import Tensor

from mask_rcnn_plugin import get_config

REPOSITORY = Path(__file__).parent.parent.parent
FPN = "table2a_backbone/r50_fpn+synthetic"
KEYPOINTS = "table4_keypoints/keypoint_and_mask+synthetic"
SCRIPT = "tools/train_stages.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs a script of the repository in this process, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run_script(script: str, *args: str) -> None:
        monkeypatch.setattr(sys, "argv", [script, *args])
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")

    return run_script


@pytest.fixture
def toy(toy_dataset: Path) -> list[str]:
    return [
        f"dataset.synthetic.root={toy_dataset}",
        *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
        *("model.backbone.width=16", "train.device=cpu"),
    ]


TRAINING = ("dataloader.train.total_batch_size=2", "train.max_iter=2")


def weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    model = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in model.items() if k.startswith(prefix)}


def results(folder: Path) -> dict[str, Any]:
    """The scores in results.json."""
    content = json.loads((folder / "results.json").read_text())
    return {k: content[k] for k in ("bbox", "segm", "box_proposals") if k in content}


def test_4step_ends_in_one_model_and_is_not_repeated(
    run: Callable[..., None], toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--regime", "4step", "--config-file", FPN, *TRAINING, *toy)
    run(SCRIPT, *arguments)
    out = tmp_path / f"output/{FPN}-4step"
    assert "| bbox " in capsys.readouterr().out
    assert {"AR@100", "AR@1000"} <= results(out / "3_rpn")["box_proposals"].keys()

    one, heads = (
        json.loads((folder / "coco_instances_results.json").read_text())
        for folder in (out, out / "4_detector")
    )
    assert len(one) > 6
    assert [d["image_id"] for d in one] == [d["image_id"] for d in heads]
    assert [d["score"] for d in one] == pytest.approx([d["score"] for d in heads], abs=1e-4)

    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "output").rglob("*.p??")}
    for again in (arguments, ("--regime", "4step", "--config-file", str(out / "config.yaml"))):
        run(SCRIPT, *again)
        assert "| bbox " in capsys.readouterr().out
        assert {f: f.stat().st_mtime_ns for f in (tmp_path / "output").rglob("*.p??")} == before

    with pytest.raises(SystemExit, match="2"):
        run(SCRIPT, "--regime", "separate", *arguments[2:], f"train.output_dir={out}")
    assert "regime: '4step' there, 'separate' here" in capsys.readouterr().err.splitlines()[-1]


def test_eval_takes_the_proposals_of_separate(
    run: Callable[..., None], toy: list[str], tmp_path: Path
) -> None:
    run(SCRIPT, "--regime", "separate", "--config-file", FPN, *TRAINING, *toy)
    out = tmp_path / f"output/{FPN}-separate"
    model = out / "2_detector" / "model_final.pth"
    assert not weights(model, "proposal_generator.")
    backbone = weights(model, "backbone.")
    rpn = weights(out / "1_rpn" / "model_final.pth", "backbone.")
    assert any(not torch.equal(backbone[k], rpn[k]) for k in rpn)

    run(
        *("eval.py", "--config-file", FPN, "--weights", str(model), "--output", "evaluated"),
        *("model.proposal_generator=null", *toy),
        f"dataloader.test.dataset.proposal_files=[{out}/1_rpn/proposals/test_0.pkl]",
        "dataloader.test.mapper.precomputed_proposal_topk=50",
    )
    assert results(tmp_path / "evaluated") == results(out / "2_detector")


def test_stages_of_a_finetune_count_epochs_and_keep_usable_configs(
    run: Callable[..., None],
    toy: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("detectron2.utils.logger.setup_logger", lambda *_, **__: None)
    row = "table2a_backbone/r50_fpn+finetune+synthetic"
    model = get_config(row, toy)
    torch.manual_seed(0)
    torch.save({"model": instantiate(model.model).state_dict()}, tmp_path / "start.pth")
    short = ("finetune.epochs=1", "train.init_checkpoint=start.pth")
    short += ("dataloader.train.dataset.filter_empty=False", "train.output_dir=out")
    run(SCRIPT, "--regime", "separate", "--config-file", row, *short, *toy)
    for stage in ("1_rpn", "2_detector"):
        cfg = get_config(str(tmp_path / "out" / stage / "config.yaml"))
        assert (cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (2, 8)
    assert "not drawn" not in caplog.text
    assert "no pictures" not in caplog.text
    assert (tmp_path / "out" / "2_detector" / "pictures").is_dir()
    assert not (tmp_path / "out" / "1_rpn" / "pictures").exists()


def test_a_test_set_without_annotations_gives_a_submission(
    run: Callable[..., None], toy: list[str], toy_dataset: Path, tmp_path: Path
) -> None:
    content = json.loads((toy_dataset / "person_keypoints_val.json").read_text())
    del content["annotations"]
    file = tmp_path / "image_info_test-dev2017.json"
    file.write_text(json.dumps(content))
    run(
        *(SCRIPT, "--regime", "separate", "--config-file", KEYPOINTS, *TRAINING, *toy),
        *(f"dataset.test.json={file}", f"dataset.test.images={toy_dataset / 'val'}"),
        "+train.output_dir=out",
    )
    submitted = (tmp_path / "out" / "2_detector" / "submission").rglob("*.zip")
    assert {f.parent.name for f in submitted} == {"bbox", "segm", "keypoints"}
    assert not (tmp_path / "out" / "1_rpn" / "submission").exists()


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["--regime", "joint", "--config-file", FPN], {}, "'joint'"),
        (["--regime", "4step", "--config-file", "table2a/r50"], {}, "'table2a/r50'"),
        (["--regime", "4step", "--config-file", FPN, "--num-gpus", "99"], {}, "99"),
        (["--regime", "4step", "--config-file", FPN], {"WORLD_SIZE": "8"}, "RANK"),
    ],
)
def test_a_mistake_ends_with_2_one_line_and_nothing_written(
    args: list[str],
    env: dict[str, str],
    message: str,
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        run(SCRIPT, *args)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
