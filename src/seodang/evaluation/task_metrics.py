"""What a model's responses to a task are worth, example by example.

choice
    ``accuracy``: the likeliest choice is the right one. ``calibration_error``: of the probability
    of that choice among the choices.
ranking
    per query, over its passages by falling score: ``ndcg@10`` (Järvelin and Kekäläinen 2002, the
    relevance itself as gain, as in trec_eval), ``mrr@10`` and ``recall@10``, for which every
    relevance above 0 counts. The score is the log-odds of the first choice against the second,
    with ``fusion`` plus that weight of the search's score, scaled to [0, 1] over the query's
    passages (Bruch et al., arXiv 2210.11934, eq. 3, up to a factor). Equal scores are ordered at
    random, but always alike. Queries without a relevant passage are left out: they measure nothing.
json
    ``schema_valid``, ``exact_match`` of the whole value and ``field_f1`` over its fields.
answer
    ``exact_match`` and ``token_f1`` as in SQuAD (Rajpurkar et al. 2016), in Korean over
    characters as in KorQuAD (Lim et al. 2019), and, if the task has examples to be refused,
    ``refusal_f1``: of refusing against those that are to be refused.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from seodang.artifact import sha256_bytes
from seodang.corpus.tasks import Example, Request
from seodang.evaluation import structured
from seodang.evaluation.statistics import Float, Statistic, calibration_error, mean_of, ratio
from seodang.evaluation.tasks import Task
from seodang.recipe import TaskKind

AT = 10  # the depth of ranking metrics
MAIN: dict[TaskKind, str] = {
    "choice": "accuracy",
    "ranking": f"ndcg@{AT}",
    "json": "field_f1",
    "answer": "token_f1",
}
"""The metric that stands for a kind of task in plots and short tables."""


@dataclass(frozen=True)
class Response:
    """What a model gave for one example: the choices' log-likelihoods (nats), or what it said."""

    log_likelihoods: tuple[float, ...] | None = None
    said: str | None = None

    def answer_to(self, request: Request) -> str:
        """The likeliest of the request's choices; without likelihoods, what the model said."""
        if self.log_likelihoods is None or request.choices is None:
            return self.said or ""
        return request.choices[int(np.argmax(self.log_likelihoods))]


class Metric(NamedTuple):
    """Per-example columns (n, 2), and the statistic that makes a figure of them."""

    table: Float
    statistic: Statistic = ratio


@dataclass(frozen=True)
class TaskResult:
    """A model's results: metrics over the rows, each row's ``id`` and ``language``, and the rows.

    A row is an example, or a query of a ranking task.
    """

    rows: list[dict[str, Any]]
    metrics: dict[str, Metric]

    @classmethod
    def of_rows(cls, task: Task, rows: list[dict[str, Any]]) -> TaskResult:
        """The result of rows that were judged before."""
        return cls(rows, _metrics(task, rows))

    @property
    def languages(self) -> list[str]:
        """The languages of the rows, in alphabetical order."""
        return sorted({row["language"] for row in self.rows})

    def of_language(self, language: str) -> TaskResult:
        """The part of it that is in one language."""
        keep = np.array([row["language"] == language for row in self.rows], bool)
        rows = [row for row, kept in zip(self.rows, keep, strict=True) if kept]
        return TaskResult(
            rows, {name: Metric(m.table[keep], m.statistic) for name, m in self.metrics.items()}
        )


def evaluate_responses(task: Task, responses: Sequence[Response]) -> TaskResult:
    """Judge one response to each example of the task, in their order."""
    pairs = list(zip(task.examples, responses, strict=True))
    match task.kind:
        case "choice":
            rows = [_choice(example, response) for example, response in pairs]
        case "ranking":
            rows = _ranking(task, pairs)
        case "json":
            rows = [_json(task, example, response) for example, response in pairs]
        case "answer":
            rows = [_answer(task, example, response) for example, response in pairs]
    return TaskResult.of_rows(task, rows)


def _metrics(task: Task, rows: list[dict[str, Any]]) -> dict[str, Metric]:
    names = {
        "choice": ["accuracy"],
        "ranking": [f"ndcg@{AT}", f"mrr@{AT}", f"recall@{AT}"],
        "json": ["schema_valid", "exact_match", "field_f1"],
        "answer": ["exact_match", "token_f1"],
    }[task.kind]
    metrics = {name: Metric(mean_of([row[name] for row in rows])) for name in names}
    if task.kind == "choice" and all("confidence" in row for row in rows):
        sure = np.array([[row["confidence"], row["accuracy"]] for row in rows], np.float64)
        metrics["calibration_error"] = Metric(sure.reshape(-1, 2), calibration_error)
    if task.refusal is not None and any(row["should_refuse"] for row in rows):
        counts = [
            (2 * (row["refused"] and row["should_refuse"]), row["refused"] + row["should_refuse"])
            for row in rows
        ]
        metrics["refusal_f1"] = Metric(np.array(counts, np.float64).reshape(-1, 2))
    return metrics


