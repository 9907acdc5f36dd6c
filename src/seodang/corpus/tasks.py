"""Task files: the examples that a student learns a task from, or is measured on.

A line is an example: the ``messages`` of the request, the ``answer`` of a right model, and what
its kind of task needs beside them. A task's training side becomes documents of the corpus. Its
held-out side is only measured, so no document that resembles an example of it may be trained on.

Examples of one task share most of their words: an instruction, a list of categories. What tells
them apart is what is left without the runs of three words that many of a language share; of a
ranking task, whose held-out queries meet known passages, what all passages of a query share.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seodang.corpus.documents import Document, content_id, normalise
from seodang.corpus.formats import File, names, read_records
from seodang.corpus.split import clusters, without_duplicates, words
from seodang.errors import InputError
from seodang.recipe import Language, TaskConfig, TaskKind

MAX_LINE = 1_000_000  # bytes
TEMPLATE_SHARE = 0.3  # of the examples in a language: what more of them hold is their template
TEMPLATE_EXAMPLES = 5

_Text = Annotated[str, Field(min_length=1)]


class Turn(BaseModel):
    """One message of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Literal["system", "user", "assistant"]
    content: _Text


class Request(BaseModel):
    """One line of a task file without its answer; ``choices`` and ``group`` as its kind needs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: _Text
    messages: list[Turn] = Field(min_length=1)
    choices: list[_Text] | None = None
    language: Language
    group: _Text | None = None
    source: _Text
    license: _Text
    synthetic: bool

    @property
    def request(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [message.model_dump() for message in self.messages]

    @property
    def words(self) -> str:
        """All words of the request, and of its answer if that is known."""
        return "\n".join(message.content for message in self.messages)


class Example(Request):
    """One line of a task file; ``relevance`` is a ranking's."""

    answer: _Text
    relevance: int | None = Field(None, ge=0, le=3)

    @property
    def words(self) -> str:
        """All words of the request and its answer."""
        return f"{super().words}\n{self.answer}"


Line = TypeVar("Line", bound=Request)


def read_examples(
    path: Path, kind: TaskKind, languages: Sequence[Language] | None = None
) -> list[Example]:
    """The examples of one side of a task, of those ``languages`` only if any are named.

    Raises ``InputError`` naming file, line and key for a line that is no example of this kind,
    for an id that stands on two lines, and for a file without any.
    """
    return _read(path, kind, languages, Example)


def read_requests(
    path: Path, kind: TaskKind, languages: Sequence[Language] | None = None
) -> list[Request]:
    """Requests of a task that nobody has answered; raises ``InputError`` like ``read_examples``."""
    return _read(path, kind, languages, Request)


def _read(
    path: Path, kind: TaskKind, languages: Sequence[Language] | None, line: type[Line]
) -> list[Line]:
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"{path}: a task file is a .jsonl file, one example a line")
    found: dict[str, Line] = {}
    for record in read_records(File(path.name, str(path), lambda: path.open("rb")), None, MAX_LINE):
        read = _parsed(record.value, record.where, line)
        _check_choices(read, kind, record.where)
        if isinstance(read, Example):
            _check_answer(read, kind, record.where)
        if read.id in found:
            raise InputError(f"{record.where}: `id`: {read.id!r} stands on an earlier line too")
        first = next(iter(found.values()), read)
        if (read.choices is None) != (first.choices is None):
            raise InputError(f"{record.where}: `choices`: every line of a file has them, or none")
        found[read.id] = read
    kept = [r for r in found.values() if languages is None or r.language in languages]
    if not kept:
        spoken = "" if languages is None else f" in {names(languages)}"
        raise InputError(f"{path}: holds no {line.__name__.lower()}{spoken}")
    return kept


def _parsed(value: Any, where: str, line: type[Line]) -> Line:
    try:
        return line.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"{where}: unknown key `{key}`; known: {names(line.model_fields)}"
            ) from None
        message = "the key is missing" if first["type"] == "missing" else first["msg"]
        raise InputError(f"{where}: {f'`{key}`: ' if key else ''}{message}") from None


def _check_choices(asked: Request, kind: TaskKind, where: str) -> None:
    if asked.messages[-1].role != "user":
        raise InputError(f"{where}: `messages`: the last must be the user's")
    choices = asked.choices
    if choices is None and kind in ("choice", "ranking"):
        raise InputError(f"{where}: `choices`: a {kind} task needs them")
    if choices is not None:
        if kind == "json":
            raise InputError(f"{where}: `choices`: have no place in a json task")
        if len(set(choices)) != len(choices) or len(choices) < 2:
            raise InputError(f"{where}: `choices`: wants at least two different ones")
        if kind == "ranking" and len(choices) != 2:
            raise InputError(f"{where}: `choices`: a ranking task has two, the relevant one first")
    if kind == "ranking" and asked.group is None:
        raise InputError(f"{where}: `group`: a ranking task needs it")


def _check_answer(example: Example, kind: TaskKind, where: str) -> None:
    if example.choices is not None and example.answer not in example.choices:
        raise InputError(f"{where}: `answer`: {example.answer!r} is not one of `choices`")
    if kind == "ranking" and example.relevance is None:
        raise InputError(f"{where}: `relevance`: a ranking task needs it")
    if kind == "json":
        try:
            json.loads(example.answer)
        except ValueError as error:
            raise InputError(f"{where}: `answer`: is not JSON: {error}") from None


