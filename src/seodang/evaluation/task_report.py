"""The report's section on tasks: figures, tests, robustness, quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seodang.evaluation.plots import COLOUR, NAMES, Plot, megabytes, spread, styled, svg
from seodang.evaluation.task_evaluation import LEXICAL, SEARCH
from seodang.evaluation.task_metrics import MAIN

LANGUAGES = {"ko": "Korean", "en": "English"}
_METRICS = {
    "accuracy": ("Accuracy", "The likeliest of the choices is the right one."),
    "calibration_error": (
        "Calibration error",
        "Between how sure it is of its choice and how often that is right. Lower is better.",
    ),
    "ndcg@10": ("nDCG@10", "How far up the relevant passages of a query stand."),
    "mrr@10": ("MRR@10", "One over the place of the first relevant passage."),
    "recall@10": ("Recall@10", "Share of the relevant passages among the first ten."),
    "schema_valid": ("Keeps to the schema", "The answer is JSON, and its schema’s."),
    "exact_match": ("Exact match", "The answer is the right one and nothing else."),
    "field_f1": ("F1 of fields", "Over the fields of the answer and their values."),
    "token_f1": ("F1 of words", "Over the words that the answer shares, in Korean characters."),
    "refusal_f1": ("F1 of refusing", "Of refusing against the examples that are to be refused."),
}


def task_sections(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the template shows of each task in metrics.json, in order; nothing if there is none."""
    return [_section(name, metrics) for name in metrics.get("tasks") or {}]


