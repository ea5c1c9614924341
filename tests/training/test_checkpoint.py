import errno
import os
import pickle
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError

import pytest
import torch
from detectron2.utils.file_io import PathManager
from torch import nn

from mask_rcnn_plugin.training import checkpoint as checkpoint_module
from mask_rcnn_plugin.training.checkpoint import SafeCheckpointer, SaveError, check_readable
from mask_rcnn_plugin.weights import WeightsError, download, resolve_weights


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
    SafeCheckpointer(target).load_strictly(file)
    for key, value in target.state_dict().items():
        assert torch.equal(value, model().state_dict()[key] + 1)


def test_zoo_format_loads(tmp_path: Path) -> None:
    file = tmp_path / "model.pkl"
    weights = {k: v.numpy() + 1 for k, v in model().state_dict().items()}
    file.write_bytes(pickle.dumps({"model": weights, "__author__": "someone"}))
    target = model()
    SafeCheckpointer(target).load_strictly(str(file))
    assert torch.equal(target[1].bias, model()[1].bias + 1)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    file = tmp_path / "README.pth"
    file.write_text("# not weights")
    with pytest.raises(WeightsError, match="README.pth cannot be loaded: "):
        SafeCheckpointer(model()).load_strictly(str(file))


def test_missing_parameter_is_named(tmp_path: Path) -> None:
    weights = model().state_dict()
    del weights["1.bias"]
    with pytest.raises(WeightsError, match=r"do not fit .*: 1\.bias is missing$"):
        SafeCheckpointer(model()).load_strictly(saved(tmp_path, weights))


def test_other_shape_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        SafeCheckpointer(model(4)).load_strictly(saved(tmp_path, model(3).state_dict()))
    assert "0.bias is [3] in the file, [4] in the model" in str(error.value)
    assert "missing" not in str(error.value)


@pytest.mark.parametrize(
    "weights", ["detectron2://COCO-Detection/x.pkl", "catalog://ImageNetPretrained/MSRA/R-50"]
)
def test_addresses_are_left_to_detectron2(weights: str) -> None:
    assert resolve_weights(weights) == weights


def test_without_internet_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = SafeCheckpointer(model())

    def offline(*_: object, **__: object) -> str:
        raise URLError("Name or service not known")

    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", offline)
    with pytest.raises(WeightsError, match=r"download .*R-50\.pkl \(.*train\.init_checkpoint=FILE"):
        checkpointer.resume_or_load("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    with pytest.raises(WeightsError, match="not known"):
        download("detectron2://ImageNetPretrained/MSRA/R-50.pkl?matching_heuristics=True")
    assert download("") == ""


def test_options_of_an_address_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(PathManager, "get_local_path", asked.append)
    address = "https://example.com/model.pkl"
    assert download(f"{address}?matching_heuristics=True") == address
    assert asked == [address]


@pytest.mark.parametrize("content", [[1], {"model": {"0.weight": "x"}}])
def test_a_training_starts_from_no_file_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"weights .*other\.pth cannot be loaded: "):
        SafeCheckpointer(model()).resume_or_load(str(tmp_path / "other.pth"))


def test_missing_file_names_what_is_beside_it(tmp_path: Path) -> None:
    file = saved(tmp_path, {})
    assert resolve_weights(file) == file
    with pytest.raises(WeightsError, match=r"model\.pth.*weights\.pth"):
        resolve_weights(str(tmp_path / "model.pth"))
    with pytest.raises(WeightsError, match=r"nowhere/model\.pth"):
        resolve_weights(str(tmp_path / "nowhere" / "model.pth"))


def test_a_folder_is_no_file_and_what_is_in_it_is_named(tmp_path: Path) -> None:
    saved(tmp_path, {})
    (tmp_path / "log.txt").touch()
    with pytest.raises(WeightsError, match=r"folder.*weights\.pth") as error:
        resolve_weights(str(tmp_path))
    assert "log.txt" not in str(error.value)