def _row(example: Example, **found: Any) -> dict[str, Any]:
    return {"id": example.id, "language": example.language, **found}


def _choice(example: Example, response: Response) -> dict[str, Any]:
    assert example.choices is not None
    if response.log_likelihoods is None:
        said = (response.said or "").strip()
        return _row(example, said=said, accuracy=int(said == example.answer))
    scores = np.array(response.log_likelihoods, np.float64)
    probabilities = np.exp(scores - np.logaddexp.reduce(scores))
    chosen = response.answer_to(example)
    return _row(
        example,
        chosen=chosen,
        confidence=float(min(1.0, probabilities.max())),
        accuracy=int(chosen == example.answer),
    )


def _ranking(task: Task, pairs: Sequence[tuple[Example, Response]]) -> list[dict[str, Any]]:
    queries: dict[str, list[tuple[Example, float]]] = defaultdict(list)
    for example, response in pairs:
        queries[str(example.group)].append((example, _relevance_score(example, response)))
    rows = []
    for query, found in queries.items():
        scored = found if task.fusion is None else _fused(task, found)
        scored.sort(key=lambda item: (-item[1], sha256_bytes(item[0].id.encode())))
        relevance = np.array([example.relevance for example, _ in scored], np.float64)
        if not relevance.any():
            continue
        rows.append(
            {
                "id": query,
                "language": scored[0][0].language,
                **ranking_metrics(relevance),
                "ranked": [[example.id, round(score, 6)] for example, score in scored],
            }
        )
    return rows


def _fused(task: Task, scored: list[tuple[Example, float]]) -> list[tuple[Example, float]]:
    """A query's passages with their scores and the weighted ones of the better search."""
    searched = task.search or task.first_stage
    assert searched is not None
    assert task.fusion is not None
    found = np.array([searched[example.id] for example, _ in scored])
    shares = (found - found.min()) / (np.ptp(found) or 1.0)
    return [
        (example, score + task.fusion * float(share))
        for (example, score), share in zip(scored, shares, strict=True)
    ]


def _relevance_score(example: Example, response: Response) -> float:
    """Log-odds of the first choice; 1 or 0 for a model that only says one of the two."""
    assert example.choices is not None
    if response.log_likelihoods is None:
        return float((response.said or "").strip() == example.choices[0])
    first, second = response.log_likelihoods
    return first - second


def ranking_metrics(relevance: Float) -> dict[str, float]:
    """nDCG, reciprocal rank and recall at ``AT`` of a query's passages, best first: (passages,)."""
    top, best = relevance[:AT], np.sort(relevance)[::-1][:AT]
    discounts = 1 / np.log2(np.arange(2, len(top) + 2))
    hits = np.flatnonzero(top > 0)
    return {
        f"ndcg@{AT}": float(top @ discounts / (best @ discounts)),
        f"mrr@{AT}": float(1 / (hits[0] + 1)) if len(hits) else 0.0,
        f"recall@{AT}": float(len(hits) / (relevance > 0).sum()),
    }


def _json(task: Task, example: Example, response: Response) -> dict[str, Any]:
    assert task.schema is not None
    said = response.said or ""
    value, right = structured.parsed(said), json.loads(example.answer)
    valid = value is not None and structured.problem(value, task.schema) is None
    return _row(
        example,
        said=said,
        schema_valid=int(valid),
        exact_match=int(value is not None and structured.same(value, right)),
        field_f1=0.0 if value is None else structured.field_f1(value, right),
    )


def _answer(task: Task, example: Example, response: Response) -> dict[str, Any]:
    said = response.answer_to(example)
    given, right = said, example.answer
    if task.extract is not None:
        given, right = (extracted(text, task.extract) for text in (given, right))
    row = _row(
        example,
        said=said,
        exact_match=int(normalised(given) == normalised(right)),
        token_f1=token_f1(given, right, example.language),
    )
    if task.refusal is not None:
        refusal = normalised(task.refusal)
        row["should_refuse"] = int(normalised(right) == refusal)
        row["refused"] = int(refusal in normalised(said))
    return row


def extracted(said: str, pattern: str) -> str:
    """The last match of ``pattern`` without the commas of large numbers, or nothing."""
    found = re.findall(pattern, said)
    return str(found[-1]).replace(",", "") if found else ""


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, English articles and needless white space."""
    text = unicodedata.normalize("NFC", text).lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(said: str, right: str, language: str) -> float:
    """F1 over the words that two answers share, in Korean over characters; 1 if both are empty."""
    ours, theirs = (Counter(_units(normalised(text), language)) for text in (said, right))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 1.0


def _units(text: str, language: str) -> list[str]:
    return list(text.replace(" ", "")) if language == "ko" else text.split()
