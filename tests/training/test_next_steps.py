from pathlib import Path
from typing import Any

from mask_rcnn_plugin.training.next_steps import next_steps
from train import do_train


def test_the_best_model_is_named_with_its_own_score(build: Any, score: Any) -> None:
    score(3.0, 7.25, 5.0)
    best = ("train.best_metric=segm/AP", "train.max_iter=3", "train.eval_period=1")
    cfg = build("with a space", *best)
    first, evaluate, predict = next_steps(cfg, do_train(cfg)).splitlines()
    folder = cfg.train.output_dir
    assert first.endswith(f"{folder}/model_best.pth: segm/AP 7.25, after iteration 1")
    weights = f"--weights '{folder}/model_best.pth'"
    assert evaluate.endswith(f"python eval.py --config-file '{folder}/config.yaml' {weights}")
    assert predict.endswith(f"python tools/predict.py --weights '{folder}' --input PHOTO")


def test_without_a_test_set_there_is_nothing_to_evaluate(build: Any) -> None:
    names = ("dataset.test.names=[]", "dataset.test.json=", "dataset.test.images=")
    cfg = build("out", *names)
    first, predict = next_steps(cfg, do_train(cfg)).splitlines()
    assert first.endswith("out/model_final.pth: after iteration 1")
    assert "predict.py" in predict


def test_a_config_file_of_ones_own_is_named_as_it_may_register_the_dataset(
    build: Any, score: Any, tmp_path: Path
) -> None:
    score(3.0)
    cfg = build("out")
    results = do_train(cfg)
    own = tmp_path / "own.py"
    own.touch()
    overrides = ["train.device=cpu", "model.backbone.width=8"]
    for config in (str(own), f"{own}+synthetic"):
        line = next_steps(cfg, results, config, overrides).splitlines()[1]
        weights = f"--weights {cfg.train.output_dir}/model_final.pth"
        assert line.endswith(f"--config-file {config} {weights} {' '.join(overrides)}")
    line = next_steps(cfg, results, "table2a_backbone/r50_fpn", overrides).splitlines()[1]
    assert f"--config-file {cfg.train.output_dir}/config.yaml" in line