def test_zoo_name_resolves_or_says_why_not() -> None:
    try:
        from detectron2 import model_zoo  # noqa: F401
    except ImportError:
        with pytest.raises(WeightsError, match=r"detectron2\.model_zoo"):
            resolve_weights("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x")
    else:
        address = resolve_weights("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x")
        assert address.endswith("model_final_f10217.pkl")
        with pytest.raises(WeightsError, match="mask_rcnn_R_51"):
            resolve_weights("COCO-InstanceSegmentation/mask_rcnn_R_51")


class Runs:
    """Pickled, a call that makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.pyth", "old.pth", "bare.pth"])
def test_a_file_that_would_run_code_is_refused(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    key = "model_state" if name == "a.pyth" else "model"
    content = {key: {"weight": Runs(marker)}, "__author__": "someone"}
    file = tmp_path / name
    if name == "bare.pth":
        file.write_bytes(pickle.dumps(content, 2))
    elif name == "a.pkl":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=name != "old.pth")
    with pytest.raises(WeightsError, match=rf"{name} cannot be loaded: .*asks for posix\.mkdir"):
        SafeCheckpointer(model()).load_strictly(str(file))
    with pytest.raises(WeightsError, match="asks for posix.mkdir"):
        SafeCheckpointer(model()).resume_or_load(str(file))
    assert not marker.exists()


def test_pycls_and_caffe2_files_load(tmp_path: Path) -> None:
    weights = {k: v + 1 for k, v in model().state_dict().items()}
    torch.save({"model_state": weights | {"x.num_batches_tracked": 1}}, tmp_path / "a.pyth")
    blobs = {k: v.numpy() for k, v in weights.items()}
    blobs["0.weight_momentum"] = blobs["0.weight"]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs, "cfg": "x: 1"}, 2))
    for name in ("a.pyth", "a.pkl"):
        target = model()
        SafeCheckpointer(target).load_strictly(str(tmp_path / name))
        assert torch.equal(target[1].bias, weights["1.bias"]), name


class Counter:
    """A part of a training with a state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def checkpoints(folder: Path, *names: str) -> SafeCheckpointer:
    """A training's folder with a checkpoint at each of the names, in this order."""
    writer = SafeCheckpointer(model(), str(folder), counter=Counter())
    for name in names:
        count = int(name) if name.isdigit() else 99
        writer.checkpointables["counter"].count = count
        writer.save(f"model_{name}", iteration=count)
    return writer


def resumed(folder: Path) -> int:
    reader = SafeCheckpointer(model(), str(folder), counter=Counter())
    loaded = reader.resume_or_load("", resume=True)
    count = reader.checkpointables["counter"].count
    assert loaded.get("iteration", 0) == count
    return count


def test_what_is_saved_is_resumed_from_and_left_alone(tmp_path: Path) -> None:
    writer = checkpoints(tmp_path, "0000001", "0000003")
    assert writer.saved_iteration == 3
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert resumed(tmp_path) == 3
    files = ["last_checkpoint", "model_0000001.pth", "model_0000003.pth"]
    assert sorted(f.name for f in tmp_path.iterdir()) == files


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        damaged = {
            "truncated": content[:middle],
            "empty": b"",
            "garbage": b"\xaa" * len(content),
            "zeroed tail": content[:middle] + bytes(len(content) - middle),
            # the values of a weight, which torch.load reads without a word
            "a bit flipped": content.replace(TAG, TAG[:-1] + b"\x00"),
            "no checkpoint": b"",
        }[how]
        assert damaged != content
        file.write_bytes(damaged)
        if how == "no checkpoint":
            torch.save([1, 2], file)


TAG = torch.tensor([1234.5, 6789.25]).numpy().tobytes()


