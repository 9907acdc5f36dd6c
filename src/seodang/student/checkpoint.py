"""Checkpoints of a training run: weights, optimizer and step, exactly, without pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from seodang.artifact import write_atomically

_OPTIMIZER = "optimizer."
_MODEL = "model."


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write ``folder/step-N``; it appears complete or not at all, then older ones go."""
    names: dict[torch.Tensor, str] = {
        parameter: name for name, parameter in model.named_parameters()
    }
    tensors = {_MODEL + name: p.detach().contiguous() for p, name in names.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{_OPTIMIZER}{key}.{names[parameter]}"] = value.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    save_file(tensors, unfinished / "state.safetensors")
    with (unfinished / "state.safetensors").open("rb") as file:
        os.fsync(file.fileno())
    write_atomically(unfinished / "state.json", json.dumps({"step": step}).encode())
    older = list(folder.glob("step-*"))
    final = folder / f"step-{step:08d}"
    if final.exists():
        return
    unfinished.rename(final)
    for path in older:
        shutil.rmtree(path)


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into ``model`` and ``optimizer``; returns its step, 0 if none."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0
    tensors = load_file(found[-1] / "state.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(_MODEL + name))
    for full_name, tensor in tensors.items():
        key, name = full_name.removeprefix(_OPTIMIZER).split(".", 1)
        parameter = parameters[name]
        value = tensor.to(parameter.device) if tensor.ndim else tensor
        optimizer.state[parameter][key] = value
    return int(json.loads((found[-1] / "state.json").read_bytes())["step"])
