"""What every command shares: results as JSON, errors for people, exit codes.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the work
failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from seodang.errors import SeodangError, WorkFailed

P = ParamSpec("P")

INTERRUPTED = 130  # the exit code after a Ctrl-C: 128 and the number of the signal
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into a message for people and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        message, code = "", 0
        try:
            command(*args, **kwargs)
        except SeodangError as error:
            message, code = str(error), error.exit_code
        except KeyboardInterrupt:
            message, code = "stopped; run the same command again and it continues", INTERRUPTED
        except BrokenPipeError:
            code = 1
        except Exception as error:
            message, code = fault_of_the_machine(error), 1
            if not message:
                raise
        if message:
            if kwargs.get("as_json"):
                print_json({"error": message, "exit_code": code})
            print(f"seodang: {message}", file=sys.stderr)
        if code:
            raise typer.Exit(code)

    return wrapper


def fault_of_the_machine(error: Exception) -> str:
    """What to say about a full disk, or a file that may not be read or written; else nothing."""
    where = getattr(error, "filename", None)
    if "No space left on device" in str(error):
        at = f" (writing {where})" if where else ""
        return f"the disk is full{at}: free some space and run the same command again; it continues"
    if isinstance(error, OSError) and where:
        return f"{where}: {error.strerror}"
    return ""


def print_json(value: dict[str, Any]) -> None:
    """Print the one object that ``--json`` promises."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def report_problems(path: Path, problems: list[str], as_json: bool) -> None:
    """Print the outcome of a verification; raises ``WorkFailed`` if there is a problem."""
    if as_json:
        print_json({"path": str(path), "verified": not problems, "problems": problems})
    if problems:
        text = f"{path}: verification failed:\n  " + "\n  ".join(problems)
        if not as_json:
            raise WorkFailed(text)
        print(f"seodang: {text}", file=sys.stderr)
        raise typer.Exit(1)
    if not as_json:
        print(f"{path}: verified")