def task_documents(
    task: TaskConfig,
) -> tuple[list[Document], list[Document]]:
    """The training examples as conversations, and the held-out ones, which nobody may train on.

    ``compared`` of each document holds the words that tell it apart from the others of its task.
    """
    train, held_out = _both_sides(task)
    documents = _compared(task, [*train, *held_out])
    return documents[: len(train)], documents[len(train) :]


def unseen_requests(task: TaskConfig, near_duplicate: float) -> list[Request]:
    """The task's requests that no example asks, each once, in the order of their file.

    Left out is what a training or held-out example asks word for word, and what is a
    near-duplicate of a held-out one (``near_duplicate``: of a Jaccard similarity from which on).
    Raises ``InputError`` as ``read_examples`` does.
    """
    assert task.requests is not None
    asked = read_requests(Path(task.requests), task.kind, task.languages)
    train, held_out = _both_sides(task)
    known = {_spoken(example) for example in [*train, *held_out]}
    first: dict[tuple[str, ...], Request] = {}
    for request in asked:
        if _spoken(request) not in known:
            first.setdefault(_spoken(request), request)
    # The answers of both are left out: those of the requests are not known.
    measured = [Request(**_without_answer(example)) for example in held_out]
    documents = _compared(task, [*first.values(), *measured])
    requests = dict(zip(map(id, documents), first.values(), strict=False))
    near: set[int] = set()
    for cluster in clusters(without_duplicates(documents), near_duplicate):
        if any(id(document) not in requests for document in cluster.documents):
            near.update(id(document) for document in cluster.documents)
    return [request for key, request in requests.items() if key not in near]


def answered(task: TaskConfig, asked: Request, answer: str) -> Document:
    """A request with an answer that a model wrote, as a conversation to learn from."""
    return replace(_document(task, asked, answer, None), synthetic=True)


def _both_sides(task: TaskConfig) -> tuple[list[Example], list[Example]]:
    train, held_out = (
        [] if file is None else read_examples(Path(file), task.kind, task.languages)
        for file in (task.train, task.held_out)
    )
    return train, held_out


def _without_answer(example: Example) -> dict[str, Any]:
    return {key: getattr(example, key) for key in Request.model_fields}


def _spoken(asked: Request) -> tuple[str, ...]:
    """What is asked, as far as it is compared word for word."""
    return tuple(" ".join(words(message.content)) for message in asked.messages)


def _compared(task: TaskConfig, asked: Sequence[Request]) -> list[Document]:
    texts = distinctive(asked, grouped=task.kind == "ranking")
    return [
        _document(task, one, one.answer if isinstance(one, Example) else "", text)
        for one, text in zip(asked, texts, strict=True)
    ]


def _document(task: TaskConfig, asked: Request, answer: str, compared: str | None) -> Document:
    messages = [*asked.request, {"role": "assistant", "content": answer}]
    messages = [{**turn, "content": normalise(turn["content"])} for turn in messages]
    return Document(
        id=content_id({"messages": messages}),
        source=asked.source,
        license=asked.license,
        origin=f"{task.name}#{asked.id}",
        messages=messages,
        compared=compared,
        synthetic=asked.synthetic,
    )


def distinctive(examples: Sequence[Request], *, grouped: bool) -> list[str]:
    """The words of each example without what many share; ``grouped``: those of its whole group.

    An example of which nothing is left keeps all of its words.
    """
    spoken = [words(example.words) for example in examples]
    runs = [list(zip(text, text[1:], text[2:], strict=False)) for text in spoken]
    # A long list of passages repeats its query, which is no template: there groups are counted.
    groups = [str(example.group) if grouped else example.id for example in examples]
    shared: dict[str, set[_Run]] = {}
    holders: dict[_Run, set[str]] = defaultdict(set)
    for group, found in zip(groups, runs, strict=True):
        shared[group] = shared.get(group, set(found)) & set(found)
        for run in found:
            holders[run].add(group)
    language = {group: e.language for group, e in zip(groups, examples, strict=True)}
    number = Counter(language.values())
    template: dict[str, set[_Run]] = defaultdict(set)
    for run, where in holders.items():
        for spoken_in, count in Counter(language[group] for group in where).items():
            if count > max(TEMPLATE_EXAMPLES, TEMPLATE_SHARE * number[spoken_in]):
                template[spoken_in].add(run)
    kept = []
    for group, text, found in zip(groups, spoken, runs, strict=True):
        commonplace = template[language[group]]
        own = _covered(text, found, shared[group] - commonplace) if grouped else []
        common = set(_covered(text, found, commonplace))
        own = own or [index for index in range(len(text)) if index not in common]
        kept.append(" ".join(text[index] for index in own) or " ".join(text))
    return kept


_Run = tuple[str, str, str]


def _covered(text: list[str], runs: Sequence[_Run], wanted: set[_Run]) -> list[int]:
    """Where the words stand that a run of ``wanted`` covers, in rising order."""
    places = {start + step for start, run in enumerate(runs) if run in wanted for step in range(3)}
    return sorted(places)
