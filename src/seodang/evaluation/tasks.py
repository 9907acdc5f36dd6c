"""Tasks: held-out examples of one kind, and what a model may say to them.

A task comes from a recipe, from a list of tasks in a file of its own, or from a single task file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seodang.artifact import canonical_json, sha256_bytes
from seodang.corpus.formats import File, read_records
from seodang.corpus.tasks import MAX_LINE, Example, read_examples
from seodang.errors import InputError
from seodang.recipe import TaskConfig, TaskKind

SCORES, SEARCH_SCORES = "scores", "search_scores"  # keys of a first stage's lines
SPARE_TOKENS = 16  # an answer may be half as long again as the longest right one, and so much more


@dataclass(frozen=True)
class Task:
    """Examples that a model is measured on.

    ``schema`` is the JSON schema of the answers (kind json), ``refusal`` the answer where there is
    nothing to answer from (kind answer), ``first_stage`` the score that a search gave to each
    example, by id, ``search`` that of a better one, if there is one, and ``fusion`` the weight
    of the better one's beside a model's (kind ranking). ``extract`` is a pattern whose last
    match in what a model says is its answer, ``max_new_tokens`` how much it may say; both have
    a default.
    """

    name: str
    kind: TaskKind
    examples: Sequence[Example]
    schema: dict[str, Any] | None = field(default=None, hash=False)
    refusal: str | None = None
    first_stage: dict[str, float] | None = field(default=None, hash=False)
    search: dict[str, float] | None = field(default=None, hash=False)
    fusion: float | None = None
    extract: str | None = None
    max_new_tokens: int | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides a model's result."""
        examples = [example.model_dump() for example in self.examples]
        rest = [self.name, self.kind, self.schema, self.refusal, self.extract, self.max_new_tokens]
        given = [g for g in (self.first_stage, self.search, self.fusion) if g is not None]
        return sha256_bytes(canonical_json([*rest, *given, examples]))

    @property
    def has_choices(self) -> bool:
        """Whether every example names what may be said to it: its likeliest choice is taken."""
        return all(example.choices is not None for example in self.examples)

    @property
    def languages(self) -> list[str]:
        """The languages of the examples, in alphabetical order."""
        return sorted({example.language for example in self.examples})

    @property
    def synthetic(self) -> int:
        """How many examples are synthetic."""
        return sum(example.synthetic for example in self.examples)


def load_task(config: TaskConfig) -> Task:
    """The held-out side of a recipe's task.

    Raises ``InputError`` naming file, line and key for a file that is no task of this kind, a
    JSON schema that is none, an answer that breaks it, and a passage that the search did not score.
    """
    file = Path(config.held_out)
    examples = read_examples(file, config.kind, config.languages)
    scored: dict[str, dict[str, float]] = {}
    if config.first_stage is not None:
        scored = _read_scores(Path(config.first_stage), examples)
    task = Task(
        name=config.name,
        kind=config.kind,
        examples=examples,
        schema=None if config.json_schema is None else _read_schema(Path(config.json_schema)),
        refusal=config.refusal,
        first_stage=scored.get(SCORES),
        search=scored.get(SEARCH_SCORES),
        fusion=config.fusion,
    )
    if task.schema is not None:
        from seodang.evaluation.constrained import not_generable
        from seodang.evaluation.structured import problem

        for example in task.examples:
            if wrong := problem(json.loads(example.answer), task.schema):
                raise InputError(f"{file}: {example.id}: `answer`: breaks the schema: {wrong}")
        if unable := not_generable(task.schema):
            raise InputError(f"{config.json_schema}: no answer can be generated under it: {unable}")
    return task


def _read_scores(file: Path, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """The examples' ``scores`` by a search and, if the lines have them, ``search_scores``.

    Lines of JSON with ``ids`` and as many scores of each kind.
    """
    found: dict[str, dict[str, float]] = {SCORES: {}}
    source = File(file.name, str(file), lambda: file.open("rb"))
    for record in read_records(source, None, MAX_LINE):
        line = record.value if isinstance(record.value, dict) else {}
        ids = line.get("ids")
        for kind in (SCORES, SEARCH_SCORES):
            if kind not in line and kind != SCORES:
                continue
            scores = line.get(kind)
            if not (isinstance(ids, list) and isinstance(scores, list) and len(ids) == len(scores)):
                raise InputError(f"{record.where}: wants as many `{kind}` as `ids`")
            if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
                raise InputError(f"{record.where}: `{kind}`: are not all numbers")
            found.setdefault(kind, {}).update(zip(map(str, ids), map(float, scores), strict=True))
    for kind, scores_of in found.items():
        for example in examples:
            if example.id not in scores_of:
                which = "score" if kind == SCORES else f"`{kind}`"
                raise InputError(
                    f"{file}: has no {which} of {example.id}, a passage of {example.group}"
                )
        found[kind] = {example.id: scores_of[example.id] for example in examples}
    return found


def _read_schema(file: Path) -> dict[str, Any]:
    from jsonschema import Draft202012Validator, SchemaError
    from jsonschema.validators import validator_for

    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except ValueError as error:
        raise InputError(f"{file}: is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise InputError(f"{file}: a JSON schema is an object")
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise InputError(f"{file}: {error.json_path}: {error.message}") from None
    return schema


def read_tasks(path: Path) -> list[Task]:
    """The tasks that a file names: a recipe, a list of ``tasks`` (YAML), or one task file.

    Of a foundation recipe they are its ``benchmarks``. What a task file alone holds is seen from
    its keys: choices with a relevance are a ranking, choices a choice task, all else answers (those
    with choices too are told from choice tasks by a recipe or a list of tasks only).
    Raises ``InputError`` if there is no task in it, and as :func:`load_task` does.
    """
    if path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        return [_task_of_file(path)]
    from seodang.foundation.recipe import is_foundation_recipe, load_foundation_recipe
    from seodang.recipe_file import load_recipe, load_task_list

    if is_foundation_recipe(path):
        from seodang.evaluation.standard import standard_tasks

        found = standard_tasks(load_foundation_recipe(path).corpus.benchmarks)
    else:
        configs = load_task_list(path) or load_recipe(path).tasks
        found = [load_task(config) for config in configs]
    if not found:
        raise InputError(f"{path}: names no task; add `tasks`, or name a task file (.jsonl)")
    return found


def _task_of_file(path: Path) -> Task:
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline()) if path.suffix == ".jsonl" else {}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError:
        first = {}
    keys = first if isinstance(first, dict) else {}
    kind: TaskKind = "answer"
    if "choices" in keys:
        kind = "ranking" if "relevance" in keys else "choice"
    name = "".join(c if c.isalnum() or c in "_-" else "-" for c in path.name.split(".")[0])
    return Task(name=name or "task", kind=kind, examples=read_examples(path, kind))
