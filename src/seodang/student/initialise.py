"""Where a student starts: the teacher with fewer layers.

Depth pruning keeps the embedding, the head and an even choice of layers, the first and the last
always among them: faster at equal size than width pruning (Minitron, arXiv 2408.11796), and the
student inherits the teacher's vocabulary and chat template.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from seodang.causal_lm import quiet_transformers
from seodang.errors import InputError

_LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")


def kept_layers(total: int, keep: int) -> list[int]:
    """Which of ``total`` layers stay when ``keep`` do: evenly spaced, both ends included."""
    if keep == 1:
        return [0]
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def depth_pruned(teacher: Path, layers: int) -> Any:
    """A model of the teacher's architecture with ``layers`` of its layers, in float32.

    Raises ``InputError`` if the teacher has fewer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    config = AutoConfig.from_pretrained(teacher, local_files_only=True)
    total = config.num_hidden_layers
    if layers > total:
        raise InputError(f"student.layers is {layers}, the teacher has only {total}")
    full: Any = AutoModelForCausalLM.from_pretrained(
        teacher, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    keep = kept_layers(total, layers)
    new_index = {old: new for new, old in enumerate(keep)}
    config.num_hidden_layers = layers
    config._name_or_path = ""
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in keep]
    student: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {}
    for name, tensor in full.state_dict().items():
        if match := _LAYER.fullmatch(name):
            if int(match[2]) not in new_index:
                continue
            name = f"{match[1]}{new_index[int(match[2])]}{match[3]}"  # noqa: PLW2901
        state[name] = tensor
    student.load_state_dict(state)
    student.generation_config = full.generation_config
    return student