def _section(task: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    models = metrics["tasks"][task]
    about = metrics["task_examples"][task]
    columns = [model for model in NAMES if model in models]
    main = MAIN[about["kind"]]
    costs = metrics.get("task_costs", {}).get(task, {})
    return {
        "name": task,
        "about": f"{about['kind']}, {examples_in_words(about)}",
        "columns": columns,
        "rows": _rows(models, columns),
        "differences": _differences(metrics["task_comparisons"].get(task, {})),
        "robustness": _robustness(metrics["task_robustness"].get(task, {}), main),
        "plot": quality_cost(task, main, models, costs, metrics.get("models") or {}),
    }


def examples_in_words(about: Mapping[str, Any]) -> str:
    """How many held-out examples a task has, in which languages, and how many are synthetic."""
    languages = " and ".join(LANGUAGES.get(code, code) for code in about["languages"])
    text = f"{about['examples']:,} held-out examples in {languages}"
    if about["synthetic"]:
        text += f", {about['synthetic']:,} of them synthetic"
    return text


def _rows(models: Mapping[str, Any], columns: Sequence[str]) -> list[dict[str, Any]]:
    """A row per metric and, where there are several, per language below it."""
    rows = []
    for key, (name, meaning) in _METRICS.items():
        if not any(key in models[model] for model in columns):
            continue
        cells = [interval(models[model].get(key)) for model in columns]
        rows.append(
            {"name": name, "meaning": meaning, "cells": list(zip(columns, cells, strict=True))}
        )
        languages = sorted({code for model in columns for code in models[model]["by_language"]})
        for code in languages if len(languages) > 1 else []:
            cells = [interval(models[m]["by_language"].get(code, {}).get(key)) for m in columns]
            language = f"in {LANGUAGES.get(code, code)}"
            rows.append(
                {"name": language, "meaning": "", "cells": list(zip(columns, cells, strict=True))}
            )
    return rows


def interval(figure: Mapping[str, Any] | None, sign: str = "") -> str | None:
    """``81.2% [78.0, 84.1]``; None for what was not measured."""
    if figure is None:
        return None
    value = f"{100 * figure['value']:{sign}.1f}%"
    if figure["low"] is None:
        return value
    return f"{value} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def _differences(comparisons: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The student minus each other model, metric by metric, with the test."""
    rows = []
    for other in (name for name in NAMES if name in comparisons):
        for key, found in comparisons[other].items():
            if key in _METRICS:
                p = f"{found['p']:.2g}" if found["p"] >= 0.0001 else "< 0.0001"
                rows.append(
                    {
                        "other": other,
                        "metric": _METRICS[key][0],
                        "difference": interval(found, sign="+"),
                        "p": p,
                        "test": {"mcnemar": "McNemar, exact"}.get(found["test"], found["test"]),
                    }
                )
    return rows


def _robustness(found: Mapping[str, Any], main: str) -> dict[str, Any]:
    columns = [name for name in NAMES if name in found]
    perturbations = list(dict.fromkeys(name for model in columns for name in found[model]))
    rows = []
    for name in perturbations:
        parts = [found[model].get(name, {}) for model in columns]
        first = next(part for part in parts if part)
        cells = [interval(part.get(main, {}).get("change"), sign="+") for part in parts]
        language = LANGUAGES.get(first["language"], first["language"])
        rows.append(
            {
                "name": name.removesuffix(f"-{first['language']}"),
                "language": language,
                "n": first["n"],
                "cells": list(zip(columns, cells, strict=True)),
            }
        )
    return {"metric": _METRICS[main][0], "columns": columns, "rows": rows}


@styled
def quality_cost(
    task: str,
    metric: str,
    figures: Mapping[str, Any],
    costs: Mapping[str, Any],
    models: Mapping[str, Any],
) -> Plot | None:
    """A task's metric with its interval against a request's median milliseconds; area is bytes.

    Draws the models of which all three were measured, and the first stage of a ranking as a line;
    None below two of them.
    """
    points = {}
    for model in NAMES:
        figure, cost = figures.get(model, {}).get(metric), costs.get(model)
        size = models.get(model, {}).get("bytes")
        if figure and cost and size:
            low, high = figure["low"], figure["high"]
            value = figure["value"]
            reach = (value - low, high - value) if low is not None else (0.0, 0.0)
            points[model] = (1000 * cost["median"], value, size, *reach)
    if len(points) < 2:
        return None
    title = f"{task}: quality, cost of a request, and size"
    figure_ = Figure(figsize=(5.0, 3.4))
    axes = figure_.subplots()
    figure_.subplots_adjust(left=0.12, right=0.98, bottom=0.16, top=0.9)
    largest = max(size for _, _, size, *_ in points.values())
    slowest = max(ms for ms, *_ in points.values())
    heights = spread([value for _, value, *_ in points.values()], 0.13)
    for (model, (ms, value, size, below, above)), height in zip(
        points.items(), heights, strict=True
    ):
        colour = COLOUR[model]
        axes.vlines(ms, value - max(0, below), value + max(0, above), color=colour, linewidth=1.6)
        axes.scatter([ms], [value], s=500 * size / largest, color=colour, alpha=0.8, linewidth=0)
        left = ms > 0.6 * slowest
        axes.annotate(
            f"{NAMES[model]} {value:.1%}\n{ms:,.0f} ms · {megabytes(size)}",
            (ms, height),
            xytext=(-16 if left else 16, 0),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            verticalalignment="center",
            fontsize=9,
            color=colour,
            bbox={"facecolor": COLOUR["card"], "edgecolor": "none", "pad": 0.6},
        )
    for search, side in ((LEXICAL, "top"), (SEARCH, "bottom")):
        if (found := figures.get(search, {}).get(metric)) is None:
            continue
        value, colour = found["value"], COLOUR[search]
        axes.axhline(value, color=colour, linewidth=1.4, linestyle=(0, (3, 3)))
        label = f"{NAMES[search]} {value:.1%}"
        place = value - 0.02 if side == "top" else value + 0.02
        axes.text(slowest * 0.01, place, label, fontsize=9, color=colour, va=side)
    axes.set_xlim(0, slowest * 1.1)
    axes.set_ylim(-0.06, 1.12)
    axes.set_yticks(np.linspace(0, 1, 5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("milliseconds of a single request (median) →")
    axes.set_title(
        f"{_METRICS[metric][0]} ↑", loc="left", fontsize=10.5, color=COLOUR["muted"], x=-0.1
    )
    note = (
        "Vertical lines: intervals of 95%. Area: size in bytes. Time on the evaluation’s machine."
    )
    return Plot(title, note, svg(figure_, f"quality-cost-{task}", title))
