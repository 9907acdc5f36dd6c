"""The harness against a real server: a random release on `seodang serve`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from seodang.errors import InputError
from seodang.evaluation.comparison import Named
from seodang.evaluation.harness import HarnessModel
from seodang.evaluation.task_metrics import evaluate_responses
from seodang.evaluation.tasks import Task
from served import NAME, running, tiny_release
from tiny import tiny_teacher
from tiny_run import seodang
from tiny_tasks import REFUSAL, SHORT_SCHEMA, examples, task_lines, write_lines


def test_a_server_says_answers_and_is_compared_with_a_directory(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    release = tiny_release(tmp_path_factory.getbasetemp())
    (few, *_) = examples("answer", range(1))
    with running(release) as (_, service):
        model = HarnessModel.served(service["api"], NAME, None)
        task = Task("help", "answer", [few], refusal=REFUSAL, max_new_tokens=4)
        said = model.respond(task)
        assert model.respond(task) == said
        assert said[0].said
        choices = Task("routing", "choice", examples("choice", range(1))[:2])
        found = evaluate_responses(choices, model.respond(choices))
        assert set(found.metrics) == {"accuracy"}  # it says no probabilities
        form = few.model_copy(update={"answer": '{"topic": "card"}' + " " * 300})
        structured = Task("order", "json", [form], schema=SHORT_SCHEMA)
        found = evaluate_responses(structured, model.respond(structured))
        assert found.rows[0]["schema_valid"] == 1  # a random model, under the schema's grammar

        write_lines(tmp_path / "routing.jsonl", task_lines("choice", range(1))[:4])
        tasks = {"tasks": [{"name": "r", "kind": "choice", "held_out": "routing.jsonl"}]}
        (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
        arguments = ["evaluate", service["api"], "--model-name", NAME]
        arguments += ["--against", tiny_teacher(tmp_path / "m", layers=1)]
        arguments += ["--tasks", tmp_path / "tasks.yaml", "--out", tmp_path / "out", "--json"]
        done = seodang(*arguments)
        assert done.returncode == 0, done.stderr
        metrics = json.loads(done.stdout)
        assert metrics["models"]["model"] == {"name": NAME}
        assert metrics["task_comparisons"]["r"]["against"]["accuracy"]["n"] == 4
        assert "calibration_error" not in metrics["task_comparisons"]["r"]["against"]
        with pytest.raises(InputError, match=f"does not run gpt, but {NAME}"):
            Named(service["api"], "gpt").check()
    with pytest.raises(InputError, match="no OpenAI-compatible server answers here"):
        Named(service["api"], NAME).check()
