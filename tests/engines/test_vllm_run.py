"""A real teacher behind a real vLLM server, for all that a run and an evaluation ask of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from vllm_server import VllmServer

from seodang.artifact import Artifact
from seodang.evaluation.structured import parsed, problem
from seodang.recipe import OnPolicyConfig
from seodang.softlabels import open as open_store
from seodang.softlabels.capture import capture
from seodang.student.on_policy import read_answers, scoring
from seodang.teacher.local import LocalTeacher
from tiny_run import seodang, tiny_recipe
from tiny_tasks import SHORT_SCHEMA, request_lines, task_lines, tiny_tasks, write_lines

STAGE = {"prompts": 6, "max_new_tokens": 12, "k": 16}


@pytest.fixture(scope="module")
def recipe(
    server: VllmServer,
    directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A teacher's server, a choice and a JSON task with requests, and an on-policy stage."""
    folder = tmp_path_factory.mktemp("recipe")
    student = {"layers": 2, "batch_tokens": 512, "on_policy": STAGE}
    file = tiny_recipe(folder, 12, student=student, gate={})
    recipe = yaml.safe_load(file.read_text())
    recipe["teacher"] = {"path": str(directory), "license": "Apache-2.0"}
    recipe["teacher"] |= {"server": server.address, "model": "served"}
    recipe["soft_labels"] = {"estimator": "residual", "k": 16}
    routing, _, order, _ = tiny_tasks(folder)
    write_lines(folder / "schema.json", [SHORT_SCHEMA])
    for side, numbers in (("train", range(10, 12)), ("held_out", range(2))):
        lines = [
            {**line, "answer": json.dumps({"topic": topic})}
            for line in task_lines("json", numbers)
            if (topic := json.loads(line["answer"])["topic"]) in ("card", "phone")
        ]
        write_lines(folder / order[side], lines)
    for task, kind in ((routing, "choice"), (order, "json")):
        name = f"{task['name']}.requests.jsonl"
        task["requests"] = write_lines(folder / name, request_lines(kind, range(30, 32))).name
    recipe["tasks"] = [routing, order]
    recipe["release"] |= {"quantizations": ["q8_0"], "parity_positions": 4}
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture(scope="module")
def out(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "run"
    done = seodang("run", recipe, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert {"answers", "soft-labels", "on-policy", "release"} <= set(
        json.loads(done.stdout)["stages"]
    )
    return out


def test_its_answers_are_choices_and_keep_to_the_schema(out: Path) -> None:
    lines = [json.loads(line) for line in (out / "answers" / "answers.jsonl").open()]
    kept = [line for line in lines if line["dropped"] is None]
    orders = [line for line in kept if line["task"] == "order"]
    assert len(orders) == len([line for line in lines if line["task"] == "order"]) > 0
    assert all(problem(parsed(line["answer"]), SHORT_SCHEMA) is None for line in orders)
    chosen = [line for line in kept if line["task"] == "routing"]
    assert all(line["answer"] in line["choices"] for line in chosen)


def test_it_scores_the_students_own_words_as_its_weights_do(
    out: Path,
    directory: Path,
    tmp_path: Path,
) -> None:
    rounds = out / "on-policy-rounds" / "round-1"
    answers = read_answers(Artifact.open(rounds / "answers"))
    local = LocalTeacher(directory)
    made = capture(local, answers, scoring(OnPolicyConfig(**STAGE)), tmp_path / "local")
    expected, found = open_store(made.path), open_store(rounds / "soft-labels")
    assert len(expected) == len(found) > 0
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(ours.offsets, theirs.offsets)
        mine, other = (dict(zip(s.ids.tolist(), s.weights, strict=True)) for s in (ours, theirs))
        both = sorted(mine.keys() & other.keys())
        assert len(both) > 0.9 * len(mine)
        np.testing.assert_allclose(
            [mine[i] for i in both], [other[i] for i in both], rtol=0.02, atol=2e-3
        )


def test_it_is_compared_with_its_own_weights(
    server: VllmServer,
    recipe: Path,
    directory: Path,
    tmp_path: Path,
) -> None:
    """By likelihood: with the tokenizer the server scores every choice, as the directory does."""
    task = recipe.parent / "routing.held_out.jsonl"
    options = ["--model-name", "served", "--tokenizer", directory, "--against", directory]
    out = tmp_path / "comparison"
    done = seodang("evaluate", server.address, *options, "--tasks", task, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    served, local = (
        [json.loads(line) for line in (out / "tasks" / f"routing.{name}.jsonl").open()]
        for name in ("model", "against")
    )
    assert [row["id"] for row in served] == [row["id"] for row in local]
    found, expected = ([row["confidence"] for row in rows] for rows in (served, local))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert [row["chosen"] for row in served] == [row["chosen"] for row in local]
