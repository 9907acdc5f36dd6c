"""A student with its loss, its packs and its optimizer: what the training loop is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from seodang.recipe import StudentConfig, TrainingConfig
from seodang.student.divergences import sparse_divergence_terms
from seodang.student.losses import LossTerms, sparse_kd_terms
from seodang.student.packing import Objective, Pack, hidden_states
from seodang.training.attention import use_packed_attention
from seodang.training.gated_mlp import use_lean_mlps
from seodang.training.loop import Plan
from seodang.training.parallel import Processes
from seodang.training.plan import share
from seodang.training.products import use_fast_products

CPU_PACK_TOKENS = 512  # activations of more add to the peak; products of fewer are slow


def make_trainable(model: Any, config: TrainingConfig) -> None:
    """Let ``model`` take packs, and train faster and with less memory, in place.

    Raises ``InputError`` if its attention cannot be exchanged.
    """
    use_packed_attention(model)
    use_fast_products(model)
    use_lean_mlps(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def plan_packs(
    steps: Sequence[Sequence[int]],
    lengths: Sequence[int],
    labelled: Sequence[int],
    packed: Callable[[Sequence[int]], Pack],
    config: TrainingConfig,
    processes: Processes,
) -> Plan:
    """What the loop is told of ``steps``: this process' packs, made by ``packed`` when needed.

    ``lengths`` and ``labelled`` count tokens and labelled positions of every sequence.
    """
    on_cpu = processes.device.type == "cpu"
    at_once = config.micro_batch_tokens or (CPU_PACK_TOKENS if on_cpu else None)

    def packs(step: int) -> list[Pack]:
        shared = share(steps[step], lengths, processes.count, at_once)
        return [packed(members) for members in shared[processes.rank]]

    return Plan(
        tokens=[sum(lengths[index] for index in step) for step in steps],
        labelled=[sum(labelled[index] for index in step) for step in steps],
        packs=packs,
    )


def make_optimizer(module: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, as the config has it."""
    return torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )


class Distillation(torch.nn.Module):
    """A student together with its loss: maps a pack to the scaled sums of the loss terms.

    The loss is computed inside, where the head's weights are whole, also if they are sharded. With
    ``accumulate_head_gradient`` a forward pass with gradients adds the head's to its ``grad``: a
    backward pass has to follow, from ``total`` as it is.
    """

    accumulate_head_gradient = False

    def __init__(
        self, model: Any, config: StudentConfig, objective: Objective, residual: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.divergence = config.divergence if objective == "soft-labels" else "forward-kl"
        self.cross_entropy_weight = (
            config.cross_entropy_weight if objective == "soft-labels" else 1.0
        )
        self.residual = residual and objective == "soft-labels"
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if embedding.weight is head.weight:  # rows that autograd adds to the head's gradient
            embedding.sparse = True

    def forward(self, batch: Pack, scale: float = 1.0) -> LossTerms:
        """Sums over the pack's labelled positions, in nats, times ``scale``."""
        hidden_NH = hidden_states(self.model, batch)
        head = self.model.get_output_embeddings()
        if torch.is_autocast_enabled(hidden_NH.device.type):
            hidden_NH = hidden_NH.to(torch.get_autocast_dtype(hidden_NH.device.type))
        labels = (batch.offsets, batch.entry_ids, batch.weights)
        options: dict[str, Any] = {
            "cross_entropy_targets": batch.targets,
            "cross_entropy_weight": self.cross_entropy_weight,
            "bias": getattr(head, "bias", None),
            "reduction": "sum",
            "scale": scale,
        }
        if self.accumulate_head_gradient and torch.is_grad_enabled():
            if head.weight.grad is None:
                head.weight.grad = torch.zeros_like(head.weight)
            options["head_gradient"] = head.weight.grad
        if self.divergence == "forward-kl":
            return sparse_kd_terms(
                hidden_NH, head.weight, *labels, residual=self.residual, **options
            )
        terms: LossTerms = sparse_divergence_terms(
            hidden_NH, head.weight, *labels, divergence=self.divergence, **options
        )
        return terms
