"""The kinds of things a check can find, and a table of those that it found."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from tabulate import tabulate

SEVERITIES = ("error", "warning", "note")


class Kind(NamedTuple):
    """What a finding means."""

    severity: str  # error: refused, or trained on wrongly, or lost; warning: coped with; note
    of: str  # what the ids are of
    meaning: str  # and what the training does with it


# Severities follow what detectron2's loader, trainer and evaluation do with the plugin's mapper.
KINDS = {
    # The file. After one of the first four nothing else of it can be checked.
    "not-readable": Kind("error", "file", "the file cannot be opened"),
    "not-json": Kind("error", "file", "not JSON, or it ends early; nothing else was checked"),
    "not-coco": Kind("error", "file", "not of COCO's format; nothing else was checked"),
    "no-image": Kind("error", "file", "there is no image"),
    "no-annotation": Kind("error", "file", "there is no annotation: nothing to train on"),
    "no-test-annotation": Kind("note", "file", "no annotations: predictions are not scored"),
    "not-standard-json": Kind(
        "warning", "file", "NaN or Infinity, which Python reads and other programs refuse"
    ),
    # Categories.
    "category-format": Kind("error", "category", "needs an integer id and a name of its own"),
    "category-id-duplicate": Kind("error", "category", "the id is taken by an earlier category"),
    "category-name-duplicate": Kind("warning", "category", "two classes of one name"),
    "category-keypoints": Kind(
        "error", "category", "keypoints must be a list of names, the same in all that have any"
    ),
    "category-unused": Kind("note", "category", "a class without annotations is not learnt"),
    # Entries of "images".
    "image-format": Kind(
        "error", "image", "needs an integer id, a file_name, and width and height of 1 or more"
    ),
    "image-id-duplicate": Kind("error", "image", "the id is taken by an earlier image"),
    "file-name-duplicate": Kind("warning", "image", "one file under two ids: trained on twice"),
    "image-no-annotation": Kind("note", "image", "left out of the training, not of the evaluation"),
    # Image files.
    "image-missing": Kind("error", "image", "there is no such file"),
    "image-unreadable": Kind("error", "image", "broken, cut short, or not an image"),
    "image-size": Kind("error", "image", "the file is of another size: detectron2 refuses it"),
    "image-rotated-size": Kind(
        "error",
        "image",
        "detectron2 turns the image as its EXIF tag says; the size is that before: refused",
    ),
    "image-rotated": Kind(
        "warning",
        "image",
        "turned on reading as its EXIF tag says: annotations must be of the turned image",
    ),
    "image-depth": Kind("error", "image", "32 bits without a known range: convert to 8 bits"),
    "image-16-bit": Kind("warning", "image", "16 bits: the upper 8 are used"),
    "image-alpha": Kind("warning", "image", "transparency is dropped: what lies beneath is seen"),
    "image-cmyk": Kind("warning", "image", "CMYK: converted to RGB without its colour profile"),
    "image-palette": Kind("note", "image", "a palette: converted to RGB"),
    "image-grayscale": Kind("note", "image", "grayscale: converted to three equal channels"),
    # Annotations.
    "annotation-format": Kind(
        "error", "annotation", "must be an object with integer id, image_id and category_id"
    ),
    "annotation-id-duplicate": Kind("error", "annotation", "the id is taken: detectron2 stops"),
    "annotation-id-zero": Kind(
        "warning", "annotation", "COCO's evaluation never counts id 0 as found"
    ),
    "unknown-image": Kind("error", "annotation", "no image has this image_id: left out"),
    "unknown-category": Kind("error", "annotation", "no category has this id: detectron2 stops"),
    "ignore-set": Kind("error", "annotation", '"ignore" is set: detectron2 stops'),
    "iscrowd-format": Kind("error", "annotation", "iscrowd must be 0 or 1"),
    "crowd": Kind("note", "annotation", "a crowd: not trained on, and finds in it are not scored"),
    "crowd-polygon": Kind(
        "warning", "annotation", "a crowd of polygons; COCO's are RLE: is it one object?"
    ),
    "non-finite": Kind("error", "annotation", "NaN or infinity in a box or mask"),
    "box-missing": Kind("error", "annotation", "no bbox"),
    "box-format": Kind("error", "annotation", "bbox must be [x, y, width, height] in pixels"),
    "box-negative": Kind("error", "annotation", "negative width or height: is it x1, y1, x2, y2?"),
    "box-empty": Kind("warning", "annotation", "width or height of 0: not trained on"),
    "box-outside": Kind("error", "annotation", "the box does not meet the image"),
    "box-partly-outside": Kind("warning", "annotation", "by more than 1 pixel: clipped"),
    "box-small": Kind("warning", "annotation", "thinner than 1 pixel: hardly to be learnt"),
    "mask-missing": Kind("error", "annotation", "no segmentation, which the mask branch needs"),
    "mask-mixed": Kind(
        "warning", "annotation", "no segmentation, others have one: unfit for a mask branch"
    ),
    "mask-format": Kind("error", "annotation", "segmentation must be polygons or RLE"),
    "mask-kinds": Kind("note", "image", "polygons and RLE in one image: all become bitmaps"),
    "mask-empty": Kind("warning", "annotation", "no pixel is set: not trained on"),
    "polygon-format": Kind("error", "annotation", "polygons must be lists [x, y, x, y, ...]"),
    "polygon-short": Kind("error", "annotation", "no polygon has 3 points: left out"),
    "polygon-odd": Kind("error", "annotation", "an odd number of coordinates: left out"),
    "polygon-dropped": Kind(
        "warning", "annotation", "some polygons lack 3 points or a coordinate: these are left out"
    ),
    "polygon-outside": Kind("error", "annotation", "the polygons do not meet the image"),
    "mask-partly-outside": Kind("warning", "annotation", "by more than 1 pixel: clipped"),
    "rle-format": Kind("error", "annotation", "RLE that cannot be decoded"),
    "rle-size": Kind("error", "annotation", "RLE of another size than the image"),
    "rle-sum": Kind("error", "annotation", "RLE of more or fewer pixels than the image"),
    "area-missing": Kind("warning", "annotation", "no area: training ignores it, scoring needs it"),
    "area-format": Kind("error", "annotation", "area must be a finite number"),
    "area-contradicts": Kind(
        "warning", "annotation", "area differs from the mask's by over 10 % + 10 pixels"
    ),
    "box-contradicts": Kind(
        "warning", "annotation", "an edge is over 5 % of the side + 2 pixels off the mask's"
    ),
    "keypoint-format": Kind(
        "error", "annotation", "keypoints must be finite numbers [x, y, v, ...]"
    ),
    "keypoint-count": Kind("error", "annotation", "not 3 numbers for each of the keypoints"),
    "keypoint-other": Kind("error", "annotation", "keypoints of a category whose own differ"),
    "keypoint-missing": Kind("warning", "annotation", "no keypoints: taken as none labelled"),
    "keypoint-visibility": Kind(
        "warning", "annotation", "v must be 0, 1 or 2; above 0 is labelled"
    ),
    "keypoint-outside": Kind("warning", "annotation", "labelled outside the image: not trained on"),
    "num-keypoints": Kind(
        "warning", "annotation", "num_keypoints is not the number labelled; 0 is not scored"
    ),
    "keypoint-none": Kind("warning", "file", "no keypoint is labelled: the loss will stay 0"),
    # Training set, test set and model.
    "classes-differ": Kind(
        "error", "class", "training and test set must have the same classes in the order of ids"
    ),
    "keypoints-differ": Kind(
        "error", "keypoint", "training and test set must have the same keypoints"
    ),
    "num-classes": Kind("error", "file", "the model's num_classes is not the data set's"),
    "no-keypoints": Kind(
        "error", "file", "the model has a keypoint branch, the data set no keypoints"
    ),
    "leak": Kind("warning", "file", "in training and test set: the score is too good"),
}
_SHOWN = 5  # ids of each kind


@dataclass
class Finding:
    """All of one kind: how many, the first ids, and the first one in words."""

    severity: str
    count: int = 0
    first: list[str] = field(default_factory=list)
    example: str = ""


class Findings(dict[str, Finding]):
    """Findings of one file by their kind."""

    def add(self, kind: str, where: object = "", text: str = "", severity: str = "") -> None:
        """Count one.

        Args:
            kind: a key of `KINDS`.
            where: the id of what it is about.
            text: what is there.
            severity: another than the kind's.
        """
        if kind not in self:
            self[kind] = Finding(severity or KINDS[kind].severity, example=text)
        finding = self[kind]
        finding.count += 1
        if len(finding.first) < _SHOWN and where != "":
            finding.first.append(str(where)[:60])

    def count(self, severity: str) -> int:
        """How many of a severity there are."""
        return sum(finding.count for finding in self.values() if finding.severity == severity)

    def table(self) -> str:
        """Errors, warnings, notes; in each the kinds in the order of `KINDS`."""
        if not self:
            return "nothing found"
        kinds = list(KINDS)
        found = sorted(
            self.items(), key=lambda f: (SEVERITIES.index(f[1].severity), kinds.index(f[0]))
        )
        rows = [
            [
                finding.severity,
                kind,
                finding.count,
                f"{KINDS[kind].of} {', '.join(finding.first)}{_more(finding)}",
                KINDS[kind].meaning + (f"\ne.g. {finding.example}" if finding.example else ""),
            ]
            for kind, finding in found
        ]
        headers = ["", "finding", "count", "first", "what it means"]
        return tabulate(rows, headers, "simple", maxcolwidths=[None, None, None, 32, 64])


def _more(finding: Finding) -> str:
    return ", ..." if finding.count > len(finding.first) > 0 else ""


def total(findings: Iterable[Findings], severity: str) -> int:
    """How many of a severity there are in several files."""
    return sum(f.count(severity) for f in findings)
