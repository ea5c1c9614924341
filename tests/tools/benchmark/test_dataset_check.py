"""The check of a made-up data set at a small size."""

import json
from pathlib import Path

import pytest

from benchmark.dataset_check import dataset_check, timed_check, write_made_up


def test_a_made_up_data_set_is_checked_and_measured(tmp_path: Path) -> None:
    measured = dataset_check(images=30, annotations=200)
    write_made_up(tmp_path, images=30, annotations=200)  # from the same seed
    file = tmp_path / "made_up.json"
    content = json.loads(file.read_text())
    assert measured.images == len(content["images"]) == 30
    assert measured.annotations == len(content["annotations"]) == 200
    assert measured.file_mb == file.stat().st_size / 1e6
    assert 0 < measured.seconds < 60
    assert 50 < measured.imports_mb <= measured.peak_mb < measured.imports_mb + 100
    files = sorted((tmp_path / "images").iterdir())
    assert {file.name for file in files} == {image["file_name"] for image in content["images"]}
    assert not any(file.stat().st_size for file in files)


def test_errors_are_no_measurement(tmp_path: Path) -> None:
    write_made_up(tmp_path, images=5, annotations=20)
    assert timed_check(tmp_path).annotations == 20
    (tmp_path / "images" / "3.jpg").unlink()
    with pytest.raises(ValueError, match="has errors:[^$]*image-missing"):
        timed_check(tmp_path)
