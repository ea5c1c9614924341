#!/usr/bin/env python3
"""Provide detectron2 where there is none: `python tools/install_detectron2.py`.

A detectron2 that the running interpreter can find is left as it is, whatever its version. Only an
earlier copy of this tool's own is brought up to date.

detectron2 itself is not on the package index; two packages that carry its Python files are: one the
package as of a commit, the other, of release 0.6, what that copy lacks (``model_zoo``,
``projects``, the scripts of ``tools/``). Neither of the two is installed. They are downloaded by
their hash, each file is checked against git's blob ids (``detectron2_blobs*.txt``), the one-line
fixes below are made, and pip builds and installs the outcome as ``detectron2``, the scripts below
``<prefix>/share/detectron2/tools``. The compiled ``detectron2._C`` is not part of it (rotated
boxes, deformable convolution, the fast COCO evaluation): Mask R-CNN needs none of it.

pip is asked for the two packages as it is set up; PIP_FIND_LINKS=FOLDER names a folder that has
them. Exit code: 0 when detectron2 is there, 2 when a file is not what it should be, 1 for anything
else that went wrong. Nothing is installed unless every file has passed.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LICENSE = HERE.parent / "LICENSE"
HOMEPAGE = "https://github.com/facebookresearch/detectron2"
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

# Where upstream's setup.py puts what doesn't lie in its place in the source tree.
PROJECTS = {
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}

ZOO = "detectron2/model_zoo/model_zoo.py"
MAPPER = "projects/Panoptic-DeepLab/panoptic_deeplab/dataset_mapper.py"


class Fix(NamedTuple):
    """In the file at ``path``, every ``old`` that ends with a word's end becomes ``new``."""

    path: str
    old: str
    new: str


FIXES = (
    # Pillow 10 dropped LINEAR, an alias of BILINEAR: `import detectron2.data` failed.
    Fix("detectron2/data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # NumPy 1.24 dropped its aliases of Python's types (2.0 brought np.bool back): building a train
    # loader failed, with NumPy 1 also drawing, and masks from polygons.
    Fix("detectron2/data/build.py", "np.int", "int"),
    Fix("detectron2/data/datasets/pascal_voc.py", "np.str", "str"),
    Fix("detectron2/evaluation/pascal_voc_evaluation.py", "np.bool", "bool"),
    Fix("detectron2/evaluation/sem_seg_evaluation.py", "np.float", "float"),
    Fix("detectron2/evaluation/sem_seg_evaluation.py", "np.int", "int"),
    Fix("detectron2/structures/masks.py", "np.bool", "bool"),
    Fix("detectron2/utils/video_visualizer.py", "np.bool", "bool"),
    Fix("detectron2/utils/visualizer.py", "np.bool", "bool"),
    # NumPy 2 takes copy=False at its word: reading a segmentation failed.
    Fix("detectron2/evaluation/sem_seg_evaluation.py", "copy=copy", "copy=copy or None"),
    # Python 3.11 no longer samples from a set: a mapper that skips an image ended the training.
    Fix(
        "detectron2/data/common.py",
        "self._fallback_candidates, k",
        "list(self._fallback_candidates), k",
    ),
    # Since torch 2.0 its schedulers are no _LRScheduler: their state was not saved.
    Fix("detectron2/engine/hooks.py", "lr_scheduler._LRScheduler", "lr_scheduler.LRScheduler"),
    # torch's group norm refuses 1 channel in 32 groups: FCOS could not be built.
    Fix("detectron2/modeling/meta_arch/retinanet.py", "get_norm(norm, 1)", "get_norm(norm, 32)"),
    # setuptools 82 dropped pkg_resources: `from detectron2 import model_zoo` failed.
    Fix(ZOO, "import pkg_resources", ""),
    Fix(ZOO, "pkg_resources.resource_filename(", "os.path.join("),
    Fix(ZOO, '"detectron2.model_zoo", os.path', "os.path.dirname(__file__), os.path"),
    # panopticapi is not on the package index, and one method needs it: import it there.
    Fix(MAPPER, "from panopticapi.utils import rgb2id", ""),
    Fix(MAPPER, "# Generates training targets for", "from panopticapi.utils import rgb2id  #"),
)

# detectron2's own __version__ says 0.6, at this commit and still on its main branch.
COPY = "0.6+0ad20f1"
VERSION = f"{COPY}.{len(FIXES)}fixes"

# Upstream's setup.py at this commit, except:
# - future, pydot: no file of the copy imports them;
# - black, pinned to 21.4b2 upstream, is only called to print a config, which today's does as well;
#   the pin would take back the black, and with it the click, that an environment already has;
# - iopath, below 0.1.10 upstream: 0.1.10 is today's, and still has all that detectron2 imports;
# - shapely, an extra upstream: crops need it as soon as masks are polygons.
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
    "shapely",
)

# json.dumps writes strings and lists of strings as TOML reads them.
PYPROJECT = f"""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "{VERSION}"
description = "Detectron2's Python files, without its compiled operators"
readme = "README.txt"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.10"
dependencies = {json.dumps(REQUIREMENTS)}
urls = {{ Homepage = "{HOMEPAGE}" }}

[tool.setuptools]
packages = {{ find = {{ include = ["detectron2*"] }} }}
package-data = {{ "*" = ["**/*"] }}

[tool.setuptools.data-files]
"share/detectron2" = ["README.txt"]
"share/detectron2/tools" = ["tools/*.py"]
"""

# The licence asks that changed files say so.
README = f"""\
Copied from {HOMEPAGE}: the package at commit 0ad20f1; model_zoo, projects and tools of release 0.6.
Left out: the compiled detectron2._C. Changed, for today's libraries:

""" + "".join(f"{fix.path}: {fix.old!r} -> {fix.new!r}\n" for fix in FIXES)


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
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {name: blob for blob, name in pairs}


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
        for source, target in PROJECTS.items():
            name = name.replace(source, target)
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (project / "LICENSE").write_bytes(LICENSE.read_bytes())
    (project / "README.txt").write_text(README, encoding="utf-8")
    (project / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")


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
