import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Before torch, and for the processes that tests start too. The tests' tensors are small: threads
# that wait for each other are slow beside other work, and add up in another order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

import mask_rcnn_plugin  # noqa: F401  before anything of detectron2's, see compat.py
from mask_rcnn_plugin.data.synthetic import write_dataset


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn COCO-format dataset: 12 images to train, 6 to validate, 64 px."""
    root = tmp_path_factory.mktemp("data") / "toy"
    write_dataset(root, train=12, val=6, size=64, seed=0, progress=False)
    return root


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """A block in which the system refuses to write files beyond so many bytes."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limit


@pytest.fixture
def toy_overrides(toy_dataset: Path, tmp_path: Path) -> list[str]:
    """Overrides that train NAME+synthetic on the toy dataset, for two steps."""
    return [
        f"dataset.synthetic.root={toy_dataset}",
        "dataset.synthetic.train=12",
        "dataset.synthetic.val=6",
        "dataset.synthetic.size=64",
        "dataloader.train.total_batch_size=2",
        "train.max_iter=2",
        "train.device=cpu",
        f"train.output_dir={tmp_path / 'out'}",
    ]
