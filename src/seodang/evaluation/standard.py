"""The standard part: small benchmark sets that pinned packages ship, as tasks.

GSM8K (Cobbe et al. 2021), HellaSwag (Zellers et al. 2019) and TruthfulQA's single-choice part
(Lin et al. 2022) are asked without examples and through the model's chat template. The figures
compare models with each other; a leaderboard asks the same questions in another way.

What else is pinned beside them, such as HumanEval, whose answers are programs that would have to
be run, is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from seodang.corpus.raw.config import Benchmark
from seodang.corpus.tasks import Example, Turn
from seodang.errors import InputError
from seodang.evaluation.tasks import Task
from seodang.packages import open_package
from seodang.progress import say
from seodang.recipe import TaskKind

NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def standard_tasks(benchmarks: Sequence[Benchmark]) -> list[Task]:
    """The tasks of those benchmarks that can be asked, in the order of their files.

    Raises ``InputError`` if a package is not on this machine, or holds another format.
    """
    found: list[Task] = []
    for benchmark in benchmarks:
        pin = benchmark.pin()
        if pin is None:
            continue
        with open_package(pin) as package:
            for pattern in benchmark.files:
                for member in package.matching(pattern):
                    name = member.rsplit("/", 2)[-2] if "/" in member else member
                    if name not in _READERS:
                        say(f"{pin}: {member} is not asked: its answers cannot be checked here")
                        continue
                    lines = package.open(member).read().decode().splitlines()
                    try:
                        found.append(_task(name, [json.loads(line) for line in lines], benchmark))
                    except (ValueError, KeyError, TypeError, IndexError) as error:
                        raise InputError(f"{pin}/{member}: not as expected: {error!r}") from None
    return found


def _task(name: str, rows: list[dict[str, Any]], benchmark: Benchmark) -> Task:
    kind, read, options = _READERS[name]
    examples = []
    for row in rows:
        request, answer, choices = read(row)
        examples.append(
            Example(
                id=str(row["id"]),
                messages=[Turn(role="user", content=request)],
                answer=answer,
                choices=choices,
                language="en",
                source=benchmark.name,
                license=benchmark.license,
                synthetic=False,
            )
        )
    return Task(name=name, kind=kind, examples=examples, **options)


_Read = Callable[[dict[str, Any]], tuple[str, str, list[str] | None]]


def _gsm8k(row: dict[str, Any]) -> tuple[str, str, list[str] | None]:
    return (
        f"{row['prompt']}\n\nEnd with the number that answers the question.",
        row["expected"],
        None,
    )


def _hellaswag(row: dict[str, Any]) -> tuple[str, str, list[str] | None]:
    request = f"Write how this goes on: {row['ctx']}"
    return request, row["endings"][row["expected_index"]], row["endings"]


def _truthfulqa(row: dict[str, Any]) -> tuple[str, str, list[str] | None]:
    return row["question"], row["choices"][row["expected_index"]], row["choices"]


_READERS: dict[str, tuple[TaskKind, _Read, dict[str, Any]]] = {
    "gsm8k": ("answer", _gsm8k, {"extract": NUMBER, "max_new_tokens": 256}),
    "hellaswag": ("choice", _hellaswag, {}),
    "truthfulqa_mc1": ("choice", _truthfulqa, {}),
}
