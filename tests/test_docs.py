"""Pages that are made of data are up to date, and what they and the README name is there."""

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import update_docs
from mask_rcnn_plugin.config.paper import rows_of
from reproduce.report import read_tables

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
REPRODUCTION = REPOSITORY / "docs" / "reproduction"


@pytest.mark.parametrize("path", update_docs.generate(), ids=str)
def test_generated_pages_are_up_to_date(path: Path) -> None:
    text = (REPOSITORY / path).read_text()
    assert text == update_docs.generate()[path], "run python tools/update_docs.py"


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    file = tmp_path / "docs" / "reproduction" / "2c.json"
    content = json.loads(file.read_text())
    content["rows"][0]["results"][0]["segm"]["AP"] += 30
    file.write_text(json.dumps(content))
    before, after = update_docs.generate(), update_docs.generate(tmp_path)
    differing = {path.name for path in before if before[path] != after[path]}
    assert differing == {"README.md", "paper.md", "2c.md", "index.md"}


def test_a_block_without_its_place_is_an_error() -> None:
    text = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    expected = "a\n<!-- begin x -->\n1 | 2\n<!-- end x -->\nb\n"
    assert update_docs.replace_blocks(text, {"x": "1 | 2"}) == expected
    with pytest.raises(ValueError, match="'y'"):
        update_docs.replace_blocks(text, {"y": ""})


def test_the_committed_reproduction_has_the_papers_rows() -> None:
    contents = read_tables(REPRODUCTION)
    assert len(contents) == 8
    for content in contents:
        rows = rows_of(content["table"])
        assert [row["config"] for row in content["rows"]] == [row.config for row in rows]
        for row in content["rows"]:
            assert len(row["results"]) == content["seeds"]


def test_results_of_the_committed_benchmark_agree() -> None:
    report = json.loads((REPOSITORY / "docs" / "benchmarks" / "cpu.json").read_text())
    for row in report["stages"]:
        assert row["allowed"] is None or row["difference"] <= row["allowed"], row["name"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_pages_name_no_path_of_a_machine() -> None:
    for file in [*PAGES, *(REPOSITORY / "docs").rglob("*.json")]:
        assert not re.search(r"/(home|root|tmp|work|Users)/", file.read_text()), file


def commands() -> list[str]:
    """Commands of the README and the pages that start a program of this repository."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        code = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
        code += re.findall(r"`(python tools/[^`]+)`", text)
        lines = [line.strip() for part in code for line in part.splitlines()]
        found += [line for line in lines if re.match(r"python [\w/]+\.py\b", line)]
    return sorted(set(found))


class _Parsed(BaseException):
    """Ends a program when it has parsed its arguments."""


@pytest.mark.parametrize("command", commands())
def test_arguments_of_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled_in = re.sub(r"\bN\b", "1", command)
    _, script, *arguments = shlex.split(filled_in, comments=True)
    if script == "tools/train_net.py":  # detectron2's
        return

    def parse(parser: argparse.ArgumentParser, *_: Any) -> None:
        _, unknown = parser.parse_known_intermixed_args()
        assert not unknown
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(_Parsed):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def test_the_tests_of_the_reliability_page_are_there() -> None:
    page = (REPOSITORY / "docs" / "reliability.md").read_text()
    tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page)
    assert tests
    for file, test in tests:
        source = (REPOSITORY / file).read_text()
        assert f"\ndef {test}(" in source, f"{file}::{test}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api" / "inference" / "index.html").read_text()
    assert "mask_rcnn_plugin.inference.predictor.load" in reference
