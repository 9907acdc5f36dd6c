"""What responses are worth: each metric against another implementation or by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from seodang.evaluation.structured import field_f1, parsed, problem, same
from seodang.evaluation.task_metrics import (
    Response,
    evaluate_responses,
    normalised,
    ranking_metrics,
    token_f1,
)
from seodang.evaluation.tasks import Task
from tiny_tasks import REFUSAL, SCHEMA, TOPICS, examples


def _values(result: Any) -> dict[str, float]:
    return {name: float(metric.statistic(metric.table)) for name, metric in result.metrics.items()}


def test_the_likeliest_choice_is_the_answer() -> None:
    task = Task("routing", "choice", examples("choice", range(2)))
    right = [list(TOPICS).index(e.answer) for e in task.examples]
    scores = np.full((len(right), 4), math.log(0.1))
    for row, index in enumerate(right):
        scores[row, index if row % 4 else (index + 1) % 4] = math.log(0.7)
    found = evaluate_responses(task, [Response(tuple(row - 20)) for row in scores])
    assert _values(found)["accuracy"] == 0.75
    assert _values(found)["calibration_error"] == pytest.approx(0.75 - 0.7)
    assert found.rows[1]["chosen"] == task.examples[1].answer
    assert found.rows[1]["confidence"] == pytest.approx(0.7)
    spoken = evaluate_responses(task, [Response(said=f" {e.answer}\n") for e in task.examples])
    assert _values(spoken) == {"accuracy": 1.0}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40).filter(any))
def test_ranking_metrics_are_those_of_scikit_learn_and_of_loops(relevance: list[int]) -> None:
    found = ranking_metrics(np.array(relevance, np.float64))
    if len(relevance) > 1:
        expected = ndcg_score([relevance], [-np.arange(len(relevance))], k=10)
        assert found["ndcg@10"] == pytest.approx(expected)
    first = next(i for i, value in enumerate(relevance) if value) + 1
    assert found["mrr@10"] == (1 / first if first <= 10 else 0)
    hits = sum(value > 0 for value in relevance[:10])
    assert found["recall@10"] == pytest.approx(hits / sum(value > 0 for value in relevance))


def test_a_ranking_is_measured_by_query() -> None:
    task = Task("search", "ranking", examples("ranking", range(4)))
    perfect = [Response((-1.0, -5.0) if e.relevance else (-5.0, -1.0)) for e in task.examples]
    found = evaluate_responses(task, perfect)
    assert _values(found) == {"ndcg@10": 1, "mrr@10": 1, "recall@10": 1}
    assert len(found.rows) == len({e.group for e in task.examples}) == 8
    assert found.languages == ["en", "ko"]
    assert len(found.of_language("ko").rows) == 4
    worst = [Response(said="no" if e.relevance else "yes") for e in task.examples]
    assert _values(evaluate_responses(task, worst))["mrr@10"] == 0.25
    equal = [Response((-1.0, -1.0)) for _ in task.examples]
    order = [row["ranked"] for row in evaluate_responses(task, equal).rows]
    backwards = Task("search", "ranking", list(task.examples)[::-1])
    again = [row["ranked"] for row in evaluate_responses(backwards, equal).rows]
    assert sorted(order) == sorted(again)
    irrelevant = [e.model_copy(update={"relevance": 0}) for e in task.examples]
    assert evaluate_responses(Task("search", "ranking", irrelevant), equal).rows == []


def test_a_fused_ranking_weighs_the_scores_of_the_first_stage() -> None:
    passages = [e for e in examples("ranking", range(4)) if e.group == "en-card"]
    ids = [e.id for e in passages]  # the first is relevant
    odds, searched = [0.0, 3.0, 1.0, -1.0], [9.0, 4.0, 5.0, 1.0]
    given = [Response((value, 0.0)) for value in odds]
    for weight in (None, 1.0, 8.0):
        scores = dict(zip(ids, searched, strict=True))
        task = Task("search", "ranking", passages, first_stage=scores, fusion=weight)
        (row,) = evaluate_responses(task, given).rows
        shares = [(score - 1) / (9 - 1) for score in searched]
        fused = [o + (weight or 0) * share for o, share in zip(odds, shares, strict=True)]
        expected = sorted(zip(ids, fused, strict=True), key=lambda item: -item[1])
        assert row["ranked"] == [[id_, pytest.approx(score)] for id_, score in expected]
        place = [id_ for id_, _ in expected].index(ids[0])
        assert row["mrr@10"] == 1 / (place + 1)
        alone = evaluate_responses(task, [Response((score, 0.0)) for score in searched])
        assert [id_ for id_, _ in alone.rows[0]["ranked"]] == [ids[i] for i in (0, 2, 1, 3)]
    better = dict(zip(ids, [1.0, 4.0, 5.0, 9.0], strict=True))
    two = Task("search", "ranking", passages, first_stage=scores, search=better, fusion=8.0)
    (row,) = evaluate_responses(two, given).rows
    assert [id_ for id_, _ in row["ranked"]] == [ids[i] for i in (3, 1, 2, 0)]
    equal = Task("search", "ranking", passages, first_stage=dict.fromkeys(ids, 2.0), fusion=8.0)
    (row,) = evaluate_responses(equal, given).rows
    assert [score for _, score in row["ranked"]] == sorted(odds, reverse=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON, JSON)
def test_field_f1_is_symmetric_and_one_only_without_a_difference(one: Any, other: Any) -> None:
    assert field_f1(one, one) == 1
    assert field_f1(one, other) == field_f1(other, one)
    assert 0 <= field_f1(one, other) <= 1
    assert same(one, json.loads(json.dumps(one)))
    if same(one, other):
        assert field_f1(one, other) == 1


def test_field_f1_counts_leaves() -> None:
    right = {"part": "valve", "actions": ["close", "replace"], "at": {"line": 3}}
    said = {"part": "valve", "actions": ["replace", "open"], "at": {"line": 4}, "extra": True}
    assert field_f1(said, right) == pytest.approx(2 * 2 / (5 + 4))
    assert not same({"n": 1}, {"n": True})


def test_json_must_be_whole_and_keep_to_the_schema() -> None:
    task = Task("order", "json", examples("json", range(1))[:4], schema=SCHEMA)
    answers = [e.answer for e in task.examples]
    broken = f"Sure: {answers[1]}"
    wrong = json.dumps({"topic": "weather", "number": 0})
    swapped = json.dumps(dict(reversed(json.loads(answers[3]).items())))
    said = [answers[0], broken, wrong, swapped]
    found = evaluate_responses(task, [Response(said=text) for text in said])
    assert [row["schema_valid"] for row in found.rows] == [1, 0, 0, 1]
    assert [row["exact_match"] for row in found.rows] == [1, 0, 0, 1]
    assert [row["field_f1"] for row in found.rows] == [1, 0, 0.5, 1]
    assert parsed("[" * 100_000) is None
    assert problem({"topic": "card", "number": 1}, SCHEMA) is None


@pytest.mark.parametrize(
    ("said", "right", "language", "f1"),
    [
        ("The fee is 5 dollars.", "5 dollars", "en", 2 * 2 / (4 + 2)),
        ("a cat", "the cat!", "en", 1.0),
        ("", "cat", "en", 0.0),
        ("결제 취소", "결제취소", "ko", 1.0),
        ("결제", "결제취소", "ko", 2 * 2 / (2 + 4)),
        ("", "", "en", 1.0),
    ],
)
def test_token_f1_is_that_of_squad_and_korquad(
    said: str, right: str, language: str, f1: float
) -> None:
    assert token_f1(said, right, language) == pytest.approx(f1)
    assert normalised("  The  CAT, ") == "cat"


def test_refusing_is_measured_against_what_is_to_be_refused() -> None:
    task = Task("help", "answer", examples("answer", range(4))[:16], refusal=REFUSAL)
    refused = [e.answer == REFUSAL for e in task.examples]
    assert 0 < sum(refused) < len(refused)
    said = [REFUSAL.upper() + "." if index % 2 else "card" for index in range(len(refused))]
    found = evaluate_responses(task, [Response(said=text) for text in said])
    hits = sum(right and index % 2 for index, right in enumerate(refused))
    expected = 2 * hits / (sum(refused) + len(refused) // 2)
    assert _values(found)["refusal_f1"] == pytest.approx(expected)
    none = Task(
        "help", "answer", [e for e in task.examples if e.answer != REFUSAL], refusal=REFUSAL
    )
    assert (
        "refusal_f1"
        not in evaluate_responses(none, [Response(said="card") for _ in none.examples]).metrics
    )


def test_numbers_are_taken_from_the_end_of_an_answer() -> None:
    item = examples("answer", range(1, 2))[0].model_copy(update={"answer": "1800"})
    task = Task("gsm8k", "answer", [item, item], extract=r"-?\d[\d,]*(?:\.\d+)?")
    said = ["First 3 and then 1,800 dollars.", "1800, no: 18."]
    found = evaluate_responses(task, [Response(said=text) for text in said])
    assert [row["exact_match"] for row in found.rows] == [1, 0]
