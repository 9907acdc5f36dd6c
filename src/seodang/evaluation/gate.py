"""The gate: what must hold for the student before anything is released.

from seodang.evaluation.gate import check_metrics
check_metrics(json.loads(Path("evaluation/metrics.json").read_bytes()), recipe.gate)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from seodang.errors import InputError
from seodang.recipe import GateConfig

Comparison = Literal["<=", ">=", "<", ">"]
Models = Mapping[str, Mapping[str, Any]]


class Check(TypedDict):
    """One requirement: ``value`` of ``model`` against ``threshold``.

    ``name`` is the recipe's key below ``gate`` that asks for it: ``max_kl``,
    ``beats.cross_entropy.kl``. A ``value`` or ``threshold`` that is missing or not finite is
    None, so that the checks can be written as strict JSON.
    """

    name: str
    model: str
    value: float | None
    threshold: float | None
    comparison: Comparison
    passed: bool


class GateResult(TypedDict):
    """All checks, and whether every one of them passed."""

    passed: bool
    checks: list[Check]


def measured(models: Models, model: str, metric: str) -> float | None:
    """``models[model][metric]`` as a finite number; None if it is missing, NaN or infinite."""
    return _finite(models.get(model, {}).get(metric))


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _at(metrics: Any, *keys: str) -> float | None:
    """The finite number at a path of keys; None if there is none."""
    for key in keys:
        metrics = metrics.get(key) if isinstance(metrics, Mapping) else None
    return _finite(metrics)


def _holds(value: float, comparison: Comparison, threshold: float) -> bool:
    match comparison:
        case "<=":
            return value <= threshold
        case ">=":
            return value >= threshold
        case "<":
            return value < threshold
        case ">":
            return value > threshold


def _check(
    name: str, value: float | None, comparison: Comparison, threshold: float | None
) -> Check:
    passed = value is not None and threshold is not None and _holds(value, comparison, threshold)
    return Check(
        name=name,
        model="student",
        value=value,
        threshold=threshold,
        comparison=comparison,
        passed=passed,
    )


def _above(value: float | None, step: float) -> float | None:
    return None if value is None else value + step


def check(metrics_models: Models, config: GateConfig) -> GateResult:
    """Compare the student's distributions with the recipe's gate; its tasks are left aside.

    ``metrics_models`` is ``models`` of metrics.json: KL in nats per token, agreement in [0, 1].
    ``max_kl`` and ``min_top1_agreement`` are inclusive. For each baseline in ``beats`` the
    student's KL must be strictly below the baseline's minus the margin, so that a student equal to
    a baseline never beats it, and its top-1 agreement strictly above the baseline's plus the
    margin; where that sum is 1, which nothing can be above, it must be 1.

    Whatever was not measured, or is NaN or infinite, fails its check. A gate that asks for
    nothing gives ``passed`` true and no ``checks``.
    """
    kl = measured(metrics_models, "student", "kl")
    agreement = measured(metrics_models, "student", "top1_agreement")
    checks = []
    if config.max_kl is not None:
        checks.append(_check("max_kl", kl, "<=", config.max_kl))
    if config.min_top1_agreement is not None:
        checks.append(_check("min_top1_agreement", agreement, ">=", config.min_top1_agreement))
    for baseline, margins in config.beats.items():
        if baseline in ("lexical", "search"):  # ranks passages, and has no distribution
            continue
        below = _above(measured(metrics_models, baseline, "kl"), -margins.kl)
        above = _above(measured(metrics_models, baseline, "top1_agreement"), margins.top1_agreement)
        checks.append(_check(f"beats.{baseline}.kl", kl, "<", below))
        how: Comparison = ">=" if above == 1.0 else ">"
        checks.append(_check(f"beats.{baseline}.top1_agreement", agreement, how, above))
    return _result(checks)


def check_metrics(
    metrics: Mapping[str, Any], config: GateConfig, previous: Mapping[str, Any] | None = None
) -> GateResult:
    """Compare all that was measured with the recipe's gate: distributions, then tasks.

    ``metrics`` is metrics.json, ``previous`` that of the release before this one. A task's figure
    must reach its floor; be strictly above a baseline's plus the margin, with a p of the paired
    test below the one asked for; be at most so far below the teacher's, or the previous release's;
    and differ by at most so much between any two languages, of which there must be two.

    Whatever was not measured, or is NaN or infinite, fails its check.
    """
    tasks = metrics.get("tasks") or {}
    found = check(metrics.get("models") or {}, config)["checks"]

    def figure(model: str, key: str, source: Any = tasks) -> float | None:
        task, _, metric = key.partition(".")
        return _at(source, task, model, metric, "value")

    for key, floor in config.floors.items():
        found.append(_check(f"floors.{key}", figure("student", key), ">=", floor))
    for baseline, margins in config.beats.items():
        for key, asked in margins.tasks.items():
            name = f"beats.{baseline}.tasks.{key}"
            above = _above(figure(baseline, key), asked.margin)
            found.append(_check(name, figure("student", key), ">", above))
            task, _, metric = key.partition(".")
            p = _at(metrics.get("task_comparisons"), task, baseline, metric, "p")
            found.append(_check(f"{name}.p", p, "<", asked.p))
    for key, loss in config.within_teacher.items():
        least = _above(figure("teacher", key), -loss)
        found.append(_check(f"within_teacher.{key}", figure("student", key), ">=", least))
    for key, gap in config.language_gap.items():
        found.append(_check(f"language_gap.{key}", _language_gap(tasks, key), "<=", gap))
    for key, loss in config.no_regression.items():
        before = figure("student", key, (previous or {}).get("tasks"))
        least = _above(before, -loss)
        found.append(_check(f"no_regression.{key}", figure("student", key), ">=", least))
    return _result(found)


def _language_gap(tasks: Any, key: str) -> float | None:
    """Between the student's best and worst language; None if fewer than two were measured."""
    task, _, metric = key.partition(".")
    student = (tasks.get(task) or {}).get("student") or {}
    languages = student.get("by_language") or {}
    values = [_at(figures, metric, "value") for figures in languages.values()]
    finite = [value for value in values if value is not None]
    if len(values) < 2 or len(finite) < len(values):
        return None
    return max(finite) - min(finite)


def _result(checks: list[Check]) -> GateResult:
    return GateResult(passed=all(item["passed"] for item in checks), checks=checks)


def read_metrics(path: Path) -> dict[str, Any]:
    """metrics.json: the file itself, or that of an evaluation, a run or a release by directory.

    Raises ``InputError`` if there is none, or if it is not what an evaluation writes.
    """
    places = [path / "metrics.json", path / "evaluation" / "metrics.json"]
    file = next((place for place in places if place.is_file()), path)
    try:
        metrics = json.loads(file.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no metrics.json; name one, or an evaluation's folder") from None
    except ValueError as error:
        raise InputError(f"{file}: is not JSON: {error}") from None
    if not isinstance(metrics, dict) or not {"models", "tasks"} & metrics.keys():
        raise InputError(f"{file}: holds neither `models` nor `tasks`; is it an evaluation's?")
    return metrics