@pytest.mark.parametrize(
    "how",
    [
        *("missing", "truncated", "empty", "garbage", "zeroed tail"),
        *("a bit flipped", "no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = checkpoints(tmp_path, "0000001", "0000003")
    writer.model[1].weight.data[0, :2] = torch.tensor([1234.5, 6789.25])
    writer.save("model_0000005", iteration=5)
    damage(tmp_path / "model_0000005.pth", how)
    assert resumed(tmp_path) == 3
    (warning,) = [r.message for r in caplog.records if "Cannot resume" in r.message]
    assert str(tmp_path / "model_0000005.pth") in warning


def test_the_next_in_line_is_the_latest_iteration_final_or_not(tmp_path: Path) -> None:
    checkpoints(tmp_path, "0000050", "final", "0000150", "0000200")
    damage(tmp_path / "model_0000200.pth", "empty")
    assert resumed(tmp_path) == 150
    damage(tmp_path / "model_0000150.pth", "empty")
    assert resumed(tmp_path) == 99
    damage(tmp_path / "model_final.pth", "empty")
    assert resumed(tmp_path) == 50


def test_the_best_model_is_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    torch.save({"model": model().state_dict()}, tmp_path / "model_best.pth")
    assert resumed(tmp_path) == 0


@pytest.mark.parametrize("tag", [b"", b"model_0000009.pth", b"\x00\x00", b"\xff\xe1", None])
def test_a_tag_that_names_nothing_is_no_loss(tag: bytes | None, tmp_path: Path) -> None:
    checkpoints(tmp_path, "0000001", "0000003")
    if tag is None:  # killed between the file and its tag
        (tmp_path / "last_checkpoint").unlink()
    else:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resumed(tmp_path) == 3


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    torch.save({"model": model().state_dict()}, tmp_path / "model_0000003.pth")
    reader = SafeCheckpointer(model(), str(tmp_path), trainer=Counter())
    with pytest.raises(WeightsError, match="none of the checkpoints"):
        reader.resume_or_load("", resume=True)
    writer = SafeCheckpointer(model(), str(tmp_path), trainer=Counter())
    writer.save("model_0000001", iteration=1)
    assert reader.resume_or_load("", resume=True)["iteration"] == 1


def test_never_silently_from_the_start(tmp_path: Path) -> None:
    checkpoints(tmp_path, "0000001", "0000003")
    damage(tmp_path / "model_0000001.pth", "truncated")
    damage(tmp_path / "model_0000003.pth", "empty")
    with pytest.raises(WeightsError, match=r"none of .* model_0000003\.pth, model_0000001\.pth\."):
        resumed(tmp_path)


def test_a_checkpoint_of_another_model_is_not_passed_over(tmp_path: Path) -> None:
    checkpoints(tmp_path, "0000001")
    other = SafeCheckpointer(model(4), str(tmp_path))
    with pytest.raises(WeightsError, match="do not fit the model"):
        other.resume_or_load("", resume=True)


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    checkpoints(tmp_path, "0000001")
    (tmp_path / "model_0000003.pth.tmp").write_bytes(b"half")
    assert resumed(tmp_path) == 1
    assert not (tmp_path / "model_0000003.pth.tmp").exists()


class Full:
    """Stands for a file on a disk that has room for some bytes."""

    def __init__(self, file: IO[bytes], room: int, code: int) -> None:
        self.file, self.room, self.code = file, room, code

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("room", [0, 100, 1500])
def test_a_full_disk_is_an_error_that_leaves_the_last_checkpoint(
    room: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpoints(tmp_path, "0000001")
    save = torch.save

    def full(data: Any, file: Any) -> None:
        save(data, Full(file, room, code) if hasattr(file, "fileno") else file)

    monkeypatch.setattr(checkpoint_module.torch, "save", full)
    message = rf"model_0000003\.pth cannot be written: .*{os.strerror(code)}.* MiB"
    with pytest.raises(SaveError, match=message):
        writer.save("model_0000003", iteration=3)
    assert writer.saved_iteration == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert resumed(tmp_path) == 1


def test_a_file_size_limit_is_met_by_the_system_itself(
    tmp_path: Path, file_size_limit: Any
) -> None:
    writer = checkpoints(tmp_path, "0000001")
    with file_size_limit(1024), pytest.raises(SaveError, match="File too large"):
        writer.save("model_0000003", iteration=3)
    check_readable(tmp_path / "model_0000001.pth")
    assert resumed(tmp_path) == 1
