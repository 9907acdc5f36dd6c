"""Bytes on each device while a model trains under a layout: weights, gradients, optimizer, rest.

Two engines are planned side by side. The native one shards everything (FSDP2; stage 3 of ZeRO,
Rajbhandari et al., arXiv 1910.02054, section 5), keeps float32 and gathers a layer at a time.
Megatron-Core keeps bfloat16 weights and float32 gradients whole on each device and shards the
optimizer (stage 1), with float32 main weights in it. Tensor parallelism includes sequence
parallelism (Korthikanti et al., arXiv 2205.05198, section 4.2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from seodang.foundation.model_config import ModelConfig
from seodang.foundation.planning.activations import Kernels, checkpoint_bytes, layer_bytes
from seodang.foundation.planning.layout import Layout, pipeline_stages
from seodang.foundation.planning.parameters import (
    attention_projections,
    gated_mlp,
    latent_projections,
    layer_norms,
)

COMPUTE_BYTES = 2  # bfloat16 products
LAYERS_GATHERED = 2  # the one that computes and the next one, which is fetched meanwhile


@dataclass(frozen=True)
class Engine:
    """What one parameter costs in bytes, and which of it is shared out over data parallelism."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    shards_all: bool
    kernels: Kernels


# AdamW has two float32 moments; Megatron-Core's optimizer also holds the float32 weights.
FSDP2 = Engine("FSDP2", 4, 4, 8, shards_all=True, kernels="transformers")
MEGATRON = Engine("Megatron", 2, 4, 12, shards_all=False, kernels="fused")


@dataclass(frozen=True)
class Held:
    """Parameters on one device before ZeRO: of all tokens, and of its experts."""

    common: int
    experts: int

    def __add__(self, other: Held) -> Held:
        return Held(self.common + other.common, self.experts + other.experts)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a device of pipeline stage ``stage``, counted from 0."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    recomputed: int

    @property
    def states(self) -> int:
        """What does not depend on the batch: weights, gradients, optimizer, gathered layers."""
        return self.weights + self.gradients + self.optimizer + self.gathered

    @property
    def total(self) -> int:
        """With every activation kept."""
        return self.states + self.activations

    @property
    def total_recomputed(self) -> int:
        """With layer inputs kept and the rest of each layer computed twice."""
        return self.states + self.recomputed


def held_parameters(config: ModelConfig, kind: str, layout: Layout) -> Held:
    """Parameters of one entry of a pipeline stage that a device holds before ZeRO.

    Tensor parallelism splits heads, neurons and the vocabulary. Norms, router and the projections
    into the latents, which no head has a part in, are on every device.
    """
    c, tp = config, layout.tp
    vocabulary = c.vocabulary * c.hidden_size // tp
    if kind == "embedding":
        return Held(vocabulary, 0)
    if kind == "head":
        shares = c.tied_embeddings and layout.pp == 1
        return Held(c.hidden_size + (0 if shares else vocabulary), 0)
    whole = latent_projections(c) + layer_norms(c, sparse=kind != "dense")
    split = attention_projections(c) - latent_projections(c)
    if kind == "dense":
        return Held(whole + (split + gated_mlp(c, c.intermediate_size)) // tp, 0)
    expert = gated_mlp(c, c.expert_intermediate_size)
    whole += c.hidden_size * c.experts
    if kind == "mtp":
        whole += 3 * c.hidden_size + 2 * c.hidden_size * c.hidden_size
    return Held(whole + (split + c.shared_experts * expert) // tp, c.experts // layout.ep * expert)


def stage_memory(
    config: ModelConfig, layout: Layout, sequence: int, engine: Engine
) -> list[DeviceMemory]:
    """The memory of a device of every pipeline stage.

    A micro-batch is one sequence of ``sequence`` tokens. In the 1F1B schedule stage i of p holds
    the activations of p - i micro-batches (arXiv 2205.05198, section 4.2.3).
    """
    tokens = sequence / (layout.cp * layout.tp)
    found = []
    for number, kinds in enumerate(pipeline_stages(config, layout)):
        parts = [held_parameters(config, kind, layout) for kind in kinds]
        held = sum(parts, Held(0, 0))

        def bytes_of(each: int, held: Held = held, *, sharded: bool) -> int:
            if not sharded:
                return each * (held.common + held.experts)
            common = held.common / layout.shards
            return round(each * (common + held.experts / layout.expert_shards))

        gathered = _gathered(dict(zip(kinds, parts, strict=True)), layout, engine)
        of_layers = [layer_bytes(config, k, COMPUTE_BYTES, engine.kernels) for k in kinds]
        waiting = layout.pp - number
        inputs = checkpoint_bytes(config, COMPUTE_BYTES) * sum(k != "embedding" for k in kinds)
        found.append(
            DeviceMemory(
                stage=number,
                parameters=held.common + held.experts,
                weights=bytes_of(engine.weights, sharded=engine.shards_all),
                gradients=bytes_of(engine.gradients, sharded=engine.shards_all),
                optimizer=bytes_of(engine.optimizer, sharded=True),
                gathered=gathered,
                activations=round(tokens * waiting * sum(of_layers)),
                recomputed=round(tokens * (waiting * inputs + max(of_layers))),
            )
        )
    return found


def _gathered(parts: dict[str, Held], layout: Layout, engine: Engine) -> int:
    """Bytes of what FSDP2 gathers: embedding and head for a whole step, and a layer at a time.

    What no other device has a piece of is not gathered.
    """
    if not engine.shards_all:
        return 0
    whole = {
        kind: part.common * (layout.shards > 1) + part.experts * (layout.expert_shards > 1)
        for kind, part in parts.items()
    }
    ends = whole.pop("embedding", 0) + whole.pop("head", 0)
    layer = max(whole.values(), default=0)
    weights = engine.weights * (ends + LAYERS_GATHERED * layer)
    return weights + engine.gradients * max(ends, layer)


def device_memory(
    config: ModelConfig, layout: Layout, sequence: int, engine: Engine, *, recompute: bool
) -> DeviceMemory:
    """The memory of a device of the fullest stage, activations kept or recomputed."""
    stages = stage_memory(config, layout, sequence, engine)
    return max(stages, key=lambda at: at.total_recomputed if recompute else at.total)
