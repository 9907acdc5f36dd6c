"""The standard part: benchmarks of a pinned package as tasks (a synthetic package, same format)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from seodang.artifact import sha256_file
from seodang.corpus.raw.config import Benchmark
from seodang.errors import InputError
from seodang.evaluation.standard import standard_tasks
from seodang.evaluation.task_metrics import Response, evaluate_responses

CASES: dict[str, dict[str, Any]] = {
    "gsm8k": {"id": "g1", "prompt": "How many are 900 and 900?", "expected": "1800"},
    "hellaswag": {"id": "h1", "ctx": "They", "endings": ["sit", "run"], "expected_index": 1},
    "truthfulqa_mc1": {
        "id": "t1",
        "question": "So?",
        "choices": ["no", "yes"],
        "expected_index": 0,
    },
}


def _benchmark(cache: Path, cases: dict[str, dict[str, Any]]) -> Benchmark:
    archive = cache / "sets-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        for name, case in cases.items():
            file.writestr(f"sets/{name}/cases.jsonl", json.dumps(case) + "\n")
        file.writestr("sets/programs.jsonl", "{}\n")
    pin = {"package": "sets", "version": "1.0", "sha256": sha256_file(archive)}
    folder = cache / "packages" / f"sets-1.0-{pin['sha256'][:16]}"
    folder.mkdir(parents=True)
    archive.rename(folder / archive.name)
    files = [*(f"sets/{name}/cases.jsonl" for name in cases), "sets/programs.jsonl"]
    return Benchmark(name="sets", license="CC0-1.0", files=files, **pin)


def test_benchmarks_of_a_package_become_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEODANG_CACHE", str(tmp_path))
    tasks = {task.name: task for task in standard_tasks([_benchmark(tmp_path, CASES)])}
    assert {name: task.kind for name, task in tasks.items()} == {
        "gsm8k": "answer",
        "hellaswag": "choice",
        "truthfulqa_mc1": "choice",
    }
    assert "sets/programs.jsonl is not asked" in capsys.readouterr().err
    said = "900 and 900 are 1,800."
    assert evaluate_responses(tasks["gsm8k"], [Response(said=said)]).rows[0]["exact_match"] == 1
    assert tasks["hellaswag"].examples[0].answer == "run"
    assert tasks["truthfulqa_mc1"].examples[0].answer == "no"
    assert not any(example.synthetic for task in tasks.values() for example in task.examples)


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEODANG_CACHE", str(tmp_path))
    benchmark = _benchmark(tmp_path, {"gsm8k": {"id": "g1", "question": "?"}})
    with pytest.raises(InputError, match=r"sets/gsm8k/cases.jsonl: not as expected"):
        standard_tasks([benchmark])
