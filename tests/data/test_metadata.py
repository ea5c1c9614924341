import pytest

from mask_rcnn_plugin import get_config
from mask_rcnn_plugin.data.metadata import metadata_of


def test_without_a_test_set_classes_are_numbered(caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["dataset.test.names=[]", "model.roi_heads.num_classes=2"]
    cfg = get_config("table2a_backbone/r50_fpn", overrides)
    assert metadata_of(cfg).thing_classes == ["class 0", "class 1"]
    assert "unknown" in caplog.text
