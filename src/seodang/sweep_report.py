"""What a sweep found: the economics of one capture, the fronts, the page, the table to print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seodang import __version__
from seodang.evaluation.plots import COLOUR, PALETTE, Plot, megabytes, spread, styled, svg
from seodang.pages import page_environment

if TYPE_CHECKING:
    from seodang.sweep import SweepResult

TEMPLATE = "sweep.html.j2"
COSTS = {"size": "bytes", "time": "training_seconds"}  # what quality is held against

Row = Mapping[str, Any]


def economics(
    *,
    capture: Mapping[str, Any],
    corpus: Mapping[str, Any],
    teacher: Mapping[str, Any],
    label_bytes: int,
    rows: Sequence[Row],
) -> dict[str, Any]:
    """What one capture costs, and what it saves against a teacher in every training loop.

    ``capture`` holds the labelled ``tokens`` and ``seconds`` that were measured, ``corpus`` the
    corpus' summary, ``teacher`` its figures of the evaluation: ``parameters`` and
    ``tokens_per_second`` of its forward pass and output head.

    With C the seconds of the capture, f those of a forward pass over the same tokens and n the
    passes that the teacher would make, the sum of the students' epochs, a capture is the cheaper
    way from the smallest n with n f > C. The students' own training is the same on both sides: a
    teacher in the loop gets away lightly here, since a loss on full distributions costs more than
    one on sparse labels, and the memory that the teacher takes is not counted.
    """
    trained = [row for row in rows if row["error"] is None]
    labelled, tokens = (corpus[key]["train"] for key in ("labelled_tokens", "tokens"))
    # The capture is a forward pass and more: an evaluation that was slower had a busier machine.
    captured = capture["tokens"] / capture["seconds"]
    forward = max(teacher["tokens_per_second"], captured)
    forward_seconds = labelled / forward
    passes = sum(row["epochs"] for row in trained)
    training = sum(row["training_seconds"] for row in trained)
    return {
        "capture": {
            "seconds": capture["seconds"],
            "labelled_tokens": capture["tokens"],
            "tokens_per_second": captured,
            "label_bytes": label_bytes,
            "estimated_teacher_flops": 2 * teacher["parameters"] * tokens,
        },
        "teacher_forward": {
            "tokens_per_second": forward,
            "seconds_per_epoch": forward_seconds,
        },
        "students": len(trained),
        "passes": passes,
        "training_seconds": training,
        "seconds": {
            "captured_once": capture["seconds"] + training,
            "teacher_in_the_loop": passes * forward_seconds + training,
        },
        "break_even": break_even(
            capture["seconds"], forward_seconds, min((row["epochs"] for row in trained), default=1)
        ),
    }


def break_even(capture_seconds: float, forward_seconds: float, epochs: int) -> dict[str, int]:
    """From how many passes over the teacher on one capture is cheaper than making them.

    ``passes``, which is also the epochs of a single student, and the ``students`` of so many
    ``epochs`` each that make as many.
    """
    passes = floor(capture_seconds / forward_seconds) + 1
    return {"passes": passes, "students": ceil(passes / epochs)}


def mark_fronts(rows: Sequence[dict[str, Any]]) -> None:
    """Mark in every row on which Pareto fronts it stands: no other is both cheaper and closer.

    ``fronts`` lists "size" (bytes) and "time" (seconds of training), each against :func:`quality`.
    """
    for row in rows:
        row["fronts"] = []
    trained = [row for row in rows if row["error"] is None]
    key = quality(trained)
    for front, cost in COSTS.items():
        for row in trained:
            point = (row[cost], row[key])
            if not any(_dominates((other[cost], other[key]), point) for other in trained):
                row["fronts"].append(front)


def quality(trained: Sequence[Row]) -> str:
    """What students are compared by: their KL, or perplexity if their KLs cannot be compared.

    A KL over the first pieces of one trimmed vocabulary says nothing beside one over another's;
    the likelihood of the held-out text means the same for all.
    """
    return "kl" if len({row["partition"] for row in trained}) <= 1 else "perplexity"


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def duration(seconds: float) -> str:
    """Seconds for people: ``0.4 s``, ``42 s``, ``3.5 min``, ``2.1 h``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _parameters(value: float) -> str:
    return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.2f} M"


# What a row shows besides its name: a heading, what it is measured in, and how it is written.
COLUMNS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("kl", "KL", "nats/token", lambda v: f"{v:.3f}"),
    ("top1_agreement", "Top-1", "agreement", lambda v: f"{v:.1%}"),
    ("perplexity", "Perplexity", "", lambda v: f"{v:,.1f}"),
    ("parameters", "Parameters", "", _parameters),
    ("bytes", "Size", "float32", megabytes),
    ("label_bytes_per_token", "Labels", "bytes/token", lambda v: f"{v:.1f}"),
    ("training_tokens", "Trained on", "tokens", lambda v: f"{v:,}"),
    ("training_seconds", "Training", "", duration),
    ("training_tokens_per_second", "Speed", "tokens/s", lambda v: f"{v:,.0f}"),
)

PRINTED = ("kl", "top1_agreement", "bytes", "label_bytes_per_token", "training_seconds")


def _cells(row: Row) -> list[str]:
    return [write(row[key]) if row.get(key) is not None else "–" for key, _, _, write in COLUMNS]


