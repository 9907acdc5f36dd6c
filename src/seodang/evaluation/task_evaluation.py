"""Measure models on tasks, as they are and perturbed; compare two of them.

A model is whatever responds to a task. Its results are written as soon as they are there, example
by example, and read again by work that goes on after it was stopped.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from seodang import machine
from seodang.artifact import write_atomically
from seodang.evaluation.perturb import language_of, perturbations_of, perturbed
from seodang.evaluation.statistics import difference, interval, paired_interval, ratio
from seodang.evaluation.task_metrics import Metric, Response, TaskResult, evaluate_responses
from seodang.evaluation.tasks import Task

TASKS = "tasks"  # folder of the per-example results
ROBUSTNESS = "robustness"  # the same, perturbed
LEXICAL, SEARCH = "lexical", "search"  # names of a first stage, and of the better one, as models
PERTURBED_EXAMPLES = 200  # of a task, at most
TIMED_REQUESTS = 20  # one at a time


class Responds(Protocol):
    """Whatever responds to a task."""

    def respond(self, task: Task, description: str | None) -> list[Response]:
        """The response to each example; progress is shown under ``description``."""


class Asked(Responds, Protocol):
    """A model that tasks are put to."""

    def seconds(self, task: Task) -> float:
        """How long the responses to the task's examples take."""


@dataclass(frozen=True)
class _Search:
    """A search over the passages, as one that ranks them."""

    scores: Mapping[str, float]

    def respond(self, task: Task, description: str | None) -> list[Response]:
        return [Response(log_likelihoods=(self.scores[e.id], 0.0)) for e in task.examples]


@dataclass(frozen=True)
class Measured:
    """The results of one model on one task: as it is, and by perturbation."""

    plain: TaskResult
    perturbed: dict[str, TaskResult]


def measure_tasks(
    models: Mapping[str, Asked],
    tasks: Sequence[Task],
    folder: Path,
    *,
    compared: str,
    robust: Container[str],
    timed: Container[str],
) -> dict[str, Any]:
    """What metrics.json says of tasks; the per-example results are written below ``folder``.

    ``tasks``: figures by task and model, ``lexical`` being the first stage of a ranking task and
    ``search`` the better one, each alone.
    ``task_comparisons``: the figures of ``compared`` minus those of each other model, paired.
    ``task_robustness``: of the ``robust`` models, on perturbed examples. ``task_costs``: seconds of
    single requests to the ``timed`` models, on ``machine``. ``task_examples``: what was asked.

    Raises what the models raise.
    """
    found: dict[str, Any] = {
        "tasks": {},
        "task_comparisons": {},
        "task_robustness": {},
        "task_costs": {"machine": this_machine()},
        "task_examples": describe(tasks),
    }
    for task in tasks:
        results = {
            name: measure_task(name, model, task, folder, robustness=name in robust)
            for name, model in models.items()
        }
        alone = replace(task, fusion=None)
        for name, scores in ((LEXICAL, task.first_stage), (SEARCH, task.search)):
            if scores is not None:
                search = _Search(scores)
                results[name] = measure_task(name, search, alone, folder, robustness=False)
        ours = results[compared].plain
        found["tasks"][task.name] = {name: figures(r.plain) for name, r in results.items()}
        found["task_comparisons"][task.name] = {
            name: compare(ours, r.plain) for name, r in results.items() if name != compared
        }
        found["task_robustness"][task.name] = {
            name: robustness(r) for name, r in results.items() if r.perturbed
        }
        found["task_costs"][task.name] = {
            name: latency(model, task) for name, model in models.items() if name in timed
        }
    found["task_costs"]["peak_memory_bytes"] = peak_memory()
    return found


def measure_task(
    name: str, model: Responds, task: Task, folder: Path, *, robustness: bool
) -> Measured:
    """Ask a model a task and, for ``robustness``, its perturbed examples too.

    Writes ``tasks/TASK.MODEL.jsonl`` and ``robustness/TASK.MODEL.PERTURBATION.jsonl`` below
    ``folder``; what is there already is not asked again. Raises what the model raises.
    """
    plain = _asked(
        model, task, f"{task.name}, {name}", folder / TASKS / f"{task.name}.{name}.jsonl"
    )
    found = {}
    for perturbation in perturbations_of(task) if robustness else []:
        changed = perturbed(task, perturbation, limit=PERTURBED_EXAMPLES)
        if changed.examples:
            file = folder / ROBUSTNESS / f"{task.name}.{name}.{perturbation}.jsonl"
            description = f"{task.name}, {name}, {perturbation}"
            found[perturbation] = _asked(model, changed, description, file)
    return Measured(plain, found)


