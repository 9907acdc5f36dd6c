"""The report on a raw corpus: one HTML file that loads nothing, and the lines to print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seodang import __version__
from seodang.artifact import Artifact
from seodang.corpus.raw.reading import KIND
from seodang.errors import InputError
from seodang.evaluation.plots import COLOUR, PALETTE, Plot, styled, svg
from seodang.pages import page_environment

TEMPLATE = "corpus.html.j2"
REPORT = "report.json"
LANGUAGES = {"ko": "Korean", "en": "English", "code": "Code"}
LANGUAGE_COLOUR = {"ko": "student", "en": "cross_entropy", "code": "untrained"}
STEP_NAMES = {
    "language": "Language",
    "quality": "Quality",
    "contamination": "Contamination",
    "exact-duplicates": "Exact duplicates",
    "near-duplicates": "Near-duplicates",
    "held-out-repeats": "Repeats of held-out text",
}
DATA_NAMES = {
    "EMAIL": "E-mail addresses",
    "RESIDENT_NUMBER": "Resident registration numbers",
    "CARD": "Card numbers",
    "PHONE": "Phone numbers",
    "IP": "Public IP addresses",
}

Report = Mapping[str, Any]


def load(path: Path) -> tuple[Artifact, dict[str, Any]]:
    """A raw corpus and its report; raises ``InputError`` if it is none, or was changed."""
    artifact = Artifact.open(path, KIND)
    try:
        report = json.loads((path / REPORT).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path / REPORT}: cannot be read: {error}") from None
    return artifact, report


def megabytes(size: float) -> str:
    """A size in bytes as decimal megabytes: ``14.7 MB``, ``0.03 MB``."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 or not size else f"{size / 1e6:,.2f} MB"


def share(part: float, whole: float) -> str:
    """A share in per cent; of nothing, a dash."""
    return f"{part / whole:.1%}" if whole else "–"


def lines(report: Report) -> list[str]:
    """The report in a few lines of text."""
    came, kept = report["came_in"], report["kept"]
    held = report["held_out"]
    out = [
        f"came in   {came['documents']:>8,} documents  {megabytes(came['bytes']):>10}",
        *(
            f"  dropped {step['dropped']['documents']:>8,} documents  "
            f"{megabytes(step['dropped']['bytes']):>10}  {STEP_NAMES[step['name']].lower()}"
            for step in report["steps"]
        ),
        f"kept      {kept['documents']:>8,} documents  {megabytes(kept['bytes']):>10}  "
        f"({held['documents']:,} held out, {megabytes(held['bytes'])})",
        *(
            f"  {LANGUAGES[name]:<8}"
            f"{side['train']['documents'] + side['held_out']['documents']:>8,}"
            f" documents  {megabytes(side['train']['bytes'] + side['held_out']['bytes']):>10}"
            for name, side in report["languages"].items()
        ),
    ]
    found = report["personal_data"]
    masked = ", ".join(f"{found[key]['found']:,} {DATA_NAMES[key].lower()}" for key in found)
    out.append(f"masked    {masked}")
    out += [
        f"kept out  {entry['documents']:,} documents that hold some of {entry['benchmark']}"
        for entry in report["contamination"]
    ]
    return out


def render(report: Report, digest: str) -> str:
    """The report as one HTML file, in light and in dark; equal input gives equal bytes."""
    environment = page_environment(Path(__file__).parent)
    kept = report["kept"]["bytes"]
    languages = [
        {
            "name": LANGUAGES[name],
            "documents": side["train"]["documents"] + side["held_out"]["documents"],
            "bytes": side["train"]["bytes"] + side["held_out"]["bytes"],
            "held_out": side["held_out"],
        }
        for name, side in report["languages"].items()
    ]
    plots = [_flow(report), _sizes(report), _by_source(report)]
    return environment.get_template(TEMPLATE).render(
        version=__version__,
        digest=digest,
        palette=PALETTE,
        report=report,
        languages=sorted(languages, key=lambda language: -language["bytes"]),
        step_names=STEP_NAMES,
        data_names=DATA_NAMES,
        plots=plots,
        megabytes=megabytes,
        share=share,
        kept=kept,
        language_name=lambda name: LANGUAGES.get(name, name or "not identified"),
    )


