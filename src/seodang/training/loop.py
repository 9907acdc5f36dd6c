"""The training loop: batches in, optimizer steps out, until the plan is done.

It is read from top to bottom: load the newest checkpoint, then for every step add up the
gradients of its packs, look whether they are finite, clip, step, log, save. Nothing depends on
how often it was stopped: the batches follow from the plan, random numbers from seed and step.

What is trained is the caller's business: a module that maps a pack and a factor to a NamedTuple of
sums times that factor, whose first field, ``total``, is differentiable, and the optimizers of its
parameters. A module that has the factor beforehand may compute gradients in its forward pass.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch

from seodang.errors import WorkFailed
from seodang.progress import say, track
from seodang.recipe import TrainingConfig
from seodang.training import checkpoint
from seodang.training.log import TrainingLog
from seodang.training.parallel import Processes
from seodang.training.spikes import LossSpike, SpikeWatch, skipped_steps

CHECKPOINTS = "checkpoints"
Moved = TypeVar("Moved", bound=Any)


class Batch(Protocol):
    """What one forward pass takes: ready to compute on, and able to say what is in it."""

    @property
    def documents(self) -> Sequence[str]:
        """Ids of its documents."""

    def to(self, device: torch.device) -> Self:
        """The same batch on ``device``."""

    def apart(self) -> Sequence[Self]:
        """The same documents, each in a batch of its own."""


def on_device(batch: Moved, device: torch.device) -> Moved:
    """A copy of a dataclass with its tensors on ``device``; on a CPU, the batch itself."""
    if device.type == "cpu":
        return batch
    moved = {
        name: value.pin_memory().to(device, non_blocking=True)
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor)
    }
    return replace(batch, **moved)


@dataclass(frozen=True)
class Plan:
    """What every step trains on.

    ``tokens`` and ``labelled`` count the tokens and labelled positions of each step, of all
    processes together; ``packs(step)`` gives this process's packs, at least one.
    """

    tokens: Sequence[int]
    labelled: Sequence[int]
    packs: Callable[[int], Sequence[Batch]]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.tokens)


AfterStep = Callable[[int], Mapping[str, float]]
"""Called after the optimizers with the number of steps done; gives figures for the log."""


def run(
    name: str,
    module: torch.nn.Module,
    plan: Plan,
    config: TrainingConfig,
    optimizers: Sequence[torch.optim.Optimizer],
    folder: Path,
    processes: Processes,
    *,
    after_step: AfterStep | None = None,
    spikes: SpikeWatch | None = None,
) -> None:
    """Train ``module``, which maps a pack and a factor to its loss terms, in place.

    The schedule scales the rate that every group of ``optimizers`` has now. Log and checkpoints go
    to ``folder``, and are continued if they are there. ``after_step`` may change buffers, which
    checkpoints keep. With ``spikes`` a loss that jumps, or is not finite, sends the training back
    to its last checkpoint, and the steps to blame are left out.

    Raises ``WorkFailed``, naming the documents, if the loss stops being finite, or jumps too often.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    while True:
        try:
            return _run(
                name, module, plan, config, optimizers, folder, processes, after_step, spikes
            )
        except LossSpike as spike:
            spike.write_down(folder, processes)


