"""What a reproduction measured, beside the paper: tables, plots, pictures, one page of it all."""

import base64
import contextlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from mask_rcnn_plugin.config.paper import TABLES, TASKS, rows_of
from reproduce.claims import AS_GOOD_WITHIN, CLAIMS, Claim, Effect, Measured

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Block:
    """A piece of a page: a heading (level > 0), a paragraph, a table or a picture."""

    text: str = ""
    level: int = 0
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: Path | None = None


def collect(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """What the seeds of a row measured.

    Args:
        results: of each seed, as results.json has it.

    Returns:
        {task: {metric: [AP in points, one a seed]}}, nan where one could not be computed; see
        `claims`.
    """
    first = results[0]
    return {
        task: {
            m: [np.nan if r[task][m] is None else r[task][m] for r in results]
            for m in METRICS
            if m in first[task]
        }
        for task in TASKS
        if task in first
    }


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
    table: str,
    measured: Measured,
    iterations: Mapping[str, int],
    minutes: Mapping[str, Sequence[float]],
    milliseconds: Mapping[str, float],
) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: two lines a row, the paper's values and ours with their deviation.

    Args:
        table: key of `paper.TABLES`.
        measured: see `claims`; a row that is not in it is not done, one without tasks has been
            tested on images without annotations.
        iterations, minutes: {config: of a training; and what it and its test took, one a seed}.
        milliseconds: {config: time of an image}; shown where the paper gives times.
    """
    columns = columns_of(table)
    timed = any(row.milliseconds for row in rows_of(table))
    times = [*(["ms an image"] if timed else []), "iterations", "minutes"]
    headers = ["row", "", *(f"{TASKS[t]} {m}" for t, m in columns), *times]
    lines = []
    for row in rows_of(table):
        paper = [_number(row.scores.get(t, {}).get(m)) for t, m in columns]
        ours = [_spread(measured.get(row.config, {}).get(t, {}).get(m, ())) for t, m in columns]
        if timed:
            paper.append(f"{row.milliseconds:.0f}" if row.milliseconds else "")
            ours.append(f"{milliseconds[row.config]:.0f}" if row.config in milliseconds else "")
        paper += ["", ""]
        ours += [str(iterations.get(row.config, "")), _spread(minutes.get(row.config, ()))]
        lines.append([row.name, f"paper ({row.split})", *paper])
        if row.config:
            state = "ours: not done"
            if row.config in measured:
                state = "ours" if measured[row.config] else "ours: see its submission/"
            lines.append(["", state, *ours])
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


def claim_records(claims: Sequence[Claim], measured: Measured) -> list[dict[str, Any]]:
    """What `claim_rows` shows, in numbers, for JSON."""
    return [
        {
            "claim": claim.text,
            "kind": claim.kind,
            "effect": claim.effect._asdict(),
            "paper": round(claim.effect.in_paper(), 1),
            "measured": _finite(claim.effect.measured(measured)),
            "than": claim.than and claim.than._asdict(),
            "than_paper": claim.than and round(claim.than.in_paper(), 1),
            "than_measured": claim.than and _finite(claim.than.measured(measured)),
            "verdict": claim.verdict(measured),
        }
        for claim in claims
    ]


def plot_effects(table: str, measured: Measured, file: Path) -> None:
    """Draw each row's difference to a reference row: the paper's, and ours.

    The reference is the method that the paper argues for, the table's last row; in Table 5, and
    where the text compares with a row of another table, the first one that has the task. Bars are
    one standard deviation over the seeds. Where there is nothing to draw no file is left.
    """
    file.unlink(missing_ok=True)
    panels = []
    for task, metric in columns_of(table):
        rows = [r for r in rows_of(table) if task in measured.get(r.config, {})]
        if metric in ("AP", "AP50", "AP75") and len(rows) > 1:
            first = table == "5" or TABLES[table].baseline
            panels.append((task, metric, rows[0] if first else rows[-1], rows))
    if not panels:
        return
    labels = [
        r for r in rows_of(table) if any(r in rows and r is not ref for *_, ref, rows in panels)
    ]
    figure = Figure(figsize=(2 + 2.6 * len(panels), 1.4 + 0.5 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (task, metric, reference, rows) in zip(axes, panels):
        axis.axvline(0, color="0.7", linewidth=1)
        for row in rows:
            if row is not reference:
                effect = Effect(row.config, reference.config, task, metric)
                _plot_effect(axis, labels.index(row), effect, measured)
        axis.set_title(f"{TASKS[task]} {metric}", fontsize=10)
        axis.set_xlabel(f"more than {reference.name}", fontsize=8)
        axis.set_yticks(range(len(labels)), [r.name for r in labels], fontsize=9)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=8)
        axis.margins(x=0.2)
    axes[0].plot([], [], "D", color="black", markersize=6, label="paper")
    axes[0].errorbar([], [], xerr=[], fmt="o", color="tab:red", capsize=4, label="ours")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(file, dpi=110)


def _plot_effect(axis: Any, y: int, effect: Effect, measured: Measured) -> None:
    with contextlib.suppress(KeyError):  # the paper does not give every one
        axis.plot(effect.in_paper(), y - 0.12, "D", color="black", markersize=6)
    ours = np.array(effect.measured(measured))
    axis.errorbar(ours.mean(), y + 0.12, xerr=_deviation(ours), fmt="o", color="tab:red", capsize=4)


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


VERDICTS = (
    f'"Agrees" and "disagrees": the seeds are sure of it to 95%, by a one-sided Student\'s t test; '
    f'"undecided": they are not. "As good": not worse by more than {AS_GOOD_WITHIN:.0%} of the '
    'other\'s AP. "No better": less than half of what is gained in the column "than". "More": '
    "more than in that column. The spread is that of the training alone: all rows are trained and "
    "tested on the same images."
)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _deviation(values: np.ndarray) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds; "n/a" where COCO defines no AP (nan)."""
    if not values:
        return ""
    array = np.array(values)
    if np.isnan(array).any():
        return "n/a"
    deviation = f" ± {_deviation(array):.1f}" if len(values) > 1 else ""
    return f"{array.mean():{sign}.1f}{deviation}"


def _finite(values: Sequence[float]) -> list[float | None]:
    """For JSON, which has no nan."""
    return [None if np.isnan(v) else round(v, 3) for v in values]
