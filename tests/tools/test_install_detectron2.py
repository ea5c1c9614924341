"""tools/install_detectron2.py, on two made-up carriers: no network, no real detectron2."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

TOOL = Path(__file__).resolve().parents[2] / "tools" / "install_detectron2.py"

# Blob ids from `git hash-object`, not from the code under test.
EMPTY_ID = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
EVIL = b"evil = True\n"
EVIL_ID = "548d671112b20d3b09e1696c8122f9fb60a40bdf"
PACKAGE = {
    "detectron2/__init__.py": (
        "4f20502e124da285d3781cc1e9db4f7370eb7341",
        b'__version__ = "0.6"\n',
    ),
    "detectron2/layers/__init__.py": (EMPTY_ID, b""),
    "detectron2/layers/nms.py": (
        "f8797b4346a33b3d91e7b8205dae8afc958c01e8",
        b"def nms():\n    return 'kept'\n",
    ),
}
RELEASE = {
    "detectron2/model_zoo/__init__.py": (
        "ba7f8a450494abb9fbc0ecd8c67134f28688a1ea",
        b'import gone\n\n\ndef get():\n    return gone.path("zoo.yaml")\n',
    ),
    "detectron2/model_zoo/configs/LVISv0.5/zoo.yaml": (
        "38f817474c06adb659c385a6637c0cd15afa608d",
        b"MODEL: {}\n",
    ),
    "detectron2/projects/__init__.py": (EMPTY_ID, b""),
    "projects/PointRend/point_rend/__init__.py": (
        "bb94e6634be61bb6865efff5a855132fe8e5c5dc",
        b'HEAD = "PointRend"\n',
    ),
    "tools/train_net.py": ("eadb9a9e0f12f730164c29655dd1cb7f20309811", b'print("trained")\n'),
}
LISTED = PACKAGE | RELEASE
FOREIGN = {
    "detectron2/utils/stranger.py": b"raise SystemExit\n",
    "ultralytics/__init__.py": b"raise SystemExit\n",
    "setup.py": b"raise SystemExit\n",
}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool as a fresh module, so that a test may change its constants."""
    spec = importlib.util.spec_from_file_location("install_detectron2", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Carriers:
    """The two archives, which the tool takes for the pinned ones."""

    def __init__(self, tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tool, self.monkeypatch = tool, monkeypatch
        self.wheel = folder / "carrier-1.0-py3-none-any.whl"
        self.sdist = folder / "carrier-0.6.tar.gz"
        for option, listed in (("WHEEL", PACKAGE), ("SDIST", RELEASE)):
            blobs = folder / f"{option}.txt"
            lines = [f"{blob}  {name}" for name, (blob, _) in listed.items()]
            blobs.write_text("\n".join(["# commit: none", *lines]) + "\n")
            carrier = getattr(tool, option)._replace(blob_list=blobs)
            monkeypatch.setattr(tool, option, carrier)
        self.download = tool.download
        monkeypatch.setattr(
            tool, "download", lambda c, _: self.wheel if c is tool.WHEEL else self.sdist
        )
        self.write({})
        self.pin()

    def write(self, changes: dict[str, bytes | None]) -> None:
        """Write both archives; a change replaces a file's contents, or with None drops it."""

        def contents(listed: dict[str, tuple[str, bytes]]) -> dict[str, bytes]:
            files = {name: data for name, (_, data) in listed.items()} | FOREIGN
            files |= {name: data for name, data in changes.items() if name in files}
            return {name: data for name, data in files.items() if data is not None}

        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name, data in contents(PACKAGE).items():
                archive.writestr(name, data)
        with tarfile.open(self.sdist, "w:gz") as archive:
            for name, data in contents(RELEASE).items():
                member = tarfile.TarInfo(f"carrier-0.6/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    def pin(self) -> None:
        """Take the archives' hashes, as they are now, for the right ones."""
        for option, path in (("WHEEL", self.wheel), ("SDIST", self.sdist)):
            carrier = getattr(self.tool, option)._replace(sha256=sha256(path))
            self.monkeypatch.setattr(self.tool, option, carrier)


@pytest.fixture
def carriers(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Carriers:
    zoo = "detectron2/model_zoo/__init__.py"
    fixes = (
        tool.Fix(zoo, "import gone", ""),
        tool.Fix(zoo, "gone.path", "str"),
    )
    monkeypatch.setattr(tool, "FIXES", fixes)
    monkeypatch.setattr(tool, "find_detectron2", lambda: None)
    return Carriers(tool, tmp_path, monkeypatch)


@pytest.fixture
def pip_calls(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Replaces pip by a list of what it was asked to do."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(tool, "run_pip", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(("blob", "data"), [*LISTED.values(), (EVIL_ID, EVIL)])
def test_blob_id_is_the_one_git_gives(tool: ModuleType, blob: str, data: bytes) -> None:
    assert tool.blob_id(data) == blob


def test_the_repository_s_blob_lists(tool: ModuleType) -> None:
    package = tool.read_blob_list(tool.WHEEL.blob_list)
    release = tool.read_blob_list(tool.SDIST.blob_list)
    assert (len(package), len(release)) == (167, 163)
    assert package.keys().isdisjoint(release)
    assert all(len(blob) == 40 for blob in (package | release).values())
    assert "detectron2/utils/visualizer_new.py" not in package  # the carrier's, not upstream's
    name = "detectron2/checkpoint/c2_model_loading.py"  # upstream's, not the carrier's changed one
    assert release[name] == "8c8d181bd7200bd3fd38446e743f8f16780d6e76"
    assert {fix.path for fix in tool.FIXES} <= (package | release).keys()


def test_torch_is_not_required(tool: ModuleType) -> None:
    project = tomllib.loads((tool.HERE / "detectron2_pyproject.toml").read_text())["project"]
    assert "fvcore>=0.1.5,<0.1.6" in project["dependencies"]
    assert not any("torch" in requirement for requirement in project["dependencies"])


def test_only_listed_files_are_taken(tool: ModuleType, carriers: Carriers) -> None:
    files = tool.read_verified(carriers.wheel, tool.WHEEL)
    files |= tool.read_verified(carriers.sdist, tool.SDIST)
    assert files == {name: data for name, (_, data) in LISTED.items()}


@pytest.mark.parametrize("name", list(LISTED))
def test_a_tampered_file_is_named_and_nothing_installed(
    name: str,
    tool: ModuleType,
    carriers: Carriers,
    pip_calls: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    carriers.write({name: EVIL})
    carriers.pin()  # the check of each file has to hold by itself
    assert tool.main([]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in (name, LISTED[name][0], EVIL_ID))
    assert pip_calls == []


@pytest.mark.parametrize("name", list(LISTED))
def test_a_missing_file_is_named_and_nothing_installed(
    name: str,
    tool: ModuleType,
    carriers: Carriers,
    pip_calls: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    carriers.write({name: None})
    carriers.pin()
    assert tool.main([]) == 2
    assert name in capsys.readouterr().err
    assert pip_calls == []


@pytest.mark.parametrize("option", ["WHEEL", "SDIST"])
def test_another_archive_than_the_pinned_one_is_refused(
    option: str,
    tool: ModuleType,
    carriers: Carriers,
    pip_calls: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = carriers.wheel if option == "WHEEL" else carriers.sdist
    pinned = sha256(path)
    carriers.write({"setup.py": b"\n"})  # all listed files are right
    if option == "SDIST":  # its check comes second
        wheel = tool.WHEEL._replace(sha256=sha256(carriers.wheel))
        carriers.monkeypatch.setattr(tool, "WHEEL", wheel)
    assert tool.main([]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in (path.name, pinned, sha256(path)))
    assert pip_calls == []


def test_fixes_are_made_to_whole_words_wherever_they_stand(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix = tool.Fix("a.py", "np.int", "int")
    monkeypatch.setattr(tool, "FIXES", (fix,))
    files = {"a.py": b"np.int, np.int64(np.int)", "b.py": b"np.int"}
    assert tool.apply_fixes(files) == {"a.py": b"int, np.int64(int)", "b.py": b"np.int"}


@pytest.mark.parametrize(("path", "old"), [("a.py", "np.int"), ("absent.py", "np.float")])
def test_a_fix_whose_text_is_not_there_is_an_error(
    path: str,
    old: str,
    tool: ModuleType,
    carriers: Carriers,
    pip_calls: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = path.replace("a.py", "detectron2/layers/nms.py")
    monkeypatch.setattr(tool, "FIXES", (*tool.FIXES, tool.Fix(path, old, "")))
    assert tool.main([]) == 2
    error = capsys.readouterr().err
    assert path in error
    assert old in error
    assert pip_calls == []


def test_a_failed_download_says_what_to_do(
    tool: ModuleType,
    carriers: Carriers,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tool, "download", carriers.download)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip itself fails, without trying the network
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert tool.main([]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert tool.WHEEL.requirement in error
    assert tool.INSTALL_GUIDE in error


def test_downloads_by_hash_and_runs_nothing_of_it(
    tool: ModuleType,
    carriers: Carriers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    index, folder = tmp_path / "index", tmp_path / "downloads"
    index.mkdir()
    folder.mkdir()
    # Its setup.py would end with an error.
    carriers.sdist.rename(index / "pb1-detectron2-0.6.tar.gz")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert sha256(carriers.download(tool.SDIST, folder)) == tool.SDIST.sha256

    other = tool.SDIST._replace(sha256="0" * 64)
    with pytest.raises(tool.InstallError, match="pb1-detectron2==0.6"):
        carriers.download(other, folder)
    assert tool.SDIST.sha256 in capfd.readouterr().err  # pip says what it got


def test_installs_an_ordinary_distribution(
    tool: ModuleType, carriers: Carriers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    before = set(environment.rglob("*"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, *arguments], capture_output=True, text=True, cwd=tmp_path)

    # Without an index, pip builds with the setuptools that it finds: the tests' own.
    (tmp_path / "build").mkdir()
    for name in ("setuptools", "_distutils_hack"):
        source = Path(setuptools.__file__).parents[1] / name
        (tmp_path / "build" / name).symlink_to(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "build"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say yes
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    # The tool installs into the interpreter that runs it: here, the fresh one.
    monkeypatch.setattr(sys, "executable", python)
    assert tool.main([]) == 0

    ask = (
        "import sys, detectron2, detectron2.layers.nms, detectron2.model_zoo as zoo;"
        "from detectron2.projects import point_rend;"
        "print(detectron2.__version__, detectron2.layers.nms.nms(), zoo.get(), point_rend.HEAD)"
    )
    assert run("-c", ask).stdout == "0.6 kept zoo.yaml PointRend\n"
    assert run(str(environment / "share/detectron2/tools/train_net.py")).stdout == "trained\n"
    shown = run("-m", "pip", "show", "--files", "detectron2").stdout
    assert f"Version: {tool.VERSION}" in shown
    for name in LISTED:
        assert name.rpartition("/")[2] in shown
    for name in FOREIGN:
        assert name not in shown

    removed = run("-m", "pip", "uninstall", "-y", "detectron2")
    assert removed.returncode == 0, removed.stderr
    assert run("-c", "import detectron2").returncode == 1
    left = [path for path in set(environment.rglob("*")) - before if path.name != "__pycache__"]
    assert [path for path in left if path != environment / "share"] == []


def run_tool(path: Path) -> subprocess.CompletedProcess[str]:
    """Run the tool with the folder in front on the path and, by -S, no site-packages behind it.

    It finds nothing to download.
    """
    variables = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_INDEX": "1"}
    return subprocess.run(
        [sys.executable, "-S", str(TOOL)],
        env={**os.environ, **variables, "PIP_FIND_LINKS": ""},
        capture_output=True,
        text=True,
    )


def write_package(folder: Path, version: str) -> Path:
    """Write a detectron2 that cannot be imported and, as pip does, what version it is."""
    (folder / "detectron2").mkdir()
    (folder / f"detectron2-{version}.dist-info").mkdir()
    metadata = folder / f"detectron2-{version}.dist-info" / "METADATA"
    metadata.write_text(f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\n")
    package = folder / "detectron2" / "__init__.py"
    package.write_text("raise RuntimeError('built for another torch')\n")
    return package


@pytest.mark.parametrize("version", ["0.6", "0.6+cu111", "0.7"])
def test_a_present_detectron2_is_left_alone_even_a_broken_one(version: str, tmp_path: Path) -> None:
    package = write_package(tmp_path, version)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = run_tool(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(package) in done.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_earlier_copy_of_its_own_is_brought_up_to_date(tool: ModuleType, tmp_path: Path) -> None:
    write_package(tmp_path, "0.6+0ad20f1")
    done = run_tool(tmp_path)
    assert done.returncode == 1
    assert tool.WHEEL.requirement in done.stderr  # it went on to install


def test_todays_copy_of_its_own_is_left_alone(tool: ModuleType, tmp_path: Path) -> None:
    write_package(tmp_path, tool.VERSION)
    assert run_tool(tmp_path).returncode == 0


def test_a_checkout_before_an_earlier_copy_is_left_alone(tmp_path: Path) -> None:
    write_package(tmp_path, "0.6+0ad20f1")
    checkout = tmp_path / "checkout" / "detectron2" / "__init__.py"
    checkout.parent.mkdir(parents=True)
    checkout.write_text("")
    done = run_tool(Path(f"{tmp_path / 'checkout'}{os.pathsep}{tmp_path}"))
    assert done.returncode == 0
    assert str(checkout) in done.stdout


def test_a_mere_folder_of_that_name_is_no_detectron2(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "detectron2" / "docs").mkdir(parents=True)
    done = run_tool(tmp_path)
    assert done.returncode == 1
    assert tool.WHEEL.requirement in done.stderr


def test_what_is_installed_is_not_replaced(
    tool: ModuleType, carriers: Carriers, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []

    def run_pip(*arguments: str) -> None:
        constraints = Path(arguments[arguments.index("--constraint") + 1])
        held.extend(constraints.read_text().split())

    monkeypatch.setattr(tool, "run_pip", run_pip)
    assert tool.main([]) == 0
    assert f"pytest=={pytest.__version__}" in held
