"""What the README says is so."""

import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)

from mask_rcnn_plugin import add_mask_rcnn_config, get_config, list_configs

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_table_lists_every_config_and_nothing_else() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \|", README, flags=re.MULTILINE)
    assert sorted(rows) == list_configs()


def test_yaml_of_the_readme_fits_detectron2(tmp_path: Path) -> None:
    (yaml,) = blocks("yaml")
    file = tmp_path / "my.yaml"
    file.write_text(yaml)
    cfg = get_cfg()
    add_mask_rcnn_config(cfg)
    cfg.merge_from_file(str(file))
    model = cfg.MODEL
    assert model.META_ARCHITECTURE in META_ARCH_REGISTRY
    assert model.BACKBONE.NAME in BACKBONE_REGISTRY
    assert model.ROI_HEADS.NAME in ROI_HEADS_REGISTRY
    assert model.ROI_MASK_HEAD.NAME in ROI_MASK_HEAD_REGISTRY
    assert model.ROI_KEYPOINT_HEAD.NAME in ROI_KEYPOINT_HEAD_REGISTRY
    for name in ("MaskRCNNC4ROIHeads", "MaskRCNNMLPHead"):
        assert name in (*dict(ROI_HEADS_REGISTRY), *dict(ROI_MASK_HEAD_REGISTRY))


def test_python_of_the_readme_runs() -> None:
    for code in blocks("python"):
        exec(code, {})


def test_overrides_of_the_readme_exist() -> None:
    text = README.replace("\\\n", " ")
    own = r"(?<![\w/-])((?:dataset|optimizer|dataloader)\.[\w.]+=[^\s'`]+)"
    for override in re.findall(own, text):
        get_config("table2a_backbone/r50_fpn", [override])
    for override in re.findall(r"(model\.roi_heads\.[\w.]+=\w+)", text):
        get_config("table2a_backbone/r50_c4", [override])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[\w/]+\.py\b", README))))
def test_files_of_the_readme_exist(path: str) -> None:
    assert (REPOSITORY / path).is_file() or path == "tools/train_net.py"  # detectron2's


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
