"""The gate: what passes, and above all what never does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from seodang.cli import app
from seodang.evaluation.gate import check, check_metrics
from seodang.recipe import BaselineName, GateConfig, Margins, TaskMargin
from tiny_run import tiny_recipe

NAMES: list[BaselineName] = ["untrained", "cross_entropy"]
KL = st.floats(0, 20)
AGREEMENT = st.floats(0, 1)
BROKEN = st.sampled_from([None, math.nan, math.inf, -math.inf, "0.1"])


def _values(kl: Any = KL, agreement: Any = AGREEMENT) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"kl": kl, "top1_agreement": agreement})


models = st.fixed_dictionaries({name: _values() for name in ("student", *NAMES)})
configs = st.builds(
    GateConfig,
    max_kl=st.none() | st.floats(0.01, 20),
    min_top1_agreement=st.none() | AGREEMENT,
    beats=st.dictionaries(
        st.sampled_from(NAMES),
        st.builds(Margins, kl=st.floats(0, 2), top1_agreement=st.floats(0, 0.5)),
    ),
)
OPERATORS = {
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


@given(models, configs)
def test_verdict_follows_from_the_numbers_it_shows(
    values: dict[str, Any], config: GateConfig
) -> None:
    result = check(values, config)
    asked = [config.max_kl, config.min_top1_agreement]
    assert len(result["checks"]) == sum(x is not None for x in asked) + 2 * len(config.beats)
    for item in result["checks"]:
        assert item["value"] is not None
        holds = OPERATORS[item["comparison"]](item["value"], item["threshold"])
        assert item["passed"] is holds
    assert result["passed"] is all(item["passed"] for item in result["checks"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@given(models, configs, st.data())
def test_what_is_broken_or_missing_never_passes(
    values: dict[str, Any], config: GateConfig, data: st.DataObject
) -> None:
    used = ["student", *config.beats]
    needed = {
        "kl": config.max_kl is not None or bool(config.beats),
        "top1_agreement": config.min_top1_agreement is not None or bool(config.beats),
    }
    metric = data.draw(st.sampled_from(sorted(needed)))
    model = data.draw(st.sampled_from(used))
    if data.draw(st.booleans()):
        values[model][metric] = data.draw(BROKEN)
    else:
        values[model].pop(metric)
    result = check(values, config)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    if needed[metric]:
        assert not result["passed"]


@given(configs)
def test_without_any_model_only_an_empty_gate_passes(config: GateConfig) -> None:
    result = check({}, config)
    assert result["passed"] == (result["checks"] == [])


@given(models, configs, st.floats(0, 1), st.floats(0, 1))
def test_a_better_student_still_passes(
    values: dict[str, Any], config: GateConfig, closer: float, more: float
) -> None:
    before = check(values, config)["passed"]
    student = values["student"]
    student["kl"] *= closer
    student["top1_agreement"] += more * (1 - student["top1_agreement"])
    assert check(values, config)["passed"] >= before


@given(_values(), st.sampled_from(NAMES))
def test_an_equal_student_beats_nothing(values: dict[str, Any], baseline: BaselineName) -> None:
    result = check({"student": values, baseline: values}, GateConfig(beats={baseline: Margins()}))
    nothing_above = values["top1_agreement"] == 1.0
    assert [item["passed"] for item in result["checks"]] == [False, nothing_above]
    assert not result["passed"]


def test_where_nothing_can_be_better_as_good_is_enough() -> None:
    values = {
        "student": {"kl": 0.001, "top1_agreement": 1.0},
        "cross_entropy": {"kl": 0.011, "top1_agreement": 1.0},
    }
    config = GateConfig(beats={"cross_entropy": Margins()})
    assert check(values, config)["passed"]
    values["student"]["top1_agreement"] = 0.99
    assert not check(values, config)["passed"]
    values["student"]["top1_agreement"] = 1.0
    unreachable = GateConfig(beats={"cross_entropy": Margins(top1_agreement=0.01)})
    assert not check(values, unreachable)["passed"]


def test_limits_are_inclusive_and_margins_strict() -> None:
    values = {
        "student": {"kl": 0.5, "top1_agreement": 0.75},
        "cross_entropy": {"kl": 1.0, "top1_agreement": 0.5},
    }
    config = GateConfig(
        max_kl=0.5,
        min_top1_agreement=0.75,
        beats={"cross_entropy": Margins(kl=0.5, top1_agreement=0.25)},
    )
    result = check(values, config)
    assert [(item["name"], item["passed"]) for item in result["checks"]] == [
        ("max_kl", True),
        ("min_top1_agreement", True),
        ("beats.cross_entropy.kl", False),
        ("beats.cross_entropy.top1_agreement", False),
    ]
    assert result["checks"][2] == {
        "name": "beats.cross_entropy.kl",
        "model": "student",
        "value": 0.5,
        "threshold": 0.5,
        "comparison": "<",
        "passed": False,
    }


@pytest.mark.parametrize("metric", ["kl", "top1_agreement"])
def test_one_failed_check_fails_the_gate(metric: str) -> None:
    values = {
        "student": {"kl": 0.5, "top1_agreement": 0.7},
        "untrained": {"kl": 6.0, "top1_agreement": 0.1},
    }
    config = GateConfig(beats={"untrained": Margins()})
    assert check(values, config)["passed"]
    values["student"][metric] = values["untrained"][metric]
    assert not check(values, config)["passed"]


ROUTING = "routing.accuracy"
TASK_CONFIG = GateConfig(
    floors={ROUTING: 0.7},
    beats={"cross_entropy": Margins(tasks={ROUTING: TaskMargin(margin=0.02, p=0.05)})},
    within_teacher={ROUTING: 0.03},
    language_gap={ROUTING: 0.05},
    no_regression={ROUTING: 0.01},
)
TASK_CHECKS = [
    f"floors.{ROUTING}",
    f"beats.cross_entropy.tasks.{ROUTING}",
    f"beats.cross_entropy.tasks.{ROUTING}.p",
    f"within_teacher.{ROUTING}",
    f"language_gap.{ROUTING}",
    f"no_regression.{ROUTING}",
]


def _figure(value: Any) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": 100}


def _metrics(**student: Any) -> dict[str, Any]:
    """Synthetic measurements that pass every check of ``TASK_CONFIG``."""
    languages = {code: {"accuracy": _figure(value)} for code, value in (("ko", 0.79), ("en", 0.81))}
    models = {
        "teacher": {"accuracy": _figure(0.82)},
        "student": {"accuracy": _figure(0.8), "by_language": languages},
        "cross_entropy": {"accuracy": _figure(0.75)},
    }
    models["student"] |= student
    return {
        "models": {
            "student": {"kl": 0.5, "top1_agreement": 0.7},
            "cross_entropy": {"kl": 0.9, "top1_agreement": 0.6},
        },
        "tasks": {"routing": models},
        "task_comparisons": {
            "routing": {"cross_entropy": {"accuracy": {"value": 0.05, "p": 0.01}}}
        },
    }


def _failed(metrics: Any, previous: Any = None) -> list[str]:
    result = check_metrics(metrics, TASK_CONFIG, previous or _metrics())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["passed"] is all(item["passed"] for item in result["checks"])
    return [item["name"] for item in result["checks"] if not item["passed"]]


def test_tasks_pass_and_fail_one_by_one() -> None:
    assert _failed(_metrics()) == []
    result = check_metrics(_metrics(), TASK_CONFIG, _metrics())
    assert [item["name"] for item in result["checks"]][2:] == TASK_CHECKS
    floor, above, p, teacher, gap, regression = TASK_CHECKS
    assert _failed(_metrics(accuracy=_figure(0.79))) == []
    assert _failed(_metrics(accuracy=_figure(0.77))) == [above, teacher, regression]
    assert _failed(_metrics(accuracy=_figure(0.5))) == [floor, above, teacher, regression]
    apart = {"ko": {"accuracy": _figure(0.7)}, "en": {"accuracy": _figure(0.8)}}
    assert _failed(_metrics(by_language=apart)) == [gap]
    assert _failed(_metrics(by_language={"en": {"accuracy": _figure(0.8)}})) == [gap]
    unsure = _metrics()
    unsure["task_comparisons"]["routing"]["cross_entropy"]["accuracy"]["p"] = 0.05
    assert _failed(unsure) == [p]
    better = _metrics(accuracy=_figure(0.9))
    assert _failed(_metrics(), better) == [regression]
    assert [
        c["name"] for c in check_metrics(_metrics(), TASK_CONFIG)["checks"] if not c["passed"]
    ] == [regression]


@given(st.sampled_from(["tasks", "task_comparisons", "student", "value", "p"]), BROKEN)
def test_tasks_that_were_not_measured_never_pass(what: str, broken: Any) -> None:
    metrics = _metrics()
    student = metrics["tasks"]["routing"]["student"]
    match what:
        case "tasks" | "task_comparisons":
            metrics[what] = {}
        case "student":
            del metrics["tasks"]["routing"]["student"]
        case "value":
            student["accuracy"]["value"] = broken
            student["by_language"]["ko"]["accuracy"]["value"] = broken
        case "p":
            metrics["task_comparisons"]["routing"]["cross_entropy"]["accuracy"]["p"] = broken
    failed = _failed(metrics)
    p = f"beats.cross_entropy.tasks.{ROUTING}.p"
    if what in ("task_comparisons", "p"):
        assert failed == [p]
    else:
        assert failed == [name for name in TASK_CHECKS if name != p]


@given(st.floats(0, 1), st.floats(0, 0.3))
def test_a_better_student_still_passes_its_tasks(value: float, more: float) -> None:
    before = set(_failed(_metrics(accuracy=_figure(value))))
    assert set(_failed(_metrics(accuracy=_figure(value + more)))) <= before


def test_the_command_is_usable_alone(tmp_path: Path) -> None:
    file = tiny_recipe(tmp_path, gate={"beats": {}, "floors": {"routing.accuracy": 0.7}})
    recipe = yaml.safe_load(file.read_text())
    recipe["teacher"]["path"] = "a-teacher-that-is-not-here"
    recipe["tasks"] = [{"name": "routing", "kind": "choice", "held_out": "not-here.jsonl"}]
    file.write_text(yaml.safe_dump(recipe))
    metrics = tmp_path / "run" / "evaluation" / "metrics.json"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(json.dumps(_metrics()))
    runner = CliRunner()

    def gate(*arguments: str) -> Any:
        return runner.invoke(app, ["gate", *arguments, "--recipe", str(file)])

    for place in (metrics, metrics.parent, tmp_path / "run"):
        done = gate(str(place), "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["passed"] is True
    shown = gate(str(metrics))
    assert "gate passed: 1 checks" in shown.stdout
    metrics.write_text(json.dumps(_metrics(accuracy=_figure(0.6))))
    failed = gate(str(metrics), "--json")
    assert (failed.exit_code, json.loads(failed.stdout)["passed"]) == (1, False)
    assert "failed: 1 of 1 checks" in gate(str(metrics)).stdout
    recipe["gate"]["no_regression"] = {"routing.accuracy": 0.01}
    file.write_text(yaml.safe_dump(recipe))
    assert gate(str(metrics), "--previous", str(tmp_path / "gone")).exit_code == 2
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "metrics.json").write_text(json.dumps(_metrics()))
    checks = json.loads(gate(str(metrics), "--previous", str(tmp_path / "last"), "--json").stdout)
    assert checks["checks"][-1]["threshold"] == pytest.approx(0.79)
    for broken in ("{", "[]", "{}"):
        metrics.write_text(broken)
        assert gate(str(metrics)).exit_code == 2
