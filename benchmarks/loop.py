"""What the training loop costs beside the products: Python, reading labels, logging.

    python benchmarks/loop.py runs/cs --layers 6 --steps 30

`runs/cs` is a finished run. The same steps are taken twice in turns: by the loop of `seodang run`,
from the store on disk, and by a bare one, whose packs lie ready in memory and which does nothing
but forward, backward, clip and step. Prints the ratio of their times, and the share of the loop's
own steps that is spent outside those four.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from seodang.recipe import StudentConfig, TeacherConfig
from seodang.softlabels import open as open_store
from seodang.student import train as training
from seodang.student.packing import pack
from seodang.student.start import build_start, choose_start
from seodang.teacher.local import teacher_directory
from seodang.training.attention import use_packed_attention
from seodang.training.gated_mlp import use_lean_mlps
from seodang.training.log import SPEED, read_rows
from seodang.training.loop import Plan, run
from seodang.training.parallel import Processes
from seodang.training.plan import plan_steps
from seodang.training.products import use_fast_products


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    recipe = json.loads((options.run / "recipe.json").read_bytes())
    teacher = teacher_directory(TeacherConfig(**recipe["teacher"]))
    store = open_store(options.run / "soft-labels")
    config = StudentConfig(layers=options.layers, batch_tokens=options.batch_tokens)
    choice = choose_start(teacher, store, config)
    lengths = store.lengths.tolist()
    steps = plan_steps(lengths, config.batch_tokens, 1, 0)[: options.steps]
    device = Processes(0, 1, torch.device("cpu"))
    plan = Plan(
        tokens=[sum(lengths[i] for i in step) for step in steps],
        labelled=[int(store.labelled_counts[step].sum()) for step in steps],
        packs=lambda step: [pack([training.checked(store, i) for i in steps[step]])],
    )

    def start() -> training.Distillation:
        model = build_start(teacher, config, choice).train()
        use_packed_attention(model)
        use_fast_products(model)
        use_lean_mlps(model)
        residual = store.estimator == "residual"
        module = training.Distillation(model, config, "soft-labels", residual)
        module.accumulate_head_gradient = True
        return module

    def adamw(module: training.Distillation) -> torch.optim.AdamW:
        return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def bare() -> list[float]:
        module = start()
        optimizer = adamw(module)
        ready = [pack([store[i] for i in step]) for step in steps]
        seconds = []
        for batch, labelled in zip(ready, plan.labelled, strict=True):
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            module(batch, 1 / labelled).total.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        return seconds

    def ours() -> list[float]:
        folder = Path(tempfile.mkdtemp())
        try:
            module = start()
            with work_timed() as work:
                run("Training", module, plan, config, [adamw(module)], folder, device)
            seconds = [row["seconds"] for row in read_rows(folder / SPEED)]
            outside.append(1 - sum(work) / sum(seconds))
            return seconds
        finally:
            shutil.rmtree(folder)

    ratios: list[float] = []
    outside: list[float] = []
    for repeat in range(options.repeats):
        if repeat % 2:
            found, floor = ours(), bare()
        else:
            floor, found = bare(), ours()
        # The first steps fill caches and allocate the optimizer's moments.
        ratios += [b / a for a, b in zip(floor[2:], found[2:], strict=True)]
        speed = sum(plan.tokens[2:]) / sum(found[2:])
        print(f"bare {sum(floor[2:]):.2f} s, loop {sum(found[2:]):.2f} s, {speed:.0f} tok/s")
    print(f"loop / bare, median of {len(ratios)} steps: {statistics.median(ratios):.3f}")
    print(f"outside forward, backward, clip and step: {statistics.median(outside):.2%} of a step")


@contextmanager
def work_timed() -> Iterator[list[float]]:
    """Collect the seconds of every forward, backward, clip and optimizer step."""
    seconds: list[float] = []

    def timed(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(*given, **named)
            finally:
                seconds.append(time.perf_counter() - started)

        return patch.object(owner, name, call)

    with (
        timed(training.Distillation, "forward"),
        timed(torch.Tensor, "backward"),
        timed(torch.nn.utils, "clip_grad_norm_"),
        timed(torch.optim.AdamW, "step"),
        timed(torch.optim.AdamW, "zero_grad"),
    ):
        yield seconds


if __name__ == "__main__":
    main()
