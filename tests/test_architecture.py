"""Imports go downwards only: a room of the package may use those below it, never one above.

And a class's name means one thing.
"""

import ast
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "mask_rcnn_plugin"

# From the ground up. A module at the top of the package is a room of its own.
GROUND = ("compat", "errors", "atomic_write", "main_process")
ROOMS = (*GROUND, "weights", "fast", "modeling", "", "config", "data", "env")
ROOMS = (*ROOMS, "evaluation", "inference", "training")


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def room_of(module: str) -> str:
    """The part below the package: "data" of mask_rcnn_plugin.data.coco, "" of the package."""
    return (*module.split("."), "")[1]


def imported(file: Path) -> set[str]:
    """Full names of the plugin's modules that a file imports, inside functions too.

    Relative imports, which only configs have, stay among them.
    """
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            # `from mask_rcnn_plugin import compat` names a module, not what is in one.
            if node.module == "mask_rcnn_plugin":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    known = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in modules(PACKAGE)}
    return {
        name
        for name in names
        if name.split(".")[0] == "mask_rcnn_plugin"
        and (room_of(name) in known or name == "mask_rcnn_plugin")
    }


@pytest.mark.parametrize("file", modules(PACKAGE), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_downwards(file: Path) -> None:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    room = "" if parts == ("__init__",) else parts[0]
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    if room == "":  # the public API names what is above it
        allowed |= {"config", "inference"}
    assert {room_of(name) for name in imported(file)} <= allowed


def test_the_package_knows_no_tool() -> None:
    tools = {p.stem for p in (REPOSITORY / "tools").iterdir()} | {"train", "eval", "tests"}
    for file in modules(PACKAGE):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = {(node.module or "").split(".")[0]}
            else:
                continue
            assert not roots & tools, file


def test_models_of_configs_are_made_of_modeling_alone() -> None:
    for file in modules(REPOSITORY / "configs" / "common" / "models"):
        assert {room_of(name) for name in imported(file)} <= {"modeling"}, file


def test_a_name_is_one_class() -> None:
    """No two classes of ours share one, nor do ours with the modules we import from detectron2."""
    ours: Counter[str] = Counter()
    theirs: dict[str, object] = {}
    for file in [*modules(PACKAGE), *modules(REPOSITORY / "tools")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                ours[node.name] += 1
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("detectron2."):
                theirs |= vars(import_module(str(node.module)))
    assert {name for name, count in ours.items() if count > 1} == set()
    # Our RoIPool is a torchvision.ops.RoIPool, as detectron2's.
    assert {name for name in ours if isinstance(theirs.get(name), type)} <= {"RoIPool"}
