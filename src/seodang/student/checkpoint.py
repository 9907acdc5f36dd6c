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
from seodang.student.parallel import Processes

STATE = "state.json"
_STEP = re.compile(r"step-(\d{8})")


def save(
    folder: Path,
    step: int,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
    keep: int = 1,
) -> None:
    """Write ``folder/step-N``; it appears complete or not at all, then all but ``keep`` go."""
    unfinished, final = folder / "unfinished", folder / f"step-{step:08d}"
    if processes.first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    processes.wait()
    try:
        with _quiet():
            save_state(
                tensors(module, optimizer),
                storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
                no_dist=processes.count == 1,
            )
    except CheckpointException as error:  # a traceback of each process; the first cause will do
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    processes.wait()
    if processes.first:
        write_atomically(unfinished / STATE, json.dumps({"step": step}).encode() + b"\n")
        if not final.exists():
            unfinished.rename(final)
        for path in found(folder)[:-keep]:
            shutil.rmtree(path)
    processes.wait()


def load(
    folder: Path,
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> int:
    """Load the newest checkpoint into ``module`` and ``optimizer``; returns its step, 0 if none."""
    newest = found(folder)
    if not newest:
        return 0
    step = int(json.loads((newest[-1] / STATE).read_bytes())["step"])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=processes.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    with _quiet():
        load_state(
            tensors(module, optimizer),
            storage_reader=HuggingFaceStorageReader(str(newest[-1])),
            no_dist=processes.count == 1,
        )
    return step


def tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and moments by name; the number of steps, equal for all, is kept beside them."""
    named: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        named[name] = parameter.detach()
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
