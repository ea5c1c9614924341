"""tools/convert_weights.py: from torchvision's files to answers, and back."""

import argparse
import json
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import convert_weights
import cv2
import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import instantiate
from torch import nn
from torchvision.models import detection
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from mask_rcnn_plugin import get_config, load
from mask_rcnn_plugin.training.checkpoint import SafeCheckpointer
from mask_rcnn_plugin.weights import WeightsError
from mask_rcnn_plugin.weights.loader import read_weights

REPOSITORY = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


def draw_weights(model: nn.Module) -> None:
    """With which something is found, and with small variances, where eps counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "running_var"):
                module.running_var.uniform_(2e-4, 4e-4)
                module.weight.uniform_(0.01, 0.02)
                module.bias.normal_(0, 0.1)
            for part, std in (("cls_logits", 0.05), ("bbox_pred", 0.02), ("cls_score", 0.5)):
                if name.endswith(part):
                    module.weight.normal_(0, std)
            if name.endswith("mask_fcn_logits"):
                module.weight.normal_(0, 0.3)
            if name.endswith("conv5_mask"):  # no checkerboards
                module.weight.copy_(module.weight.mean(dim=(2, 3), keepdim=True))


def small_detector(num_classes: int, **arguments: Any) -> nn.Module:
    """torchvision's Mask R-CNN on a ResNet-18."""
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = detection.MaskRCNN(body, num_classes, min_size=96, **arguments).eval()
    draw_weights(model)
    return model


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    convert_weights.main()


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """The line that a mistake ends with."""
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("kind", "names"), [("Keypoint", ["person"]), ("Faster", ["ring", "disk"])]
)
def test_each_kind_of_detector_goes_there_and_back(
    kind: str, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    theirs = getattr(detection, f"{kind}RCNN")(body, 1 + len(names), min_size=96).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = tmp_path / "ours" / "model_final.pth"
    given = ("--names", ",".join(names))
    command(monkeypatch, "--from", "torchvision", tmp_path / "theirs.pth", ours, *given)
    predictor = load(ours.parent)
    assert predictor.names == names
    heads = predictor.model.roi_heads
    assert (heads.keypoint_on, heads.mask_on) == (kind == "Keypoint", False)
    if kind == "Keypoint":
        assert predictor.metadata.keypoint_names[0] == "nose"
    command(monkeypatch, "--to", "torchvision", ours, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth")
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())


def test_the_published_files_are_known_by_name() -> None:
    kinds = {name.split("_")[0] for name in convert_weights.PUBLISHED}
    assert kinds == {"fasterrcnn", "maskrcnn", "keypointrcnn"}


def page_commands(page: str) -> list[list[str]]:
    text = (REPOSITORY / "docs" / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [b.splitlines() for b in blocks if "convert_weights" in b]
    return [shlex.split(line)[1:] for line in chain(*lines)]


def test_the_commands_of_the_page(
    run_python: Run, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On weights as torchvision publishes them, the model being without eps."""
    theirs = small_detector(91, box_detections_per_img=10, rpn_post_nms_top_n_test=100)
    overwrite_eps(theirs, 0.0)
    torch.save(theirs.state_dict(), demo / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth")
    pixels = cv2.resize(cv2.imread("photo.jpg"), (150, 96))
    cv2.imwrite("photo.jpg", pixels)
    small = [
        *("dataloader.test.mapper.augmentations.0.short_edge_length=96",),
        *("dataset.test.max_detections=10", "train.device=cpu"),
        "model.proposal_generator.post_nms_topk=[100,100]",
    ]
    for script, *arguments in page_commands("predict.md"):
        if script == "tools/convert_weights.py":
            command(monkeypatch, *arguments)
        elif script == "tools/predict.py":  # the evaluation is on COCO
            done = run_python(REPOSITORY / script, *arguments, *small, cwd=demo)
            assert done.returncode == 0, done.stderr

    found = json.loads((demo / "output" / "found" / "predictions.json").read_text())
    predictor = load("output/torchvision", config=get_config("output/torchvision", small))
    assert [predictor.names[i] for i in (0, 11, 89)] == ["person", "N/A", "toothbrush"]
    result = predictor("photo.jpg")
    rgb = torch.from_numpy(cv2.imread("photo.jpg")[:, :, ::-1].copy()).permute(2, 0, 1)
    with torch.no_grad():
        (expected,) = theirs([rgb.float() / 255])
        overwrite_eps(theirs, 1e-5)
        (other,) = theirs([rgb.float() / 255])
    assert len(found) == len(result.instances) == 10
    assert [f["category_id"] for f in found] == expected["labels"].tolist()
    got = result.instances
    assert (got.pred_boxes.tensor - expected["boxes"]).abs().max() < 1e-2
    assert (got.scores - expected["scores"]).abs().max() < 1e-4
    assert (other["scores"] - expected["scores"]).abs().max() > 1e-3
    # Pasted in boxes that are others by up to a pixel.
    around = np.ones((3, 3), np.uint8)
    theirs_masks = (expected["masks"][:, 0] > 0.5).byte().numpy()
    for ours, mask in zip([mask.numpy() for mask in got.pred_masks], theirs_masks):
        assert ours.any()
        assert not (ours & (cv2.dilate(mask, around) == 0)).any()
        assert not (~ours & (cv2.erode(mask, around) == 1)).any()

    back = torch.load("back.pth")  # for a model as it is made, with eps
    theirs.load_state_dict(back)
    with torch.no_grad():
        (again,) = theirs([rgb.float() / 255])
    assert (again["scores"] - expected["scores"]).abs().max() < 1e-4
    assert load("output/shared").names == load("output/demo").names


@pytest.fixture(scope="module")
def five_classes(tmp_path_factory: pytest.TempPathFactory, toy_dataset: Path) -> tuple[Path, str]:
    """A checkpoint as torchvision's reference training leaves it, and its classes, one of none."""
    file = tmp_path_factory.mktemp("torchvision") / "model_9.pth"
    categories = json.loads((toy_dataset / "val.json").read_text())["categories"]
    names = [c["name"] for c in categories]
    names.insert(1, "N/A")
    model = small_detector(len(names) + 1).state_dict()
    torch.save({"model": model, "args": argparse.Namespace(lr=0.02), "epoch": 9}, file)
    return file, ",".join(names)


def test_a_class_that_is_none_is_left_out_in_an_evaluation(
    five_classes: tuple[Path, str],
    toy_dataset: Path,
    run_python: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file, names = five_classes
    monkeypatch.chdir(tmp_path)
    command(
        monkeypatch, "--from", "torchvision", file, "out/model_final.safetensors", "--names", names
    )
    assert load("out").names == names.split(",")
    done = run_python(
        *(REPOSITORY / "eval.py", "--config-file", "out", "--weights", "out"),
        *(f"dataset.test.json={toy_dataset}/val.json", f"dataset.test.images={toy_dataset}/val"),
        *("dataloader.test.mapper.augmentations.0.short_edge_length=64", "train.device=cpu"),
        *("dataloader.test.num_workers=0", "dataset.test.max_detections=5"),
        "model.proposal_generator.post_nms_topk=[50,50]",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "AP-person" in (tmp_path / "out" / "results.json").read_text()

    # The names of the file alone will do for a start.
    (tmp_path / "out" / "config.yaml").rename(tmp_path / "config.yaml")
    cfg = get_config("config.yaml")
    cfg.model.roi_heads.num_classes = 1
    model = instantiate(cfg.model)
    checkpointer = SafeCheckpointer(model, str(tmp_path / "start"))
    checkpointer.class_names = [names.split(",")[2]]
    checkpointer.resume_or_load("out/model_final.safetensors", resume=False)
    bias = torch.load(file, weights_only=False)["model"]["roi_heads.box_predictor.cls_score.bias"]
    assert model.roi_heads.box_predictor.cls_score.bias.tolist() == bias[[3, 0]].tolist()


def test_mistakes_are_one_line_and_nothing_is_written_over(
    five_classes: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file, _ = five_classes
    monkeypatch.chdir(tmp_path)
    source = ("--from", "torchvision")
    line = refused(monkeypatch, capsys, *source, file, "out/a.pth", "--names", "ring")
    assert re.search(r"--names lists 1, must list \d+", line)
    line = refused(monkeypatch, capsys, file, "out/a.pth", "--names", "ring")
    assert "--names and --eps go with --from torchvision" in line
    assert "no.pth' does not exist" in refused(monkeypatch, capsys, *source, "no.pth", "a.pth")
    torch.save({"model": {"a": "text"}}, "text.pth")
    assert "text.pth cannot be loaded" in refused(monkeypatch, capsys, *source, "text.pth", "a.pth")
    assert not Path("out").exists()
    assert not Path("a.pth").exists()
    wide = torch.load(file, weights_only=False)["model"]
    wide["backbone.body.layer1.0.conv1.weight"] = torch.zeros(128, 64, 3, 3)
    torch.save(wide, "wide.pth")
    line = refused(monkeypatch, capsys, *source, "wide.pth", "a.pth")
    assert "res2.0.conv1.weight is [128, 64, 3, 3], must be [64, 64, 3, 3]" in line

    Path("taken").mkdir()
    Path("taken/config.yaml").write_text("mine")
    line = refused(monkeypatch, capsys, *source, file, "taken/model_final.pth")
    assert "taken/config.yaml already exists" in line
    assert [f.name for f in Path("taken").iterdir()] == ["config.yaml"]
    assert "wide.pth already exists" in refused(monkeypatch, capsys, *source, file, "wide.pth")

    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    line = refused(monkeypatch, capsys, *source, file, "new/a.safetensors")
    assert "a.safetensors needs safetensors: pip install safetensors" in line


def test_a_model_that_torchvision_does_not_have_is_not_converted(
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    weights = trained / "model_final.pth"
    line = refused(monkeypatch, capsys, "--to", "torchvision", weights, tmp_path / "a.pth")
    assert "is not a torchvision model, as it has model.input_format=BGR, " in line
    alone = tmp_path / "alone.pth"
    torch.save(read_weights(str(weights)), alone)
    line = refused(monkeypatch, capsys, "--to", "torchvision", alone, tmp_path / "a.pth")
    assert "there is no" in line
    assert "config.yaml" in line
    assert not (tmp_path / "a.pth").exists()


def test_anchors_of_its_own_are_no_model_of_torchvision(
    five_classes: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file, names = five_classes
    out = tmp_path / "out"
    source = ("--from", "torchvision", file, out / "model_final.pth", "--names", names)
    command(monkeypatch, *source)
    target = ("--to", "torchvision", out / "model_final.pth")
    command(monkeypatch, *target, tmp_path / "a.pth")
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(re.sub(r"(sizes:\s+- \[?)32", r"\g<1>16", text))
    line = refused(monkeypatch, capsys, *target, tmp_path / "b.pth")
    assert "as it has model.proposal_generator.anchor_generator.sizes" in line


@pytest.mark.parametrize(("eps", "offset"), [((), 0.0), (("--eps", 0), -1e-5)])
def test_the_eps_of_a_model_made_of_published_weights(
    eps: tuple[Any, ...],
    offset: float,
    five_classes: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file, names = five_classes
    arguments = ("--from", "torchvision", file, tmp_path / "a.pth", "--names", names, *eps)
    command(monkeypatch, *arguments)
    theirs = read_weights(str(file))["backbone.body.bn1.running_var"]
    ours = read_weights(str(tmp_path / "a.pth"))["backbone.bottom_up.stem.conv1.norm.running_var"]
    assert (ours - theirs - offset).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("wide_resnet50_2", "res2.0.conv1.weight is [128, 64, 1, 1], must be [64, 64, 1, 1]"),
        ("resnext50_32x4d", "conv"),  # the rows' are 64x4d
    ],
)
def test_a_backbone_that_no_config_has_is_not_converted(
    network: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    weights = getattr(torchvision.models, network)().state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    source = ("--from", "torchvision", tmp_path / "theirs.pth")
    line = refused(monkeypatch, capsys, *source, tmp_path / "a.pth")
    assert "no config has the backbone of these weights: " in line
    assert message in line
    assert "a.pkl, must end with .pth" in refused(monkeypatch, capsys, *source, tmp_path / "a.pkl")
    assert len([*tmp_path.iterdir()]) == 1


def test_weights_of_detectron_keep_their_meaning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conv = np.random.default_rng(0).random((64, 3, 7, 7), dtype=np.float32)
    blobs = {"blobs": {"conv1_w": conv, "res_conv1_bn_s": np.ones(64, np.float32)}}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(blobs))
    command(monkeypatch, tmp_path / "R-50.pkl", tmp_path / "R-50.safetensors")
    weights = read_weights(str(tmp_path / "R-50.safetensors"))
    assert weights.keys() == {"stem.conv1.weight", "stem.conv1.norm.weight"}
    assert np.array_equal(weights["stem.conv1.weight"].numpy(), conv)


def test_a_converted_backbone_starts_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With the settings that the page and the program name."""
    monkeypatch.chdir(tmp_path)
    theirs = torchvision.models.resnet18().eval()
    draw_weights(theirs)
    torch.save(theirs.state_dict(), "resnet50-11ad3fa6.pth")  # a quick one, for the page's
    convert, train = page_commands("configs.md")
    command(monkeypatch, *convert[1:])
    name, changes = train[2], train[3:]
    assert " ".join(changes) in capsys.readouterr().out
    cfg = get_config(name, [*changes, "model.backbone.name=ResNet-18-FPN"])
    assert not Path("output/config.yaml").exists()
    model = instantiate(cfg.model).eval()
    path = cfg.train.init_checkpoint
    SafeCheckpointer(model, str(tmp_path / "out")).resume_or_load(path, resume=False)
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        part = nn.Sequential(*[*theirs.children()][:-2])
        expected = part(((pixels / 255 - mean) / std)[None])
        x = model.preprocess_image([{"image": pixels}]).tensor
        got = model.backbone.bottom_up(x)["res5"]
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    command(monkeypatch, "--to", "torchvision", path, "back.pth")
    back, given = torch.load("back.pth"), theirs.state_dict()
    assert back.keys() == given.keys()
    assert all(torch.equal(value, given[key]) for key, value in back.items())


def test_safetensors_come_back(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also weights that share memory, or are no row of it, and with the config beside them kept."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((trained / "config.yaml").read_text())
    weights = read_weights(str(trained / "model_final.pth"))
    a = torch.rand(4, 6)
    weights |= {"a": a, "the_same": a, "turned": a.T, "number": torch.tensor(3)}
    torch.save(weights, folder / "model_final.pth")
    command(monkeypatch, folder / "model_final.pth", folder / "new.safetensors")
    assert (folder / "config.yaml").read_text() == (trained / "config.yaml").read_text()
    command(monkeypatch, folder / "new.safetensors", tmp_path / "back" / "model_final.pth")
    back = torch.load(tmp_path / "back" / "model_final.pth")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    image = np.full((64, 64, 3), 90, np.uint8)
    scores = [load(path)(image).scores for path in (folder / "new.safetensors", tmp_path / "back")]
    assert scores[0] == scores[1] != []


def test_a_damaged_safetensors_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(
        WeightsError, match=r"a\.safetensors cannot be loaded: it is empty, damaged"
    ):
        read_weights(str(file))


def test_a_folder_with_a_file_of_torchvisions_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "maskrcnn.pth"
    torch.save(small_detector(3).state_dict(), file)
    with pytest.raises(ValueError, match=r"tools/convert_weights\.py"):
        load(file)
    with pytest.raises(WeightsError, match=r"--from torchvision .*maskrcnn\.pth") as error:
        load(file, config="table2a_backbone/r50_fpn")
    assert "missing" not in str(error.value)
    model = instantiate(get_config("table2a_backbone/r50_fpn").model)
    with pytest.raises(WeightsError, match=r"--from torchvision .*maskrcnn\.pth"):
        SafeCheckpointer(model, str(tmp_path)).resume_or_load(str(file), resume=False)
