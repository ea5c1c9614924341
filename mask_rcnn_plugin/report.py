"""What a reproduction measured, beside the paper: tables, plots, pictures, one page of it all."""

import base64
import html
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from mask_rcnn_plugin.claims import CLAIMS, EQUAL_WITHIN, STANDARD_ERRORS, Claim, Measured
from mask_rcnn_plugin.paper import TABLES, TASKS, Row, rows_of

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Block:
    """A piece of a page: a heading (level > 0), a paragraph, a table or a picture."""

    text: str = ""
    level: int = 0
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: Path | None = None


def claims_of(table: str) -> list[Claim]:
    """The claims that a table alone can settle."""
    configs = {row.config for row in rows_of(table)}
    return [c for c in CLAIMS if c.configs() <= configs]


def columns_of(table: str) -> list[tuple[str, str]]:
    """The (task, metric) pairs that the paper compares in a table, in words or in numbers."""
    found = {(t, m) for row in rows_of(table) for t, scores in row.scores.items() for m in scores}
    found |= {(c.effect.task, c.effect.metric) for c in claims_of(table)}
    return [(t, m) for t in TASKS for m in METRICS if (t, m) in found]


def table_rows(
    table: str, measured: Measured, milliseconds: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: two lines a row, the paper's values and ours with their deviation.

    Args:
        table: key of `paper.TABLES`.
        measured: see `claims`; rows that are not in it have the paper's line alone.
        milliseconds: {config: time of an image}; shown where the paper gives times.
    """
    columns = columns_of(table)
    timed = any(row.milliseconds for row in rows_of(table))
    headers = ["row", "", *(f"{TASKS[t]} {m}" for t, m in columns), *(["ms"] if timed else [])]
    lines = []
    for row in rows_of(table):
        paper = [_number(row.scores.get(t, {}).get(m)) for t, m in columns]
        ours = [_spread(measured.get(row.config, {}).get(t, {}).get(m, ())) for t, m in columns]
        if timed:
            paper.append(f"{row.milliseconds:.0f}" if row.milliseconds else "")
            ours.append(f"{milliseconds[row.config]:.0f}" if row.config in milliseconds else "")
        lines.append([row.name, f"paper ({row.split})", *paper])
        if row.config:
            lines.append(["", "ours" if row.config in measured else "ours: not run", *ours])
    return headers, lines


def claim_rows(claims: Sequence[Claim], measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the paper's claims against a measurement."""
    headers = ["the paper's claim", "metric", "paper", "ours", "than", "verdict"]
    lines = []
    for claim in claims:
        effect, than = claim.effect, claim.than
        lines.append(
            [
                claim.text,
                f"{TASKS[effect.task]} {effect.metric}",
                f"{effect.in_paper():+.1f}",
                _spread(effect.measured(measured), sign="+"),
                f"{than.in_paper():+.1f}, {_spread(than.measured(measured), '+')}" if than else "",
                claim.verdict(measured),
            ]
        )
    return headers, lines


def plot_effects(table: str, measured: Measured, file: Path) -> None:
    """Draw each row's difference to the table's reference row: the paper's, and ours.

    The reference is the method that the paper argues for, the table's last row (in Table 5 the
    first, boxes alone). Bars are one standard deviation over the seeds.
    """
    rows = [r for r in rows_of(table) if r.config]
    reference = rows[0] if table == "5" or TABLES[table].baseline else rows[-1]
    others = [r for r in rows if r is not reference and r.config in measured]
    columns = [c for c in columns_of(table) if c[1] in ("AP", "AP50", "AP75")]
    columns = [c for c in columns if c[0] in measured.get(reference.config, {})]
    if not others or not columns:
        return
    figure = Figure(figsize=(1 + 2.6 * len(columns), 1.2 + 0.5 * len(others)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, (task, metric) in zip(panels, columns):
        panel.axvline(0, color="0.7", linewidth=1)
        for y, row in enumerate(others):
            _plot_row(panel, y, row, reference, measured, task, metric)
        panel.set_title(f"{TASKS[task]} {metric}", fontsize=10)
        panel.set_yticks(range(len(others)), [r.name for r in others], fontsize=9)
        panel.set_ylim(len(others) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize=8)
        panel.margins(x=0.2)
    figure.supxlabel(f"points of AP more than {reference.name}", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(file, dpi=110)


def _plot_row(
    panel: Any, y: int, row: Row, reference: Row, measured: Measured, task: str, metric: str
) -> None:
    labels = ("paper", "ours") if y == 0 else (None, None)
    if metric in row.scores.get(task, {}) and metric in reference.scores.get(task, {}):
        effect = row.scores[task][metric] - reference.scores[task][metric]
        panel.plot(effect, y - 0.12, "D", color="black", markersize=6, label=labels[0])
    elif y == 0:  # the legend is made from the first panel
        panel.plot([], [], "D", color="black", markersize=6, label=labels[0])
    if task not in measured[row.config]:
        return
    ours = [
        a - b
        for a, b in zip(
            measured[row.config][task][metric], measured[reference.config][task][metric]
        )
    ]
    error = stdev(ours) if len(ours) > 1 else 0
    panel.errorbar(
        mean(ours), y + 0.12, xerr=error, fmt="o", color="tab:red", capsize=4, label=labels[1]
    )


def plot_predictions(pictures: Mapping[str, np.ndarray], file: Path, columns: int) -> None:
    """Draw captioned pictures in lines of `columns`.

    Args:
        pictures: {caption: uint8 (H, W, 3), RGB}.
        file: where to write.
        columns: pictures a line.
    """
    lines = -(-len(pictures) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, (caption, pixels) in zip(panels, pictures.items()):
        panel.imshow(pixels)
        panel.set_title(caption, fontsize=10)
    figure.savefig(file, dpi=80, pil_kwargs={"quality": 85})


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """A page in Markdown, its pictures linked relative to `folder`."""
    parts = []
    for b in blocks:
        if b.picture:
            parts.append(f"![{b.text}]({b.picture.relative_to(folder).as_posix()})")
        elif b.headers:
            parts.append(tabulate(b.rows, b.headers, tablefmt="pipe", disable_numparse=True))
        else:
            parts.append(f"{'#' * b.level} {b.text}".strip())
    return "\n\n".join(parts) + "\n"


_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;font-size:14px}"
    "td,th{padding:.2em .6em;border-bottom:1px solid #ddd;text-align:left}"
    "img{max-width:100%}"
)


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The same page as one HTML file that holds its pictures."""
    parts = []
    for b in blocks:
        if b.picture:
            kind = "png" if b.picture.suffix == ".png" else "jpeg"
            data = base64.b64encode(b.picture.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(b.text)}" src="data:image/{kind};base64,{data}">')
        elif b.headers:
            parts.append(tabulate(b.rows, b.headers, tablefmt="html", disable_numparse=True))
        else:
            tag = f"h{b.level}" if b.level else "p"
            parts.append(f"<{tag}>{html.escape(b.text)}</{tag}>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return "\n".join(["<!doctype html>", head, *parts]) + "\n"


def environment() -> str:
    """What the numbers were measured on, in one line."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} cores of {_processor()}"
    )
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


VERDICTS = (
    f'"agrees" and "disagrees": by more than {STANDARD_ERRORS:g} standard errors over the seeds. '
    '"Undecided": less than that. A claim of "nearly as good" or "as good" is taken as within '
    f'{EQUAL_WITHIN:g} points of AP, one of "no better" as less than half of the gain in the '
    'column "than", one of "more" as more than it.'
)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.1f}{deviation}"
