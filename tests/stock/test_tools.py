"""detectron2's scripts on README's YAML, which names the plugin's parts over Base-RCNN-FPN.yaml."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

# Toy widths, and images at the size they are drawn in. The learning rate is next to nothing: random
# weights under frozen batch norm give values in the thousands.
TOY = """
_BASE_: readme.yaml
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  RESNETS: {STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 8}
  FPN: {OUT_CHANNELS: 16}
  RPN: {POST_NMS_TOPK_TRAIN: 50, POST_NMS_TOPK_TEST: 50}
  ROI_HEADS: {SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {FC_DIM: 32}
  ROI_MASK_HEAD: {CONV_DIM: 16, NUM_CONV: 1}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64, MASK_FORMAT: bitmask}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 8, STEPS: [], BASE_LR: 0.00001}
TEST: {DETECTIONS_PER_IMAGE: 5}
SEED: 1
"""

LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "total_loss"}

RunTool = Callable[..., str]


@pytest.fixture(scope="module")
def yaml(run_stock: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README's YAML at toy size, its _BASE_ the file that detectron2's model_zoo names."""
    find = "from detectron2 import model_zoo as z; print(z.get_config_file('Base-RCNN-FPN.yaml'))"
    base = run_stock("-c", find).splitlines()[-1]
    [readme] = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert "_BASE_: Base-RCNN-FPN.yaml" in readme
    folder = tmp_path_factory.mktemp("yaml")
    (folder / "readme.yaml").write_text(readme.replace("Base-RCNN-FPN.yaml", base, 1))
    (folder / "toy.yaml").write_text(TOY)
    return folder / "toy.yaml"


@pytest.fixture(scope="module")
def trained(yaml: Path, run_tool: RunTool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of train_net.py."""
    out = tmp_path_factory.mktemp("train_net")
    run_tool("train_net.py", "--config-file", yaml, "OUTPUT_DIR", out)
    return out


def check_training(out: Path, predictions: Path) -> None:
    assert "(mask_head): MaskRCNNFCNHead" in (out / "log.txt").read_text()
    first = json.loads((out / "metrics.json").read_text().splitlines()[0])
    assert first.keys() >= LOSSES
    assert all(math.isfinite(first[name]) for name in LOSSES)

    weights = torch.load(out / "model_final.pth", weights_only=True)["model"]
    assert weights["roi_heads.mask_head.predictor.weight"].shape == (80, 16, 1, 1)

    found = json.loads((predictions / "coco_instances_results.json").read_text())
    assert found
    assert all(prediction["segmentation"]["size"] == [64, 64] for prediction in found)


def test_train_net(trained: Path) -> None:
    check_training(trained, trained / "inference")


def test_plain_train_net(yaml: Path, run_tool: RunTool, tmp_path: Path) -> None:
    run_tool("plain_train_net.py", "--config-file", yaml, "OUTPUT_DIR", tmp_path)
    check_training(tmp_path, tmp_path / "inference" / "coco_2017_val")


def test_train_net_evaluates_what_it_trained(
    yaml: Path, trained: Path, run_tool: RunTool, tmp_path: Path
) -> None:
    weights = ["MODEL.WEIGHTS", trained / "model_final.pth"]
    run_tool("train_net.py", "--eval-only", "--config-file", yaml, *weights, "OUTPUT_DIR", tmp_path)
    name = Path("inference", "coco_instances_results.json")
    assert json.loads((tmp_path / name).read_text()) == json.loads((trained / name).read_text())


def test_analyze_model(yaml: Path, run_tool: RunTool) -> None:
    tasks = ["--tasks", "flop", "activation", "parameter", "structure"]
    where = ["--config-file", yaml, "--num-inputs", 2]
    out = run_tool("analyze_model.py", *tasks, *where)
    assert "(mask_head): MaskRCNNFCNHead" in out
    for operator in (r"\('conv', ([\d.e-]+)\)", r"Total \(Million\) Activations: ([\d.]+)"):
        count = re.search(operator, out)
        assert count is not None, out
        assert float(count[1]) > 0
    # 3 x 3 x 16 x 16 + 16, 2 x 2 x 16 x 16 + 16, and 80 x 16 + 80 at the end.
    assert re.search(r"roi_heads.mask_head\s*\|\s*4.7K", out)


def test_visualize_json_results(trained: Path, run_tool: RunTool, tmp_path: Path) -> None:
    results = trained / "inference" / "coco_instances_results.json"
    show = ["--output", tmp_path, "--conf-threshold", 0.0]
    run_tool("visualize_json_results.py", "--input", results, *show)
    pictures = [cv2.imread(str(path)) for path in sorted(tmp_path.iterdir())]
    # Predictions beside the ground truth, of each of the six images.
    assert [picture.shape for picture in pictures] == [(64, 128, 3)] * 6


def test_visualize_data(yaml: Path, run_tool: RunTool, tmp_path: Path) -> None:
    where = ["--config-file", yaml, "--output-dir", tmp_path]
    run_tool("visualize_data.py", "--source", "annotation", *where)
    assert len(list(tmp_path.glob("*.jpg"))) == 12
