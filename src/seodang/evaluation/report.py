"""The evaluation report: one HTML file that loads nothing and can be read by anyone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seodang import __version__
from seodang.evaluation import plots
from seodang.evaluation.gate import Models, measured
from seodang.evaluation.plots import NAMES, megabytes
from seodang.evaluation.task_report import task_sections
from seodang.pages import page_environment

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Metric:
    """A row of the table of models: what it is called, what it means, how it is written."""

    key: str
    name: str
    unit: str
    meaning: str
    write: Callable[[float], str]


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _parameters(value: float) -> str:
    return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M"


METRICS = (
    Metric(
        "kl",
        "KL to the teacher",
        "nats per token",
        "How far the model’s probabilities for the next token are from the teacher’s. "
        "0 is identical; lower is better.",
        lambda value: f"{value:.3f}" if value else "0",
    ),
    Metric(
        "top1_agreement",
        "Top-1 agreement",
        "share of positions",
        "How often the model’s first choice of the next token is also the teacher’s. "
        "Higher is better.",
        lambda value: f"{value:.1%}",
    ),
    Metric(
        "perplexity",
        "Perplexity",
        "",
        "How much the real text surprises the model: about as if it hesitated between this many "
        "equally likely tokens. Lower is better.",
        _perplexity,
    ),
    Metric(
        "calibration_error",
        "Calibration error",
        "0 to 1",
        "The gap between how sure the model is of its first choice and how often that choice is "
        "right, averaged. Lower is better.",
        lambda value: f"{value:.3f}",
    ),
    Metric("parameters", "Parameters", "", "How many learned numbers the model has.", _parameters),
    Metric(
        "bytes", "Size", "", "How much room its weights take, as they were evaluated.", megabytes
    ),
    Metric(
        "tokens_per_second",
        "Speed",
        "tokens/s",
        "How many held-out tokens it predicts in a second, in batches, on the machine of this "
        "evaluation. Another machine gives another number; writing text token by token is slower.",
        lambda value: f"{value:,.0f}",
    ),
)


@dataclass(frozen=True)
class Tile:
    """One number of the headline."""

    value: str
    name: str
    detail: str


def _ratio(ratio: float, more: str, less: str, same: str) -> tuple[str, str]:
    """A ratio as a number of at least 1 and its word: (``1.9×``, ``smaller``)."""
    if 0.95 < ratio < 1.05:
        return "1×", same
    word = more if ratio > 1 else less
    ratio = max(ratio, 1 / ratio)
    return f"{ratio:,.0f}×" if ratio >= 20 else f"{ratio:.1f}×", word


def _tiles(models: Models) -> list[Tile]:
    """The headline: what the student keeps, and what it saves; only what was measured."""
    tiles = []
    student = {metric.key: measured(models, "student", metric.key) for metric in METRICS}
    teacher = {metric.key: measured(models, "teacher", metric.key) for metric in METRICS}
    agreement, kl = student["top1_agreement"], student["kl"]
    baseline_agreement = measured(models, "cross_entropy", "top1_agreement")
    baseline_kl = measured(models, "cross_entropy", "kl")
    if agreement is not None:
        detail = "of the student’s first choices are the teacher’s"
        if baseline_agreement is not None:
            detail += f"; {baseline_agreement:.1%} with cross-entropy only"
        tiles.append(Tile(f"{agreement:.1%}", "next-token agreement", detail))
    if kl is not None:
        detail = "nats per token from the teacher"
        if baseline_kl is not None:
            detail += f"; {baseline_kl:.3f} with cross-entropy only"
        tiles.append(Tile(f"{kl:.3f}", "KL divergence", detail))
    if student["bytes"] and teacher["bytes"]:
        value, word = _ratio(
            teacher["bytes"] / student["bytes"], "smaller", "larger", "about the same size"
        )
        detail = (
            f"{megabytes(student['bytes'])} against the teacher’s {megabytes(teacher['bytes'])}"
        )
        tiles.append(Tile(value, word, detail))
    if student["tokens_per_second"] and teacher["tokens_per_second"]:
        mine, its = student["tokens_per_second"], teacher["tokens_per_second"]
        value, word = _ratio(mine / its, "faster", "slower", "about as fast")
        detail = f"{mine:,.0f} tokens/s against {its:,.0f}, on the same machine"
        tiles.append(Tile(value, word, detail))
    return tiles


def _sentence(models: Models, tiles: Sequence[Tile]) -> str:
    """The headline as one sentence, claiming no more than was measured."""
    agreement = measured(models, "student", "top1_agreement")
    if agreement is None:
        return "The student was not measured."
    words = [
        tile.name if tile.value == "1×" else f"{tile.value} {tile.name}"
        for tile in tiles
        if tile.value.endswith("×")
    ]
    beside = f", and is {' and '.join(words)}" if words else ""
    return f"The student keeps {agreement:.1%} of the teacher’s next-token choices{beside}."


def _requirement(name: str) -> str:
    """The recipe's key of a check in words; an unknown key is shown as it is."""
    baselines = {"untrained": "the untrained start", "cross_entropy": "cross-entropy only"}
    match name.split("."):
        case ["max_kl"]:
            return "KL to the teacher at or below the limit"
        case ["min_top1_agreement"]:
            return "Agreement with the teacher at or above the minimum"
        case ["beats", baseline, "kl"]:
            return f"KL below that of {baselines.get(baseline, baseline)}"
        case ["beats", baseline, "top1_agreement"]:
            return f"Agreement above that of {baselines.get(baseline, baseline)}"
        case ["beats", baseline, "tasks", task, metric]:
            return f"{task}: {metric} above that of {baselines.get(baseline, baseline)}"
        case ["beats", baseline, "tasks", task, metric, "p"]:
            return f"{task}: that {metric} is above it is no chance"
        case ["floors", task, metric]:
            return f"{task}: {metric} at or above the floor"
        case ["within_teacher", task, metric]:
            return f"{task}: {metric} close to the teacher’s, or above it"
        case ["language_gap", task, metric]:
            return f"{task}: {metric} much the same in every language"
        case ["no_regression", task, metric]:
            return f"{task}: {metric} not below that of the previous release"
    return name


