"""The training loop: packs in, optimizer steps out, until the plan is done.

It is read from top to bottom: load the newest checkpoint, then for every step add up the
gradients of its packs, look whether they are finite, clip, step, log, save. Nothing depends on
how often it was stopped: the batches follow from the plan, random numbers from seed and step.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seodang.errors import WorkFailed
from seodang.progress import say, track
from seodang.recipe import StudentConfig
from seodang.softlabels.store import SoftLabelSequence
from seodang.student import checkpoint
from seodang.student.log import TrainingLog
from seodang.student.losses import LossTerms
from seodang.student.packing import Objective, Pack, pack
from seodang.student.parallel import Processes

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Plan:
    """What every step trains on.

    ``tokens`` and ``labelled`` count the tokens and labelled positions of each step, of all
    processes together; ``packs(step)`` gives the sequences of this process's packs.
    """

    tokens: Sequence[int]
    labelled: Sequence[int]
    packs: Callable[[int], list[list[SoftLabelSequence]]]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.tokens)


def run(
    name: str,
    module: torch.nn.Module,
    plan: Plan,
    config: StudentConfig,
    folder: Path,
    processes: Processes,
    objective: Objective = "soft-labels",
) -> None:
    """Train ``module``, which maps a pack to the sums of its loss terms, in place.

    Log and checkpoints go to ``folder``, and are continued if they are there. Raises
    ``WorkFailed``, naming the documents, if the loss stops being finite.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    checkpoints = folder / CHECKPOINTS
    step = checkpoint.load(checkpoints, module, optimizer, processes)
    if step and processes.first:
        say(f"Continuing from step {step} of {len(plan)}")
    half = config.precision == "bfloat16"
    autocast = torch.autocast(processes.device.type, torch.bfloat16) if half else nullcontext()

    def prepare(step: int) -> list[tuple[list[SoftLabelSequence], Pack]]:
        return [(sequences, pack(sequences, objective)) for sequences in plan.packs(step)]

    with (
        _log(folder, step, processes) as log,
        stop_on_interrupt() as stopping,
        ThreadPoolExecutor(1) as reader,  # the next step's labels are read beside this one's work
        _progress(name, plan, step, processes) as advance,
    ):
        coming = reader.submit(prepare, step)
        while step < len(plan):
            started = time.perf_counter()
            prepared = coming.result()
            if step + 1 < len(plan):
                coming = reader.submit(prepare, step + 1)
            torch.manual_seed(_seed(config.seed, step, processes.rank))
            rate = config.learning_rate * schedule(step, len(plan), config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            sums_3 = torch.zeros(3, dtype=torch.float64, device=processes.device)
            for _, batch in prepared:
                with autocast:
                    terms: LossTerms = module(batch.to(processes.device))
                (terms.total * (processes.count / plan.labelled[step])).backward()
                sums_3 += torch.stack([term.detach() for term in terms])
            norm = float(
                _whole(
                    torch.nn.utils.clip_grad_norm_(
                        module.parameters(), config.gradient_clip, foreach=True
                    )
                )
            )
            *sums, stop = processes.add([*sums_3.tolist(), float(stopping.is_set())])
            loss, kd_loss, cross_entropy = (value / plan.labelled[step] for value in sums)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise _not_finite(step, module, [s for part, _ in prepared for s in part], autocast)
            optimizer.step()
            step += 1
            row = {
                "step": step,
                "tokens": plan.tokens[step - 1],
                "labelled": plan.labelled[step - 1],
                "loss": loss,
                "kd_loss": kd_loss,
                "cross_entropy": cross_entropy,
                "learning_rate": rate,
                "gradient_norm": norm,
            }
            if log:
                log.write(row, time.perf_counter() - started)
            advance(plan.tokens[step - 1], f"loss {loss:.3f}")
            if step % config.checkpoint_steps == 0 or stop:
                if log:
                    log.flush()
                checkpoint.save(
                    checkpoints, step, module, optimizer, processes, config.keep_checkpoints
                )
            if stop:
                raise KeyboardInterrupt


def schedule(step: int, steps: int, config: StudentConfig) -> float:
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
    sequences: Sequence[SoftLabelSequence],
    autocast: Any,
) -> WorkFailed:
    """Say which documents of this process's packs have a loss that is not finite."""
    documents = sorted({s.document_id for s in sequences})
    # A sharded module works only with all processes together, each of which has other packs.
    if not hasattr(module, "unshard"):
        with torch.no_grad(), autocast:
            documents = (
                sorted(
                    {
                        s.document_id
                        for s in sequences
                        if not math.isfinite(float(module(pack([s]).to(_device(module))).total))
                    }
                )
                or documents
            )
    return WorkFailed(
        f"step {step}: the loss is not finite; documents: {', '.join(documents)}. "
        "Lower student.learning_rate, or look at these documents"
    )


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


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
