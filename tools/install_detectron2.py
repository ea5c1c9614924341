#!/usr/bin/env python3
"""Provide detectron2 where there is none: `python tools/install_detectron2.py`.

A detectron2 that the running interpreter can find is left as it is, whatever its version. Only an
earlier copy of this tool's own is brought up to date.

detectron2 itself is not on the package index; two packages that carry its Python files are: one the
package as of a commit, the other, of release 0.6, what that copy lacks (``model_zoo``,
``projects``, the scripts of ``tools/``). Neither of the two is installed. They are downloaded by
their hash, each file is checked against git's blob ids (``detectron2_blobs*.txt``), the one-line
fixes of ``detectron2_fixes.txt`` are made, and pip builds and installs the outcome as
``detectron2``, the scripts below ``<prefix>/share/detectron2/tools``. The compiled
``detectron2._C`` is not part of it (rotated boxes, deformable convolution, the fast COCO
evaluation): Mask R-CNN needs none of it.

pip downloads the two packages as it is configured; PIP_FIND_LINKS=FOLDER names a folder that has
them. Exit code: 0 if detectron2 is installed, 2 if a file is not what it should be, 1 for anything
else that went wrong. Nothing is installed unless every file has passed.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
FIXES_FILE = HERE / "detectron2_fixes.txt"
INSTALL_GUIDE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"


class Carrier(NamedTuple):
    """A package on the index that carries files of detectron2. Version and hash belong together."""

    requirement: str
    sha256: str
    blob_list: Path


WHEEL = Carrier(
    "roof-mask-Yv8==0.5.9",
    "a1272ce904f18e602c346fee4c0b0d2a5b2ae81e2ebc390e5459ddb2a55da18f",
    HERE / "detectron2_blobs.txt",
)
SDIST = Carrier(
    "pb1-detectron2==0.6",
    "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29",
    HERE / "detectron2_blobs_v0.6.txt",
)


class Fix(NamedTuple):
    """In the file at ``path``, every ``old`` that ends with a word's end becomes ``new``."""

    path: str
    old: str
    new: str


