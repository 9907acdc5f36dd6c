"""The distributions of a store as one figure: entropy, head mass, entries, bytes per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from seodang.errors import InputError

INK, MUTED, RULE, FILL = "#1c2733", "#5a6571", "#dde3e9", "#0b5cad"

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 150,
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "seodang",
    "text.color": INK,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
}
_NO_DATE = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def check_suffix(path: Path) -> None:
    """Raise ``InputError`` for a file that is no plot."""
    if path.suffix.lower() not in _NO_DATE:
        raise InputError(f"{path}: a plot is written as .png, .svg or .pdf")


def write_plot(found: dict[str, Any], path: Path) -> None:
    """Draw what :func:`seodang.softlabels.stats.statistics` found; equal input, equal bytes."""
    check_suffix(path)
    suffix = path.suffix.lower()
    temporary = path.with_name(path.name + ".tmp")
    with style.context(_STYLE, after_reset=True):
        figure = draw(found)
        figure.savefig(temporary, format=suffix[1:], metadata=_NO_DATE[suffix])
    temporary.replace(path)


def draw(found: dict[str, Any]) -> Figure:
    """The figure: three histograms over labelled positions, and where the bytes are."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.05, hspace=0.05)
    figure = Figure(figsize=(10, 7), layout=layout)
    (entropy, head_mass), (entries, size) = figure.subplots(2, 2)
    parameters = ", ".join(f"{name} {value}" for name, value in found["parameters"].items())
    figure.suptitle(
        f"{found['tokens']:,} labelled tokens · {found['estimator']}, {parameters}",
        x=0.012,
        horizontalalignment="left",
        fontweight="bold",
    )
    _histogram(entropy, found["entropy"], "Entropy of the teacher", "nats")
    _histogram(head_mass, found["head_mass"], "Head mass", "probability of the exact entries")
    counts = np.array(found["entries"].get("counts", []))
    _bars(entries, np.arange(len(counts)) - 0.5, counts, 1.0, found["entries"])
    _titles(entries, "Entries of a position", "entries")
    _bytes(size, found)
    return figure


def _titles(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(label)


def _histogram(axes: Axes, row: dict[str, Any], title: str, label: str) -> None:
    _titles(axes, title, label)
    if row["count"]:
        counts = np.array(row["histogram"]["counts"])
        width = row["histogram"]["step"]
        _bars(axes, np.arange(len(counts)) * width, counts, width, row)


def _bars(axes: Axes, left: Any, counts: Any, width: float, row: dict[str, Any]) -> None:
    """Shares of the positions as bars, the median marked."""
    axes.bar(left, counts / max(1, counts.sum()), width, align="edge", color=FILL, linewidth=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if row["count"]:
        median = row["quantiles"]["0.5"]
        axes.axvline(median, color=INK, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate(
            f"median {median:.3g}",
            (median, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            verticalalignment="top",
            fontsize=9,
            color=MUTED,
        )


def _bytes(axes: Axes, found: dict[str, Any]) -> None:
    tokens = max(1, found["tokens"])
    names = list(found["bytes"])
    sizes = np.array(list(found["bytes"].values())) / tokens
    _titles(axes, f"{sizes.sum():,.1f} bytes per labelled token", "bytes per labelled token")
    axes.barh(range(len(names)), sizes, height=0.6, color=FILL)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(visible=False)
    for row, value in enumerate(sizes):
        axes.annotate(
            f"{value:.2f}",
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=9,
            color=MUTED,
        )
    axes.set_xlim(0, float(sizes.max()) * 1.15)
