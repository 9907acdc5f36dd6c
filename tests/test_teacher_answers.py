"""Answers that the teacher writes: to which requests, which are kept, and who learns from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from seodang import teacher_answers
from seodang.artifact import Artifact
from seodang.corpus.build import read_documents, read_sequences
from seodang.corpus.tasks import read_requests, unseen_requests
from seodang.errors import InputError
from seodang.evaluation.structured import parsed, problem
from seodang.evaluation.tasks import load_task
from seodang.pipeline import labelling_teacher, run
from seodang.recipe import TaskConfig, TeacherConfig, TeacherTuningConfig
from seodang.recipe_file import load_recipe
from seodang.release.provenance import training_data
from seodang.softlabels.store import open as open_store
from seodang.teacher import open_teacher
from seodang.teacher_answers import answer_requests
from seodang.training.log import LOG, read_rows
from served import NAME, running, tiny_release
from tiny import tiny_teacher
from tiny_run import tiny_recipe
from tiny_tasks import (
    REFUSAL,
    SCHEMA,
    SHORT_SCHEMA,
    request_lines,
    task_lines,
    tiny_tasks,
    write_lines,
)


def tasks_with_requests(folder: Path, numbers: range = range(20, 23)) -> list[dict[str, Any]]:
    found = tiny_tasks(folder)
    for task in found:
        lines = request_lines(task["kind"], numbers)
        task["requests"] = write_lines(folder / f"{task['name']}.requests.jsonl", lines).name
    return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    student = {"epochs": 1, "batch_tokens": 256}
    file = tiny_recipe(folder, release={"quantizations": []}, student=student)
    values = yaml.safe_load(file.read_text())
    values["tasks"] = [t for t in tasks_with_requests(folder) if t["name"] in ("routing", "order")]
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def out(recipe: Path) -> Path:
    return run(load_recipe(recipe), recipe.parent / "out").out


def task(folder: Path, kind: Any, asked: list[dict[str, Any]], **changes: Any) -> TaskConfig:
    train, held_out = task_lines(kind, range(10, 12)), task_lines(kind, range(4))
    return TaskConfig(
        name="t",
        kind=kind,
        train=str(write_lines(folder / "train.jsonl", train)),
        held_out=str(write_lines(folder / "held-out.jsonl", held_out)),
        requests=str(write_lines(folder / "requests.jsonl", asked)),
        **changes,
    )


@pytest.mark.parametrize("kind", ["choice", "ranking", "json", "answer"])
def test_requests_are_read_without_answers(kind: Any, tmp_path: Path) -> None:
    lines = request_lines(kind, range(3))
    found = read_requests(write_lines(tmp_path / "r.jsonl", lines), kind)
    assert [r.model_dump(exclude_none=True) for r in found] == lines
    answered = write_lines(tmp_path / "answered.jsonl", task_lines(kind, range(3)))
    with pytest.raises(InputError, match=r"answered\.jsonl:1: unknown key `answer`"):
        read_requests(answered, kind)
    del lines[0]["group" if kind == "ranking" else "language"]
    with pytest.raises(InputError, match=r"r\.jsonl:1: .*(group|language)"):
        read_requests(write_lines(tmp_path / "r.jsonl", lines), kind)


def test_nothing_that_is_known_or_measured_is_asked(tmp_path: Path) -> None:
    new = request_lines("choice", range(30, 32))
    known = request_lines("choice", range(10, 11))
    held_out = request_lines("choice", range(2, 3))
    shouted = [{**line, "id": f"{line['id']}-2"} for line in new]
    for line in shouted:
        system, user = line["messages"]
        line["messages"] = [system, {**user, "content": user["content"].upper() + "!"}]
    config = task(tmp_path, "choice", [*new, *known, *held_out, *shouted])
    assert [r.id for r in unseen_requests(config, 1.0)] == [line["id"] for line in new]
    # Of a threshold so low that whatever shares three words with a held-out request is near it.
    assert len(unseen_requests(config, 0.01)) < len(new)


def test_answers_keep_to_their_task_and_the_others_are_counted(recipe: Path) -> None:
    folder = recipe.parent
    tasks = [TaskConfig.model_validate(t) for t in tasks_with_requests(folder)]
    tasks = [
        t.model_copy(
            update={
                key: str(folder / value)
                for key in ("train", "held_out", "requests", "json_schema", "first_stage")
                if (value := getattr(t, key)) is not None
            }
        )
        for t in tasks
    ]
    teacher = load_recipe(recipe).teacher
    made = answer_requests(teacher, folder / "teacher", tasks, 1.0, folder / "answers")
    lines = [json.loads(line) for line in (made.path / "answers.jsonl").open(encoding="utf-8")]
    assert len(lines) == sum(len(unseen_requests(t, 1.0)) for t in tasks)
    dropped = [line["dropped"] for line in lines if line["dropped"]]
    counts = made.manifest.summary["answers"]
    assert sum(counts.values()) == len(lines)
    assert counts.get("kept", 0) == len(lines) - len(dropped)
    for line in lines:
        if line["task"] in ("routing", "search"):
            assert line["answer"] in line["choices"]
        if line["task"] == "order" and not line["dropped"]:
            assert problem(parsed(line["answer"]), SCHEMA) is None
        if line["task"] == "help" and not line["dropped"]:
            assert line["answer"] == REFUSAL or line["answer"] in line["messages"][1]["content"]
    # A random teacher does not speak the request's words.
    assert "not in the request" in counts
    again = answer_requests(teacher, folder / "teacher", tasks, 1.0, folder / "answers")
    assert again.digest == made.digest


def test_in_bfloat16_answers_are_another_artifact(recipe: Path, tmp_path: Path) -> None:
    routing = task(tmp_path, "choice", request_lines("choice", range(20, 23)))
    exact, model = load_recipe(recipe).teacher, recipe.parent / "teacher"
    half = exact.model_copy(update={"precision": "bfloat16"})
    made = answer_requests(exact, model, [routing], 1.0, tmp_path / "out")
    again = answer_requests(half, model, [routing], 1.0, tmp_path / "out")
    assert again.manifest.config["precision"] == "bfloat16"
    assert again.digest != made.digest
    tuned = half.model_copy(update={"fine_tuning": TeacherTuningConfig()})
    assert open_teacher(labelling_teacher(half, tmp_path)).precision == "bfloat16"
    assert labelling_teacher(tuned, tmp_path).precision == "bfloat16"


def test_stopped_it_asks_only_what_is_left_and_says_the_same(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_answers, "BLOCK_REQUESTS", 5)
    routing = task(tmp_path, "choice", request_lines("choice", range(20, 23)))
    teacher, model = load_recipe(recipe).teacher, recipe.parent / "teacher"
    real, asked = teacher_answers.respond, 0

    def respond(model: Any, task: Any) -> Any:
        nonlocal asked
        if (asked := asked + 1) == 3:
            raise KeyboardInterrupt
        return real(model, task)

    monkeypatch.setattr(teacher_answers, "respond", respond)
    with pytest.raises(KeyboardInterrupt):
        answer_requests(teacher, model, [routing], 1.0, tmp_path / "out")
    made = answer_requests(teacher, model, [routing], 1.0, tmp_path / "out")
    assert asked == 1 + math.ceil(len(unseen_requests(routing, 1.0)) / 5)
    whole = answer_requests(teacher, model, [routing], 1.0, tmp_path / "whole")
    assert made.digest == whole.digest
    assert not (made.path / teacher_answers.BLOCKS).exists()


def test_a_served_teacher_is_asked_to_chat(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    schema = write_lines(tmp_path / "schema.json", [SHORT_SCHEMA])
    order = task(tmp_path, "json", request_lines("json", range(30, 31)), schema=str(schema))
    lines = [
        {**line, "answer": '{"topic": "card"}' + " " * 300} for line in task_lines("json", range(4))
    ]
    write_lines(tmp_path / "train.jsonl", lines[:4])
    write_lines(tmp_path / "held-out.jsonl", lines[4:])
    model = tiny_teacher(tmp_path / "model", layers=1)
    with running(tiny_release(tmp_path_factory.getbasetemp())) as (_, service):
        teacher = TeacherConfig(path=str(model), server=service["api"], model=NAME)
        made = answer_requests(teacher, model, [order], 1.0, tmp_path / "answers")
    lines = [json.loads(line) for line in (made.path / "answers.jsonl").open(encoding="utf-8")]
    assert [line["id"] for line in lines] == [r.id for r in unseen_requests(order, 1.0)]
    assert {line["dropped"] for line in lines} == {None}  # a random model, under the schema
    assert all(problem(parsed(line["answer"]), SHORT_SCHEMA) is None for line in lines)


def test_the_student_learns_from_them_and_the_baseline_does_not(recipe: Path, out: Path) -> None:
    corpus = Artifact.open(out / "corpus-with-answers", "corpus")
    documents = read_documents(corpus.path)
    written = {d["id"] for d in documents if d.get("written_by_teacher")}
    before = read_documents(out / "corpus")
    assert written
    assert [d for d in documents if d["id"] not in written] == before
    assert {(d["split"], d["synthetic"]) for d in documents if d["id"] in written} == {
        ("train", True)
    }
    answers = [json.loads(line) for line in (out / "answers" / "answers.jsonl").open()]
    kept = {f"{a['task']}#{a['id']}" for a in answers if a["dropped"] is None}
    assert {d["origin"] for d in documents if d["id"] in written} <= kept
    counts = [
        sum(Artifact.open(out / name).manifest.summary["dropped"].values())
        for name in (corpus.path.name, "corpus")
    ]
    assert len(kept) == len(written) + counts[0] - counts[1]
    held_out = [read_sequences(out / name, "held_out") for name in ("corpus", corpus.path.name)]
    assert [s.digest for s in held_out[0]] == [s.digest for s in held_out[1]]
    store = open_store(out / "soft-labels")
    assert written <= set(store.document_ids)
    student, baseline = (Artifact.open(out / name) for name in ("student", "cross-entropy"))
    assert "documents" not in student.manifest.inputs
    assert "documents" in baseline.manifest.inputs
    rows = [read_rows(out / name / LOG) for name in ("student", "cross-entropy")]
    assert len({len(steps) for steps in rows}) == 1
    # Every epoch of the baseline is shorter, so that the same steps hold its documents more often.
    of_hand = sum(
        s for s, d in zip(store.lengths, store.document_ids, strict=True) if d not in written
    )
    assert baseline.manifest.summary["tokens"] > of_hand
    assert student.manifest.summary["tokens"] == store.lengths.sum()
    made = [s for s in training_data(corpus) if s.category == "synthetic"]
    assert made


def test_without_anything_else_the_baseline_has_nothing_to_learn(
    recipe: Path, out: Path, tmp_path: Path
) -> None:
    from seodang.student.train import train

    recipe_ = load_recipe(recipe)
    store = open_store(out / "soft-labels")
    with pytest.raises(InputError, match="give a task a `train` file"):
        train(
            store,
            recipe.parent / "teacher",
            recipe_.student,
            tmp_path / "none",
            objective="cross-entropy",
            documents=frozenset({"gone"}),
        )


def test_the_measured_task_is_not_changed_by_its_requests(recipe: Path) -> None:
    tasks = load_recipe(recipe).tasks
    plain = [t.model_copy(update={"requests": None}) for t in tasks]
    assert [load_task(t).digest for t in tasks] == [load_task(t).digest for t in plain]
