"""Fewer routed experts for an A.X K1 student: the others are dropped, or merged into those kept.

What stays are the experts that the router uses most on a few stored sequences, by the sum of their
routing weights. Every expert group keeps the same number, so that the router still chooses its
groups first and its experts among them.

Merging follows M-SMoE (Li et al., arXiv 2310.01334): an expert left out goes to the one kept whose
router logits are most like its own; its neurons, whose order means nothing, are first matched with
that expert's; then weights and router rows are averaged by use.
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

FAMILIES = ("axk1",)
_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate")
_ROUTED = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|experts)\..*")

Array = npt.NDArray[np.float64]


def possible_experts(config: Mapping[str, Any]) -> list[int]:
    """How many experts can be kept, ascending.

    A group is judged by its two best experts, and the groups chosen must hold as many experts as a
    token is sent to.
    """
    groups, total = config["n_group"], config["n_routed_experts"]
    chosen, per_token = config["topk_group"], config["num_experts_per_tok"]
    return [groups * each for each in range(2, total // groups + 1) if chosen * each >= per_token]


def expert_settings(experts: int | None) -> dict[str, Any]:
    """What changes in a configuration."""
    return {} if experts is None else {"n_routed_experts": experts}


def choose_experts(
    model: Any, probe: Sequence[SoftLabelSequence], experts: int, *, merge: bool
) -> dict[str, Any]:
    """Which experts to keep, and what becomes of the others.

    Returns what :func:`keep_experts` takes: ``kept_experts``, a list for each layer, None where
    there are no experts; with ``merge`` also ``merged_experts``: for each expert kept the pairs
    [expert, share] that it is the average of. Deterministic; a tie goes to the lower number.
    """
    groups = model.config.n_group
    use, logits = _routing(model, probe)
    choice: dict[str, Any] = {"kept_experts": []}
    if merge:
        choice["merged_experts"] = []
    for layer in range(len(model.base_model.layers)):
        if layer not in use:
            for rows in choice.values():
                rows.append(None)
            continue
        by_group = use[layer].reshape(groups, -1)
        size = by_group.shape[1]
        best = np.argsort(-by_group, axis=1, kind="stable")[:, : experts // groups]
        kept = sorted((best + size * np.arange(groups)[:, None]).flatten().tolist())
        choice["kept_experts"].append(kept)
        if merge:
            choice["merged_experts"].append(_merge_plan(use[layer], logits[layer], kept))
    return choice


def keep_experts(
    state: Mapping[str, torch.Tensor], choice: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The weights with the experts that ``choice`` keeps, averages where it merges."""
    out = dict(state)
    for layer, kept in enumerate(choice["kept_experts"]):
        if kept is None:
            continue
        names = [n for n in state if (m := _ROUTED.fullmatch(n)) and int(m[1]) == layer]
        for name in names:
            out[name] = state[name][kept]
        if "merged_experts" in choice:
            _merge(state, out, f"model.layers.{layer}.mlp.", choice["merged_experts"][layer])
    return out


def _routing(
    model: Any, probe: Sequence[SoftLabelSequence]
) -> tuple[dict[int, Array], dict[int, Array]]:
    """By layer: the sum of every expert's routing weights, and the router logits of all tokens."""
    use: dict[int, Array] = {}
    logits: dict[int, list[Array]] = {}
    routers = {
        name: int(m[1]) for name, _ in model.named_modules() if (m := _ROUTER.fullmatch(name))
    }

    def see(name: str, given: torch.Tensor, result: tuple[torch.Tensor, ...]) -> None:
        logits_TE, weights_TK, experts_TK = (part.cpu() for part in result)
        total = torch.zeros(logits_TE.shape[1], dtype=torch.float64)
        total.index_add_(0, experts_TK.flatten(), weights_TK.flatten().double())
        layer = routers[name]
        use[layer] = use.get(layer, 0.0) + total.numpy()
        logits.setdefault(layer, []).append(logits_TE.double().numpy())

    observe(model, probe, list(routers), see)
    return use, {layer: np.concatenate(rows) for layer, rows in logits.items()}


def _merge_plan(use: Array, logits_TE: Array, kept: list[int]) -> list[list[list[float]]]:
    """For each expert kept the [expert, share] it is made of: itself first, shares by use."""
    unit_TE = logits_TE / np.maximum(np.linalg.norm(logits_TE, axis=0), 1e-12)
    members: dict[int, list[int]] = {expert: [expert] for expert in kept}
    for expert in range(len(use)):
        if expert not in members:
            alike = unit_TE[:, kept].T @ unit_TE[:, expert]
            members[kept[int(alike.argmax())]].append(expert)
    plan = []
    for group in members.values():
        shares = use[group] / use[group].sum() if use[group].any() else np.eye(len(group))[0]
        plan.append([[m, float(s)] for m, s in zip(group, shares, strict=True)])
    return plan


def _merge(
    state: Mapping[str, torch.Tensor],
    out: dict[str, torch.Tensor],
    prefix: str,
    plan: Sequence[Sequence[Sequence[float]]],
) -> None:
    """Replace the experts of one layer, and their router rows, by averages."""
    gate_up, down = f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"
    router = state[f"{prefix}gate.weight"]
    shares = torch.zeros(len(plan), len(router))
    for row, group in zip(shares, plan, strict=True):
        for member, share in group:
            row[int(member)] = share
    for name in (f"{prefix}gate.weight", f"{prefix}gate.e_score_correction_bias"):
        out[name] = shares @ state[name]
    merged = []
    for group in plan:
        kept = int(group[0][0])
        first = _neurons(state[gate_up][kept], state[down][kept])
        average = group[0][1] * first
        for member, share in group[1:]:
            neurons = _neurons(state[gate_up][int(member)], state[down][int(member)])
            average = average + share * _matched(first, neurons)
        merged.append(average)
    gate, up, rows = torch.stack(merged).chunk(3, dim=-1)
    out[gate_up] = torch.cat([gate, up], dim=1)
    out[down] = rows.transpose(1, 2)


def _neurons(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """An expert as one row for each neuron: its gate, up and down weights, (neurons, 3 hidden)."""
    gate, up = gate_up.chunk(2)
    return torch.cat([gate, up, down.T], dim=1)


def _matched(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The neurons of ``second`` in the order that agrees best with those of ``first``.

    The assignment with the largest sum of inner products (Git Re-Basin, arXiv 2209.04836).
    """
    from scipy.optimize import linear_sum_assignment

    agreement = (first.double() @ second.double().T).numpy()
    return second[torch.from_numpy(linear_sum_assignment(agreement, maximize=True)[1])]
