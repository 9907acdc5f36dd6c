"""Progress of long work, on standard error: a live bar on a terminal, single lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 20.0  # between two lines where there is no terminal
_console: Console | None = None


def console() -> Console:
    """The console of everything that is not a command's result: standard error."""
    global _console
    if _console is None:
        from rich.console import Console

        _console = Console(stderr=True, soft_wrap=True, emoji=False)  # :100: is a line
    return _console


def say(message: str, *, markup: bool = False) -> None:
    """Print one line for the person who waits; ``markup`` only where no name can hold brackets."""
    console().print(message, highlight=False, markup=markup)


@contextmanager
def track(description: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show progress through ``total`` units; yields ``advance(units, note="")``.

    ``done`` units were finished by an earlier, stopped run: they count as progress, not as speed.
    """
    if console().is_terminal:
        with _bar(description, total, unit, done) as advance:
            yield advance
        return
    started = spoken = time.monotonic()
    finished = float(done)

    def speak(units: float, note: str = "") -> None:
        nonlocal finished, spoken
        finished += units
        now = time.monotonic()
        if now - spoken >= LINE_SECONDS:
            spoken = now
            rate = (finished - done) / (now - started)
            say(f"{description}: {finished / max(1, total):.0%}, {rate:,.0f} {unit}/s {note}")

    yield speak


@contextmanager
def _bar(description: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            finished = task.completed - done
            rate = finished / task.elapsed if task.elapsed and finished > 0 else 0.0
            return Text(f"{rate:,.0f} {unit}/s" if rate else "", style="cyan")

    bar = Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console(),
    )
    with bar:
        task = bar.add_task(description, total=total, completed=done, note="")

        def advance(units: float, note: str = "") -> None:
            bar.update(task, advance=units, note=note)

        yield advance