def _run(
    name: str,
    module: torch.nn.Module,
    plan: Plan,
    config: TrainingConfig,
    optimizers: Sequence[torch.optim.Optimizer],
    folder: Path,
    processes: Processes,
    after_step: AfterStep | None,
    spikes: SpikeWatch | None,
) -> None:
    """From the newest checkpoint to the end, or to a spike."""
    checkpoints = folder / CHECKPOINTS
    step = checkpoint.load(checkpoints, module, optimizers, processes)
    if step and processes.first:
        say(f"Continuing from step {step} of {len(plan)}")
    skipped = skipped_steps(folder)
    half = config.precision == "bfloat16"
    autocast = torch.autocast(processes.device.type, torch.bfloat16) if half else nullcontext()

    def save(step: int) -> None:
        if log:
            log.flush()
        left_out = sum(number < step for number in skipped)
        keep = config.keep_checkpoints
        checkpoint.save(checkpoints, step, module, optimizers, processes, keep, left_out)

    with (
        _log(folder, step, processes) as log,
        stop_on_interrupt() as stopping,
        ThreadPoolExecutor(1) as reader,  # the next step's packs are read beside this one's work
        _progress(name, plan, step, processes) as advance,
    ):
        if spikes:
            spikes.start(folder, processes)
            if step == 0 and not checkpoint.found(checkpoints):
                save(0)  # something to go back to
        coming = reader.submit(plan.packs, step)
        while step < len(plan):
            started = time.perf_counter()
            packs = coming.result()
            if step + 1 < len(plan):
                coming = reader.submit(plan.packs, step + 1)
            if step in skipped:
                step += 1
                if log:
                    left_out = {"step": step, "tokens": 0, "labelled": 0, "skipped": 1}
                    log.write(left_out, time.perf_counter() - started)
                advance(plan.tokens[step - 1])
                continue
            torch.manual_seed(_seed(config.seed, step, processes.rank))
            factor = schedule(step, len(plan), config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                optimizer.zero_grad(set_to_none=True)
            scale = processes.count / plan.labelled[step]  # the gradients of processes are averaged
            sums = torch.zeros((), dtype=torch.float64, device=processes.device)
            for batch in packs:
                with autocast:
                    terms: Any = module(batch.to(processes.device), scale)
                terms.total.backward()
                sums = sums + torch.stack([term.detach() for term in terms]).double()
            norm = float(
                _whole(
                    torch.nn.utils.clip_grad_norm_(
                        module.parameters(), config.gradient_clip, foreach=True
                    )
                )
            )
            *totals, stop = processes.add([*sums.tolist(), float(stopping.is_set())])
            loss, *others = (value / processes.count for value in totals)
            if spikes and spikes.jumps(loss):
                if after_step:
                    after_step(step)  # forgets what it saw of this step; its buffers are reloaded
                documents = sorted({name for pack in packs for name in pack.documents})
                raise LossSpike(step, loss, spikes, documents)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise _not_finite(step, module, packs, autocast, processes)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            row = {
                "step": step,
                "tokens": plan.tokens[step - 1],
                "labelled": plan.labelled[step - 1],
                "loss": loss,
                **dict(zip(terms._fields[1:], others, strict=True)),
                "learning_rate": config.learning_rate * factor,
                "gradient_norm": norm,
                **(after_step(step) if after_step else {}),
            }
            if log:
                log.write(row, time.perf_counter() - started)
            advance(plan.tokens[step - 1], f"loss {loss:.3f}")
            if step % config.checkpoint_steps == 0 or stop:
                save(step)
            if stop:
                raise KeyboardInterrupt


def schedule(step: int, steps: int, config: TrainingConfig) -> float:
    """Factor of the learning rate at ``step``.

    A linear warm-up; then "cosine" goes down to a tenth over the rest, "wsd" stays at one and goes
    linearly to zero over the last ``decay`` of the steps (arXiv 2404.06395, 2405.18392).
    """
    rise = round(config.warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    if config.schedule == "wsd":
        fall = max(1, round(config.decay * steps))
        return min(1.0, (steps - step) / fall)
    progress = (step - rise) / max(1, steps - rise)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _not_finite(
    step: int,
    module: torch.nn.Module,
    packs: Sequence[Batch],
    autocast: Any,
    processes: Processes,
) -> WorkFailed:
    """Say which documents of the step have a loss that is not finite, or else name them all."""
    alone = [batch for pack in packs for batch in pack.apart()] or packs
    # A sharded module works only with all processes together: all take as many turns.
    turns = int(processes.add([float(len(alone))])[0])
    bad = []
    with torch.no_grad(), autocast:
        for turn in range(turns):
            batch = alone[turn % len(alone)]
            if not math.isfinite(float(module(batch.to(processes.device), 1.0).total)):
                bad.append(batch)

    def in_all_processes(batches: Sequence[Batch]) -> set[str]:
        own = json.dumps([name for batch in batches for name in batch.documents])
        return {name for said in processes.all_say(own) for name in json.loads(said)}

    documents = in_all_processes(bad) or in_all_processes(packs)
    return WorkFailed(
        f"step {step}: the loss is not finite; documents: {', '.join(sorted(documents))}. "
        "Lower the learning_rate, or look at these documents"
    )


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm over all shards."""
    full = getattr(norm, "full_tensor", None)
    return norm if full is None else full()


def _seed(seed: int, step: int, rank: int) -> int:
    """A seed of the step's own, so that no random state needs to be kept."""
    return (seed * 1_000_003 + step) * 65_537 + rank


@contextmanager
def _log(folder: Path, step: int, processes: Processes) -> Iterator[TrainingLog | None]:
    if not processes.first:
        yield None
        return
    log = TrainingLog(folder, step)
    try:
        yield log
    finally:
        log.close()


@contextmanager
def _progress(
    name: str, plan: Plan, step: int, processes: Processes
) -> Iterator[Callable[..., None]]:
    if not processes.first:
        yield lambda *_: None
        return
    with track(name, sum(plan.tokens), "tok", sum(plan.tokens[:step])) as advance:
        yield advance


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that the step in hand is finished and saved.

    One that comes a second later or more is for the impatient: it ends the work at once. (From a
    terminal the processes of a torchrun job get each Ctrl-C twice: directly and from torchrun.)
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    first = math.inf

    def handler(number: int, frame: Any) -> None:
        nonlocal first
        first = min(first, time.monotonic())
        event.set()
        if time.monotonic() - first >= 1.0:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
