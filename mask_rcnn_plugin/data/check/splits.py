"""Training set, test set and model against each other."""

import difflib
import filecmp
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType

from mask_rcnn_plugin.data.check.dataset import Checked
from mask_rcnn_plugin.data.check.findings import Findings


def compare(
    train: Sequence[Checked],
    test: Checked,
    *,
    num_classes: int | None = None,
    needs_keypoints: bool = False,
    limits: Mapping[str, int] = MappingProxyType({}),
    open_images: bool = True,
) -> Findings:
    """What does not go together in datasets that were checked, each by itself.

    Args:
        num_classes: the model's; None if it is fitted to the dataset.
        needs_keypoints: whether the model has a keypoint branch.
        limits: of the detections in an image, by the key of the config that sets it.
        open_images: whether to compare files of one name in different folders; else only the same
            file counts as in both sets.
    """
    findings = Findings()
    if test.document is None or any(checked.document is None for checked in train):
        return findings
    if "no-test-annotation" not in test.findings:  # test-dev lists all classes, for persons too
        for checked in train:
            _compare_names(findings, "classes-differ", checked.classes, test.classes)
            _compare_names(findings, "keypoints-differ", checked.keypoints, test.keypoints)
    if num_classes is not None and num_classes != len(train[0].classes):
        text = f"num_classes is {num_classes}, must be {len(train[0].classes)}: leave it out"
        findings.add("num-classes", "", text)
    if needs_keypoints and not train[0].keypoints:
        findings.add("no-keypoints", "", "use a config without a keypoint branch")
    most = max(test.objects.values(), default=0)
    if low := {key: limit for key, limit in limits.items() if limit < most}:
        crowded = sum(count > min(low.values()) for count in test.objects.values())
        keys = " and ".join(f"{key}, which is {limit}" for key, limit in low.items())
        text = f"{crowded} of {len(test.context.images)} test images have more objects (up to "
        findings.add("detections-limited", text=f"{text}{most}) than may be detected: raise {keys}")
    ours = {os.path.realpath(p) for checked in train for p in checked.paths.values()}
    by_name = defaultdict(list)
    for path in ours if open_images else ():
        by_name[os.path.basename(path)].append(path)
    for path in test.paths.values():
        twins = by_name.get(os.path.basename(path), ())
        if os.path.realpath(path) in ours or any(_equal(path, twin) for twin in twins):
            findings.add("leak", path)
    return findings


def _compare_names(findings: Findings, kind: str, train: list[str], test: list[str]) -> None:
    for index, (ours, theirs) in enumerate(zip_longest(train, test)):
        if ours == theirs:
            continue
        text = f"number {index} is {ours!r} in the training set, {theirs!r} in the test set"
        if ours is not None and ours in test:
            text += f", where {ours!r} is number {test.index(ours)}"
        elif ours is not None and (near := difflib.get_close_matches(ours, test, 1)):
            text += f"; is {ours!r} the test set's {near[0]!r}?"
        findings.add(kind, index, text)


def _equal(path: str, other: str) -> bool:
    """Whether two files have the same bytes."""
    try:
        return filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False
