"""The numbers of the paper, each with its table, row, metric and split: configs/paper.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from mask_rcnn_plugin.config.check import METRICS
from mask_rcnn_plugin.config.loading import CONFIG_DIR

TASKS = {"segm": "mask", "bbox": "box", "keypoints": "keypoint"}


class Table(NamedTuple):
    """One comparison of the paper: where it stands, and what is compared.

    baseline: config of another table's row that the text compares with, or "".
    baseline_name: what that row is called beside those of this table.
    """

    place: str
    title: str
    baseline: str = ""
    baseline_name: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    table: key of `TABLES`.
    config: short name of the config, "" for other people's systems.
    split: "minival" or "test-dev".
    scores: {task: {metric: AP in points}}, keyed as results.json is; {} where the paper gives none.
    milliseconds: an image takes at inference on a Tesla M40, where the paper says so.
    """

    table: str
    name: str
    split: str
    scores: Mapping[str, Mapping[str, float]]
    config: str = ""
    milliseconds: float | None = None
    note: str = ""

    def summary(self) -> str:
        """The row in one sentence, as its config's docstring quotes it."""
        parts = [
            f"{TASKS[task]} " + ", ".join(f"{metric} {value:.1f}" for metric, value in m.items())
            for task, m in self.scores.items()
        ]
        if parts:
            parts = [f"{'; '.join(parts)} on {self.split}"]
        if self.milliseconds:
            parts.append(f"{self.milliseconds:.0f} ms an image on a Tesla M40")
        if self.note:
            parts.append(self.note)
        return f"{TABLES[self.table].place}, {self.name}: {'; '.join(parts)}."


def _row(table: str, split: str, content: dict[str, Any]) -> Row:
    scores = {}
    for task in [key for key in content if key in TASKS]:
        values = zip(METRICS[task], content[task])
        scores[task] = {metric: value for metric, value in values if value is not None}
    others = {key: value for key, value in content.items() if key not in TASKS}
    return Row(table=table, split=split, scores=scores, **others)


_CONTENT: Any = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "paper.yaml"))
TABLES = {
    key: Table(t["place"], t["title"], t.get("baseline", ""), t.get("baseline_name", ""))
    for key, t in _CONTENT.items()
}
ROWS = tuple(
    _row(key, table["split"], row) for key, table in _CONTENT.items() for row in table["rows"]
)


def rows_of(table: str) -> list[Row]:
    """A table's rows, the baseline that its text compares with first.

    Raises:
        KeyError: if there is no such table.
    """
    *_, baseline, name = TABLES[table]
    compared = [replace(r, name=name) for r in ROWS if baseline and r.config == baseline]
    return compared + [r for r in ROWS if r.table == table]


def row_of(config: str) -> Row | None:
    """The row that a config stands for; None for any other config."""
    return next((r for r in ROWS if r.config == config and config), None)
