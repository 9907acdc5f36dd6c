"""Width pruning: fewer attention heads, MLP neurons and hidden dimensions in every layer.

Which ones go is measured by their activations on a few stored sequences, no gradient needed
(Minitron, arXiv 2407.14679): a head by the norm of what it hands to the output projection, a
neuron by its activation before the down projection, a hidden dimension by its share of the outputs
of every norm over them; each as root mean square over the tokens, which started better than the
mean of absolute values. ``AXES`` says which axis of which weight goes with them, for Llama, Qwen2,
Qwen3 and A.X K1 (multi-head latent attention: every head has its own keys and values; experts keep
their width).

With grouped queries whole groups go, a key-value head with all its query heads, where the number
allows it, else as few query heads of every group as possible: that also shrinks the cache of keys
and values, and started better than one query head out of every group. A head's size never changes.

A norm hands on a vector of length sqrt(dimensions), before its weights: over fewer dimensions a
shorter one. Its weights are multiplied by sqrt(before / after), which keeps the length. Where the
dimensions left out were zero, the student then computes exactly what the model did, up to the
norm's epsilon; elsewhere it starts better too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seodang.softlabels.store import SoftLabelSequence
from seodang.student.probe import observe

Array = npt.NDArray[np.float64]

FAMILIES = ("llama", "qwen2", "qwen3", "axk1")
HIDDEN, HEADS, KV_HEADS, NEURONS = "hidden", "heads", "kv_heads", "neurons"
_NUMBERED = re.compile(r"model\.layers\.(\d+)\.(.*)")

# What each axis of a weight counts; None: it stays as it is.
AXES: dict[str, tuple[str | None, ...]] = {
    "model.embed_tokens.weight": (None, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (None, HIDDEN),
    "lm_head.bias": (None,),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    # grouped-query attention
    "self_attn.q_proj.weight": (HEADS, HIDDEN),
    "self_attn.q_proj.bias": (HEADS,),
    "self_attn.k_proj.weight": (KV_HEADS, HIDDEN),
    "self_attn.k_proj.bias": (KV_HEADS,),
    "self_attn.v_proj.weight": (KV_HEADS, HIDDEN),
    "self_attn.v_proj.bias": (KV_HEADS,),
    "self_attn.o_proj.weight": (HIDDEN, HEADS),
    "self_attn.o_proj.bias": (HIDDEN,),
    "self_attn.q_norm.weight": (None,),
    "self_attn.k_norm.weight": (None,),
    # multi-head latent attention; q_b and kv_b hold all of a head's rows together
    "self_attn.q_a_proj.weight": (None, HIDDEN),
    "self_attn.q_a_proj.bias": (None,),
    "self_attn.q_a_layernorm.weight": (None,),
    "self_attn.q_b_proj.weight": (HEADS, None),
    "self_attn.kv_a_proj_with_mqa.weight": (None, HIDDEN),
    "self_attn.kv_a_proj_with_mqa.bias": (None,),
    "self_attn.kv_a_layernorm.weight": (None,),
    "self_attn.kv_b_proj.weight": (HEADS, None),
    # dense MLP
    "mlp.gate_proj.weight": (NEURONS, HIDDEN),
    "mlp.gate_proj.bias": (NEURONS,),
    "mlp.up_proj.weight": (NEURONS, HIDDEN),
    "mlp.up_proj.bias": (NEURONS,),
    "mlp.down_proj.weight": (HIDDEN, NEURONS),
    "mlp.down_proj.bias": (HIDDEN,),
    # mixture of experts
    "mlp.gate.weight": (None, HIDDEN),
    "mlp.gate.e_score_correction_bias": (None,),
    "mlp.experts.gate_up_proj": (None, None, HIDDEN),
    "mlp.experts.down_proj": (None, HIDDEN, None),
    "mlp.shared_experts.gate_proj.weight": (None, HIDDEN),
    "mlp.shared_experts.up_proj.weight": (None, HIDDEN),
    "mlp.shared_experts.down_proj.weight": (HIDDEN, None),
    "mlp.post_mlp_layernorm.weight": (HIDDEN,),
}


def head_splits(config: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """Every number of heads that can be kept, as (key-value heads, query heads of each).

    Whole groups go first: of 9 heads in 3 groups, 6 are 2 groups of 3, and 4 are 2 groups of 2.
    """
    groups = config["num_key_value_heads"]
    each = config["num_attention_heads"] // groups
    return {g * q: (g, q) for q in range(1, each + 1) for g in range(1, groups + 1)}


def choose_width(
    model: Any,
    probe: Sequence[SoftLabelSequence],
    *,
    heads: int | None = None,
    neurons: int | None = None,
    hidden: int | None = None,
) -> dict[str, Any]:
    """Which heads and neurons of each layer, and which hidden dimensions, to keep.

    Returns what :func:`keep_width` takes: ``kept_heads`` and ``kept_neurons`` as a list for each
    layer (of neurons None where the layer has experts) and ``kept_hidden``; only what was asked
    for. Deterministic; a tie goes to the lower number. Raises ``KeyError`` for a number of heads
    that :func:`head_splits` lacks.
    """
    config = model.config.to_dict()
    squares = _squares(model, probe)
    choice: dict[str, Any] = {}
    layers = range(len(model.base_model.layers))
    if heads is not None:
        split = head_splits(config)[heads]
        total = config["num_attention_heads"]
        per_head = [
            squares[f"model.layers.{i}.self_attn.o_proj"].reshape(total, -1).sum(1) for i in layers
        ]
        choice["kept_heads"] = [_best_heads(square, config, *split) for square in per_head]
    if neurons is not None:
        per_neuron = [squares.get(f"model.layers.{i}.mlp.down_proj") for i in layers]
        choice["kept_neurons"] = [
            None if square is None else _largest(square, neurons) for square in per_neuron
        ]
    if hidden is not None:
        shares = [squares[name] / squares[name].sum() for name in _norms(model)]
        choice["kept_hidden"] = _largest(np.mean(shares, axis=0), hidden)
    return choice


def keep_width(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], choice: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The weights of what ``choice`` keeps; ``config`` is that of the model they come from.

    Raises ``ValueError`` for a weight of another family.
    """
    units: dict[str | None, int] = {
        HEADS: config["num_attention_heads"],
        KV_HEADS: config["num_key_value_heads"],
        NEURONS: config["intermediate_size"],
        HIDDEN: config["hidden_size"],
    }
    out = {}
    for name, tensor in state.items():
        kept = _kept(name, config, choice)
        for axis, unit in enumerate(_axes(name)):
            if unit in kept:
                tensor = _select(tensor, axis, kept[unit], units[unit])  # noqa: PLW2901
        if HIDDEN in kept and _is_norm(name):
            tensor = tensor * (units[HIDDEN] / len(kept[HIDDEN])) ** 0.5  # noqa: PLW2901
        out[name] = tensor
    return out


