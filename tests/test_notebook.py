"""The notebook runs from the first cell to the last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "first_steps.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for cell in notebook.cells:  # smaller and shorter, and elsewhere
        for long, short in (
            ("output/first_steps", str(tmp_path)),
            ("--train 400 --val 100 --size 128", "--train 8 --val 4 --size 64"),
            ("train.epochs=10", "train.epochs=0.5"),
        ):
            cell.source = cell.source.replace(long, short)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, resources=folder).execute()
    for file in ("browse/000.jpg", "model/model_best.pth", "model/report/index.html", "found.jpg"):
        assert (tmp_path / file).is_file(), file
