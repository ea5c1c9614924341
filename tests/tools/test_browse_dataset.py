"""tools/browse_dataset.py and the pictures of a training."""

import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances
from PIL import Image

from mask_rcnn_plugin.evaluation.pictures import draw_inputs

PROGRAM = Path(__file__).parents[2] / "tools" / "browse_dataset.py"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def browse(run_python: Run, toy_dataset: Path, tmp_path: Path) -> Run:
    def run(*args: object) -> subprocess.CompletedProcess[str]:
        config = ["--config-file", "table5_multitask/keypoint_and_mask+synthetic"]
        folder = [f"dataset={toy_dataset}", "dataloader.train.dataset.min_keypoints=0"]
        return run_python(PROGRAM, *config, *folder, *args, cwd=tmp_path)

    return run


def test_pages_of_what_is_trained_on(browse: Run, toy_dataset: Path, tmp_path: Path) -> None:
    images = [file.name for file in (toy_dataset / "train").iterdir()]
    done = browse("--count", 3, "--output", "a")
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "a").iterdir()
    assert Image.open(page).size == (3 * 480, 480)
    line = done.stdout.splitlines()[0]
    assert line.startswith(f"a/{page.name}: ")
    assert len({*line.split(": ")[1].split(", ")} & {*images}) == 3
    assert browse("--count", 3, "--output", "b").returncode == 0
    assert (tmp_path / "b" / page.name).read_bytes() == page.read_bytes()
    assert browse("--count", 3, "--seed", 1, "--output", "c").returncode == 0
    assert (tmp_path / "c" / page.name).read_bytes() != page.read_bytes()


def test_a_mistake_is_one_line(browse: Run, tmp_path: Path) -> None:
    done = browse("dataset.train.jsom=x")
    assert done.returncode == 2
    assert "dataset.train.json" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "output").exists()


def test_no_image_to_train_on_is_one_line(browse: Run) -> None:
    done = browse("dataloader.train.dataset.min_keypoints=999")
    assert done.returncode == 2
    assert "none has the 999 keypoints" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_grid_has_a_tile_an_image(ground_truth: Callable[..., Instances]) -> None:
    names = ["a", "b", "c"]
    metadata = Metadata(
        thing_classes=names, keypoint_names=names, keypoint_connection_rules=[("a", "b", (9, 9, 9))]
    )
    image = torch.zeros(3, 96, 128, dtype=torch.uint8)
    image[0] = 255  # blue, of BGR
    batch = [{"image": image, "instances": ground_truth(n)} for n in (3, 0, 3)]
    grid = draw_inputs(batch, metadata, "BGR", columns=2)
    assert grid.shape == (960, 960, 3)
    empty = grid[:480, 480:]
    assert np.array_equal(empty[100, 100], [0, 0, 255])
    assert np.array_equal(empty[400, 100], [255, 255, 255])  # below an image wider than high
    assert np.array_equal(grid[:480, :480], grid[480:, :480]) is False  # colours are by chance
    drawn = (grid[:360, :480] != empty[:360]).any(-1).mean()
    assert 0.1 < drawn < 0.9
    assert (grid[480:, 480:] == 255).all()


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (1, 5000)])
def test_a_thin_image_is_drawn_in_little_memory(size: tuple[int, int]) -> None:
    nothing = Instances(size, gt_classes=torch.zeros(0, dtype=torch.int64))
    batch = [{"image": torch.zeros(3, *size, dtype=torch.uint8), "instances": nothing}]
    tracemalloc.start()
    try:
        assert draw_inputs(batch, Metadata(thing_classes=[]), "BGR").shape == (480, 480, 3)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