@styled
def _flow(report: Report) -> Plot:
    """What is left after each step."""
    sizes, names = [report["came_in"]["bytes"]], ["came in"]
    for step in report["steps"]:
        sizes.append(sizes[-1] - step["dropped"]["bytes"])
        names.append(STEP_NAMES[step["name"]].lower())
    figure = Figure(figsize=(5.4, 3.4))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.34, right=0.88, bottom=0.06, top=0.98)
    rows = range(len(sizes), 0, -1)
    values = [size / 1e6 for size in sizes]
    colours = [COLOUR["muted"]] + [COLOUR["student"]] * (len(sizes) - 1)
    axes.barh(list(rows), values, height=0.62, color=colours)
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            f"{value:,.1f} MB",
            (value, row),
            xytext=(5, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=10,
        )
    axes.set_yticks(list(rows), names)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    title = f"{share(sizes[-1], sizes[0])} of what came in is left"
    note = "Text left after each step, in the order of the steps."
    return Plot(title, note, svg(figure, "flow", title))


@styled
def _sizes(report: Report) -> Plot:
    """How long the documents are, by language."""
    figure = Figure(figsize=(5.4, 3.4))
    axes = figure.subplots()
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.16, top=0.9)
    ends = []
    for name, sizes in report["sizes"].items():
        bits = sorted(int(bit) for bit in sizes)
        span = range(bits[0] - 1, bits[-1] + 2)
        counts = [sizes.get(str(bit), 0) for bit in span]
        colour = COLOUR[LANGUAGE_COLOUR[name]]
        axes.step(list(span), counts, where="mid", color=colour, linewidth=2)
        peak = max(range(len(counts)), key=counts.__getitem__)
        ends.append((span[peak], counts[peak], name, colour))
    for place, count, name, colour in ends:
        axes.annotate(
            LANGUAGES[name],
            (place, count),
            xytext=(0, 4),
            textcoords="offset points",
            horizontalalignment="center",
            color=colour,
            fontweight="bold",
        )
    axes.set_xlabel("size of a document")
    axes.set_title("documents", loc="left", fontsize=10.5, color=COLOUR["muted"], x=-0.1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda bit, _: _binary(int(bit))))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    title = "How long the documents are"
    note = "Each step of a line counts the documents between one size and twice as much."
    return Plot(title, note, svg(figure, "sizes", title))


@styled
def _by_source(report: Report) -> Plot:
    """What was kept of each source, by language."""
    sources = [s for s in report["sources"] if s["came_in"]["bytes"]]
    sources.sort(key=lambda source: -source["kept"]["bytes"])
    figure = Figure(figsize=(9.4, 0.27 * len(sources) + 0.7))
    axes = figure.subplots()
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.34, right=0.93, bottom=0.12 / height, top=1 - 0.4 / height)
    rows = list(range(len(sources), 0, -1))
    start = [0.0] * len(sources)
    for name, label in LANGUAGES.items():
        values = [s["languages"].get(name, {"bytes": 0})["bytes"] / 1e6 for s in sources]
        if any(values):
            colour = COLOUR[LANGUAGE_COLOUR[name]]
            axes.barh(rows, values, left=start, height=0.64, color=colour, label=label)
            start = [a + b for a, b in zip(start, values, strict=True)]
    for row, source, end in zip(rows, sources, start, strict=True):
        text = f"{end:,.2f} MB of {source['came_in']['bytes'] / 1e6:,.2f}"
        axes.annotate(
            text,
            (end, row),
            xytext=(5, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=9.5,
            color=COLOUR["muted"],
        )
    axes.set_yticks(rows, [source["name"] for source in sources], fontsize=9.5)
    axes.set_ylim(0.3, len(sources) + 0.7)
    axes.set_xlim(0, 1.16 * max(start, default=1.0) or 1.0)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=10, borderpad=0
    )
    title = "What was kept of each source"
    note = "By language; behind each bar, how much was kept of how much came in."
    return Plot(title, note, svg(figure, "sources", title))


def _binary(bits: int) -> str:
    """The size at which a bin begins: ``512 B``, ``4 kB``, ``1 MB``."""
    size = 2 ** max(0, bits - 1)
    for unit, scale in (("MB", 2**20), ("kB", 2**10)):
        if size >= scale:
            return f"{size // scale} {unit}"
    return f"{size} B"
