import gc

import pytest

from mask_rcnn_plugin.data.garbage import collection_paused


def test_collection_goes_on_after_the_block_and_after_an_error() -> None:
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(OSError, match="gone"), collection_paused():
        raise OSError("gone")
    assert gc.isenabled()
