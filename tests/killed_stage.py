"""Post-training stages that kill their own process at a given training step; run by the tests.

    python killed_stage.py MODEL DATA OUT STAGE=STEP ...

Prints how each process ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer
from trl.trainer import grpo_trainer, sft_trainer  # noqa: F401 (imported once, before the forks)

from seodang.artifact import Artifact
from tiny_think import STAGES


def start(name: str, model: Artifact, data: Artifact, out: Path, last: int) -> int:
    """A process that dies by SIGKILL when it begins the step after ``last``."""
    child = os.fork()
    if child:
        return child
    real, steps = Trainer.training_step, 0

    def training_step(self: Any, *given: Any) -> Any:
        nonlocal steps
        if (steps := steps + 1) > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *given)

    Trainer.training_step = training_step
    try:
        STAGES[name](model, data, out)
    finally:
        os._exit(1)


def main() -> None:
    model, data, out, *stages = sys.argv[1:]
    codes = {}
    for stage in stages:
        name, last = stage.split("=")
        child = start(name, Artifact.open(model), Artifact.open(data), Path(out) / name, int(last))
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
