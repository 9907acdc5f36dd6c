"""Synthetic task files of every kind, in both languages, and a run's recipe with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seodang.corpus.tasks import Example, Turn

TOPICS = {
    "card": ["I lost my card {n}", "카드 {n}번을 잃어버렸습니다"],
    "payment": ["payment {n} was taken twice", "{n}번 결제가 두 번 되었습니다"],
    "phone call": ["my phone {n} has no signal", "휴대폰 {n}이 터지지 않습니다"],
    "phone": ["my telephone {n} rings", "전화 {n}번이 울립니다"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "topic": {"enum": list(TOPICS)},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["topic", "number"],
    "additionalProperties": False,
}
SHORT_SCHEMA = {
    "type": "object",
    "properties": {"topic": {"enum": ["card", "phone"]}},
    "required": ["topic"],
    "additionalProperties": False,
}
REFUSAL = "I do not know"
INSTRUCTION = "Route the request to card, payment, phone call or phone, and to nothing else."


def example(kind: str, number: int, topic: str, language: str) -> dict[str, Any]:
    """One line of a task file."""
    request = TOPICS[topic][language == "ko"].format(n=number)
    line: dict[str, Any] = {
        "id": f"{kind}-{language}-{topic}-{number}",
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": f"Request: {request}."},
        ],
        "answer": topic,
        "language": language,
        "source": "synthetic requests",
        "license": "CC0-1.0",
        "synthetic": True,
    }
    if kind == "choice":
        line["choices"] = list(TOPICS)
    if kind == "ranking":
        about = list(TOPICS)[number % len(TOPICS)]
        line |= {"choices": ["yes", "no"], "group": f"{language}-{topic}"}
        line |= {"answer": "yes" if about == topic else "no", "relevance": int(about == topic)}
        line["messages"][1]["content"] += f"\nPassage: about {about} {number}."
    if kind == "json":
        line["answer"] = json.dumps({"topic": topic, "number": number})
    if kind == "answer" and number % 3 == 0:
        line["answer"] = REFUSAL
    return line


def task_lines(kind: str, numbers: range) -> list[dict[str, Any]]:
    """All topics in both languages for each of the numbers."""
    return [
        example(kind, number, topic, language)
        for number in numbers
        for topic in TOPICS
        for language in ("en", "ko")
    ]


def request_lines(kind: str, numbers: range) -> list[dict[str, Any]]:
    """Lines of a file of requests: examples without what is known of their answers."""
    unknown = ("answer", "relevance")
    return [
        {k: v for k, v in line.items() if k not in unknown} for line in task_lines(kind, numbers)
    ]


def write_lines(file: Path, lines: list[dict[str, Any]]) -> Path:
    """Write a task file."""
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return file


def examples(kind: str, numbers: range) -> list[Example]:
    """The same, as they are read."""
    found = []
    for line in task_lines(kind, numbers):
        turns = [Turn(**message) for message in line["messages"]]
        found.append(Example(**{**line, "messages": turns}))
    return found


def first_stage(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A search that finds the passages of a query in the order of their lines."""
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line["group"], []).append(line["id"])
    return [{"ids": ids, "scores": [-float(i) for i in range(len(ids))]} for ids in found.values()]


def tiny_tasks(folder: Path) -> list[dict[str, Any]]:
    """Write files of all four kinds into ``folder``; the ``tasks`` of a recipe there."""
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    entries = []
    for name, kind in (
        ("routing", "choice"),
        ("search", "ranking"),
        ("order", "json"),
        ("help", "answer"),
    ):
        entry: dict[str, Any] = {"name": name, "kind": kind}
        for side, numbers in (("train", range(10, 14)), ("held_out", range(4))):
            entry[side] = write_lines(
                folder / f"{name}.{side}.jsonl", task_lines(kind, numbers)
            ).name
        if kind == "json":
            entry["schema"] = "schema.json"
        if kind == "ranking":
            lines = first_stage(task_lines(kind, range(4)))
            entry["first_stage"] = write_lines(folder / f"{name}.first-stage.jsonl", lines).name
        if kind == "answer":
            entry["refusal"] = REFUSAL
        entries.append(entry)
    return entries