@styled
def quality_against(rows: Sequence[Row], front: str) -> Plot | None:
    """:func:`quality` against size or training time, the Pareto front marked.

    None below two students that were trained. The numbers are those of the table's rows.
    """
    points = [(n, row) for n, row in enumerate(rows, 1) if row["error"] is None]
    if len(points) < 2:
        return None
    cost = COSTS[front]
    what, unit = {
        "size": ("size", "MB, float32"),
        "time": ("training time", "seconds on this machine"),
    }[front]
    scale = 1e6 if front == "size" else 1.0
    best = [n for n, row in points if front in row["fronts"]]
    title = f"Quality against {what}: on the front {_listed(best)}"

    figure = Figure(figsize=(5.0, 4.0))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.13, top=0.92)
    key = quality([row for _, row in points])
    line = sorted((row[cost] / scale, row[key]) for _, row in points if front in row["fronts"])
    axes.plot(
        [x for x, _ in line],
        [y for _, y in line],
        color=COLOUR["student"],
        linewidth=1.4,
        alpha=0.6,
        drawstyle="steps-post",
    )
    xs = [row[cost] / scale for _, row in points]
    ys = [row[key] for _, row in points]
    axes.set_xlim(0, max(xs) * 1.12)
    axes.set_ylim(0, max(ys) * 1.12)
    heights = _label_heights(xs, ys)
    for (number, row), x, y, height in zip(points, xs, ys, heights, strict=True):
        colour = COLOUR["student" if front in row["fronts"] else "untrained"]
        axes.scatter([x], [y], s=46, color=colour, linewidth=0, zorder=3)
        axes.text(
            x + 0.022 * max(xs),
            height,
            str(number),
            color=colour,
            fontweight="bold",
            verticalalignment="center",
            bbox={"facecolor": COLOUR["card"], "edgecolor": "none", "pad": 0.8},
        )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.set_xlabel(f"{what} ({unit}) →")
    axes.set_title(
        "KL to the teacher, nats per token ↓" if key == "kl" else "perplexity of held-out text ↓",
        loc="left",
        fontsize=10.5,
        color=COLOUR["muted"],
        x=-0.12,
    )
    note = (
        "Numbers are those of the table. Blue: the Pareto front, where no other student is both "
        "better and cheaper."
    )
    if key == "perplexity":
        note += (
            " Quality is perplexity here: KLs over the pieces of several trimmed vocabularies "
            "cannot be compared."
        )
    return Plot(title, note, svg(figure, f"quality-{front}", f"{title}. {note}"))


def _listed(numbers: Sequence[int]) -> str:
    *some, last = map(str, numbers)
    return f"{', '.join(some)} and {last}" if some else last


def _label_heights(xs: Sequence[float], ys: Sequence[float]) -> list[float]:
    """Heights of the points' numbers, moved apart where points stand above each other."""
    heights = list(ys)
    left = set(range(len(xs)))
    while left:
        first = min(left, key=lambda i: xs[i])
        near = sorted(i for i in left if xs[i] - xs[first] <= 0.05 * max(xs))
        for index, height in zip(near, spread([ys[i] for i in near], 0.045 * max(ys)), strict=True):
            heights[index] = height
        left -= set(near)
    return heights


def render(title: str, rows: Sequence[Row], saved: Mapping[str, Any] | None) -> str:
    """The page: table, plots and economics, as one HTML file that loads nothing.

    Everything given is shown as text, never as markup; equal input gives equal bytes.
    """
    environment = page_environment(Path(__file__).parent)
    plots = [quality_against(rows, front) for front in COSTS]
    return environment.get_template(TEMPLATE).render(
        title=title,
        version=__version__,
        palette=PALETTE,
        columns=[(name, unit) for _, name, unit, _ in COLUMNS],
        rows=[{**row, "cells": _cells(row)} for row in rows],
        plots=[plot for plot in plots if plot],
        saved=saved,
        sentence=sentence(saved) if saved else "",
        partitions=list(dict.fromkeys(row["partition"] for row in rows if row["error"] is None)),
        duration=duration,
    )


def sentence(saved: Mapping[str, Any]) -> str:
    """The economics in two sentences."""
    once, in_loop = (saved["seconds"][key] for key in ("captured_once", "teacher_in_the_loop"))
    even = saved["break_even"]
    count = "pass" if even["passes"] == 1 else "passes"
    return (
        f"{saved['students']} students from one capture: {duration(once)}, against "
        f"{duration(in_loop)} with the teacher in every training loop. The capture is paid back "
        f"from {even['passes']} {count} over the teacher on: so many epochs of one student, or "
        f"{even['students']} of these students."
    )


def print_sweep(result: SweepResult) -> None:
    """Print the table of students, the economics, and where the report is."""
    from rich.console import Console
    from rich.table import Table

    out = Console(soft_wrap=True, emoji=False, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", justify="right")
    table.add_column("student", overflow="fold")
    shown = [i for i, (key, *_) in enumerate(COLUMNS) if key in PRINTED]
    for index in shown:
        table.add_column(COLUMNS[index][1], justify="right", no_wrap=True)
    table.add_column("front", no_wrap=True)
    for number, row in enumerate(result.rows, 1):
        cells = _cells(row)
        last = "not trained" if row["error"] else ", ".join(row["fronts"])
        style = "bold" if row["fronts"] else None
        name = row["name"].replace(",", ",\n")
        table.add_row(str(number), name, *(cells[i] for i in shown), last, style=style)
    out.print(table)
    if result.economics:
        out.print(f"\n{sentence(result.economics)}", markup=False)
    out.print(f"\nreport  {result.out / 'sweep' / 'sweep.html'}", markup=False)
