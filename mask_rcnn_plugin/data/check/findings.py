"""What a check can find, and a table of what it found."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from tabulate import tabulate

_SEVERITIES = ("error", "warning", "note")


class Kind(NamedTuple):
    """What a finding means."""

    severity: str  # error: refused, lost or trained on wrongly; warning: coped with; note
    of: str  # what the ids are of
    meaning: str  # and what the training does with it


# Severities follow what detectron2's loader, trainer and evaluation do with the plugin's mapper.
_MEANINGS = {
    ("error", "file"): {
        # Nothing else of the file is checked after one of the first three.
        "not-readable": "the file cannot be opened",
        "not-json": "not JSON, or it ends early; nothing else was checked",
        "not-coco": "not in COCO's format; nothing else was checked",
        "no-image": "there is no image",
        "no-annotation": "no annotation to train on; crowds and empty ones do not count",
        "num-classes": "the model's num_classes is not the dataset's",
        "no-keypoints": "the model has a keypoint branch, but the dataset has no keypoints",
        "refused": "train.py stops with this",
    },
    ("warning", "file"): {
        "not-checked": "its loader returns what COCO's format cannot hold: not checked",
        "not-standard-json": "NaN or Infinity, which Python reads and other programs reject",
        "keypoint-none": "no keypoint is labelled: the loss will stay 0",
        "mostly-crowds": "crowds are neither trained on nor scored: is iscrowd intended?",
        "detections-limited": "the objects beyond the limit are missed",
        "leak": "in both training and test set: the scores will be too high",
    },
    ("note", "file"): {"no-test-annotation": "no annotations but crowds: nothing to score"},
    ("error", "category"): {
        "category-format": "needs an integer id and a name of its own",
        "category-id-duplicate": "duplicate id: an earlier category has it",
        "category-keypoints": "keypoints must be a list of names, the same in all that have any",
    },
    ("warning", "category"): {
        "category-name-duplicate": "two classes have the same name",
        "category-heading": (
            "not a class but a heading of others: --fix drops it; fix both training and test set"
        ),
        "keypoint-unpaired": "left or right, but without a partner: RandomFlip will not swap it",
    },
    ("note", "category"): {
        "category-unused": "a class without annotations is not learned",
        "category-skeleton": "not pairs of keypoints counted from 1 or 0: no lines are drawn",
    },
    ("error", "image"): {
        "image-format": "needs an integer id, a file_name, and width and height of 1 or more",
        "image-id-duplicate": "duplicate id: an earlier image has it",
        "image-missing": "the file does not exist",
        "image-unreadable": "broken, cut short, or not an image",
        "image-too-large": "more pixels than Pillow opens: cut it into tiles, annotations too",
        "image-size": "the file's size differs from the one stated: detectron2 rejects it",
        "image-rotated-size": (
            "the size stated is that before the EXIF rotation: detectron2 rejects it"
        ),
        "image-depth": "32 bits without a known range: convert to 8 bits",
    },
    ("warning", "image"): {
        "file-name-duplicate": "one file under two ids: trained on twice",
        "image-rotated": (
            "rotated on reading, as its EXIF tag says: annotations must be of the rotated image"
        ),
        "image-16-bit": "16 bits: the upper 8 are used",
        "image-pages": "only the first page or frame is read: save each as an image of its own",
        "image-dark": (
            "nearly black as read: if 10 to 14 bits are stored in 16, scale all images to the full "
            "range, e.g. 12 bits by 16"
        ),
        "image-alpha": "transparency is dropped: the colors beneath it show",
        "image-cmyk": "CMYK: converted to RGB without its color profile",
    },
    ("note", "image"): {"image-no-annotation": "left out of the training, not of the evaluation"},
    ("error", "annotation"): {
        "annotation-format": "must be an object with integer id, image_id and category_id",
        "annotation-id-missing": "no id: detectron2 stops; --fix assigns one",
        "annotation-id-duplicate": "duplicate id: detectron2 stops; --fix assigns a new one",
        "unknown-image": "no image has this image_id: left out",
        "unknown-category": "no category has this id: detectron2 stops",
        "ignore-set": '"ignore" is set: detectron2 stops',
        "iscrowd-format": "iscrowd must be 0 or 1",
        "non-finite": "NaN or infinity in a box or mask",
        "box-missing": "no bbox",
        "box-format": "bbox must be [x, y, width, height] in pixels",
        "box-negative": "negative width or height: is it x1, y1, x2, y2?",
        "box-xyxy": "the masks say x1, y1, x2, y2, must be x, y, width, height; --fix converts",
        "box-outside": "the box is outside the image",
        "mask-missing": "no segmentation, which the mask branch needs",
        "mask-format": "segmentation must be polygons or RLE",
        "polygon-format": "polygons must be lists [x, y, x, y, ...]; --fix nests or flattens",
        "polygon-short": "no polygon has 3 points: left out",
        "polygon-odd": "an odd number of coordinates: left out",
        "polygon-outside": "the polygons are outside the image",
        "rle-format": "RLE that cannot be decoded",
        "rle-size": "the RLE's size is not the image's",
        "rle-sum": "the RLE has more or fewer pixels than the image",
        "area-format": "area must be a finite number",
        "keypoint-format": "keypoints must be finite numbers [x, y, v, ...]",
        "keypoint-count": "not 3 numbers for each of the keypoints",
        "keypoint-other": "keypoints of a category with another list of keypoints",
    },
    ("warning", "annotation"): {
        "crowd-polygon": "a crowd with polygons; COCO's have RLE: is it one object?",
        "box-empty": "width or height of 0: not trained on",
        "box-partly-outside": "by more than 1 pixel: clipped",
        "box-small": "thinner than 1 pixel: can hardly be learned",
        "box-contradicts": "an edge is more than 5% of the side + 2 pixels off the mask's",
        "mask-mixed": "no segmentation, while others have one: unfit for a mask branch",
        "mask-empty": "no pixel is set: not trained on",
        "mask-partly-outside": "by more than 1 pixel: clipped",
        "polygon-dropped": "some polygons lack 3 points or a coordinate: these are left out",
        "area-missing": "no area: training ignores it, scoring needs it",
        "area-contradicts": "area differs from the mask's by more than 10% + 10 pixels",
        "keypoint-missing": "no keypoints: treated as unlabelled",
        "keypoint-visibility": "v must be 0, 1 or 2; above 0 is labelled",
        "keypoint-outside": "labelled outside the image: not trained on",
        "num-keypoints": "num_keypoints is not the number labelled",
    },
    ("note", "annotation"): {
        "annotation-id-zero": "pycocotools never counts id 0 as found; eval.py renumbers",
        "crowd": "a crowd: not trained on, and detections in it are not scored",
    },
    ("error", "class"): {
        "classes-differ": "training and test set must have the same classes in the order of ids"
    },
    ("error", "keypoint"): {
        "keypoints-differ": "training and test set must have the same keypoints"
    },
}
KINDS = {
    kind: Kind(severity, of, meaning)
    for (severity, of), meanings in _MEANINGS.items()
    for kind, meaning in meanings.items()
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
        """Count one of a kind of `KINDS`: the id of what it is about, and what is there."""
        if kind not in self:
            self[kind] = Finding(severity or KINDS[kind].severity, example=text)
        finding = self[kind]
        finding.count += 1
        if len(finding.first) < _SHOWN and where != "":
            finding.first.append(str(where)[:60])

    def rename(self, kind: str, other: str) -> None:
        """Count those of one kind as of another."""
        if moved := self.pop(kind, None):
            known = self.setdefault(other, Finding(KINDS[other].severity, example=moved.example))
            known.count += moved.count
            known.first = [*known.first, *moved.first][:_SHOWN]

    def count(self, severity: str) -> int:
        """How many of a severity there are."""
        return sum(finding.count for finding in self.values() if finding.severity == severity)

    def table(self) -> str:
        """Errors, warnings, notes; in each the kinds in the order of `KINDS`."""
        if not self:
            return "no problems found"
        found = [(kind, self[kind]) for kind in KINDS if kind in self]
        found.sort(key=lambda f: _SEVERITIES.index(f[1].severity))
        rows = [
            [
                finding.severity,
                kind,
                finding.count,
                f"{KINDS[kind].of} {', '.join(finding.first)}"
                + (", ..." if finding.count > len(finding.first) > 0 else ""),
                KINDS[kind].meaning + (f"\ne.g. {finding.example}" if finding.example else ""),
            ]
            for kind, finding in found
        ]
        headers = ["", "finding", "count", "first", "what it means"]
        return tabulate(rows, headers, "simple", maxcolwidths=[None, None, None, 32, 64])


def total(findings: Iterable[Findings], severity: str) -> int:
    """How many of a severity there are in several files."""
    return sum(f.count(severity) for f in findings)
