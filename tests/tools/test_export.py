"""tools/export.py: files that answer as the model, and none that doesn't."""

import importlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import detectron2.data.transforms as T
import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image
from torch import Tensor

import mask_rcnn_plugin
from benchmark.weights import draw_like_trained
from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.inference import export as exporting
from mask_rcnn_plugin.inference import verification
from mask_rcnn_plugin.training import setup_datasets

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "export.md").read_text()
ROWS: dict[str, tuple[str, list[str]]] = {
    "fpn": ("table4_keypoints/keypoint_and_mask", []),
    "c4": ("table2a_backbone/r50_c4", []),
    "mlp": ("table2e_mask_branch/mlp_2fc", []),
    "c5": ("table2d_stride32/roipool", ["model.roi_heads.mask_head.loss_type=softmax"]),
    "torchvision": ("table2a_backbone/r50_fpn+torchvision", []),
    "timm": (
        "backbones/convnext_tiny",
        ["model.backbone.name=convnext_atto", "model.backbone.options={}"],
    ),
    "swin": (
        "backbones/swin_tiny",
        ["model.backbone.options={embed_dim: 24, depths: [2, 1, 1, 1], num_heads: [1, 1, 1, 1]}"],
    ),
    "stock": ("table2a_backbone/r50_fpn+stock", []),
    "stock keypoints": ("table4_keypoints/keypoint_and_mask+stock", []),
}
TIMM = ("timm", "swin")

Program = Callable[..., int]

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporters


def draw_model(row: str, changes: list[str], toy: Path, folder: Path) -> Path:
    """What a training leaves of a narrow model, with weights as if trained."""
    data = [f"dataset.{s}.json={toy}/{t}.json" for s, t in (("train", "train"), ("test", "val"))]
    data += [f"dataset.{s}.images={toy}/{t}" for s, t in (("train", "train"), ("test", "val"))]
    cfg = get_config(f"{row}+synthetic", [*data, "train.device=cpu", *changes])
    if "width" in cfg.model.backbone:
        cfg.model.backbone.update(norm="FrozenBN", width=8)
        cfg.model.backbone.name = cfg.model.backbone.name.replace("18", "10")
    setup_datasets(cfg)
    model = instantiate(cfg.model).eval()
    photo = cv2.imread(str(toy / "val" / "000000.jpg"))
    image = torch.from_numpy(cv2.resize(photo, (128, 128)).transpose(2, 0, 1))
    draw_like_trained(model, [{"image": image}], num_candidates=30)
    threshold = model.roi_heads.box_predictor.test_score_thresh
    cfg.model.roi_heads.box_predictor.test_score_thresh = threshold
    folder.mkdir()
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    return folder