def width_settings(
    config: Mapping[str, Any], *, heads: int | None, neurons: int | None, hidden: int | None
) -> dict[str, Any]:
    """What changes in a configuration; the size of a head is written down, for it stays."""
    changes: dict[str, Any] = {}
    if hidden is not None:
        changes["hidden_size"] = hidden
    if neurons is not None:
        changes["intermediate_size"] = neurons
    if heads is not None:
        changes["num_attention_heads"] = heads
        changes["num_key_value_heads"] = head_splits(config)[heads][0]
    if hidden is not None or heads is not None:
        size = config["hidden_size"] // config["num_attention_heads"]
        changes["head_dim"] = config.get("head_dim") or size
    return changes


def _axes(name: str) -> tuple[str | None, ...]:
    match = _NUMBERED.fullmatch(name)
    try:
        return AXES[match[2] if match else name]
    except KeyError:
        raise ValueError(f"{name}: no weight of {', '.join(FAMILIES)}") from None


def _kept(
    name: str, config: Mapping[str, Any], choice: Mapping[str, Any]
) -> dict[str | None, list[int]]:
    """The units that stay, for a weight of this name; those of which all stay are left out."""
    kept: dict[str | None, list[int]] = {}
    if "kept_hidden" in choice:
        kept[HIDDEN] = choice["kept_hidden"]
    if match := _NUMBERED.fullmatch(name):
        layer = int(match[1])
        if "kept_neurons" in choice and choice["kept_neurons"][layer] is not None:
            kept[NEURONS] = choice["kept_neurons"][layer]
        if "kept_heads" in choice:
            each = config["num_attention_heads"] // config["num_key_value_heads"]
            kept[HEADS] = choice["kept_heads"][layer]
            kept[KV_HEADS] = sorted({head // each for head in kept[HEADS]})
    return kept


def _select(tensor: torch.Tensor, axis: int, kept: Sequence[int], units: int) -> torch.Tensor:
    """Those of ``units`` equal blocks along an axis that are kept."""
    size = tensor.shape[axis] // units
    rows = torch.tensor(kept)[:, None] * size + torch.arange(size)
    return tensor.index_select(axis, rows.flatten())


def _largest(scores: Array, count: int) -> list[int]:
    """Indices of the ``count`` largest scores, ascending."""
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def _best_heads(squares: Array, config: Mapping[str, Any], groups: int, each: int) -> list[int]:
    """The groups, and the heads of each, with the largest squared norms."""
    by_group = squares.reshape(config["num_key_value_heads"], -1)
    best = [_largest(group, each) for group in by_group]
    sums = np.array([group[heads].sum() for group, heads in zip(by_group, best, strict=True)])
    size = by_group.shape[1]
    return [group * size + head for group in _largest(sums, groups) for head in best[group]]


def _squares(model: Any, probe: Sequence[SoftLabelSequence]) -> dict[str, Array]:
    """Sums of squares over the tokens, by module: inputs of projections, outputs of norms."""
    sums: dict[str, Any] = {}

    def watch(name: str, given: torch.Tensor, result: torch.Tensor) -> None:
        activation = result if name in norms else given
        sums[name] = sums.get(name, 0.0) + activation.double().square().sum((0, 1)).cpu().numpy()

    norms = _norms(model)
    projections = [
        name
        for name, _ in model.named_modules()
        if name.endswith(("self_attn.o_proj", ".mlp.down_proj"))
    ]
    observe(model, probe, [*norms, *projections], watch)
    return sums


def _norms(model: Any) -> list[str]:
    return [name for name, _ in model.named_modules() if _is_norm(f"{name}.weight")]


def _is_norm(name: str) -> bool:
    """Whether a weight is that of a norm over the hidden dimensions."""
    return name.endswith("norm.weight") and _axes(name) == (HIDDEN,)
