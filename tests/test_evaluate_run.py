"""A whole run whose recipe has tasks: from task files to metrics, report, gate and release."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from seodang.artifact import SIGNATURE, Artifact
from seodang.errors import InputError
from seodang.pipeline import RunResult, run
from seodang.recipe_file import load_recipe
from tiny_run import tiny_recipe
from tiny_tasks import request_lines, task_lines, tiny_tasks, write_lines

NAMES = ["teacher", "student", "cross_entropy", "untrained"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("run")
    file = tiny_recipe(folder, release={"quantizations": []}, student={"epochs": 1})
    recipe = yaml.safe_load(file.read_text())
    tasks = tiny_tasks(folder)
    for name, number in (("routing", 16), ("help", 4)):
        held_out = folder / f"{name}.held_out.jsonl"
        held_out.write_text("".join(held_out.open().readlines()[:number]))
    recipe["tasks"] = [task for task in tasks if task["name"] in ("routing", "help")]
    recipe["gate"] = {
        "floors": {"routing.accuracy": 0.0, "help.token_f1": 0.0},
        "within_teacher": {"routing.accuracy": 1.0},
        "language_gap": {"routing.accuracy": 1.0},
    }
    file.write_text(yaml.safe_dump(recipe))
    return run(load_recipe(file), folder / "out")


def test_every_model_is_measured_on_every_task(result: RunResult) -> None:
    tasks = result.metrics["tasks"]
    assert {name: sorted(models) for name, models in tasks.items()} == {
        "routing": sorted(NAMES),
        "help": sorted(NAMES),
    }
    for models in tasks.values():
        for figures in models.values():
            assert set(figures["by_language"]) == {"en", "ko"}
            for metric in figures.keys() - {"by_language"}:
                figure = figures[metric]
                assert figure["low"] <= figure["value"] <= figure["high"]
    assert set(result.metrics["task_comparisons"]["routing"]) == set(NAMES) - {"student"}
    assert set(result.metrics["task_robustness"]["routing"]) == {"student", "cross_entropy"}
    assert result.metrics["task_costs"]["routing"]["student"]["median"] > 0
    assert result.metrics["task_examples"]["routing"]["synthetic"] == 16


def test_the_gate_checks_tasks_and_the_release_has_every_example(result: RunResult) -> None:
    names = [check["name"] for check in result.metrics["gate"]["checks"]]
    assert set(names) == {
        "floors.routing.accuracy",
        "floors.help.token_f1",
        "within_teacher.routing.accuracy",
        "language_gap.routing.accuracy",
    }
    assert result.metrics["gate"]["passed"]
    assert result.release is not None
    folder = result.release / "evaluation" / "tasks"
    for task, number in (("routing", 16), ("help", 4)):
        for model in NAMES:
            rows = [json.loads(line) for line in (folder / f"{task}.{model}.jsonl").open()]
            assert len(rows) == number
            assert {"id", "language"} <= rows[0].keys()
    assert Artifact.open(result.release).verify(ignore=[SIGNATURE]) == []


def test_training_examples_are_in_the_corpus_and_held_out_ones_are_not(result: RunResult) -> None:
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (result.out / "corpus" / "documents.jsonl").open()
    ]
    origins = [line["origin"] for line in lines if "#choice-" in line["origin"]]
    assert len(origins) == 32
    assert {int(origin.rpartition("-")[2]) for origin in origins} == set(range(10, 14))


def test_the_report_shows_the_tasks(result: RunResult) -> None:
    page = (result.out / "evaluation" / "report.html").read_text()
    for words in (
        "What the student is for",
        "16 held-out examples in English and Korean, 16 of them synthetic",
        "McNemar, exact",
        "code-switching",
        "routing: quality, cost of a request, and size",
        "routing: accuracy much the same in every language",
    ):
        assert words in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_nothing_is_measured_again(result: RunResult) -> None:
    recipe = load_recipe(result.out.parent / "recipe.yaml")
    again = run(recipe, result.out)
    assert not any(stage["ran"] for stage in again.stages.values())


@pytest.mark.parametrize("broken", ["order.held_out.jsonl", "new.jsonl", "metrics.json"])
def test_what_is_read_last_is_looked_at_first(broken: str, tmp_path: Path) -> None:
    """A held-out example that breaks its schema, a request, the previous release's figures."""
    file = tiny_recipe(tmp_path)
    recipe = yaml.safe_load(file.read_text())
    tasks = {task["name"]: task for task in tiny_tasks(tmp_path)}
    new = write_lines(tmp_path / "new.jsonl", request_lines("json", range(30, 32)))
    tasks["order"]["requests"] = new.name
    recipe |= {"tasks": [tasks["order"]], "gate": {"previous": "metrics.json"}}
    (tmp_path / "metrics.json").write_text('{"models": {}}')
    file.write_text(yaml.safe_dump(recipe))
    spoilt = {
        "order.held_out.jsonl": [{**task_lines("json", range(1))[0], "answer": '{"topic": 1}'}],
        "new.jsonl": [{"id": "no messages"}],
        "metrics.json": [{"neither": 1}],
    }
    write_lines(tmp_path / broken, spoilt[broken])
    with pytest.raises(InputError, match=broken):
        run(load_recipe(file), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*/manifest.json"))


@pytest.fixture
def results() -> Any:
    """The script that makes the page of results."""
    file = Path(__file__).parent.parent / "benchmarks" / "results.py"
    spec = importlib.util.spec_from_file_location("results", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_page_says_what_the_run_measured(
    result: RunResult, results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "KEPT", tmp_path / "results")
    recipe = result.out.parent / "recipe.yaml"
    file = results.keep(result.out, recipe)
    page = results.page([file])
    assert "Run with" not in page
    assert "The gate **passed**" in page
    for task in ("routing", "help"):
        assert f"### {task}\n" in page
    found = result.metrics["tasks"]["routing"]["student"]["accuracy"]
    row = next(line for line in page.splitlines() if line.startswith("| **student**"))
    assert f" {found['value']:.3f} ({found['low']:.3f}–{found['high']:.3f}) " in row
    assert "16 held-out examples in English and Korean, 16 of them synthetic." in page
    kept = json.loads(file.read_text())
    kept["gate"]["checks"][0] |= {"passed": False, "value": 0.25, "threshold": 0.5}
    file.write_text(json.dumps(kept))
    failed = results.page([file])
    assert "The gate **failed 1 of its" in failed
    assert f"- {kept['gate']['checks'][0]['name']}: 0.25 must be" in failed
    values = yaml.safe_load(recipe.read_text())
    values["student"]["epochs"] = 7
    other = recipe.with_name("other.yaml")
    other.write_text(yaml.safe_dump(values))
    assert "`student.epochs=1`" in results.page([results.keep(result.out, other)])


def test_the_committed_page_is_made_of_the_committed_files(results: Any) -> None:
    assert results.PAGE.read_text("utf-8") == results.page(sorted(results.KEPT.glob("*.json")))
