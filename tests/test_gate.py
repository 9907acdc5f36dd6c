"""The gate: what passes, and above all what never does."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seodang.evaluation.gate import check
from seodang.recipe import BaselineName, GateConfig, Margins

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
    assert [item["passed"] for item in result["checks"]] == [False, False]


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
