import json
from pathlib import Path

import pytest
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.config import ConfigError
from mask_rcnn_plugin.data.coco import DatasetError
from mask_rcnn_plugin.training import setup_datasets
from mask_rcnn_plugin.training.batch_scaling import fit_batch, fit_epochs, scale_to_batch

ROW = "table2a_backbone/r50_fpn"


def schedule(cfg: DictConfig) -> list[float]:
    return [
        cfg.optimizer.lr,
        cfg.train.max_iter,
        cfg.lr_multiplier.warmup_length.iterations,
        cfg.train.eval_period,
        cfg.train.checkpointer.period,
    ]


@pytest.mark.parametrize(
    ("batch", "accumulate", "expected"),
    [
        (2, 1, [0.0025, 1_280_000, 8000, 160_000, 40_000]),
        (2, 2, [0.005, 640_000, 4000, 80_000, 20_000]),
        (64, 1, [0.08, 40_000, 250, 5000, 1250]),
        (12, 1, [0.015, 213_333, 1333, 26_667, 6667]),  # 160,000 x 16 / 12 = 213,333.3
        (8, 2, [0.02, 160_000, 1000, 20_000, 5000]),  # the reference itself
    ],
)
def test_the_schedule_follows_the_batch(batch: int, accumulate: int, expected: list[float]) -> None:
    overrides = [
        *("train.reference_batch_size=16", f"dataloader.train.total_batch_size={batch}"),
        f"train.accumulate_steps={accumulate}",
    ]
    cfg = get_config(ROW, overrides)
    changes = scale_to_batch(cfg)
    assert schedule(cfg) == pytest.approx(expected, rel=1e-12)
    assert len(changes) == (0 if batch * accumulate == 16 else 5)
    assert scale_to_batch(cfg) == []  # once is enough
    assert schedule(cfg) == pytest.approx(expected, rel=1e-12)


def test_the_shape_of_the_schedule_stays() -> None:
    """The rate at half and after the drop at 120k of 160k, and the end of the warm-up."""
    small = ["train.reference_batch_size=16", "dataloader.train.total_batch_size=4"]
    cfg, scaled = get_config(ROW), get_config(ROW, small)
    scale_to_batch(scaled)
    before, after = instantiate(cfg.lr_multiplier), instantiate(scaled.lr_multiplier)
    assert scaled.train.max_iter == 640_000
    for iteration in (0, 500, 1000, 80_000, 119_999, 120_000, 159_999):
        assert after(4 * iteration / 640_000) == before(iteration / 160_000)


def test_a_warm_up_and_a_period_that_follow_max_iter_do_so_still() -> None:
    small = ["train.reference_batch_size=16", "dataloader.train.total_batch_size=8"]
    cfg = get_config(f"{ROW}+synthetic", [*small, "train.max_iter=100"])
    assert scale_to_batch(cfg) == ["optimizer.lr 0.001 -> 0.0005", "train.max_iter 100 -> 200"]
    assert OmegaConf.is_interpolation(cfg.train.checkpointer, "period")
    assert cfg.train.checkpointer.period == 200
    assert cfg.train.eval_period == 0  # none but at the end
    assert cfg.lr_multiplier.warmup_length == 0.05


def test_without_a_reference_nothing_changes() -> None:
    cfg = get_config(ROW, ["dataloader.train.total_batch_size=2"])
    assert scale_to_batch(cfg) == []
    assert cfg == get_config(ROW, ["dataloader.train.total_batch_size=2"])


def test_a_period_does_not_vanish() -> None:
    large = ["train.reference_batch_size=1", "dataloader.train.total_batch_size=16"]
    cfg = get_config(ROW, [*large, "train.max_iter=4", "train.checkpointer.period=2"])
    scale_to_batch(cfg)
    assert (cfg.train.max_iter, cfg.train.checkpointer.period) == (1, 1)


def test_what_is_changed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["train.reference_batch_size=16", "dataloader.train.total_batch_size=8"]
    fit_batch(get_config(ROW, small))
    assert capsys.readouterr().out == (
        "scaled to a batch of 8: optimizer.lr 0.02 -> 0.01; train.max_iter 160000 -> 320000; "
        "train.eval_period 20000 -> 40000; train.checkpointer.period 5000 -> 10000; "
        "lr_multiplier.warmup_length.iterations 1000 -> 2000\n"
    )
    fit_batch(get_config(ROW))
    assert capsys.readouterr().out == ""


def test_a_batch_that_the_processes_cannot_share_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="total_batch_size is 16, must be a multiple of 3"):
        fit_batch(get_config(ROW))
    fit_batch(get_config(ROW, ["dataloader.train.total_batch_size=6"]))
    with pytest.raises(ConfigError, match="total_batch_size is 0"):
        fit_batch(get_config(ROW, ["dataloader.train.total_batch_size=0"]))


@pytest.mark.parametrize("reference", ["0", "8.5", "many"])
def test_a_reference_that_is_no_batch_is_refused(reference: str) -> None:
    with pytest.raises(ConfigError, match=f"reference_batch_size is '?{reference}'?, must be"):
        scale_to_batch(get_config(ROW, [f"train.reference_batch_size={reference}"]))


