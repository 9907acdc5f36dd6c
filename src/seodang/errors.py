"""What Seodang raises for people: each error says what was wrong, where, and what to do."""

from __future__ import annotations


class SeodangError(Exception):
    """Base of the errors that are printed without a traceback; ``exit_code`` ends the process."""

    exit_code = 1


class InputError(SeodangError):
    """Bad usage or bad input: nothing was started (exit code 2)."""

    exit_code = 2


class WorkFailed(SeodangError):
    """The work itself failed: a gate, a verification, a training run (exit code 1)."""
