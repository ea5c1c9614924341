"""What two processes agree on: all in one pair of them, as starting these takes longest."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mask_rcnn_plugin.training.guarded_trainer import GuardedTrainer
from mask_rcnn_plugin.training.weight_average import WeightAverage


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield importlib.import_module("two_processes")


@pytest.fixture(scope="module")
def ranks(
    module: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what each process has come to."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(module.one_process, (folder,), nprocs=2)
    return folder, [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in range(2)]


def test_they_accumulate_skip_and_stop_together(
    ranks: Any, module: ModuleType, tmp_path: Path
) -> None:
    folder, own = ranks
    (message, first), (same_message, second) = (rank["accumulated"] for rank in own)
    assert message == same_message
    assert "iteration 3: rank 1: forward pass of ['9.0.jpg']" in message
    files = sorted(f.name for f in (folder / "accumulated" / "nonfinite").iterdir())
    assert files == [f"iteration_{i:07d}_rank1_0.pth" for i in (2, 3)]
    # Two steps of four images were taken.
    images = [module.image(float(i)) for i in range(8)]
    _, expected = module.train_with(tmp_path, module.Model(), [images[:4], images[4:]], 2)
    for a, b, c in zip(first, second, expected):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-6)


def test_losses_that_differ_end_both_and_new_ones_of_both_do_not(
    ranks: Any, module: ModuleType
) -> None:
    (metrics, message), (others, same_message) = (rank["renamed"] for rank in ranks[1])
    assert message == same_message
    assert "iteration 3: rank 0: ['loss', 'a']; rank 1: ['loss', 'a', 'b']" in message
    loss = module.Model()([module.image(1.0), module.image(2.0)])["loss"].item()
    assert metrics["loss"] == pytest.approx(loss)
    assert metrics["a"] == pytest.approx(2 * loss)
    assert metrics["total_loss"] == pytest.approx(3 * loss)
    assert "loss" not in others  # metrics are the main process's


def test_a_synchronised_batch_norm_ends_all_with_a_report(ranks: Any) -> None:
    folder, (first, second) = ranks
    assert first["synchronized"].startswith("lost: ")
    (file,) = (folder / "nonfinite").iterdir()
    assert file.name == "iteration_0000001_rank1_0.pth"
    for part in ("Iteration 1, rank 1", "4.0.jpg", str(file), "synchronised"):
        assert part in second["synchronized"]


def test_the_main_process_reads_the_weights_for_all(ranks: Any, module: ModuleType) -> None:
    expected = [v + 1 for v in module.Model().state_dict().values()]
    for rank in ranks[1]:
        assert all(torch.equal(a, b) for a, b in zip(rank["weights"], expected, strict=True))


def test_what_the_main_process_sees_of_files_counts(ranks: Any) -> None:
    for rank in ranks[1]:
        assert "nowhere.pth" in rank["missing"]
        assert rank["checkpoint"] == (True, False)
        assert rank["both"] == "of rank 0"


def test_validation_of_a_diverged_model_is_nan_on_all(ranks: Any) -> None:
    for rank in ranks[1]:
        assert set(rank["validated"]) == {"total_loss", "loss"}
        assert all(value != value for value in rank["validated"].values())


def test_early_stopping_ends_both_after_the_same_step(ranks: Any) -> None:
    folder, own = ranks
    assert [rank["stopped"] for rank in own] == [3, 3]  # the first score and three no better
    final = torch.load(folder / "stopped" / "model_final.pth", weights_only=True)
    assert final["iteration"] == 3


def test_averages_are_those_of_one_process(ranks: Any, module: ModuleType) -> None:
    model = module.Model()
    average = WeightAverage(model, 0.5)
    batches = [[module.image(x), module.image(x + 1)] for x in (1.0, 3.0)]
    one = GuardedTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    one.register_hooks([average])
    one.train(0, 2)
    for rank in ranks[1]:
        for ours, expected in zip(rank["averaged"], average.model.state_dict().values()):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, *(rank["averaged"] for rank in ranks[1])))


def test_the_first_process_s_running_statistics_are_evaluated(ranks: Any) -> None:
    """In a model wrapped for DDP, and in an average of its weights, which is not."""
    assert [rank["evaluated"] for rank in ranks[1]] == [[1.0, 1.0], [1.0, 1.0]]