def _check_row(check: Mapping[str, Any]) -> dict[str, Any]:
    """A gate check as the words and numbers of its row."""
    of_task = not check["name"].endswith((".kl", ".p", "max_kl"))
    share = "agreement" in check["name"] or of_task

    def write(value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return "not measured"
        return f"{value:.1%}" if share else f"{value:.3f}"

    sign = {"<=": "≤ ", ">=": "≥ "}.get(check["comparison"], f"{check['comparison']} ")
    threshold = check["threshold"]
    return {
        "name": check["name"],
        "requirement": _requirement(check["name"]),
        "value": write(check["value"]),
        "threshold": (sign if threshold is not None else "") + write(threshold),
        "passed": bool(check["passed"]),
    }


def _verdict(gate: Mapping[str, Any] | None) -> dict[str, str]:
    checks = gate.get("checks", []) if gate else []
    held = sum(bool(check["passed"]) for check in checks)
    if not gate or not checks:
        return {
            "state": "none",
            "title": "No gate was set",
            "detail": "The recipe asks for nothing, so nothing was passed or failed.",
        }
    if gate["passed"]:
        detail = (
            f"All {held} requirements of the recipe hold."
            if held > 1
            else ("The one requirement of the recipe holds.")
        )
        return {"state": "passed", "title": "Gate passed", "detail": detail}
    return {
        "state": "failed",
        "title": "Gate failed",
        "detail": f"{len(checks) - held} of {len(checks)} requirements of the recipe do not hold: "
        "this student is not released.",
    }


def _table(models: Models) -> dict[str, Any]:
    """The table of models: a column per model that was measured, a row per metric."""
    columns = [model for model in NAMES if model in models]
    rows = []
    for metric in METRICS:
        values = [measured(models, model, metric.key) for model in columns]
        if any(value is not None for value in values):
            cells = [None if value is None else metric.write(value) for value in values]
            rows.append({"metric": metric, "cells": list(zip(columns, cells, strict=True))})
    return {"columns": columns, "rows": rows}


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) if value else ""


