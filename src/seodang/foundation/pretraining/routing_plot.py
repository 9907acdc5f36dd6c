"""A plot of how busy the experts were."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seodang.artifact import write_atomically

_PANELS = {
    "load_max": "busiest expert, load over mean",
    "load_entropy": "entropy of the loads",
    "router_entropy": "entropy of a token's scores",
    "dead": "experts without a token",
}


def draw_routing(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot the routing figures of every layer over the steps, as SVG; the same rows, the same file.

    ``rows`` are the lines of ``training.jsonl``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in rows if "load_max/1" in row]
    layers = _layers(rows[0])
    with rc_context({"svg.hashsalt": "routing", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
            for layer in layers:
                axes.plot(
                    [row["step"] for row in rows],
                    [row[f"{name}/{layer}"] for row in rows],
                    linewidth=0.8,
                    label=f"MoE layer {layer}",
                )
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        figure.axes[0].legend(fontsize=6, ncols=1 + len(layers) // 8)
        figure.axes[0].axhline(1.0, color="black", linewidth=0.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomically(file, buffer.getvalue())


def _layers(row: dict[str, Any]) -> list[int]:
    return sorted(int(m[1]) for key in row if (m := re.fullmatch(r"load_max/(\d+)", key)))
