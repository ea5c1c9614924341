import json
import struct
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from detectron2.engine import HookBase
from omegaconf import DictConfig

import train
from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from train import do_train

LOGGED = ("train.log_period=1", "train.max_iter=4", "train.checkpointer.period=2")


class Fail(HookBase):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise ZeroDivisionError


def trained(build: Any, score: Any, *overrides: str) -> DictConfig:
    """A training that fails in iteration 2 and is resumed."""
    score(7.0)
    with pytest.raises(ZeroDivisionError):
        do_train(build("out", *LOGGED, *overrides), extra_hooks=[Fail(2)])
    cfg = build("out", *LOGGED, *overrides)
    do_train(cfg, resume=True)
    return cfg


def in_json(cfg: DictConfig, name: str) -> dict[int, float]:
    lines = (Path(cfg.train.output_dir) / "metrics.json").read_text().splitlines()
    metrics = map(json.loads, lines)
    return {line["iteration"]: line[name] for line in metrics if name in line}


def records(file: Path) -> Iterator[Any]:
    """What W&B has written, in LevelDB's log format after 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 < len(data):
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:  # the rest of a block
            place += -place % 32768
            continue
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_has_one_run_with_all_metrics(
    build: Any, score: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = trained(build, score, "train.loggers=[json, wandb]")
    output = Path(cfg.train.output_dir)
    files = sorted(output.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    assert len(files) == 2  # of one run, to be synchronised as one
    assert {file.stem for file in files} == {f"run-{(output / 'wandb_run_id').read_text()}"}
    losses, aps, config, exits = {}, {}, {}, []
    for file in files:
        for record in records(file):
            config |= {
                ".".join(item.nested_key) or item.key: item.value_json
                for item in record.run.config.update
            }
            if record.WhichOneof("record_type") == "exit":
                exits.append(record.exit.exit_code)
            row = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            if "total_loss" in row:
                losses[record.history.step.num] = json.loads(row["total_loss"])
            if "segm/AP" in row:
                aps[record.history.step.num] = json.loads(row["segm/AP"])
    assert losses == in_json(cfg, "total_loss")
    assert sorted(losses) == [0, 1, 2, 3]
    assert aps == in_json(cfg, "segm/AP") == {4: 7.0}
    assert config["train.max_iter"] == "4"
    assert exits == [1, 0]


def test_mlflow_has_one_run_with_all_metrics(
    build: Any, score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")

    class Rename(HookBase):
        """A category's name with signs that MLflow refuses."""

        def before_step(self) -> None:
            self.trainer.storage.put_scalar("segm/AP-cat (é+)", 5.0)

    score(7.0)
    client = mlflow.MlflowClient()
    overrides = (*LOGGED, "train.loggers=[json, mlflow]")
    with pytest.raises(ZeroDivisionError):
        do_train(build("out", *overrides), extra_hooks=[Rename(), Fail(2)])
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FAILED"
    cfg = build("out", *overrides)
    do_train(cfg, resume=True, extra_hooks=[Rename()])
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.info.run_id == (Path(cfg.train.output_dir) / "mlflow_run_id").read_text()
    assert run.info.run_name == "out"
    assert run.data.params["train.max_iter"] == "4"
    assert run.data.params["optimizer._target_"] == "torch.optim.adamw.AdamW"
    for name in ("total_loss", "lr", "segm/AP"):
        history = client.get_metric_history(run.info.run_id, name)
        assert {metric.step: metric.value for metric in history} == in_json(cfg, name)
    assert run.data.metrics["segm/AP-cat _é__"] == 5.0


def test_a_folder_begun_anew_begins_a_run(
    build: Any, score: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    run = SimpleNamespace(id="a1", log=lambda *_, **__: None, finish=lambda **_: None)
    fake = SimpleNamespace(init=lambda **settings: asked.append(settings["id"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    score(1.0, 1.0, 1.0)
    for resume in (False, True, False):
        do_train(build("out", "train.loggers=[wandb]"), resume=resume)
    assert asked == [None, "a1", None]


def test_a_service_that_fails_does_not_end_a_training(
    build: Any, score: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    run = SimpleNamespace(id="a1", log=fail, finish=fail)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    score(1.0)
    cfg = build("out", "train.loggers=[wandb]")
    do_train(cfg)
    assert (Path(cfg.train.output_dir) / "model_final.pth").exists()
    assert "wandb cannot log metrics: no route to host" in caplog.text


def test_a_service_that_refuses_is_told_before_the_training(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise RuntimeError("No API key configured.\nLog in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    cfg = build("out", "train.loggers=[wandb]")
    with pytest.raises(ConfigError, match=r"wandb .*: No API key configured\.$"):
        do_train(cfg)
    (Path(cfg.train.output_dir) / "wandb_run_id").write_text("a1")
    with pytest.raises(ConfigError, match=r"a1.*wandb_run_id.*No API key"):
        do_train(cfg, resume=True)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_is_one_line_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = get_config(
        "table2a_backbone/r50_fpn", [f"train.loggers=[{name}]", f"train.output_dir={tmp_path}/out"]
    )
    (tmp_path / "wandb").mkdir()  # as W&B leaves one where it has run: no package
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    cfg.train.init_checkpoint = ""
    with pytest.raises(ConfigError, match=f"'{name}'.*pip install {name}$"):
        train.prepare(Namespace(resume=False), cfg)
    assert not (tmp_path / "out").exists()


def test_none_writes_no_file(build: Any, score: Any) -> None:
    score(1.0)
    cfg = build("out", "train.loggers=[]")
    do_train(cfg)
    written = [file.name for file in Path(cfg.train.output_dir).iterdir()]
    assert sorted(written) == ["last_checkpoint", "model_final.pth", "train_batch.jpg"]