def test_a_config_without_a_learning_rate_is_refused() -> None:
    cfg = get_config(ROW, ["train.reference_batch_size=8"])
    del cfg.optimizer.lr
    with pytest.raises(ConfigError, match=r"reference_batch_size.*optimizer\.lr"):
        scale_to_batch(cfg)


@pytest.mark.parametrize(
    ("epochs", "batch", "expected"),
    # 12 images. Iterations of the training, periods, warm-up.
    [("3", 2, (18, 6, 6)), ("0.5", 5, (2, 3, 3)), ("2", 24, (1, 1, 1))],
)
def test_epochs_are_of_the_dataset(
    epochs: str, batch: int, expected: tuple[int, ...], toy_dataset: Path
) -> None:
    cfg = get_config(
        "table2a_backbone/r50_fpn",
        [
            f"dataset={toy_dataset}",
            f"train.epochs={epochs}",
            f"dataloader.train.total_batch_size={batch}",
            "dataloader.train.dataset.filter_empty=False",
        ],
    )
    setup_datasets(cfg)
    fit_epochs(cfg)
    train = cfg.train
    assert train.eval_period == train.checkpointer.period
    warm_up = cfg.lr_multiplier.warmup_length.iterations
    assert (train.max_iter, train.eval_period, warm_up) == expected


def test_what_epochs_replace_is_printed(
    toy_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train.epochs=2", "train.max_iter=500"]
    batch = ["dataloader.train.total_batch_size=2", "dataloader.train.dataset.filter_empty=False"]
    cfg = get_config(ROW, [f"dataset={toy_dataset}", *given, *batch])
    cfg.train.checkpointer.period = "${train.max_iter}"
    setup_datasets(cfg)
    fit_epochs(cfg)
    (line,) = capsys.readouterr().out.splitlines()
    assert "an evaluation every 6" in line
    cfg.dataset.test.names = []
    fit_epochs(cfg)
    assert "a checkpoint every 6" in capsys.readouterr().out
    for key, old, new in (
        ("train.max_iter", 500, 12),
        ("train.eval_period", 20000, 6),
        ("train.checkpointer.period", 500, 6),
        ("lr_multiplier.warmup_length.iterations", 1000, 6),
    ):
        assert f"{key} {old} -> {new}" in line


def test_a_training_set_without_the_keypoints_asked_for_names_the_key(toy_dataset: Path) -> None:
    key = "dataloader.train.dataset.min_keypoints"
    given = [f"dataset={toy_dataset}", "train.epochs=1", f"{key}=100"]
    cfg = get_config("table5_multitask/mask_only", given)
    setup_datasets(cfg)
    with pytest.raises(DatasetError, match=f"all 12 training images .* 100 keypoints .*{key}"):
        fit_epochs(cfg)


def test_the_main_process_alone_reads_the_file_to_count(
    toy_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = get_config(ROW, [f"dataset={toy_dataset}", "train.epochs=2"])
    setup_datasets(cfg)
    file = cfg.dataset.train.json
    DatasetCatalog.remove(file)
    DatasetCatalog.register(file, lambda: pytest.fail("read in another process"))
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "all_gather", lambda _: [(160, None), (None, None)])
    fit_epochs(cfg)
    batch = cfg.dataloader.train.total_batch_size
    assert cfg.train.max_iter == 2 * 160 / batch


def test_epochs_of_a_dataset_without_an_annotated_image_are_an_error(
    toy_dataset: Path, tmp_path: Path
) -> None:
    content = json.loads((toy_dataset / "train.json").read_text())
    (tmp_path / "none.json").write_text(json.dumps({**content, "annotations": []}))
    cfg = get_config(
        f"{ROW}+synthetic",
        [
            "train.epochs=2",
            f"dataset.synthetic.root={toy_dataset}",
            *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
            f"dataset.train.json={tmp_path / 'none.json'}",
        ],
    )
    setup_datasets(cfg)
    with pytest.raises(DatasetError, match=r"training set \['.*none\.json'\]"):
        fit_epochs(cfg)


def test_an_epoch_is_as_long_where_rare_classes_are_drawn_more_often(toy_dataset: Path) -> None:
    lengths = []
    for threshold in (0, 0.9):
        changes = [f"dataset={toy_dataset}", "train.epochs=2"]
        changes += [f"dataloader.train.repeat_threshold={threshold}"]
        changes += ["dataloader.train.dataset.filter_empty=False"]
        cfg = get_config(ROW, [*changes, "dataloader.train.total_batch_size=2"])
        setup_datasets(cfg)
        fit_epochs(cfg)
        lengths.append(cfg.train.max_iter)
    assert lengths == [12, 12]


def test_without_epochs_the_schedule_is_the_configs(toy_dataset: Path) -> None:
    cfg = get_config("table2a_backbone/r50_fpn", [f"dataset={toy_dataset}"])
    setup_datasets(cfg)
    before = cfg.train.copy()
    fit_epochs(cfg)
    assert cfg.train == before
