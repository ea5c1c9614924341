"""The committed reproduction says what its own results, and the rules of today, say."""

import json
import re
from pathlib import Path

from mask_rcnn_plugin.config.paper import rows_of
from reproduce import report
from reproduce.claims import CLAIMS

PAGE = Path(__file__).parent.parent / "docs" / "reproduction"
BENCHMARK = PAGE.parent / "benchmarks"
TABLES = [f.stem for f in PAGE.glob("*.json") if f.stem != "claims"]


def test_claims_follow_from_the_committed_results() -> None:
    measured = {}
    for table in TABLES:
        content = json.loads((PAGE / f"{table}.json").read_text())
        assert [row["config"] for row in content["rows"]] == [r.config for r in rows_of(table)]
        for row in content["rows"]:
            assert len(row["results"]) == content["seeds"]
            measured[row["config"]] = report.collect(row["results"])
    committed = json.loads((PAGE / "claims.json").read_text())
    assert report.claim_records(CLAIMS, measured) == committed

    _, lines = report.claim_rows(CLAIMS, measured)
    page = (PAGE / "index.md").read_text()
    for line in lines:
        pattern = r" *\| *".join(re.escape(cell) for cell in line)
        assert re.search(rf"^\| {pattern} *\|$", page, flags=re.MULTILINE), line


def test_pictures_of_the_page_are_there() -> None:
    page = (PAGE / "index.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert len(pictures) == 2 * len(TABLES) > 0
    for picture in pictures:
        assert (PAGE / picture).is_file()
    assert (PAGE / "index.html").read_text().count("data:image/") == len(pictures)


def test_pages_name_no_path_of_a_machine() -> None:
    for file in [*PAGE.iterdir(), *BENCHMARK.iterdir()]:
        if file.suffix in (".md", ".json", ".html"):
            assert not re.search(r"/(home|root|tmp|work|Users)/", file.read_text()), file


def test_readme_sums_up_the_committed_results() -> None:
    readme = " ".join((PAGE.parent.parent / "README.md").read_text().split())
    lines = [line.split("|") for line in (PAGE / "2c.md").read_text().splitlines()]
    ours = [line[3].strip() for line in lines if len(line) > 3 and line[2].strip() == "ours"]
    assert len(ours) == 5
    assert f"| drawn images | {' | '.join(ours)} |" in readme
    verdicts = [c["verdict"] for c in json.loads((PAGE / "claims.json").read_text())]
    words = {20: "twenty", 10: "ten", 3: "three", 7: "seven"}
    total, agree, disagree, undecided = (
        words[n]
        for n in (len(verdicts), *(map(verdicts.count, ("agrees", "disagrees", "undecided"))))
    )
    assert (
        f"Of {total} claims of the paper {agree} are seen there too, {disagree} are not" in readme
    )
    assert f"{undecided} are undecided." in readme


def test_readme_shows_the_committed_benchmark() -> None:
    readme = (PAGE.parent.parent / "README.md").read_text()
    report = json.loads((BENCHMARK / "cpu.json").read_text())
    assert report["environment"].split(", Python")[0] in " ".join(readme.split())
    shown = 0
    for row in report["stages"]:
        if f"| {row['name']} |" not in readme:
            continue
        shown += 1
        peers = ("detectron2", "detectron2 tuned", "torchvision", "plugin")
        times = [row["ms"].get(peer) for peer in peers]
        cells = ["" if ms is None else f"{ms:.0f}" for ms in times]
        line = f"| {' | '.join([row['name'], *cells, format(row['ratio'], '.2f')])} |"
        assert line.replace("|  |", "| |").replace("|  |", "| |") in readme
    assert shown > 10
    for stage in ("whole model", "training step", "masks to RLE"):
        assert f"| {stage} |" in readme
    found = f"{report['bf16']['found']:.1%}"
    assert f"{found} of the boxes" in readme


def test_the_committed_check_of_a_million_annotations_is_fast_and_shown() -> None:
    report = json.loads((BENCHMARK / "dataset_check.json").read_text())
    largest = report["dataset_check"][-1]
    assert (largest["images"], largest["annotations"]) == (100_000, 1_000_000)
    assert largest["seconds"] < 180
    file_mb, peak_mb, imports_mb = (
        f"{largest[name]:.0f}" for name in ("file_mb", "peak_mb", "imports_mb")
    )
    seconds = f"{largest['seconds']:.0f} s"
    readme = " ".join((PAGE.parent.parent / "README.md").read_text().split())
    assert (
        f"100,000 images with 1,000,000 annotations, a file of {file_mb} MB, take {seconds} on the "
        f"CPU below and {peak_mb} MB of memory, {imports_mb} of it for the imports" in readme
    )
    reliability = (PAGE.parent / "reliability.md").read_text()
    assert (
        f"no error, [{seconds}, {peak_mb} MB of memory](benchmarks/dataset_check.md)" in reliability
    )


def test_the_benchmarks_results_agree_with_detectron2s() -> None:
    report = json.loads((BENCHMARK / "cpu.json").read_text())
    page = (BENCHMARK / "cpu.md").read_text()
    assert report["command"] in page
    for row in report["stages"]:
        assert row["allowed"] is None or row["difference"] <= row["allowed"], row["name"]
        low, high = row["ratio_range"]
        assert f"**{row['ratio']:.2f}** ({low:.2f} to {high:.2f})" in page


def test_the_tests_of_the_reliability_page_are_there() -> None:
    page = (PAGE.parent / "reliability.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "| --- |" not in line]
    tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)` \|$", page, flags=re.MULTILINE)
    headings = page.count("\n## ")
    assert len(tests) == len(rows) - headings > 30
    for file, test in tests:
        source = (PAGE.parent.parent / file).read_text()
        assert f"\ndef {test}(" in source, f"{file}::{test}"