def _asked(model: Responds, task: Task, description: str, file: Path) -> TaskResult:
    if file.exists():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return TaskResult.of_rows(task, rows)
    result = evaluate_responses(task, model.respond(task, description))
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows]
    write_atomically(file, "".join(lines).encode())
    return result


def figures(result: TaskResult) -> dict[str, Any]:
    """``{METRIC: {"value", "low", "high", "n"}, "by_language": {LANGUAGE: {METRIC: ...}}}``.

    A figure over no example at all is left out.
    """
    languages = {language: _figures(result.of_language(language)) for language in result.languages}
    return {**_figures(result), "by_language": languages}


def _figures(result: TaskResult) -> dict[str, Any]:
    return {
        name: vars(interval(metric.table, metric.statistic))
        for name, metric in result.metrics.items()
        if len(metric.table)
    }


def compare(ours: TaskResult, theirs: TaskResult) -> dict[str, Any]:
    """Our figures minus theirs, as :func:`figures`: ``value``, ``low``, ``high``, ``p``, ``test``.

    Only over the rows that both have, and only figures that both have.
    """
    ours, theirs = _paired(ours, theirs)
    languages = {
        language: _differences(ours.of_language(language), theirs.of_language(language))
        for language in ours.languages
    }
    return {**_differences(ours, theirs), "by_language": languages}


def _differences(ours: TaskResult, theirs: TaskResult) -> dict[str, Any]:
    return {
        name: vars(difference(metric.table, theirs.metrics[name].table, metric.statistic))
        for name, metric in ours.metrics.items()
        if name in theirs.metrics and len(metric.table)
    }


def _paired(ours: TaskResult, theirs: TaskResult) -> tuple[TaskResult, TaskResult]:
    """The rows of both that have the same id, in the order of ours."""
    places = {row["id"]: index for index, row in enumerate(theirs.rows)}
    mine = [index for index, row in enumerate(ours.rows) if row["id"] in places]
    other = [places[ours.rows[index]["id"]] for index in mine]
    return _rows(ours, np.array(mine, np.int64)), _rows(theirs, np.array(other, np.int64))


def _rows(result: TaskResult, places: npt.NDArray[np.int64]) -> TaskResult:
    metrics = {name: Metric(m.table[places], m.statistic) for name, m in result.metrics.items()}
    return TaskResult([result.rows[i] for i in places], metrics)


def robustness(measured: Measured) -> dict[str, Any]:
    """What perturbations change: ``{PERTURBATION: {"language", "n", METRIC: {...}}}``.

    A metric has its ``value`` on the perturbed examples, its value on the same examples ``before``
    and the ``change`` from there with its interval: negative is a drop. Calibration is left
    out.
    """
    found = {}
    for name, result in measured.perturbed.items():
        after, before = _paired(result, measured.plain)
        entry: dict[str, Any] = {"language": language_of(name), "n": len(after.rows)}
        for metric, (table, statistic) in after.metrics.items():
            if statistic is not ratio or metric not in before.metrics or not len(table):
                continue
            first = before.metrics[metric].table
            entry[metric] = {
                "value": float(ratio(table)),
                "before": float(ratio(first)),
                "change": vars(paired_interval(table, first)),
            }
        found[name] = entry
    return found


def latency(model: Asked, task: Task) -> dict[str, Any]:
    """Seconds of single requests, one after the other: ``median``, ``p95``, and their number.

    A first request, which is not counted, warms the model up.
    """
    places = np.linspace(0, len(task.examples) - 1, min(TIMED_REQUESTS, len(task.examples)))
    single = [replace(task, examples=[task.examples[int(place)]]) for place in places]
    model.seconds(single[0])
    seconds = [model.seconds(request) for request in single]
    return {
        "median": float(np.median(seconds)),
        "p95": float(np.percentile(seconds, 95)),
        "requests": len(seconds),
    }


def this_machine() -> dict[str, Any]:
    """Where latencies were measured: processor, cores that may be used, memory in bytes."""
    import torch

    memory = machine.memory()
    return {
        "processor": machine.cpu().model,
        "cores": machine.available_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": None if memory is None else memory.total_bytes,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def peak_memory() -> int:
    """The most main memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(tasks: Sequence[Task]) -> dict[str, Any]:
    """What was measured: kind, examples, languages, and how many examples are synthetic."""
    return {
        task.name: {
            "kind": task.kind,
            "examples": len(task.examples),
            "languages": task.languages,
            "synthetic": task.synthetic,
        }
        for task in tasks
    }
