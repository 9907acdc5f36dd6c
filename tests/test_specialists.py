"""A specialist's recipe in its quick form: real stations, real teacher, every stage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seodang.artifact import Artifact
from seodang.corpus.task_writing import read_pins
from seodang.errors import InputError
from seodang.packages import open_package
from seodang.recipe_file import load_recipe
from tiny_run import seodang

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def mobility(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mobility")
    recipe = folder / "recipes" / "mobility.yaml"
    recipe.parent.mkdir()
    shutil.copy(RECIPES / "mobility.yaml", recipe)
    try:
        for pin in read_pins(RECIPES / "mobility" / "packages.yaml"):
            open_package(pin).close()
        tasks = folder / "runs" / "mobility" / "quick"
        script = [sys.executable, str(RECIPES / "mobility" / "make_tasks.py")]
        subprocess.run([*script, "--out", str(tasks), "--quick"], check=True, capture_output=True)
        for pin in load_recipe(recipe, quick=True).packages():
            open_package(pin).close()
    except InputError:
        pytest.skip("needs the fetched packages of the recipe (make fetch)")
    done = seodang("run", recipe, "--quick", "--out", folder / "out", "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads(done.stdout)


def test_every_stage_runs_and_every_answer_keeps_to_the_schema(
    mobility: tuple[Path, dict[str, Any]],
) -> None:
    out, result = mobility
    assert list(result["stages"]) == [
        *("corpus", "teacher", "answers", "corpus-with-answers", "soft-labels"),
        *("student", "cross-entropy", "evaluation", "release"),
    ]
    assert result["gate"]["passed"]
    counts = Artifact.open(out / "answers").manifest.summary["answers"]
    assert counts["kept"] > 0.9 * sum(counts.values())
    models = result["models"]
    assert models["student"]["parameters"] * 4 <= models["teacher"]["parameters"]
    said = (out / "release" / "evaluation" / "tasks" / "trip_query.student.jsonl").open()
    assert {json.loads(line)["schema_valid"] for line in said} == {1.0}


def test_the_release_says_what_was_generated(mobility: tuple[Path, dict[str, Any]]) -> None:
    text = (mobility[0] / "release" / "TRAINING_DATA.md").read_text()
    generated = text.partition("### 2.5")[2].partition("### 2.6")[0]
    assert "korail-mcp" in generated
    assert "the teacher's answers" in generated or "Made from stations" in generated
