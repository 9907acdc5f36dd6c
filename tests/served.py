"""A signed release of a tiny random model, and `seodang serve` running on it, for tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seodang.artifact import Draft, begin
from seodang.release import keys, signature
from seodang.release.gguf import convert
from tiny import tiny_teacher

NAME = "tiny-helper"
PROMPTS = ["How do I replace a lost card?", "카드를 잃어버렸어요. <b>어떻게</b> 하죠?"]


def signed_release(directory: Path, ggufs: dict[str, Path]) -> Path:
    """A signed release of these GGUF files, by quantisation, with its keys beside it."""
    private, _ = keys.new_keys(directory)
    config = {"name": NAME, "license": "Apache-2.0", "description": "Synthetic & random."}
    draft = begin(directory / "release", "release", config, {})
    assert isinstance(draft, Draft)
    for quantization, file in ggufs.items():
        shutil.copyfile(file, draft.path / f"{NAME}-{quantization}.gguf")
    (draft.path / "evaluation").mkdir()
    samples = [{"prompt": prompt, "answers": {}} for prompt in PROMPTS]
    (draft.path / "evaluation" / "samples.json").write_text(json.dumps(samples))
    work = directory / "work"
    work.mkdir()
    draft.finish(
        sign=lambda manifest: signature.sign(draft.path, manifest, private, name=NAME, work=work)
    )
    return draft.path


def tiny_release(session: Path) -> Path:
    """A release of a random Llama in f16 and q8_0, made once in the directory of a test session."""
    folder = session / "served"
    if not folder.exists():
        teacher = tiny_teacher(folder / "teacher", layers=2)
        # Positions are rotary: a longer context is only a number, and answers can be made long.
        config = json.loads((teacher / "config.json").read_text())
        config["max_position_embeddings"] = 65536
        (teacher / "config.json").write_text(json.dumps(config))
        ggufs = {"f16": folder / "f16.gguf", "q8_0": folder / "q8_0.gguf"}
        convert(teacher, ggufs, name=NAME, card={})
        signed_release(folder, ggufs)
    return folder / "release"


def start(release: Path, *options: str) -> subprocess.Popen[str]:
    """Start `seodang serve --json` in a session of its own, on one core.

    Two threads of llama.cpp wait for each other: beside other work that is many times slower.
    """
    command = [sys.executable, "-m", "seodang", "serve", str(release), "--json", *options]
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(ours)})
    try:
        return subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    finally:
        os.sched_setaffinity(0, ours)


@contextmanager
def running(release: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server that is up, and what it printed; killed at the end if it still runs."""
    with start(release, "--port", "0", *options) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.kill()


def outcome(release: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, printed JSON and messages of a server that must not start."""
    with start(release, *options) as process:
        try:
            out, messages = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, json.loads(out), messages


def port_of(service: dict[str, Any]) -> int:
    """The port in what a running server printed."""
    return int(service["api"].rsplit(":", 1)[1].split("/")[0])
