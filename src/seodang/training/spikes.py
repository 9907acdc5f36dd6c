"""Loss spikes: found by a robust z-score, undone by a rollback, their batches left out.

A spike is a loss far above those of the steps before it. What is to blame is the batch that shows
it, or the update before it, so that the training goes back to its last checkpoint and leaves both
steps out: the remedy of PaLM (Chowdhery et al., arXiv 2204.02311, section 5.1), which skips some
hundreds of batches. The steps left out are written down first, so that a run that is killed and
continued leaves out the same.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seodang.artifact import write_json
from seodang.errors import WorkFailed
from seodang.progress import say
from seodang.training.log import LOG, read_rows
from seodang.training.parallel import Processes

SKIPPED = "skipped.json"
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations


class SpikeWatch:
    """The losses of the last ``window`` steps, and what lies too far above them.

    ``threshold`` is in robust standard deviations: 1.4826 times the median absolute deviation
    (Rousseeuw & Croux 1993), at least ``floor`` nats. No loss is judged before half a window is
    full. More than ``most`` steps left out are a sign of something else.
    """

    def __init__(
        self, window: int = 64, threshold: float = 8.0, floor: float = 0.02, most: int = 32
    ) -> None:
        self.window = window
        self.threshold = threshold
        self.floor = floor
        self.most = most
        self._losses: deque[float] = deque(maxlen=window)

    def start(self, folder: Path, processes: Processes) -> None:
        """Take up the losses of the log in ``folder``, which has been cut to the steps done."""
        processes.wait()  # for the cut
        rows = read_rows(folder / LOG)
        processes.wait()  # before more is written
        self._losses.clear()
        self._losses.extend(row["loss"] for row in rows if "loss" in row)

    def score(self, loss: float) -> float:
        """How many robust standard deviations ``loss`` is above the median of the window."""
        middle = statistics.median(self._losses)
        spread = _SIGMA * statistics.median(abs(x - middle) for x in self._losses)
        return (loss - middle) / max(spread, self.floor)

    def jumps(self, loss: float) -> bool:
        """Whether ``loss`` is a spike; if it is not, it joins the window."""
        if not math.isfinite(loss):
            return True
        if len(self._losses) >= self.window // 2 and self.score(loss) > self.threshold:
            return True
        self._losses.append(loss)
        return False


class LossSpike(Exception):
    """The loss of ``step`` (counted from 0) is a spike: go back, and leave its batches out."""

    def __init__(self, step: int, loss: float, watch: SpikeWatch, documents: Sequence[str]) -> None:
        super().__init__(f"step {step}: loss {loss}")
        self.step = step
        self.loss = loss
        self.watch = watch
        self.documents = documents

    def write_down(self, folder: Path, processes: Processes) -> None:
        """Add the spike to ``folder/skipped.json``.

        Raises ``WorkFailed`` if too many steps are left out already.
        """
        spikes = read_spikes(folder)
        left_out = {number for spike in spikes for number in spike["steps"]}
        steps = [number for number in (self.step - 1, self.step) if number >= 0]
        shown = ", ".join(self.documents[:8]) + (", ..." if len(self.documents) > 8 else "")
        found = f"step {self.step}: the loss jumped to {self.loss:.3g}; documents: {shown}"
        if len(left_out.union(steps)) > self.watch.most:
            raise WorkFailed(
                f"{found}. {len(left_out)} steps are left out already ({folder / SKIPPED}): lower "
                "the learning_rate, or look at these documents"
            )
        processes.wait()  # everybody has read the file
        if processes.first:
            say(f"{found}. Going back to the last checkpoint, without steps {steps}")
            # A loss that is not finite has no place in JSON.
            loss = self.loss if math.isfinite(self.loss) else None
            spike = {"steps": steps, "loss": loss, "documents": list(self.documents)}
            write_json(folder / SKIPPED, [*spikes, spike])
        processes.wait()


def read_spikes(folder: Path) -> list[dict[str, Any]]:
    """The spikes of a run: ``steps`` left out, ``loss``, ``documents`` of the first process."""
    file = folder / SKIPPED
    return json.loads(file.read_bytes()) if file.exists() else []


def skipped_steps(folder: Path) -> set[int]:
    """The steps that are left out, counted from 0."""
    return {number for spike in read_spikes(folder) for number in spike["steps"]}
