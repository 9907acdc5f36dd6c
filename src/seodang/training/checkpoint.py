"""Checkpoints of a training run: weights, optimizer and step, exactly, without pickle.

They are PyTorch's distributed checkpoints in safetensors files: every process writes its own
shard, and a job of another number of processes reads the parts that it needs.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from seodang.artifact import write_atomically
from seodang.training.parallel import Processes

STATE = "state.json"
_STEP = re.compile(r"step-(\d{8})")


def save(
    folder: Path,
    step: int,
    module: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    processes: Processes,
    keep: int = 1,
    skipped: int = 0,
) -> None:
    """Write ``folder/step-N``; it appears complete or not at all, then all but ``keep`` go.

    ``skipped`` of its steps were left out: the optimizers made so many fewer.
    """
    unfinished, final = folder / "unfinished", folder / f"step-{step:08d}"
    if processes.first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    processes.wait()
    try:
        with _quiet():
            save_state(
                tensors(module, optimizers),
                storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
                no_dist=processes.count == 1,
            )
    except CheckpointException as error:  # a traceback of each process; the first cause will do
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    processes.wait()
    if processes.first:
        state = {"step": step, "updates": step - skipped}
        write_atomically(unfinished / STATE, json.dumps(state).encode() + b"\n")
        if not final.exists():
            unfinished.rename(final)
        for path in found(folder)[:-keep]:
            shutil.rmtree(path)
    processes.wait()


def load(
    folder: Path,
    module: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    processes: Processes,
) -> int:
    """Load the newest checkpoint in place; returns its step, 0 if there is none."""
    newest = found(folder)
    if not newest:
        return 0
    state = json.loads((newest[-1] / STATE).read_bytes())
    for optimizer in optimizers:
        optimizer.state.clear()
        if state["updates"]:
            _allocate(optimizer, state["updates"])
    with _quiet():
        load_state(
            tensors(module, optimizers),
            storage_reader=HuggingFaceStorageReader(str(newest[-1])),
            no_dist=processes.count == 1,
        )
    return int(state["step"])


def _allocate(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Give every parameter a state to load into, of ``updates`` steps.

    States appear with an optimizer's first step; one at rate 0 with gradients of 0 moves nothing.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for values in optimizer.state.values():
        if "step" in values:
            values["step"].fill_(updates)


def tensors(
    module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """Parameters, persistent buffers and moments by name.

    The number of steps, equal for all, is kept beside them.
    """
    kept = module.state_dict().keys()
    named = {name: value for name, value in module.named_buffers() if name in kept}
    for name, parameter in module.named_parameters():
        named[name] = parameter.detach()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if value.ndim:
                    named[f"optimizer.{key}.{name}"] = value
    return named


def found(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name))


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Keep to ourselves what the checkpoint library says about a single process."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
