"""The growth table's lines at a small size."""

import torch

from benchmark.growth import growth
from benchmark.stages import Peers


def test_lines() -> None:
    def small(device: str, size: tuple[int, int] = (64, 96), detections: int = 5) -> Peers:
        return Peers(device, size=(64, 96), detections=min(detections, 5))

    numbers: dict[tuple[str, str], list[int]] = {}
    with torch.no_grad():
        for line in growth("cpu", build=small):
            numbers.setdefault((line.name, line.quantity), []).append(line.number)
            assert set(line.runs) == {"detectron2", "plugin"}
            if line.name != "mask branch, training" or line.number == 10:
                for run in line.runs.values():
                    run()
    assert numbers[("mask branch", "classes")] == [1, 10, 80, 1203]
    assert numbers[("mask branch, training", "classes")] == [1, 10, 80, 1203]
    assert len(numbers[("mask branch and RLE", "detections")]) == 4
    assert len(numbers[("whole model", "pixels")]) == 3
