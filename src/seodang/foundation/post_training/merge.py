"""Linear merging of models with the same shape.

    merge_linear({Path("reasoning"): 0.8, Path("instruct"): 0.2}, Path("merged"))

Fine-tuned from one base, two models lie so close that the average of their weights has the skills
of both (model soups: Wortsman et al., arXiv 2203.05482); A.X K1 fuses its two modes like this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from seodang.artifact import write_json
from seodang.errors import InputError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def merge_linear(weights: Mapping[Path, float], out: Path) -> None:
    """Write the weighted average of the models' tensors into ``out``, in files like the first's.

    Computed in float64 and stored as the first model stores it. At no time is more than one file
    of weights in memory. Tensors that are not of floating point must be equal in all.

    Raises ``InputError`` if the models differ in tensors or shapes, ``ValueError`` if the weights
    do not add up to one.
    """
    from safetensors.torch import save_file

    if not weights or not math.isclose(sum(weights.values()), 1, rel_tol=1e-9):
        raise ValueError(f"weights must add up to 1: {list(weights.values())}")
    (first, *others) = weights
    layout = tensor_files(first)
    for other in others:
        if missing := layout.keys() ^ tensor_files(other).keys():
            raise InputError(
                f"{first} and {other} cannot be merged: only one of them has {min(missing)}"
            )
    for file in sorted(set(layout.values())):
        names = sorted(name for name, place in layout.items() if place == file)
        tensors = {name: _average(name, weights) for name in names}
        save_file(tensors, out / file, metadata={"format": "pt"})
    if (first / INDEX).exists():
        write_json(out / INDEX, json.loads((first / INDEX).read_bytes()))


def tensor_files(directory: Path) -> dict[str, str]:
    """The file of each tensor of a model directory; raises ``InputError`` if there are none."""
    from safetensors import safe_open

    if (directory / INDEX).exists():
        found: dict[str, str] = json.loads((directory / INDEX).read_bytes())["weight_map"]
        return found
    if not (directory / SINGLE).exists():
        raise InputError(f"{directory}: no {SINGLE}; only safetensors can be merged")
    with safe_open(directory / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def _average(name: str, weights: Mapping[Path, float]) -> torch.Tensor:
    import torch
    from safetensors import safe_open

    found = []
    for directory in weights:
        with safe_open(directory / tensor_files(directory)[name], framework="pt") as file:
            found.append(file.get_tensor(name))
    first = found[0]
    for directory, tensor in zip(weights, found, strict=True):
        if tensor.shape != first.shape:
            raise InputError(
                f"{directory}: {name} has the shape {tuple(tensor.shape)}, elsewhere it is "
                f"{tuple(first.shape)}: models of one base are needed"
            )
    if not first.is_floating_point():
        if not all(torch.equal(first, tensor) for tensor in found):
            raise InputError(f"{name} differs between the models and is not a number to average")
        return torch.as_tensor(first)
    total = torch.zeros(first.shape, dtype=torch.float64)
    for tensor, weight in zip(found, weights.values(), strict=True):
        total += weight * tensor.double()
    return total.to(first.dtype)
