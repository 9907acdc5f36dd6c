"""The reward of an answer in a mode: is it right, and does it keep to the mode?

Right or wrong is worth +1 or -1, a broken format -1 more (A.X K1's technical report, arXiv
2601.09200). Thinking, an answer must close its thoughts once, with something after them, and end;
at once, it must hold neither mark, and end.
"""

from __future__ import annotations

from dataclasses import dataclass

from seodang.foundation.post_training.problem import Mode
from seodang.foundation.post_training.reasoning_data import END_THINK, THINK, Problem


@dataclass(frozen=True)
class Reward:
    """What an answer earned: ``correct`` is 1 or -1, ``format`` 0 or -1."""

    correct: int
    format: int

    @property
    def total(self) -> int:
        """Both together: 1, -1 or -2, or 0 if it is right in the wrong form."""
        return self.correct + self.format


def reward(problem: Problem, mode: Mode, said: str, ended: bool) -> Reward:
    """Judge ``said``, the words after ``<think>`` or ``</think>``; ``ended`` if the turn ended."""
    return Reward(
        correct=1 if problem.is_right(answer_of(said)) else -1,
        format=0 if ended and keeps_to(mode, said) else -1,
    )


def answer_of(said: str) -> str:
    """What is answered: all that follows the thoughts."""
    return said.rpartition(END_THINK)[2].strip()


def keeps_to(mode: Mode, said: str) -> bool:
    """Whether thoughts are closed once and followed by an answer, or there are none."""
    if THINK in said:
        return False
    if mode == "instant":
        return END_THINK not in said and bool(said.strip())
    return said.count(END_THINK) == 1 and bool(answer_of(said))
