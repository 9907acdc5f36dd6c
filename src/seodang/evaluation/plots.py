"""The report's plots: matplotlib to inline SVG, readable on white and on dark paper.

A plot is drawn in the light colours of ``PALETTE``; each of them then becomes a CSS variable
(``#0b5cad`` → ``var(--student, #0b5cad)``), so that the page chooses light or dark. Text stays
text, in the page's font. The same numbers give the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seodang.evaluation.gate import Models, measured

NAMES = {
    "teacher": "Teacher",
    "student": "Student",
    "cross_entropy": "Cross-entropy only",
    "untrained": "Untrained start",
    "lexical": "Lexical search",
    "search": "Search alone",
    "before_on_policy": "Before on-policy",
    "after_on_policy": "On-policy, not kept",
}

# (light, dark). Blue and orange are told apart by every common kind of colour blindness, the two
# greys by lightness; what text is written in has a contrast of at least 4.5 with ``card``.
PALETTE = {
    "teacher": ("#1c2733", "#eef2f6"),
    "student": ("#0b5cad", "#6cb4f5"),
    "cross_entropy": ("#b45309", "#f2a65a"),
    "untrained": ("#6b7580", "#98a3af"),
    "lexical": ("#5b6b34", "#b5c98a"),
    "search": ("#5b6b34", "#b5c98a"),
    "before_on_policy": ("#44719b", "#9cc4e8"),
    "after_on_policy": ("#44719b", "#9cc4e8"),
    "muted": ("#5a6571", "#a3aebb"),
    "rule": ("#dde3e9", "#36414d"),
    "card": ("#ffffff", "#1a222b"),
}
COLOUR = {name: light for name, (light, _) in PALETTE.items()}

_STYLE: dict[str, Any] = {
    "axes.edgecolor": COLOUR["rule"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": COLOUR["muted"],
    "axes.labelsize": 10.5,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "grid.color": COLOUR["rule"],
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "seodang",
    "text.color": COLOUR["teacher"],
    "xtick.color": COLOUR["rule"],
    "xtick.labelcolor": COLOUR["muted"],
    "xtick.labelsize": 10.5,
    "xtick.major.size": 0,
    "ytick.color": COLOUR["rule"],
    "ytick.labelcolor": COLOUR["muted"],
    "ytick.labelsize": 10.5,
    "ytick.major.size": 0,
}
styled = style.context(_STYLE, after_reset=True)


@dataclass(frozen=True)
class Plot:
    """A drawn plot: ``title`` says what is seen, ``note`` how to read it, ``svg`` is inline SVG."""

    title: str
    note: str
    svg: Markup


def megabytes(size: float) -> str:
    """A size in bytes as decimal megabytes, or gigabytes from one on: ``269 MB``, ``1.5 GB``."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as SVG for a page that holds others: its ids begin with ``name``."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(label)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    for variable, colour in COLOUR.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    return Markup(re.sub(r"\s*\n\s*", "\n", svg))


