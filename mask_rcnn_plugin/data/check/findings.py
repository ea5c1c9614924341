"""What a check can find, and a table of what it found."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from tabulate import tabulate

SEVERITIES = ("error", "warning", "note")


class Kind(NamedTuple):
    """What a finding means."""

    severity: str  # error: refused, lost or trained on wrongly; warning: coped with; note
    of: str  # what the ids are of
    meaning: str  # and what the training does with it


def _kinds(of: str, severity: str, **meanings: str) -> dict[str, Kind]:
    return {
        name.replace("_", "-"): Kind(severity, of, meaning) for name, meaning in meanings.items()
    }


# Severities follow what detectron2's loader, trainer and evaluation do with the plugin's mapper.
KINDS = {
    # Nothing else of the file is checked after one of the first three.
    **_kinds(
        "file",
        "error",
        not_readable="the file cannot be opened",
        not_json="not JSON, or it ends early; nothing else was checked",
        not_coco="not in COCO's format; nothing else was checked",
        no_image="there is no image",
        no_annotation="no annotation to train on; crowds and empty ones are left out",
        num_classes="the model's num_classes is not the dataset's",
        no_keypoints="the model has a keypoint branch, the dataset no keypoints",
    ),
    **_kinds(
        "file",
        "warning",
        not_standard_json="NaN or Infinity, which Python reads and other programs refuse",
        keypoint_none="no keypoint is labelled: the loss will stay 0",
        leak="in both training and test set: the score is too good",
    ),
    **_kinds("file", "note", no_test_annotation="no annotations but crowds: nothing to score"),
    **_kinds(
        "category",
        "error",
        category_format="needs an integer id and a name of its own",
        category_id_duplicate="the id is taken by an earlier category",
        category_keypoints="keypoints must be a list of names, the same in all that have any",
    ),
    **_kinds("category", "warning", category_name_duplicate="two classes of one name"),
    **_kinds("category", "note", category_unused="a class without annotations is not learned"),
    **_kinds(
        "image",
        "error",
        image_format="needs an integer id, a file_name, and width and height of 1 or more",
        image_id_duplicate="the id is taken by an earlier image",
        image_missing="there is no such file",
        image_unreadable="broken, cut short, or not an image",
        image_size="the file is of another size than stated: detectron2 refuses it",
        image_rotated_size="the size is that before the turn which the EXIF tag asks for: refused",
        image_depth="32 bits without a known range: convert to 8 bits",
    ),
    **_kinds(
        "image",
        "warning",
        file_name_duplicate="one file under two ids: trained on twice",
        image_rotated="turned on reading, as its EXIF tag says: annotations must be of that view",
        image_16_bit="16 bits: the upper 8 are used",
        image_alpha="transparency is dropped: what lies beneath is seen",
        image_cmyk="CMYK: converted to RGB without its color profile",
    ),
    **_kinds(
        "image", "note", image_no_annotation="left out of the training, not of the evaluation"
    ),
    **_kinds(
        "annotation",
        "error",
        annotation_format="must be an object with integer id, image_id and category_id",
        annotation_id_duplicate="the id is taken: detectron2 stops",
        unknown_image="no image has this image_id: left out",
        unknown_category="no category has this id: detectron2 stops",
        ignore_set='"ignore" is set: detectron2 stops',
        iscrowd_format="iscrowd must be 0 or 1",
        non_finite="NaN or infinity in a box or mask",
        box_missing="no bbox",
        box_format="bbox must be [x, y, width, height] in pixels",
        box_negative="negative width or height: is it x1, y1, x2, y2?",
        box_outside="the box does not meet the image",
        mask_missing="no segmentation, which the mask branch needs",
        mask_format="segmentation must be polygons or RLE",
        polygon_format="polygons must be lists [x, y, x, y, ...]",
        polygon_short="no polygon has 3 points: left out",
        polygon_odd="an odd number of coordinates: left out",
        polygon_outside="the polygons do not meet the image",
        rle_format="RLE that cannot be decoded",
        rle_size="RLE of another size than the image",
        rle_sum="RLE of more or fewer pixels than the image",
        area_format="area must be a finite number",
        keypoint_format="keypoints must be finite numbers [x, y, v, ...]",
        keypoint_count="not 3 numbers for each of the keypoints",
        keypoint_other="keypoints of a category whose own differ",
    ),
    **_kinds(
        "annotation",
        "warning",
        annotation_id_zero="COCO's evaluation never counts id 0 as found",
        crowd_polygon="a crowd of polygons; COCO's are RLE: is it one object?",
        box_empty="width or height of 0: not trained on",
        box_partly_outside="by more than 1 pixel: clipped",
        box_small="thinner than 1 pixel: hardly to be learned",
        box_contradicts="an edge is over 5% of the side + 2 pixels off the mask's",
        mask_mixed="no segmentation, others have one: unfit for a mask branch",
        mask_empty="no pixel is set: not trained on",
        mask_partly_outside="by more than 1 pixel: clipped",
        polygon_dropped="some polygons lack 3 points or a coordinate: these are left out",
        area_missing="no area: training ignores it, scoring needs it",
        area_contradicts="area differs from the mask's by over 10% + 10 pixels",
        keypoint_missing="no keypoints: taken as none labelled",
        keypoint_visibility="v must be 0, 1 or 2; above 0 is labelled",
        keypoint_outside="labelled outside the image: not trained on",
        num_keypoints="num_keypoints is not the number labelled",
    ),
    **_kinds("annotation", "note", crowd="a crowd: not trained on, and finds in it are not scored"),
    **_kinds(
        "class",
        "error",
        classes_differ="training and test set must have the same classes in the order of ids",
    ),
    **_kinds(
        "keypoint", "error", keypoints_differ="training and test set must have the same keypoints"
    ),
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
