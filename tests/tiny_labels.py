"""Stores of soft labels for tests: a tiny random teacher, synthetic documents, the real code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_teacher

# Synthetic: written for these tests. Markup and control characters are there on purpose.
HOSTILE = "Type <script>alert('x')</script> & </b>\x1b[31m \u202e now\n\tAmén 카드.\n"
DOCUMENTS: list[dict[str, Any]] = [
    {"id": "card", "text": "To replace a lost debit card, sign in and choose replacement."},
    {
        "id": "chat",
        "messages": [
            {"role": "user", "content": "카드를 잃어버렸어요. What now?"},
            {"role": "assistant", "content": "앱에서 바로 정지할 수 있습니다. Thank you."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": "A new card comes."},
        ],
    },
    {"id": "<i>evil</i>", "text": HOSTILE},
]


def make_store(
    folder: Path,
    name: str,
    *options: str,
    documents: Sequence[dict[str, Any]] = DOCUMENTS,
) -> Path:
    """Capture ``documents`` with a tiny teacher (``folder/teacher``) into ``folder/name``."""
    from seodang.cli import app

    teacher, corpus = folder / "teacher", folder / f"{name}.jsonl"
    if not teacher.exists():
        tiny_teacher(teacher)
    corpus.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))
    arguments = ["--teacher", teacher, "--corpus", corpus, "--out", folder / name, "--json"]
    with pytest.raises(SystemExit) as stopped:
        app(["capture", *map(str, arguments), *options])
    assert not stopped.value.code
    return folder / name


def run_labels(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``seodang labels`` in this process: exit code, standard output, standard error."""
    from seodang.cli_labels import labels_app

    def run(*arguments: str | Path | int) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            labels_app([str(argument) for argument in arguments])
        code = stopped.value.code or 0
        assert isinstance(code, int)
        return (code, *capsys.readouterr())

    return run
