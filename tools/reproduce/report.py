"""What a reproduction measured, beside the paper: pages in Markdown, plots, pictures.

A table's `content` is what its JSON file holds: {"table", "scale", "seeds", "command", "jobs",
"environment", "rows": [{"name", "config", "split", "paper", "results": of each seed as results.json
has it, or null, "iterations", "minutes": of each seed}]}. Pages are made of it alone, and can be
made again.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from mask_rcnn_plugin.config.check import METRICS
from mask_rcnn_plugin.config.paper import TABLES, TASKS, rows_of
from reproduce.claims import AS_GOOD_WITHIN, CLAIMS, Claim, Effect, Measured

_VERDICTS = (
    f'"Agrees" and "disagrees": the seeds are sure of it to 95%, by a one-sided Student\'s t test; '
    f'"undecided": they are not. "As good": not worse by more than {AS_GOOD_WITHIN:.0%} of the '
    'other\'s AP. "No better": less than half of what is gained in the column "than". "More": '
    'more than in that column, in points; "relative": if that differs, as a share of what the '
    "other row has. The spread is that of the training alone: all rows are trained and "
    "tested on the same images."
)

Content = Mapping[str, Any]


def read_tables(folder: Path) -> list[dict[str, Any]]:
    """The contents of the tables in a folder, in the paper's order."""
    files = [folder / f"{table}.json" for table in TABLES]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def index_page(contents: Sequence[Content]) -> str:
    """The page of all tables that were run."""
    minutes = minutes_of(contents)
    commands = " and ".join(dict.fromkeys(f"`{c['command']}`" for c in contents))
    seeds, jobs, environments = (
        " and ".join(dict.fromkeys(str(c[key]) for c in contents))
        for key in ("seeds", "jobs", "environment")
    )
    parts = [
        f"# The paper's tables, reproduced at the {contents[0]['scale']} scale",
        f"Written by {commands}: {len(minutes)} trainings (seeds a row: "
        f"{seeds}), {sum(minutes):.0f} minutes together, {jobs} at a time, on "
        f"{environments}. AP in points; mean ± standard deviation over the seeds. Relative: what "
        "is gained as a share of what the other row has, the paper's and ours.",
    ]
    if claims := claims_table(CLAIMS, measured_in(*contents)):
        parts += ["## The paper's claims", _VERDICTS, claims]
    return "\n\n".join(parts) + "\n\n" + "\n".join(map(table_page, contents))


def minutes_of(contents: Sequence[Content]) -> list[float]:
    """What each training took. Rows that are equal were run once, and have the same results."""
    rows = [row for content in contents for row in content["rows"] if row["results"]]
    seeds = (seed for row in rows for seed in zip(row["results"], row["minutes"]))
    return [*{json.dumps(results): minutes for results, minutes in seeds}.values()]


def table_page(content: Content) -> str:
    """The page of one table."""
    table, measured = content["table"], measured_in(content)
    place, title, *_ = TABLES[table]
    parts = [f"## {place}: {title}", results_table(content)]
    if claims := claims_table(claims_of(table), measured):
        parts.append(claims)
    if _panels(table, measured):
        parts.append(f"![{place}, the paper's effects and ours]({table}.png)")
    if measured:
        parts.append(f"![{place}, the same images under each row]({table}_pictures.jpg)")
    return "\n\n".join(parts) + "\n"


def measured_in(*contents: Content) -> Measured:
    """What the tables' rows measured; see `claims`."""
    return {
        row["config"]: collect(row["results"])
        for content in contents
        for row in content["rows"]
        if row["results"]
    }


