"""What a training run writes down: each step as a line of JSON, its speed, and TensorBoard's file.

``training.jsonl`` holds what a second run would reproduce, ``speed.jsonl`` what it would not
(seconds and tokens per second of the step), ``events.out.tfevents.student`` both.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, Any

LOG = "training.jsonl"
SPEED = "speed.jsonl"
EVENTS = "events.out.tfevents.student"  # TensorBoard reads files whose names begin like this


class TrainingLog:
    """The log of a run in ``folder``, cut back to its first ``steps`` steps and then continued."""

    def __init__(self, folder: Path, steps: int) -> None:
        from tensorboardX.record_writer import RecordWriter

        self._rows = _cut(folder / LOG, steps)
        self._speeds = _cut(folder / SPEED, steps)
        (folder / EVENTS).unlink(missing_ok=True)
        self._events = RecordWriter(str(folder / EVENTS))
        self._write_event(time=0.0, file_version="brain.Event:2")
        done = zip(read_rows(folder / LOG), read_rows(folder / SPEED), strict=True)
        for row, speed in done:
            self._show(row, speed)

    def write(self, row: dict[str, Any], seconds: float) -> None:
        """Write one step: ``step``, ``tokens`` and whatever figures belong to it."""
        speed = {
            "step": row["step"],
            "time": time.time(),
            "seconds": seconds,
            "tokens_per_second": row["tokens"] / seconds,
        }
        self._rows.write(json.dumps(row) + "\n")
        self._speeds.write(json.dumps(speed) + "\n")
        self._show(row, speed)

    def flush(self) -> None:
        """Bring everything to the disk."""
        for file in (self._rows, self._speeds):
            file.flush()
            os.fsync(file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self.flush()
        self._rows.close()
        self._speeds.close()
        self._events.close()

    def _show(self, row: dict[str, Any], speed: dict[str, Any]) -> None:
        figures = {**row, "tokens_per_second": speed["tokens_per_second"]}
        step = figures.pop("step")
        self._write_event(time=speed["time"], step=step, figures=figures)

    def _write_event(
        self,
        *,
        time: float,
        step: int = 0,
        file_version: str | None = None,
        figures: dict[str, float] | None = None,
    ) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=k, simple_value=v) for k, v in (figures or {}).items()]
        event = Event(wall_time=time, step=step, file_version=file_version)
        if values:
            event.summary.CopyFrom(Summary(value=values))
        self._events.write(event.SerializeToString())


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, step by step."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def _cut(file: Path, lines: int) -> IO[str]:
    """Open ``file`` to append after its first ``lines`` lines."""
    kept = file.read_text().splitlines(keepends=True)[:lines] if file.exists() else []
    file.write_text("".join(kept))
    return file.open("a")