def _column(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[np.ndarray]:
    """The ``keys`` of the rows that hold a finite number under each of them."""
    table = np.array([[row.get(key) for key in keys] for row in rows], dtype=np.float64)
    table = table.reshape(-1, len(keys))
    return list(table[np.isfinite(table).all(axis=1)].T)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over at most ``window`` values, fewer at the two ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


@styled
def loss_curve(model: str, rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Training loss (nats per token) against the optimizer step; None below two steps.

    ``rows`` are the lines of training.jsonl. The distilled ``student`` shows ``kd_loss``, the
    cross-entropy of the teacher's soft labels; any other model ``loss``.
    """
    key, quantity = ("kd_loss", "distillation loss") if model == "student" else ("loss", "loss")
    steps, losses = _column(rows, "step", key)
    if len(steps) < 2:
        return None
    average = smooth(losses, max(1, len(losses) // 12))
    first, last = float(average[0]), float(average[-1])
    verb = "fell" if last < first else "did not fall:"
    title = f"{NAMES[model]}: {quantity} {verb} from {first:.2f} to {last:.2f}"

    figure = Figure(figsize=(5.0, 3.2))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.9, bottom=0.15, top=0.92)
    axes.plot(steps, losses, color=COLOUR[model], linewidth=0.8, alpha=0.35)
    axes.plot(steps, average, color=COLOUR[model], linewidth=2.4)
    axes.plot(steps[-1:], average[-1:], "o", color=COLOUR[model], markersize=5, clip_on=False)
    axes.annotate(
        f"{last:.2f}",
        (float(steps[-1]), last),
        xytext=(8, 0),
        textcoords="offset points",
        verticalalignment="center",
        color=COLOUR[model],
        fontweight="bold",
    )
    axes.set_xlim(float(steps[0]), float(steps[-1]))
    axes.set_xlabel("optimizer step")
    axes.set_title("nats per token", loc="left", fontsize=10.5, color=COLOUR["muted"], x=-0.07)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    note = "Thin line: each optimizer step. Thick line: moving average."
    return Plot(title, note, svg(figure, f"loss-{model}", title))


@styled
def calibration(model: str, bins: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Reliability diagram: how sure the model was against how often it was right, per bin.

    ``bins`` hold ``confidence`` and ``accuracy`` in [0, 1] and ``count``; the strip below shows
    how many positions each bin holds. None if no bin holds any.
    """
    confidence, accuracy, count = _column(bins, "confidence", "accuracy", "count")
    filled = count > 0
    confidence, accuracy, count = confidence[filled], accuracy[filled], count[filled]
    if not len(count):
        return None
    share = count / count.sum()
    gap = 100 * float(share @ (confidence - accuracy))
    if abs(gap) < 1:
        seen = "as often right as it is sure, on average"
    else:
        seen = f"{'over' if gap > 0 else 'under'}confident by {abs(gap):.1f} points"
    title = f"{NAMES[model]}: {seen}"

    figure = Figure(figsize=(3.6, 4.2))
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.11, top=0.93, hspace=0.22)
    colour = COLOUR[model]
    axes.plot([0, 1], [0, 1], color=COLOUR["muted"], linewidth=1, linestyle=(0, (3, 3)))
    axes.text(
        0.27,
        0.33,
        "perfectly calibrated",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
        fontsize=8.5,
        color=COLOUR["muted"],
    )
    axes.vlines(confidence, confidence, accuracy, color=colour, linewidth=2, alpha=0.35)
    axes.plot(confidence, accuracy, color=colour, linewidth=1.2, alpha=0.6)
    axes.scatter(confidence, accuracy, s=14 + 150 * share, color=colour, zorder=3, linewidth=0)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(
        "how often it is right", loc="left", fontsize=10.5, color=COLOUR["muted"], x=-0.13
    )
    strip.vlines(confidence, 0, count, color=colour, linewidth=6)
    strip.set_ylim(0)
    strip.set_xlim(-0.02, 1.02)
    highest = f"positions (highest bar {count.max():,.0f})"
    strip.set_title(highest, loc="left", fontsize=10.5, color=COLOUR["muted"], x=-0.13, pad=4)
    strip.set_yticks([])
    strip.set_xlabel("how sure it is")
    percent = FuncFormatter(lambda value, _: f"{value:.0%}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(percent)
        axis.set_major_locator(MaxNLocator(5))
    note = f"{int(count.sum()):,} held-out positions, in {len(count)} bins of its confidence."
    return Plot(title, note, svg(figure, f"calibration-{model}", f"{title}. {note}"))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels at least ``gap`` apart, in the same order and about the same mean."""
    order = np.argsort(np.asarray(heights), kind="stable")
    placed = np.array(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    return list(placed - (placed - heights).mean()) if heights else []


@styled
def size_speed_quality(models: Models) -> Plot | None:
    """Top-1 agreement against speed in tokens per second, bubble area proportional to bytes.

    Draws the models of which all three were measured; None below two of them.
    """
    points: dict[str, tuple[float, float, float]] = {}
    for model in NAMES:
        speed = measured(models, model, "tokens_per_second")
        agreement = measured(models, model, "top1_agreement")
        size = measured(models, model, "bytes")
        if speed and size and agreement is not None:
            points[model] = (speed, agreement, size)
    if len(points) < 2:
        return None
    title = "Size, speed and agreement with the teacher"
    if "teacher" in points and "student" in points:
        speed, agreement, size = points["student"]
        teacher_speed, _, teacher_size = points["teacher"]
        title = (
            f"Student: {agreement:.1%} agreement at {speed / teacher_speed:.1f}× the teacher’s "
            f"speed and {size / teacher_size:.0%} of its size"
        )

    figure = Figure(figsize=(5.0, 4.0))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.12, right=0.99, bottom=0.13, top=0.92)
    speeds, agreements, sizes = np.array(list(points.values())).T
    areas = dict(zip(points, 700 * sizes / sizes.max(), strict=True))
    colours = [COLOUR[model] for model in points]
    axes.scatter(speeds, agreements, s=list(areas.values()), color=colours, alpha=0.8, linewidth=0)
    middle = 0.6 * float(speeds.max())
    for side, alignment in ((1, "left"), (-1, "right")):
        labelled = [model for model in points if (points[model][0] < middle) == (side > 0)]
        heights = spread([points[model][1] for model in labelled], 0.14)
        for model, height in zip(labelled, heights, strict=True):
            speed, agreement, size = points[model]
            name = f"{NAMES[model]} {agreement:.1%}"
            numbers = f"{speed:,.0f} tokens/s · {megabytes(size)}"
            beside = side * (float(np.sqrt(areas[model] / np.pi)) + 7)
            for text, below, weight in ((name, 2, "bold"), (numbers, -11, "normal")):
                axes.annotate(
                    text,
                    (speed, height),
                    xytext=(beside, below),
                    textcoords="offset points",
                    horizontalalignment=alignment,
                    fontweight=weight,
                    fontsize=10,
                    color=COLOUR[model],
                    bbox={"facecolor": COLOUR["card"], "edgecolor": "none", "pad": 0.8},
                )
    axes.set_xlim(0, float(speeds.max()) * 1.06)
    axes.set_ylim(-0.06, 1.14)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("tokens per second →")
    axes.set_title(
        "agreement with the teacher ↑", loc="left", fontsize=10.5, color=COLOUR["muted"], x=-0.12
    )
    note = "Area of a bubble: size in bytes. Speed as measured on the machine of the evaluation."
    return Plot(title, note, svg(figure, "size-speed-quality", title))


@styled
def bars(models: Models, metric: str) -> Plot | None:
    """Bars of ``kl`` (nats per token) or ``top1_agreement`` (share) of all but the teacher.

    The teacher is left out: its own KL is 0 and its agreement 1 by definition. None if neither
    the student nor a baseline was measured.
    """
    values = {
        model: value
        for model in NAMES
        if model != "teacher" and (value := measured(models, model, metric)) is not None
    }
    if not values:
        return None
    is_kl = metric == "kl"
    title = _bar_title(values, is_kl)
    figure = Figure(figsize=(5.0, 0.5 * len(values)))
    axes: Axes = figure.subplots()
    figure.subplots_adjust(left=0.32, right=0.98, bottom=0, top=1)
    limit = max(values.values()) if is_kl else 1.0
    for row, (model, value) in enumerate(values.items()):
        axes.barh(row, value, height=0.56, color=COLOUR[model])
        shown = f"{value:.3f}" if is_kl else f"{value:.1%}"
        axes.annotate(
            shown,
            (value, row),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontweight="bold",
            color=COLOUR[model],
        )
    axes.set_yticks(range(len(values)), [NAMES[model] for model in values])
    for label, model in zip(axes.get_yticklabels(), values, strict=True):
        label.set_color(COLOUR[model])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(True)
    axes.set_xticks([])
    axes.set_xlim(0, limit * 1.17 or 1)
    unit = "KL to the teacher, nats per token; shorter is better; the teacher’s own is 0."
    if not is_kl:
        unit = "Share of next-token choices equal to the teacher’s; longer is better."
        axes.axvline(1, color=COLOUR["muted"], linewidth=1, linestyle=(0, (3, 3)))
        unit += " Dashed: the teacher itself."
    return Plot(title, unit, svg(figure, f"bars-{metric}", title))


def _bar_title(values: Mapping[str, float], is_kl: bool) -> str:
    name = "KL" if is_kl else "Agreement"
    student, baseline = values.get("student"), values.get("cross_entropy")
    if student is None or baseline is None:
        return f"{name} of the student" if baseline is None else f"{name} of the baselines"
    if is_kl and student < baseline:
        return f"KL is {1 - student / baseline:.0%} below cross-entropy only"
    if not is_kl and student > baseline:
        return f"Agreement is {100 * (student - baseline):.1f} points above cross-entropy only"
    return f"{name} is no better than with cross-entropy only"