def read_lines(path: Path) -> list[str]:
    """Return a file's lines but empty ones and comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def read_fixes(path: Path) -> tuple[Fix, ...]:
    """Return the fixes in a file of lines ``<path>: <old> -> <new>``."""
    fixes = []
    for line in read_lines(path):
        name, _, change = line.partition(": ")
        old, _, new = change.partition(" ->")
        fixes.append(Fix(name, old, new.strip()))
    return tuple(fixes)


FIXES = read_fixes(FIXES_FILE)

# detectron2's own __version__ says 0.6, at this commit and still on its main branch.
COPY = "0.6+0ad20f1"
VERSION = f"{COPY}.{len(FIXES)}fixes"


class InstallError(Exception):
    """Something outside the files went wrong: no network, no pip."""

    exit_code = 1


class VerificationError(InstallError):
    """A file is not what it should be."""

    exit_code = 2


def say(step: str) -> None:
    print(f"install_detectron2: {step}", flush=True)


def find_detectron2() -> str | None:
    """Return where the running interpreter finds detectron2; None for an earlier copy of ours.

    It is looked up, not imported: a broken one is its owner's to mend. A mere folder of that name
    (a clone's root on the path, say) is a namespace package without origin, and doesn't count.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return None
    for found in importlib.metadata.distributions(name="detectron2"):
        ours = Path(found.locate_file("detectron2/__init__.py")) == Path(spec.origin)
        if ours and found.version.startswith(COPY) and found.version != VERSION:
            return None
    return spec.origin


def blob_id(data: bytes) -> str:
    """Return the id that git gives a file with these contents (``git hash-object``)."""
    # An SHA-1; nothing rests on it alone, the archive's SHA-256 is pinned as well.
    header = b"blob %d\0" % len(data)
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest()


def read_blob_list(path: Path) -> dict[str, str]:
    """Return git's blob id by path; lines are ``<blob id>  <path>`` or start with ``#``."""
    return {name: blob for blob, name in map(str.split, read_lines(path))}


def read_archive(path: Path) -> dict[str, bytes]:
    """Return the contents of the files in a wheel or a source distribution, by path."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name[-1] != "/"}
    with tarfile.open(path) as sdist:
        # Below one folder, which is named after the package.
        return {
            member.name.partition("/")[2]: sdist.extractfile(member).read()
            for member in sdist.getmembers()
            if member.isfile()
        }


def read_verified(path: Path, carrier: Carrier) -> dict[str, bytes]:
    """Return the listed files' contents by path, each equal to its blob id; drop all others.

    Raises:
        VerificationError: if the archive has another hash, or naming the first listed file that is
            missing or differs.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != carrier.sha256:
        raise VerificationError(f"{path.name}: expected sha256 {carrier.sha256}, found {found}")
    present = read_archive(path)
    listed = read_blob_list(carrier.blob_list)
    for name, expected in listed.items():
        found = blob_id(present[name]) if name in present else "no such file"
        if found != expected:
            raise VerificationError(f"{name}: expected blob {expected}, found {found}")
    say(f"{path.name}: {len(listed)} files are as {carrier.blob_list.name} lists them")
    return {name: present[name] for name in listed}


def apply_fixes(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files with the fixes made.

    Raises:
        VerificationError: naming the first fix whose text its file doesn't have.
    """
    fixed = dict(files)
    for fix in FIXES:
        old = rf"{re.escape(fix.old)}(?!\w)"
        text, count = re.subn(old, fix.new, fixed.get(fix.path, b"").decode())
        if count == 0:
            raise VerificationError(f"{fix.path}: {fix.old!r} is not there to be fixed")
        fixed[fix.path] = text.encode()
    return fixed


def write_project(files: dict[str, bytes], project: Path) -> None:
    """Write the files, in their places, as a project that pip can build."""
    for name, data in files.items():
        # Upstream's setup.py puts projects/PointRend/point_rend/ there, and the others'.
        path = project / re.sub("^projects/[^/]+/", "detectron2/projects/", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shutil.copy(HERE / "detectron2_pyproject.toml", project / "pyproject.toml")
    shutil.copy(HERE.parent / "LICENSE", project)
    shutil.copy(FIXES_FILE, project / "README.txt")  # the licence asks that changed files say so
    (project / "VERSION").write_text(VERSION)


def run_pip(*arguments: str, **variables: str) -> None:
    """Run the interpreter's own pip, whose messages reach the user as they are.

    Raises:
        InstallError: if the interpreter has no pip, or pip fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.call(command, env=os.environ | variables) != 0:
        raise InstallError(f"'{sys.executable} -m pip {arguments[0]}' failed, see above")


def installed_packages() -> str:
    """Return pip's constraints to what is installed, a line each.

    A requirement of a requirement would else replace a NumPy that torch or OpenCV were built for.
    """
    names = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    # Not detectron2: what is left of one that cannot be imported need not stay.
    return "".join(f"{n}=={v}\n" for n, v in names.items() if n and n != "detectron2")


# Before pip hands a source distribution over, it asks setuptools for the package's metadata. In
# setuptools' place, this answers for SDIST, whose setup.py wants torch and names a requirement that
# newer pips refuse: nothing of it is run.
METADATA_BACKEND = """\
from pathlib import Path

class __legacy__:
    def get_requires_for_build_wheel(config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        info = Path(folder, "pb1_detectron2-0.6.dist-info")
        info.mkdir()
        text = "Metadata-Version: 2.1\\nName: pb1-detectron2\\nVersion: 0.6\\n"
        (info / "METADATA").write_text(text)
        return info.name
"""


def download(carrier: Carrier, folder: Path) -> Path:
    """Download the archive into the folder, from the index that pip is set up for."""
    say(f"downloading {carrier.requirement}, which carries a part of detectron2")
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True, exist_ok=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(METADATA_BACKEND, encoding="utf-8")
    # pip takes hashes from a requirements file only.
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{carrier.requirement} --hash=sha256:{carrier.sha256}\n", encoding="utf-8")
    archives = folder / carrier.sha256
    try:
        run_pip(
            *("download", "--quiet", "--no-deps", "--require-hashes", "--no-build-isolation"),
            *("--dest", str(archives), "--requirement", str(pinned)),
            PYTHONPATH=str(backend.parent),
            PIP_USE_PEP517="1",  # not by setup.py; newer pips know no other way
        )
    except InstallError as error:
        raise InstallError(
            f"cannot download {carrier.requirement}: {error}. Without it, build detectron2 from "
            f"source by upstream's guide: {INSTALL_GUIDE}"
        ) from error
    [archive] = archives.iterdir()
    return archive


def install(folder: Path) -> None:
    """Install what the carriers hold; the folder is for files on the way."""
    files: dict[str, bytes] = {}
    for carrier in (WHEEL, SDIST):
        files |= read_verified(download(carrier, folder), carrier)
    project, present = folder / "detectron2", folder / "present.txt"
    write_project(apply_fixes(files), project)
    present.write_text(installed_packages(), encoding="utf-8")
    say(f"installing detectron2 {VERSION} and what it requires")
    run_pip("install", "--quiet", "--constraint", str(present), str(project))
    say(f"detectron2 {VERSION} is installed; 'pip uninstall detectron2' removes it")


def main(arguments: list[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(arguments)
    if place := find_detectron2():
        say(f"detectron2 is already there, nothing to do: {place}")
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            install(Path(folder))
    except InstallError as error:
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
