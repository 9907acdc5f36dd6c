"""Captures that are killed with SIGKILL at random moments and resumed; run by test_capture.

    python killed_capture.py TEACHER OUT TIMES

Each is killed three times, each time a moment after one more random shard was there, however fast
the machine is. Prints as JSON how often one was killed in the midst of its work, and what was
wrong.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from seodang.recipe import SoftLabelsConfig
from seodang.softlabels import capture as capture_module
from seodang.teacher.local import LocalTeacher
from tiny_store import sequences

SHARDS = "labels-*.parquet"


def start(teacher: LocalTeacher, out: Path) -> int:
    """A process that captures into ``out``; it ends with 0 when the store is finished."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        capture_module.capture(teacher, sequences(24), SoftLabelsConfig(), out)
        code = 0
    finally:
        os._exit(code)


def finished_shards(out: Path) -> dict[str, tuple[int, int]]:
    """Which shards there are, and what would differ if one of them were made again."""
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in out.glob(SHARDS)}


def content(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def kill(child: int, out: Path, shards: int) -> int:
    """Kill the process a moment after it has finished more than ``shards``; its exit code."""
    while len(finished_shards(out)) <= shards:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)  # a zombie, if it has ended: nothing happens then
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    directory, out, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    capture_module.SHARD_TOKENS = 60
    teacher = LocalTeacher(directory)
    teacher.model, teacher.tokenizer, teacher.fingerprint  # noqa: B018 (loaded before all forks)
    assert os.waitpid(start(teacher, out / "whole"), 0)[1] == 0
    whole = content(out / "whole")
    shards = len(finished_shards(out / "whole"))
    killed, partial, wrong = 0, 0, []
    for number in range(times):
        path = out / str(number)
        for moment in [*sorted(random.sample(range(-1, shards - 1), 3)), shards]:
            before = finished_shards(path)
            code = kill(start(teacher, path), path, moment)
            after = finished_shards(path)
            wrong += [f"{name} made again" for name in before if before[name] != after.get(name)]
            if code == -signal.SIGKILL:
                killed += 1
                partial += 0 < len(after) < shards
        if code:
            wrong.append(f"run {number} ended with {code}")
        elif content(path) != whole:
            wrong.append(f"run {number} gave other bytes")
    print(json.dumps({"killed": killed, "partial": partial, "wrong": wrong, "files": len(whole)}))


if __name__ == "__main__":
    main()
