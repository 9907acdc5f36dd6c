"""Depth pruning: a student keeps some of a model's layers, whole.

It keeps the embedding, the head and most of what the model knows, and is faster at equal size than
width pruning (Minitron, arXiv 2408.11796). Neighbouring layers do similar things, so a contiguous
block goes (Gromov et al., arXiv 2403.17887). Which one is measured: the block whose removal leaves
the lowest loss on a few stored soft labels. `benchmarks/pruning.py` compares it with an even choice
and with the block chosen by angular distance.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from seodang.softlabels.store import SoftLabelSequence
from seodang.student.probe import soft_label_loss

_LAYER = re.compile(r"(.*?\blayers\.)(\d+)(\..*)")


def without_block(total: int, keep: int, start: int) -> list[int]:
    """All of ``total`` layers but the ``total - keep`` that begin at ``start``."""
    return [*range(start), *range(start + total - keep, total)]


def choose_layers(
    model: Any, probe: Sequence[SoftLabelSequence], keep: int, *, residual: bool
) -> list[int]:
    """Which ``keep`` layers of ``model`` to keep: all but the contiguous block missed least.

    The first layer always stays, and the last one unless ``keep`` is 1.
    """
    total = len(model.base_model.layers)
    if keep in (1, total):
        return list(range(keep))
    candidates = [without_block(total, keep, start) for start in range(1, keep)]
    losses = []
    for kept in candidates if len(candidates) > 1 else []:
        with only_layers(model, kept), torch.inference_mode():
            losses.append(float(soft_label_loss(model, probe, residual=residual)))
    return candidates[losses.index(min(losses)) if losses else 0]


@contextmanager
def only_layers(model: Any, kept: Sequence[int]) -> Iterator[None]:
    """Let ``model`` compute with the layers ``kept`` alone, without a copy of its weights."""
    every = model.base_model.layers
    settings = model.config.to_dict()
    changes = layer_settings(settings, kept)
    try:
        model.base_model.layers = torch.nn.ModuleList(every[i] for i in kept)
        for name, value in changes.items():
            setattr(model.config, name, value)
        yield
    finally:
        model.base_model.layers = every
        for name in changes:
            setattr(model.config, name, settings[name])


def keep_layers(state: Mapping[str, torch.Tensor], kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """The weights of the layers ``kept``, numbered anew, and everything outside the layers."""
    new_index = {old: new for new, old in enumerate(kept)}
    out = {}
    for name, tensor in state.items():
        if match := _LAYER.fullmatch(name):
            if (old := int(match[2])) in new_index:
                out[f"{match[1]}{new_index[old]}{match[3]}"] = tensor
        else:
            out[name] = tensor
    return out


def layer_settings(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """What changes in a configuration: the number of layers, and lists with an entry for each.

    Such lists say which layers attend to a window, rotate their positions or have experts; all
    are named after layers (``layer_types``, ``mlp_layer_types``, ``no_rope_layers``).
    """
    total = config["num_hidden_layers"]
    lists = {
        name: [value[i] for i in kept]
        for name, value in config.items()
        if "layer" in name and isinstance(value, list) and len(value) == total
    }
    return {**lists, "num_hidden_layers": len(kept)}