@pytest.fixture(scope="module")
def models(toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: draw_model(*row, toy_dataset, folder / name) for name, row in ROWS.items()}


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Program:
    """Runs the program; its exit code."""

    def run(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, args)])
        try:
            importlib.import_module("export").main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        *product(("fpn", "c4", "mlp", "timm"), exporting.FORMATS),
        *product(("swin", "stock"), ["torchscript", "onnx"]),
        *product(("c5", "torchvision"), ["onnx"]),
        ("stock keypoints", "torchscript"),
    ],
)
def test_a_file_answers_as_its_model(
    kind: str,
    format: str,
    models: dict[str, Path],
    toy_dataset: Path,
    tmp_path: Path,
    export: Program,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "new" / "model"
    images = ["--verify", 4, "--images", toy_dataset / "val"]
    code = export("--weights", models[kind], "--format", format, "--output", file, *images)
    said = capsys.readouterr()
    assert code == 0, said.err
    empty = "([1-3]|none)" if kind in ("torchvision", *TIMM) else "1"
    assert re.search(rf"4 images of 3 sizes, {empty} without detections.*AP 100.0", said.out)
    assert [file] == [*file.parent.iterdir()]

    if format == "onnx":
        session = onnxruntime.InferenceSession(str(file))
        text = session.get_modelmeta().custom_metadata_map[exporting.METADATA]
        assert [i.name for i in session.get_inputs()] == ["image"]
        shapes = {o.name: o.shape for o in session.get_outputs()}
        assert shapes["boxes"] == ["detections", 4]
        side = 14 if kind == "c4" else 28
        assert shapes["masks"] == ["detections", side, side]
    else:
        extra = {exporting.METADATA: ""}
        if format == "torchscript":
            torch.jit.load(str(file), _extra_files=extra)
            text = extra[exporting.METADATA]
        else:
            torch.export.load(io.BytesIO(file.read_bytes()), extra_files=extra)
            text = extra[exporting.METADATA]
    info = json.loads(text)
    assert info["class_names"][0] == "person"
    assert len(info["keypoint_names"]) == (17 if kind in ("fpn", "stock keypoints") else 0)
    assert info["input_format"] == ("RGB" if kind in ("torchvision", *TIMM) else "BGR")
    assert info["resize"] == {"short_edge": 128, "max_size": 1333}
    mean = [123.675, 116.28, 103.53] if info["input_format"] == "RGB" else [103.53, 116.28, 123.675]
    assert info["pixel_mean"] == pytest.approx(mean)
    assert info["pixel_std"] == pytest.approx(
        [58.395, 57.12, 57.375] if info["input_format"] == "RGB" else [1.0, 1.0, 1.0]
    )


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("stock keypoints", "onnx"),
        ("stock", "exported-program"),
        ("stock keypoints", "exported-program"),
        ("swin", "exported-program"),
    ],
)
def test_what_the_pages_table_denies_is_one_line(
    kind: str,
    format: str,
    models: dict[str, Path],
    tmp_path: Path,
    export: Program,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = ("--format", format, "--output", tmp_path / "out" / "model")
    assert export("--weights", models[kind], *output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot express this model" in line
    assert not [*(tmp_path / "out").iterdir()]


def blocked(code: str) -> str:
    """Code that runs where neither torch nor detectron2 is."""
    return (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'detectron2', 'mask_rcnn_plugin', 'cv2'):\n"
        "    sys.modules[name] = None\n" + code
    )


def test_the_pages_program_finds_what_the_predictor_finds(
    models: dict[str, Path], toy_dataset: Path, tmp_path: Path, export: Program
) -> None:
    file = tmp_path / "model.onnx"
    everything = "model.roi_heads.box_predictor.test_score_thresh=0.0"  # also of odd photos
    weights = ("--weights", models["fpn"])
    assert export(*weights, "--format", "onnx", "--output", file, everything) == 0
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    cfg = get_config(str(models["fpn"]), [everything])
    predictor = mask_rcnn_plugin.load(models["fpn"], config=cfg)
    command = [sys.executable, "-c", blocked(code)]
    plain = Image.open(toy_dataset / "val" / "000001.jpg").resize((200, 150))
    turned = Image.Exif()
    turned[0x0112] = 6  # the orientation of a phone held upright
    deep = np.asarray(plain.convert("L")).astype(np.uint16) * 256 + 255
    for image, options in (
        (plain, {"format": "JPEG"}),
        (plain, {"format": "JPEG", "exif": turned}),
        (Image.fromarray(deep), {"format": "PNG"}),
    ):
        image.save(tmp_path / "photo.jpg", **options)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        result = predictor(tmp_path / "photo.jpg")
        instances = result.instances
        lines = [line.split() for line in done.stdout.splitlines()]
        assert len(lines) == len(instances) > 3
        areas = instances.pred_masks.sum((1, 2)).tolist()
        boxes = instances.pred_boxes.tensor.numpy()
        assert max(areas) > 100
        for line, known, score, box, area in zip(lines, result.names, result.scores, boxes, areas):
            name, *numbers, pixels, unit = line
            assert (name, unit) == (known, "pixels")
            np.testing.assert_allclose([float(n) for n in numbers], [score, *box], atol=0.011)
            assert abs(int(pixels) - area) <= 2


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_a_file_of_other_weights_is_not_left(
    format: str,
    models: dict[str, Path],
    tmp_path: Path,
    export: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tampered(predictor: Any, *args: Any) -> None:
        weight = predictor.model.roi_heads.mask_head.predictor.weight.data
        weight *= 1.1
        exporting.write_exported(predictor, *args)
        weight /= 1.1

    monkeypatch.setattr(importlib.import_module("export"), "write_exported", tampered)
    output = tmp_path / "out" / "model"
    output.parent.mkdir()
    output.write_bytes(b"an older one")
    code = export("--weights", models["c4"], "--format", format, "--output", output, "--verify", 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1
    assert "drawn image, 128 x 128, number 1" in line
    assert "masks differ" in line
    assert [*output.parent.iterdir()] == [output]
    assert output.read_bytes() == b"an older one"


def run_verify(change: Callable[[dict[str, Tensor]], None], models: dict[str, Path]) -> str:
    """What is said of answers that were changed."""
    predictor = mask_rcnn_plugin.load(models["fpn"], optimize=False)
    images = verification.example_images(predictor, [], 3)
    model = exporting.ExportableModel(predictor.model)

    def run(image: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = model(image)
        if len(outputs["scores"]) > 1:
            change(outputs)
        return outputs

    with pytest.raises(verification.ExportMismatchError) as caught:
        verification.verify(predictor, run, images)
    return str(caught.value)


def drop_one(outputs: dict[str, Tensor]) -> None:
    outputs.update({name: value[1:] for name, value in outputs.items()})


CHANGES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "boxes": lambda outputs: outputs["boxes"].add_(0.002),
    "scores": lambda outputs: outputs["scores"].mul_(1.001),
    "classes": lambda outputs: outputs["classes"].add_(1),
    "masks": lambda outputs: outputs["masks"][-1].mul_(0.9),
    "keypoints": lambda outputs: outputs["keypoints"][:, :2, 0].add_(1),
    "detections": drop_one,
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_difference_is_seen(what: str, models: dict[str, Path]) -> None:
    said = run_verify(CHANGES[what], models)
    assert "drawn image" in said
    assert what in said


def test_ap_is_looked_at_too(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LIMITS", dict.fromkeys(verification.LIMITS, math.inf))
    said = run_verify(lambda outputs: outputs["boxes"].add_(2), models)
    assert "AP against the model's own detections is" in said


def test_an_error_of_the_runtime_is_one_line(models: dict[str, Path]) -> None:
    def run(image: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("no kernel of that name\nin many lines")

    predictor = mask_rcnn_plugin.load(models["fpn"], optimize=False)
    images = verification.example_images(predictor, [], 3)
    with pytest.raises(verification.ExportMismatchError, match="number 1: no kernel of that name$"):
        verification.verify(predictor, run, images)


def test_other_augmentations_are_no_rule(models: dict[str, Path]) -> None:
    predictor = mask_rcnn_plugin.load(models["fpn"], optimize=False)
    assert exporting.metadata_of_export(predictor)["resize"]
    predictor.mapper.augmentation_input = type("ByOpenCV", (T.AugInput,), {})
    assert exporting.metadata_of_export(predictor)["resize"] is None
    predictor.mapper.augmentation_input = T.AugInput
    predictor.mapper.augmentations.augs.append(T.RandomFlip())
    assert exporting.metadata_of_export(predictor)["resize"] is None


def test_boxes_that_were_cut_to_nothing_match_none() -> None:
    """Two in a corner, which suppress each other in no order, and one that is there."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 4, 0, 9], [0, 4, 0, 9]])
    outputs = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7])}
    outputs["classes"] = torch.tensor([0, 1, 1])
    found = {name: value[[0, 2]] for name, value in outputs.items()}
    outputs, found = map(verification._with_area, (outputs, found))
    assert dict(verification._differences("a", outputs, found)) == {"boxes": 0, "scores": 0}
    assert verification._average_precision([outputs], [found]) == pytest.approx(100)


def test_where_something_is_found_everywhere_it_is_said(models: dict[str, Path]) -> None:
    predictor = mask_rcnn_plugin.load(models["c4"], optimize=False)
    predictor.model.roi_heads.box_predictor.test_score_thresh = 0.0
    images = verification.example_images(predictor, [], 3)
    run = exporting.ExportableModel(predictor.model)
    with torch.no_grad():
        assert "none without detections, even a blank one" in verification.verify(
            predictor, run, images
        )


def test_a_file_that_does_not_load_is_not_kept(
    models: dict[str, Path],
    tmp_path: Path,
    export: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no such operator\nin this runtime")

    monkeypatch.setattr(importlib.import_module("export"), "load_exported", refuse)
    output = ("--format", "torchscript", "--output", tmp_path / "out" / "model", "--verify", 3)
    assert export("--weights", models["c4"], *output) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not load: no such operator; the file is not kept" in line
    assert not [*(tmp_path / "out").iterdir()]


def test_nothing_found_verifies_nothing(
    models: dict[str, Path], tmp_path: Path, export: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--format", "torchscript", "--output", tmp_path / "out" / "model", "--verify", 3]
    threshold = "model.roi_heads.box_predictor.test_score_thresh=1.0"
    assert export("--weights", models["c4"], *output, threshold) == 1
    assert "nothing is found in any of the 3 images" in capsys.readouterr().err
    assert not [*(tmp_path / "out").iterdir()]


def test_mistakes_are_one_line(
    models: dict[str, Path],
    tmp_path: Path,
    export: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*args: object) -> str:
        assert export("--weights", models["c4"], *args) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 or lines[0].startswith("usage")
        return lines[-1]

    output = ["--output", tmp_path / "model"]
    assert "--verify is 2" in said("--format", "onnx", *output, "--verify", 2)
    assert "is not a file" in said("--format", "onnx", "--output", tmp_path)
    assert "is not a file" in said("--format", "onnx", "--output", "/dev/null")
    long = f"dataset.metadata.thing_classes=[{'a' * 300}]"
    assert "'nowhere'" in said(
        "--format", "onnx", *output, "--verify", 3, "--images", "nowhere", long
    )
    assert "'nowhere'" in said("--format", "onnx", *output, "--verify", 3, "--images", "nowhere")
    # detectron2's parts, of which torch.export cannot know whether all boxes are finite.
    stock = ["--config-file", f"{ROWS['c4'][0]}+synthetic+stock", "model.backbone.width=8"]
    stock += ["model.backbone.name=ResNet-10-C4", "model.backbone.norm=FrozenBN"]
    stock += ["model.roi_heads.num_classes=5"]
    line = said("--format", "exported-program", *output, *stock)
    assert "cannot express this model" in line
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnx" else "there")
    assert "needs onnx: pip install" in said("--format", "onnx", *output)
    assert not [*tmp_path.iterdir()]
