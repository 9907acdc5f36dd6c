"""Where a student starts: the teacher without a block of its layers.

Depth pruning keeps the embedding, the head and most of what the teacher knows, and is faster at
equal size than width pruning (Minitron, arXiv 2408.11796). Neighbouring layers do similar things,
so a contiguous block goes (Gromov et al., arXiv 2403.17887). Which one is measured: the block
whose removal leaves the lowest loss on a few stored soft labels. At 16 of SmolLM2's 30 layers
this starts at half the divergence of an even choice of layers and stays ahead after training
(`benchmarks/pruning.py`), also of the block chosen by angular distance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seodang.causal_lm import quiet_transformers
from seodang.errors import InputError
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore
from seodang.student.batch import batch_loss

PROBE_TOKENS = 512  # labelled tokens on which the blocks are compared
_LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")


def check_layers(teacher: Path, keep: int) -> None:
    """Raise ``InputError`` if the teacher has fewer than ``keep`` layers."""
    from transformers import AutoConfig

    total = AutoConfig.from_pretrained(teacher, local_files_only=True).num_hidden_layers
    if keep > total:
        raise InputError(f"student.layers is {keep}, the teacher has only {total}")


def choose_layers(teacher: Path, store: SoftLabelStore, keep: int) -> list[int]:
    """Which layers of ``teacher`` a student of ``keep`` layers takes over."""
    model = load_teacher(teacher)
    total = model.config.num_hidden_layers
    candidates = [without_block(total, keep, start) for start in range(1, keep)]
    if keep in (1, total) or len(candidates) == 1:
        return candidates[0] if candidates else without_block(total, keep, keep)
    probe, residual = probe_sequences(store), store.estimator == "residual"
    every = list(model.base_model.layers)
    losses = []
    for kept in candidates:
        model.base_model.layers = torch.nn.ModuleList(every[i] for i in kept)
        with torch.inference_mode():
            losses.append(
                float(batch_loss(model, probe, "soft-labels", 0.0, residual).distillation)
            )
    return candidates[losses.index(min(losses))]


def without_block(total: int, keep: int, start: int) -> list[int]:
    """All of ``total`` layers but the ``total - keep`` that begin at ``start``."""
    return [*range(start), *range(start + total - keep, total)]


def probe_sequences(store: SoftLabelStore) -> list[SoftLabelSequence]:
    """Sequences from all over the store, with about ``PROBE_TOKENS`` labelled tokens."""
    wanted = max(1, round(PROBE_TOKENS * len(store) / max(1, store.num_tokens)))
    step = max(1, len(store) // wanted)
    return [store[i] for i in range(0, len(store), step)][:wanted]


def load_teacher(teacher: Path) -> Any:
    """The teacher's model in float32."""
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    return AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).eval()


def depth_pruned(teacher: Path, kept: Sequence[int]) -> Any:
    """A model of the teacher's architecture with the layers ``kept``, in float32."""
    from transformers import AutoModelForCausalLM

    full = load_teacher(teacher)
    config = full.config
    new_index = {old: new for new, old in enumerate(kept)}
    state = {}
    for name, tensor in full.state_dict().items():
        if match := _LAYER.fullmatch(name):
            if int(match[2]) not in new_index:
                continue
            name = f"{match[1]}{new_index[int(match[2])]}{match[3]}"  # noqa: PLW2901
        state[name] = tensor
    config.num_hidden_layers = len(kept)
    config._name_or_path = ""
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    student: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    student.load_state_dict(state)
    student.generation_config = full.generation_config
    return student