def collect(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """{task: {metric: [AP in points, one a seed]}}, nan where one could not be computed."""
    first = results[0]
    return {
        task: {
            m: [np.nan if r[task][m] is None else r[task][m] for r in results]
            for m in METRICS["segm"]
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
    return [(t, m) for t in TASKS for m in METRICS["segm"] if (t, m) in found]


def results_table(content: Content) -> str:
    """Two lines a row: the paper's values, and ours with their deviation over the seeds."""
    table, measured = content["table"], measured_in(content)
    done = {row["config"]: row for row in content["rows"] if row["results"]}
    columns = columns_of(table)
    timed = ["ms an image"] if any(row.milliseconds for row in rows_of(table)) else []
    names = [f"{TASKS[t]} {m}" for t, m in columns]
    lines = []
    for row in rows_of(table):
        paper = [_number(row.scores.get(t, {}).get(m)) for t, m in columns]
        if timed:
            paper.append(_number(row.milliseconds, digits=0))
        lines.append([row.name, f"paper ({row.split})", *paper, "", ""])
        if not row.config:  # other people's system
            continue
        ours = [spread(measured.get(row.config, {}).get(t, {}).get(m, ())) for t, m in columns]
        result = done.get(row.config)
        if timed:
            ours.append(_number(result and result["results"][0]["ms_per_image"], digits=0))
        state = "ours: not done"
        if result:
            state = "ours" if measured[row.config] else "ours: see its submission/"
            ours += [str(result["iterations"]), spread(result["minutes"])]
        lines.append(["", state, *ours])
    return markdown(["row", "", *names, *timed, "iterations", "minutes"], lines)


def claims_table(claims: Sequence[Claim], measured: Measured) -> str:
    """The paper's claims against a measurement, those whose rows were run; "" if there are none."""

    def share(effect: Effect) -> str:
        shares = [effect.relative_in_paper(), effect.relative(measured)]
        return ", ".join("n/a" if s is None else f"{s:+.0%}" for s in shares)

    def points(effect: Effect) -> list[str]:
        return [f"{effect.in_paper():+.1f}", spread(effect.measured(measured), "+")]

    lines = []
    for claim in claims:
        if not claim.support(measured):
            continue
        effect, than = claim.effect, claim.than
        metric = f"{TASKS[effect.task]} {effect.metric}"
        beside = f"{', '.join(points(than))}; {share(than)}" if than else ""
        verdict = claim.verdict(measured)
        in_shares = claim.verdict(measured, relative=claim.kind == "more")
        if in_shares != verdict:
            verdict += f"; relative: {in_shares}"
        lines.append([claim.text, metric, *points(effect), share(effect), beside, verdict])
    headers = ["the paper's claim", "metric", "paper", "ours", "relative", "than", "verdict"]
    return markdown(headers, lines) if lines else ""


def _panels(table: str, measured: Measured) -> list[tuple[str, str, Any, list[Any]]]:
    """What of a table to plot: task, metric, the row to compare with, all rows."""
    panels = []
    for task, metric in columns_of(table):
        rows = [r for r in rows_of(table) if task in measured.get(r.config, {})]
        if metric in ("AP", "AP50", "AP75") and len(rows) > 1:
            first = table == "5" or TABLES[table].baseline
            panels.append((task, metric, rows[0] if first else rows[-1], rows))
    return panels


def plot_effects(content: Content, file: Path) -> None:
    """Draw each row's difference to a reference row: the paper's, and ours.

    The reference is the method that the paper argues for, the table's last row; in Table 5, and
    where the text compares with a row of another table, the first one that has the task. Bars are
    one standard deviation over the seeds. Where there is nothing to draw no file is left.
    """
    file.unlink(missing_ok=True)
    table, measured = content["table"], measured_in(content)
    panels = _panels(table, measured)
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
    """Draw captioned pictures, RGB uint8 (H, W, 3), in lines of `columns`."""
    lines = -(-len(pictures) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, (caption, pixels) in zip(panels, pictures.items()):
        panel.imshow(pixels)
        panel.set_title(caption, fontsize=10)
    figure.savefig(file, dpi=80, pil_kwargs={"quality": 85})


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _deviation(values: np.ndarray) -> float:
    """Standard deviation of a sample; 0 for a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds; "n/a" where COCO defines no AP (nan)."""
    if not values:
        return ""
    array = np.array(values)
    if np.isnan(array).any():
        return "n/a"
    deviation = f" ± {_deviation(array):.1f}" if len(values) > 1 else ""
    return f"{array.mean():{sign}.1f}{deviation}"
