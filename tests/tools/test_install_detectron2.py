"""tools/install_detectron2.py, on a made-up carrier wheel: no network, no real detectron2."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"
COMMIT = "a1b2c3d4e5f60718293a4b5c6d7e8f9001122334"

# Blob ids from `git hash-object`, not from the code under test.
INIT = b'__version__ = "0.6"\n'
INIT_ID = "4f20502e124da285d3781cc1e9db4f7370eb7341"
NMS = b"def nms():\n    return 'kept'\n"
NMS_ID = "f8797b4346a33b3d91e7b8205dae8afc958c01e8"
EMPTY_ID = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"

LISTED = {
    "detectron2/__init__.py": (INIT_ID, INIT),
    "detectron2/layers/__init__.py": (EMPTY_ID, b""),
    "detectron2/layers/nms.py": (NMS_ID, NMS),
}
FOREIGN = {
    "detectron2/utils/stranger.py": b"raise SystemExit\n",
    "ultralytics/__init__.py": b"raise SystemExit\n",
    "carrier-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n",
}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool as a fresh module, so that a test may change its constants."""
    spec = importlib.util.spec_from_file_location("install_detectron2", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def write_carrier(path: Path, changes: dict[str, bytes | None] | None = None) -> Path:
    """Write the listed and the foreign files; a change replaces one, or with None leaves it out."""
    files = {name: data for name, (_, data) in LISTED.items()} | FOREIGN | (changes or {})
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            if data is not None:
                archive.writestr(name, data)
    return path


@pytest.fixture
def carrier(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A carrier whose hash and blob list the tool takes for the pinned ones, detectron2 absent."""
    blob_list = tmp_path / "blobs.txt"
    lines = [f"# commit: {COMMIT}", *(f"{blob}  {name}" for name, (blob, _) in LISTED.items())]
    blob_list.write_text("\n".join(lines) + "\n")
    wheel = write_carrier(tmp_path / "carrier-1.0-py3-none-any.whl")
    monkeypatch.setattr(tool, "BLOB_LIST", blob_list)
    monkeypatch.setattr(tool, "CARRIER_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(tool, "find_detectron2", lambda: None)
    return wheel


@pytest.fixture
def pip_calls(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Replaces pip by a list of what it was asked to do."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(tool, "run_pip", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(("data", "expected"), [(b"", EMPTY_ID), (INIT, INIT_ID), (NMS, NMS_ID)])
def test_blob_id_is_the_one_git_gives(tool: ModuleType, data: bytes, expected: str) -> None:
    assert tool.blob_id(data) == expected


def test_the_repository_s_blob_list(tool: ModuleType) -> None:
    source = tool.read_blob_list(tool.BLOB_LIST)
    assert source.version == "0.6+0ad20f1"
    assert source.commit.startswith("0ad20f13e23f")
    assert len(source.blobs) == 168
    assert all(path.startswith("detectron2/") for path in source.blobs)
    assert "detectron2/utils/visualizer_new.py" not in source.blobs
    changed = source.blobs["detectron2/checkpoint/c2_model_loading.py"]
    assert changed == "6c424c6cd4ad153cd5a7e99ceec01db072ebc3c9"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{EMPTY_ID}  detectron2/a.py\n", "no line '# commit: "),
        (f"# commit: {COMMIT}\n{EMPTY_ID} detectron2/a.py\n", ":2: expected '<40 hex digits>"),
        (f"# commit: {COMMIT}\n" + f"{EMPTY_ID}  a.py\n" * 2, ":3: a.py is listed twice"),
    ],
)
def test_a_malformed_blob_list_is_refused(
    tool: ModuleType, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "blobs.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        tool.read_blob_list(tmp_path / "blobs.txt")


def test_foreign_files_are_dropped(tool: ModuleType, carrier: Path, tmp_path: Path) -> None:
    source = tool.read_blob_list(tool.BLOB_LIST)
    files = tool.read_verified(carrier, source.blobs)
    assert files == {name: data for name, (_, data) in LISTED.items()}

    wheel = tool.build_wheel(files, source, tmp_path)
    assert wheel.name == "detectron2-0.6+a1b2c3d-py3-none-any.whl"
    dist_info = "detectron2-0.6+a1b2c3d.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        own = {name for name in archive.namelist() if name.startswith(f"{dist_info}/")}
        assert set(archive.namelist()) - own == set(LISTED)
        licence = archive.read(f"{dist_info}/licenses/LICENSE")
        metadata = archive.read(f"{dist_info}/METADATA").decode()
    assert licence == tool.LICENSE.read_bytes()
    assert COMMIT in metadata
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert len(requirements) == len(tool.REQUIREMENTS)
    assert not any("torch" in line for line in requirements)  # pip must leave the user's alone


def test_the_record_lists_every_file_by_its_hash(
    tool: ModuleType, carrier: Path, tmp_path: Path
) -> None:
    source = tool.read_blob_list(tool.BLOB_LIST)
    wheel = tool.build_wheel(tool.read_verified(carrier, source.blobs), source, tmp_path)
    expected = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            digest = urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            expected.append([name, f"sha256={digest}", str(len(data))])
        [record] = (name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        found = list(csv.reader(archive.read(record).decode().splitlines()))
    # Its own line comes last and is bare, as the format asks.
    assert found == [*expected[:-1], [record, "", ""]]


@pytest.mark.parametrize("name", list(LISTED))
def test_a_tampered_file_is_named_and_nothing_installed(
    name: str,
    tool: ModuleType,
    carrier: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The carrier's own hash is right here: the check of each file has to hold by itself.
    write_carrier(carrier, {name: b"evil = True\n"})
    monkeypatch.setattr(tool, "CARRIER_SHA256", hashlib.sha256(carrier.read_bytes()).hexdigest())
    monkeypatch.setattr(tool, "build_wheel", lambda *_: pytest.fail("a wheel was written"))

    assert tool.main(["--wheel", str(carrier)]) == 2
    evil_id = "548d671112b20d3b09e1696c8122f9fb60a40bdf"
    assert f"error: {name}: expected blob {LISTED[name][0]}, found {evil_id}" in (
        capsys.readouterr().err
    )
    assert pip_calls == []


def test_a_missing_file_is_named_and_nothing_installed(
    tool: ModuleType,
    carrier: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_carrier(carrier, {"detectron2/layers/nms.py": None})
    monkeypatch.setattr(tool, "CARRIER_SHA256", hashlib.sha256(carrier.read_bytes()).hexdigest())

    assert tool.main(["--wheel", str(carrier)]) == 2
    assert "error: detectron2/layers/nms.py: expected blob" in capsys.readouterr().err
    assert pip_calls == []


def test_another_wheel_than_the_pinned_one_is_refused(
    tool: ModuleType,
    carrier: Path,
    pip_calls: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_carrier(carrier, {"ultralytics/__init__.py": b"\n"})  # all listed files are right
    assert tool.main(["--wheel", str(carrier)]) == 2
    error = capsys.readouterr().err
    assert f"{carrier.name}: expected sha256 {tool.CARRIER_SHA256}, found " in error
    assert pip_calls == []


def test_a_failed_download_says_what_to_do(
    tool: ModuleType,
    carrier: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip itself fails, without trying the network
    assert tool.main([]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"install_detectron2: error: cannot download {tool.CARRIER}")
    assert f"build detectron2 from source by upstream's guide: {tool.INSTALL_GUIDE}" in error


def test_installs_an_ordinary_distribution(
    tool: ModuleType, carrier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=tmp_path)

    # The tool installs into the interpreter that runs it: here, the fresh one.
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    assert tool.main(["--wheel", str(carrier)]) == 0

    ask = "import detectron2, detectron2.layers.nms as m; print(detectron2.__version__, m.nms())"
    assert run("-c", ask).stdout == "0.6 kept\n"
    assert run("-c", "import ultralytics").returncode == 1
    shown = run("-m", "pip", "show", "--files", "detectron2").stdout
    assert "Version: 0.6+a1b2c3d" in shown
    assert "nms.py" in shown
    assert "stranger" not in shown

    removed = run("-m", "pip", "uninstall", "-y", "detectron2")
    assert removed.returncode == 0, removed.stderr
    assert run("-c", "import detectron2").returncode == 1


def run_tool(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the tool with the folder in front on the path and, by -S, no site-packages behind it."""
    return subprocess.run(
        [sys.executable, "-S", str(TOOL), *arguments],
        env=os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )


def test_a_present_detectron2_is_left_alone_even_a_broken_one(tmp_path: Path) -> None:
    stub = tmp_path / "detectron2" / "__init__.py"
    stub.parent.mkdir()
    stub.write_text("raise RuntimeError('built for another torch')\n")

    done = run_tool(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"install_detectron2: detectron2 is already there, nothing to do: {stub}\n"
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [stub]


def test_a_mere_folder_of_that_name_is_no_detectron2(tmp_path: Path) -> None:
    (tmp_path / "detectron2" / "docs").mkdir(parents=True)
    done = run_tool(tmp_path, "--wheel", "absent.whl")
    assert done.returncode == 1
    assert "--wheel absent.whl: no such file" in done.stderr


def test_what_is_installed_is_not_replaced(
    tool: ModuleType, carrier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []

    def run_pip(*arguments: str) -> None:
        constraints = Path(arguments[arguments.index("--constraint") + 1])
        held.extend(constraints.read_text().split())

    monkeypatch.setattr(tool, "run_pip", run_pip)
    monkeypatch.setattr(tool, "check_sha256", lambda *_: None)
    monkeypatch.setattr(tool, "read_verified", lambda *_: {})
    tool.install(carrier)
    assert f"pytest=={pytest.__version__}" in held