def _held_out(held_out: Mapping[str, Any] | None) -> str:
    """``1,234 positions of 56 documents``, or nothing if that is not known."""
    counts = (
        [f"{held_out[unit]:,} {unit}" for unit in ("positions", "documents") if unit in held_out]
        if held_out
        else []
    )
    return " of ".join(counts)


def _artifact(artifact: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": artifact["kind"],
        "digest": artifact["digest"],
        "inputs": artifact.get("inputs") or {},
        "config": _pretty(artifact.get("config") or {}),
        "summary": _pretty(artifact.get("summary") or {}),
    }


def _sources(provenance: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every source of every artifact once, with the kinds of artifact that name it."""
    rows: dict[str, dict[str, Any]] = {}
    for artifact in provenance:
        for source in artifact.get("sources") or []:
            counts = [source.get("documents"), source.get("tokens")]
            documents, tokens = ("–" if count is None else f"{count:,}" for count in counts)
            row = {key: source.get(key) for key in ("name", "version", "license", "attribution")}
            row |= {"sha256": source.get("sha256"), "documents": documents, "tokens": tokens}
            row = rows.setdefault(json.dumps(row, sort_keys=True), {**row, "used_in": []})
            if artifact["kind"] not in row["used_in"]:
                row["used_in"].append(artifact["kind"])
    return list(rows.values())


def render(
    *,
    title: str,
    description: str,
    metrics: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    samples: Sequence[Mapping[str, Any]],
    provenance: Sequence[Mapping[str, Any]],
) -> str:
    """The report as one HTML file without scripts, which loads nothing from anywhere.

    ``metrics`` is metrics.json and ``samples`` samples.json; ``curves`` holds the lines of
    training.jsonl under ``student`` and ``cross_entropy``; each item of ``provenance`` describes
    an artifact: ``kind``, ``digest``, ``config``, ``inputs`` (name → digest), ``summary`` and
    ``sources`` (as in its manifest). A part that nothing is known about is left out and says so.
    Everything given is shown as text, never as markup; equal input gives equal bytes.
    """
    models: Models = metrics.get("models") or {}
    gate = metrics.get("gate")
    bins = metrics.get("calibration") or {}
    tiles = _tiles(models)
    figures = {
        "bars": [plots.bars(models, "kl"), plots.bars(models, "top1_agreement")],
        "loss": [
            plots.loss_curve(model, curves.get(model) or [])
            for model in ("student", "cross_entropy")
        ],
        "calibration": [
            plots.calibration(model, bins.get(model) or [])
            for model in ("teacher", "student", "cross_entropy")
        ],
        "size_speed_quality": [plots.size_speed_quality(models)],
    }
    environment = page_environment(Path(__file__).parent)
    return environment.get_template(TEMPLATE).render(
        title=title,
        description=description,
        version=__version__,
        names=NAMES,
        palette=plots.PALETTE,
        partition=metrics.get("partition"),
        on_policy=metrics.get("on_policy"),
        verdict=_verdict(gate),
        sentence=_sentence(models, tiles),
        tiles=tiles,
        table=_table(models),
        tasks=task_sections(metrics),
        checks=[_check_row(check) for check in (gate or {}).get("checks", [])],
        held_out=_held_out(metrics.get("held_out")),
        figures={name: [plot for plot in group if plot] for name, group in figures.items()},
        samples=samples,
        provenance=[_artifact(artifact) for artifact in provenance],
        digests={artifact["digest"] for artifact in provenance},
        sources=_sources(provenance),
    )
