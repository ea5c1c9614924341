import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from mask_rcnn_plugin.engine import Checkpointer, resolve_weights
from mask_rcnn_plugin.engine.checkpoint import WeightsError


def model(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))


def saved(tmp_path: Path, weights: dict[str, torch.Tensor]) -> str:
    file = tmp_path / "weights.pth"
    torch.save({"model": weights}, file)
    return str(file)


def test_weights_of_the_whole_model_load(tmp_path: Path) -> None:
    file = saved(tmp_path, {k: v + 1 for k, v in model().state_dict().items()})
    target = model()
    Checkpointer(target).load_strictly(file)
    for key, value in target.state_dict().items():
        assert torch.equal(value, model().state_dict()[key] + 1)


def test_zoo_format_loads(tmp_path: Path) -> None:
    file = tmp_path / "model.pkl"
    weights = {k: v.numpy() + 1 for k, v in model().state_dict().items()}
    file.write_bytes(pickle.dumps({"model": weights, "__author__": "someone"}))
    target = model()
    Checkpointer(target).load_strictly(str(file))
    assert torch.equal(target[1].bias, model()[1].bias + 1)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    file = tmp_path / "README.pth"
    file.write_text("# not weights")
    with pytest.raises(WeightsError, match="README.pth cannot be loaded: "):
        Checkpointer(model()).load_strictly(str(file))


def test_missing_parameter_is_named(tmp_path: Path) -> None:
    weights = model().state_dict()
    del weights["1.bias"]
    with pytest.raises(WeightsError, match=r"do not fit .*missing: 1\.bias$"):
        Checkpointer(model()).load_strictly(saved(tmp_path, weights))


def test_other_shape_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        Checkpointer(model(4)).load_strictly(saved(tmp_path, model(3).state_dict()))
    assert "0.bias: [3] in the file, [4] in the model" in str(error.value)
    assert "missing" not in str(error.value)


@pytest.mark.parametrize(
    "weights", ["detectron2://COCO-Detection/x.pkl", "catalog://ImageNetPretrained/MSRA/R-50"]
)
def test_addresses_are_left_to_detectron2(weights: str) -> None:
    assert resolve_weights(weights) == weights


def test_missing_file_names_what_is_beside_it(tmp_path: Path) -> None:
    file = saved(tmp_path, {})
    assert resolve_weights(file) == file
    with pytest.raises(WeightsError, match=r"model\.pth' does not exist; .*\['weights\.pth'\]"):
        resolve_weights(str(tmp_path / "model.pth"))
    with pytest.raises(WeightsError, match="nor does its folder"):
        resolve_weights(str(tmp_path / "nowhere" / "model.pth"))


def test_zoo_name_resolves_or_says_why_not() -> None:
    try:
        from detectron2 import model_zoo  # noqa: F401
    except ImportError:
        with pytest.raises(WeightsError, match="has no usable detectron2.model_zoo"):
            resolve_weights("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x")
    else:
        address = resolve_weights("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x")
        assert address.endswith("model_final_f10217.pkl")
        with pytest.raises(WeightsError, match="mask_rcnn_R_51"):
            resolve_weights("COCO-InstanceSegmentation/mask_rcnn_R_51")
