"""Proposals written by a stage and read back by detectron2."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.data.build import load_proposals_into_dataset
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from omegaconf import DictConfig

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.data.mapper import MaskRCNNDatasetMapper
from mask_rcnn_plugin.training import setup_datasets
from train_stages.proposals import ProposalWriter, write_proposals
from train_stages.stages import detector_stage, rpn_stage

FPN = "table2a_backbone/r50_fpn+synthetic"
THIN = "model.backbone.width=16"


@pytest.fixture
def cfg(toy_overrides: list[str]) -> DictConfig:
    cfg = get_config(FPN, [*toy_overrides, THIN])
    setup_datasets(cfg)
    return cfg


def test_proposals_are_read_back_in_pixels_of_the_image_on_disk(cfg: DictConfig) -> None:
    cfg.model.proposal_generator.post_nms_topk = (30, 10)
    cfg.dataloader.test.mapper.augmentations[0].short_edge_length = 128  # of images of 64
    stage = rpn_stage(cfg, "1_rpn")
    model = instantiate(stage.model).eval()
    output = Path(stage.train.output_dir)
    output.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, output / "model_final.pth")

    files = write_proposals(stage)
    assert [len(names) for names in files] == [1, 1]
    for names, paths, number in (
        (cfg.dataset.train.names, files[0], 30),
        (cfg.dataset.test.names, files[1], 10),
    ):
        records = load_proposals_into_dataset(DatasetCatalog.get(names[0]), paths[0])
        assert {len(record["proposal_boxes"]) for record in records} == {number}

    inputs = next(iter(instantiate(cfg.dataloader.test)))
    assert inputs[0]["image"].shape[1:] == (128, 128)
    assert (inputs[0]["height"], inputs[0]["width"]) == (64, 64)
    with torch.no_grad():
        images = instantiate(cfg.model).eval().preprocess_image(inputs)
        features = model.backbone(images.tensor)
        (expected,), _ = model.proposal_generator(images, features)
    assert expected.proposal_boxes.tensor.max() > 64
    record = next(r for r in records if r["image_id"] == inputs[0]["image_id"])
    boxes = torch.from_numpy(record["proposal_boxes"])
    torch.testing.assert_close(boxes, expected.proposal_boxes.tensor / 2)
    logits = torch.from_numpy(record["proposal_objectness_logits"])
    torch.testing.assert_close(logits, expected.objectness_logits)
    assert record["proposal_bbox_mode"] == BoxMode.XYXY_ABS


def test_images_without_annotations_have_proposals_too(
    toy_dataset: Path, toy_overrides: list[str], tmp_path: Path
) -> None:
    content = json.loads((toy_dataset / "train.json").read_text())
    empty = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]
    (tmp_path / "train.json").write_text(json.dumps(content))
    own = [f"dataset.train.json={tmp_path / 'train.json'}"]
    cfg = get_config(FPN, [*toy_overrides, THIN, *own])
    setup_datasets(cfg)
    stage = rpn_stage(cfg, "1_rpn")
    Path(stage.train.output_dir).mkdir(parents=True)
    checkpoint = Path(stage.train.output_dir) / "model_final.pth"
    torch.save({"model": instantiate(stage.model).state_dict()}, checkpoint)
    detector = detector_stage(cfg, "2_detector", write_proposals(stage))
    # detectron2 fails on an image of the dataset that the file lacks, used for training or not.
    records = instantiate(detector.dataloader.train.dataset)
    assert len(records) == 11
    assert all(len(r["proposal_boxes"]) for r in records)


def test_proposal_files_that_are_there_are_left(cfg: DictConfig) -> None:
    stage = rpn_stage(cfg, "1_rpn")
    folder = Path(stage.train.output_dir) / "proposals"
    folder.mkdir(parents=True)
    for name in ("train_0.pkl", "test_0.pkl"):
        (folder / name).write_text("kept")
    files = write_proposals(stage)
    assert [Path(f).read_text() for f in (*files[0], *files[1])] == ["kept", "kept"]


def test_rank_0_decides_which_proposals_are_there(
    cfg: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = rpn_stage(cfg, "1_rpn")  # nothing is there, not even the weights
    monkeypatch.setattr(comm, "all_gather", lambda mine: [True, mine])
    files = write_proposals(stage)
    assert [len(names) for names in files] == [1, 1]
    assert not Path(files[0][0]).exists()


def test_a_proposal_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ProposalWriter(tmp_path / "p.pkl")
    writer.reset()
    proposals = Instances((8, 8))
    proposals.proposal_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    proposals.objectness_logits = torch.tensor([0.5])
    writer.process([{"image_id": 3}], [{"proposals": proposals}])
    with monkeypatch.context() as patch:

        def interrupted(content: Any, file: Any, **kwargs: Any) -> None:
            file.write(b"part")
            raise KeyboardInterrupt

        patch.setattr(pickle, "dump", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.evaluate()
    assert not (tmp_path / "p.pkl").exists()
    writer.evaluate()
    assert [f.name for f in tmp_path.iterdir()] == ["p.pkl"]
    content = pickle.loads((tmp_path / "p.pkl").read_bytes())
    assert content["ids"] == [3]
    assert content["boxes"][0].dtype == np.float32


def test_proposals_are_resized_and_flipped_with_the_image(cfg: DictConfig) -> None:
    mapper = MaskRCNNDatasetMapper(
        is_train=True,
        augmentations=[T.Resize((128, 128)), T.RandomFlip(prob=1.0)],
        image_format="BGR",
        use_instance_mask=True,
        precomputed_proposal_topk=2,
    )
    record = DatasetCatalog.get(cfg.dataset.train.names[0])[0]
    record["proposal_boxes"] = np.float32([[0, 10, 20, 30], [4, 4, 8, 8], [1, 1, 9, 9]])
    record["proposal_objectness_logits"] = np.float32([3, 2, 1])
    record["proposal_bbox_mode"] = BoxMode.XYXY_ABS
    proposals = mapper(record)["proposals"]
    expected = torch.tensor([[88.0, 20.0, 128.0, 60.0], [112.0, 8.0, 120.0, 16.0]])
    torch.testing.assert_close(proposals.proposal_boxes.tensor, expected)
    assert proposals.objectness_logits.tolist() == [3, 2]
    assert proposals.image_size == (128, 128)
