"""The gate: what must hold for the student before anything is released."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

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
    value = models.get(model, {}).get(metric)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


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


def check(metrics_models: Models, config: GateConfig) -> GateResult:
    """Compare the student with the recipe's gate.

    ``metrics_models`` is ``models`` of metrics.json: KL in nats per token, agreement in [0, 1].
    ``max_kl`` and ``min_top1_agreement`` are inclusive. For each baseline in ``beats`` the
    student's KL must be strictly below the baseline's minus the margin, and its top-1 agreement
    strictly above the baseline's plus the margin: a student equal to a baseline never beats it.

    Whatever was not measured, or is NaN or infinite, fails its check. A gate that asks for
    nothing gives ``passed`` true and no ``checks``.
    """

    def one(name: str, metric: str, comparison: Comparison, threshold: float | None) -> Check:
        value = measured(metrics_models, "student", metric)
        passed = (
            value is not None and threshold is not None and _holds(value, comparison, threshold)
        )
        return Check(
            name=name,
            model="student",
            value=value,
            threshold=threshold,
            comparison=comparison,
            passed=passed,
        )

    checks = []
    if config.max_kl is not None:
        checks.append(one("max_kl", "kl", "<=", config.max_kl))
    if config.min_top1_agreement is not None:
        checks.append(one("min_top1_agreement", "top1_agreement", ">=", config.min_top1_agreement))
    for baseline, margins in config.beats.items():
        kl = measured(metrics_models, baseline, "kl")
        agreement = measured(metrics_models, baseline, "top1_agreement")
        below = None if kl is None else kl - margins.kl
        above = None if agreement is None else agreement + margins.top1_agreement
        checks.append(one(f"beats.{baseline}.kl", "kl", "<", below))
        checks.append(one(f"beats.{baseline}.top1_agreement", "top1_agreement", ">", above))
    return GateResult(passed=all(item["passed"] for item in checks), checks=checks)
