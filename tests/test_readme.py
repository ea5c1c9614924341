"""What the README says is so."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    build_model,
)

from mask_rcnn_plugin import add_mask_rcnn_config, get_config, list_configs

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_table_lists_every_config_and_nothing_else() -> None:
    page = (REPOSITORY / "docs" / "paper.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)` +\|", page, flags=re.MULTILINE)
    others = {name for name in list_configs() if name.startswith("backbones/")}
    assert sorted(rows) == sorted({*list_configs()} - others)
    page = (REPOSITORY / "docs" / "extend.md").read_text()
    assert {*re.findall(r"`(backbones/\w+)`", page)} == others


# What of detectron2's Base-RCNN-FPN.yaml shapes the model; not every detectron2 has its model_zoo.
BASE_FPN = """
MODEL:
  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6]}
  ROI_HEADS: {IN_FEATURES: [p2, p3, p4, p5]}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 2, POOLER_RESOLUTION: 7}
  ROI_MASK_HEAD: {NUM_CONV: 4, POOLER_RESOLUTION: 14}
"""


@pytest.mark.parametrize("keypoints", [False, True])
def test_yaml_of_the_readme_builds_the_model_it_names(keypoints: bool, tmp_path: Path) -> None:
    (yaml,) = blocks("yaml")
    (tmp_path / "Base-RCNN-FPN.yaml").write_text(BASE_FPN)
    file = tmp_path / "my.yaml"
    file.write_text(yaml)
    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    cfg.merge_from_file(str(file))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.KEYPOINT_ON = keypoints
    heads = build_model(cfg).roi_heads
    assert type(heads.mask_head).__name__ == "MaskRCNNFCNHead"
    assert heads.keypoint_on == keypoints
    assert heads.box_pooler.level_poolers[0].sampling_ratio == 2
    model = cfg.MODEL
    assert model.META_ARCHITECTURE in META_ARCH_REGISTRY
    assert model.BACKBONE.NAME in BACKBONE_REGISTRY
    assert model.ROI_HEADS.NAME in ROI_HEADS_REGISTRY
    assert model.ROI_MASK_HEAD.NAME in ROI_MASK_HEAD_REGISTRY
    assert model.ROI_KEYPOINT_HEAD.NAME in ROI_KEYPOINT_HEAD_REGISTRY
    for name in ("MaskRCNNC4ROIHeads", "MaskRCNNMLPHead"):
        assert name in (*dict(ROI_HEADS_REGISTRY), *dict(ROI_MASK_HEAD_REGISTRY))


def test_python_of_the_readme_runs(demo: Path) -> None:
    for code in blocks("python"):
        exec(code, {})
    assert (demo / "found.jpg").is_file()


def test_overrides_of_the_readme_exist() -> None:
    text = README.replace("\\\n", " ")
    own = r"(?<![\w/-])((?:dataset|optimizer|dataloader|train)\.[\w.]+=[^\s'`]+)"
    for override in re.findall(own, text):
        get_config("table2a_backbone/r50_fpn", [override])
    for override in re.findall(r"(model\.[\w.]+=[\w\[\],.]*[\w\]])", text):
        row = "r50_fpn" if "box_pooler" in override or "mask_pooler" in override else "r50_c4"
        get_config(f"table2a_backbone/{row}", [override])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[\w/]+\.py\b", README))))
def test_files_of_the_readme_exist(path: str) -> None:
    assert (REPOSITORY / path).is_file() or path.startswith("venv/share/detectron2/tools/")


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def readme_commands() -> list[list[str]]:
    """Its commands that start a program, in their order."""
    text = README.replace("\\\n", " ")
    code = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, part in code for line in part.splitlines() if not language]
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def small(command: list[str], toy: Path) -> list[str]:
    """The same on a CPU, with drawn images and for a few steps."""
    program, *args = command
    args = [a.replace("r50_fpn+finetune", "r50_fpn+synthetic+finetune") for a in args]
    args = [a.replace("+ablation", "+synthetic") for a in args]  # as the fixture's model
    if program != "train.py":
        return [program, *args]
    few = ["finetune.epochs=0.5"]
    if "dataset=my/data" not in args:  # COCO, on 8 GPUs
        args = ["2" if a == "8" else a.replace("r50_fpn", "r50_fpn+synthetic") for a in args]
        drawn = [f"dataset.synthetic.root={toy}", "dataset.synthetic.train=12"]
        drawn += ["dataset.synthetic.val=6", "dataset.synthetic.size=64"]
        few = [*drawn, "dataloader.train.total_batch_size=2", "train.max_iter=2"]
    return [program, *args, "train.device=cpu", *few]


def test_commands_of_the_readme_run(
    demo: Path, toy_dataset: Path, run_python: Callable[..., CompletedProcess[str]]
) -> None:
    (demo / "my").mkdir()
    (demo / "my" / "data").symlink_to(toy_dataset)
    ran = [command[0] for command in readme_commands()]
    assert {"train.py", "eval.py", "tools/predict.py", "tools/browse_dataset.py"} <= {*ran}
    for command in readme_commands():
        program, *args = small(command, toy_dataset)
        done = run_python(REPOSITORY / program, *args, cwd=demo)
        assert done.returncode == 0, (command, done.stderr)
    for file in (
        *("found/pictures/photo.jpg", "browse/000.jpg", "mine/model_best.pth"),
        *("mine/report/index.html", "table2a_backbone/r50_fpn+synthetic/model_final.pth"),
    ):
        assert (demo / "output" / file).is_file(), file
