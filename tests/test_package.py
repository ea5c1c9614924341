"""What a user meets first: importing, packaging, compatibility."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mask_rcnn_plugin import compat, list_configs

REPOSITORY = Path(__file__).parent.parent


def python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_without_detectron2_the_import_says_how_to_get_it() -> None:
    done = python("import sys; sys.modules['detectron2'] = None; import mask_rcnn_plugin")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: mask_rcnn_plugin needs detectron2")
    assert "python tools/install_detectron2.py" in last


def test_import_is_silent() -> None:
    done = python("import mask_rcnn_plugin")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_loads_no_harness() -> None:
    done = python("import sys, mask_rcnn_plugin; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    loaded = [name for name in done.stdout.split() if name.startswith("mask_rcnn_plugin.")]
    harness = ("training", "evaluation", "data")
    assert not [name for name in loaded if name.split(".")[1] in harness]


def test_configs_are_found_from_anywhere(tmp_path: Path) -> None:
    code = "import mask_rcnn_plugin as m; print(m.get_config('table2a_backbone/r50_fpn').train)"
    assert "160000" in python(code, cwd=tmp_path).stdout


def test_wheel_ships_package_and_configs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    # A copy: building leaves files beside the sources.
    tracked = ["mask_rcnn_plugin", "configs", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *(str(REPOSITORY / t) for t in tracked), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for config in [*list_configs(), "common/train", "overlays/synthetic"]:
        assert f"mask_rcnn_plugin/configs/{config}.py" in names
    assert "mask_rcnn_plugin/evaluation/report.html" in names
    for file in (REPOSITORY / "mask_rcnn_plugin").rglob("*.py"):
        assert file.relative_to(REPOSITORY).as_posix() in names
    assert not [n for n in names if n.startswith(("tests", "tools", "output"))]

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import mask_rcnn_plugin as m\n"
        "print(m.__file__, m.get_config('table2a_backbone/r50_fpn').train.max_iter)"
    )
    command = [sys.executable, "-c", code, str(installed)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert out.split() == [str(installed / "mask_rcnn_plugin" / "__init__.py"), "160000"]


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (PIL.Image, "LINEAR", PIL.Image.Resampling.BILINEAR),
        (np, "int", int),
        (np, "float", float),
        (np, "object", object),
        (np, "str", str),
    ],
)
def test_compat_restores_what_is_gone(
    module: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, name)
    compat.apply()
    assert getattr(module, name) is value


def test_compat_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "int", "mine")
    monkeypatch.setattr(PIL.Image, "LINEAR", "mine")
    own_bool = np.bool
    compat.apply()
    assert np.int == PIL.Image.LINEAR == "mine"  # type: ignore[attr-defined]
    assert np.bool is own_bool


def test_warnings_that_nobody_can_act_on_are_left_out() -> None:
    done = python(
        "import mask_rcnn_plugin, numpy, torch\n"
        "from detectron2.structures import Keypoints\n"
        "Keypoints([numpy.zeros((1, 3)), numpy.zeros((1, 3))])\n"
        "torch.meshgrid(torch.arange(2), torch.arange(2))"
    )
    assert (done.returncode, done.stderr) == (0, "")
