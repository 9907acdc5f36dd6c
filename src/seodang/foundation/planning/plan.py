"""A training run on paper: what a model costs before anything is bought or started.

    seodang foundation plan --preset a.x-k1

Parameters and FLOPs are exact counts; memory and days are models of a run, and every number that
they assume is listed in ``assumptions``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from seodang.errors import InputError
from seodang.foundation.model_config import ModelConfig
from seodang.foundation.planning import flops, memory, parameters, scaling_laws
from seodang.foundation.planning.devices import Device
from seodang.foundation.planning.layout import Layout, check_layout
from seodang.foundation.planning.sources import SOURCES

SECONDS_A_DAY = 86_400

# arXiv 2601.09200: budget, devices and days; tokens of the three stages and their contexts. The
# third stage grows from 4,096 to 32,768; all of it is counted at the latter.
PUBLISHED_FLOPS = 2.55e24
PUBLISHED_DEVICES = 1024
PUBLISHED_DAYS = 75
PUBLISHED_PEAK = 989e12
PUBLISHED_SPEED = 301.72e12  # FLOP/s of a device, at the end of its tuning
PUBLISHED_STAGES = ((7e12, 4096), (1.66e12, 4096), (0.6e12, 32_768))
PUBLISHED_TOKENS = sum(tokens for tokens, _ in PUBLISHED_STAGES)


def utilisation_of(total_flops: float, devices: int, days: float, peak: float) -> float:
    """Model FLOPs utilisation: FLOPs over what the devices could do in that time.

    Source: PaLM, arXiv 2204.02311, section 4.1.
    """
    return total_flops / (devices * peak * days * SECONDS_A_DAY)


def days_of(total_flops: float, devices: int, utilisation: float, peak: float) -> float:
    """Days that ``total_flops`` take on ``devices`` at a utilisation of their ``peak`` FLOP/s."""
    return total_flops / (devices * peak * utilisation * SECONDS_A_DAY)


PUBLISHED_UTILISATION = utilisation_of(
    PUBLISHED_FLOPS, PUBLISHED_DEVICES, PUBLISHED_DAYS, PUBLISHED_PEAK
)


@dataclass(frozen=True)
class Run:
    """What the model is trained on, and how fast that goes.

    ``sequence`` in tokens; ``tokens`` None for the compute-optimal number; ``utilisation`` of the
    device's peak, None for that of the published run; ``tokens_per_second`` of one device, if it
    was measured.
    """

    layout: Layout
    device: Device
    sequence: int
    tokens: float | None = None
    utilisation: float | None = None
    tokens_per_second: float | None = None


def make_plan(config: ModelConfig, run: Run) -> dict[str, Any]:
    """The whole plan, ready for JSON.

    Raises ``InputError`` if the layout breaks a rule of the model's, the sequence is longer than
    the model's context, or a speed is stated twice.
    """
    if run.sequence > config.context:
        raise InputError(
            f"--sequence {run.sequence}: the model's context is {config.context:,} positions"
        )
    if run.utilisation is not None and run.tokens_per_second is not None:
        raise InputError("--utilisation and --tokens-per-second: name one of them")
    check_layout(config, run.layout, run.sequence)
    if run.tokens is not None:
        tokens, origin = run.tokens, "stated"
    elif config.is_published:
        tokens, origin = PUBLISHED_TOKENS, "of the published run's three stages"
    else:
        scale = scaling_laws.non_embedding_flops(config, run.sequence)
        tokens, origin = scaling_laws.optimal_tokens(scale), "compute-optimal"
    result = _run(config, run, tokens, origin)
    plan: dict[str, Any] = {
        "model": config.model_dump(),
        "parameters": _parameters(config),
        "flops_per_token": _flops(config, run.sequence),
        "kv_bytes_per_token": parameters.kv_cache_bytes(config),
        "layout": {**asdict(run.layout), "devices": run.layout.devices},
        "memory_per_device": _memory(config, run),
        "scaling_laws": _laws(config, run.sequence, tokens),
        "run": result,
    }
    if config.is_published:
        plan["published_run"] = _published(config)
    plan["assumptions"] = _assumptions(config, run, result)
    if config.is_published:
        plan["assumptions"].append(
            "published run: the third stage's context grows from 4,096 to 32,768; all of it is "
            "counted at the latter"
        )
    plan["sources"] = dict(SOURCES)
    return plan


def _parameters(config: ModelConfig) -> dict[str, Any]:
    found = parameters.components(config)
    mtp = parameters.mtp_layer(config)
    return {
        "total": sum(part.total for part in found),
        "active": sum(part.active for part in found),
        "components": [asdict(part) for part in found],
        "multi_token_prediction": {
            "total": config.mtp_layers * mtp.total,
            "active": config.mtp_layers * mtp.active,
        },
    }


def _flops(config: ModelConfig, context: int) -> dict[str, Any]:
    forward = flops.forward_flops(config, context)
    return {
        "context": context,
        "forward": sum(forward.values()),
        "training": flops.training_flops(config, context),
        "components": forward,
        "multi_token_prediction": flops.mtp_flops(config, context),
    }


def _memory(config: ModelConfig, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"sequence": run.sequence, "device_bytes": run.device.memory}
    for engine in (memory.FSDP2, memory.MEGATRON):
        kept, recomputed = (
            memory.device_memory(config, run.layout, run.sequence, engine, recompute=recompute)
            for recompute in (False, True)
        )
        found[engine.name.lower()] = {
            **asdict(kept),
            "total": kept.total,
            "recomputed": recomputed.recomputed,
            "stage_recomputed": recomputed.stage,
            "total_recomputed": recomputed.total_recomputed,
        }
    return found


def _laws(config: ModelConfig, context: int, tokens: float) -> dict[str, Any]:
    scale = scaling_laws.non_embedding_flops(config, context)
    budget = scale * tokens
    ratio, fine = scaling_laws.activation_ratio(config), scaling_laws.granularity(config)
    low, high = scaling_laws.FITTED_FLOPS
    return {
        "non_embedding_flops_per_token": scale,
        "compute_optimal_tokens": scaling_laws.optimal_tokens(scale),
        "chinchilla_tokens": scaling_laws.chinchilla_tokens(config),
        "budget_flops": budget,
        "budget_in_fitted_range": low <= budget <= high,
        "optimal_flops_per_token_of_budget": scaling_laws.optimal_model_scale(budget),
        "optimal_tokens_of_budget": budget / scaling_laws.optimal_model_scale(budget),
        "granularity": fine,
        "granularity_optimum": list(scaling_laws.OPTIMAL_GRANULARITY),
        "activation_ratio": ratio,
        "efficiency_leverage": scaling_laws.efficiency_leverage(ratio, fine, budget),
        "learning_rate": scaling_laws.optimal_learning_rate(budget),
        "batch_tokens": scaling_laws.optimal_batch_tokens(budget),
        "vocabulary": config.vocabulary,
        "vocabulary_optimum": scaling_laws.optimal_vocabulary(config),
    }


def _run(config: ModelConfig, run: Run, tokens: float, origin: str) -> dict[str, Any]:
    each = flops.training_flops(config, run.sequence)
    kind: Literal["assumed", "stated", "measured"]
    if run.tokens_per_second is not None:
        kind, utilisation = "measured", run.tokens_per_second * each / run.device.peak
    elif run.utilisation is not None:
        kind, utilisation = "stated", run.utilisation
    else:
        kind, utilisation = "assumed", PUBLISHED_UTILISATION
    devices = run.layout.devices
    return {
        "device": run.device.name,
        "devices": devices,
        "peak_flops": run.device.peak,
        "tokens": tokens,
        "tokens_are": origin,
        "flops": tokens * each,
        "utilisation": utilisation,
        "utilisation_is": kind,
        "tokens_per_second": devices * run.device.peak * utilisation / each,
        "days": days_of(tokens * each, devices, utilisation, run.device.peak),
    }


def _published(config: ModelConfig) -> dict[str, Any]:
    counted = sum(
        tokens * flops.training_flops(config, context) for tokens, context in PUBLISHED_STAGES
    )
    return {
        "flops": PUBLISHED_FLOPS,
        "devices": PUBLISHED_DEVICES,
        "days": PUBLISHED_DAYS,
        "peak_flops": PUBLISHED_PEAK,
        "utilisation": PUBLISHED_UTILISATION,
        "tokens": PUBLISHED_TOKENS,
        "flops_counted": counted,
        "flops_per_second_of_a_device": PUBLISHED_SPEED,
        "devices_at_that_speed": PUBLISHED_FLOPS
        / (PUBLISHED_SPEED * PUBLISHED_DAYS * SECONDS_A_DAY),
    }


def _assumptions(config: ModelConfig, run: Run, result: dict[str, Any]) -> list[str]:
    """Every number that is neither counted nor stated, for people to disagree with."""
    found = [
        f"sequences of {run.sequence:,} tokens; attention counts what the causal mask leaves: "
        f"(context + 1) / 2 = {flops.mean_attended(run.sequence):,.1f} positions a token",
        "norms, activations, rotary embedding and softmax are no FLOPs; recomputation repeats none",
        "a micro-batch is one sequence; tokens are spread evenly over the experts",
        "AdamW; products in bfloat16; attention does not keep its matrix (FlashAttention)",
        "FSDP2: weights, gradients and both moments in float32 and sharded; embedding, head and "
        f"{memory.LAYERS_GATHERED} layers gathered, the gradient of the larger of these whole",
        "Megatron: bfloat16 weights and float32 gradients on every device, float32 weights and "
        "both moments sharded",
        "1F1B schedule with at least as many micro-batches as stages; buffers of communication and "
        "fragmentation are not counted",
        f"{run.device.name}: {run.device.peak / 1e12:,.0f} TFLOP/s of dense bfloat16 products, "
        f"{run.device.memory / 1e9:,.0f} GB",
        "Tian et al.: C is what training costs, M = C / D; logarithms of compute decimal, of "
        "granularity binary (the paper does not say; only so do its constants give its results)",
        "Tao et al.: the active parameters of a mixture of experts count as a dense model's",
    ]
    if result["utilisation_is"] == "assumed":
        found.append(
            f"utilisation {PUBLISHED_UTILISATION:.1%}, which is what the published run's FLOPs, "
            "devices and days come to; name your own with --utilisation or --tokens-per-second"
        )
    if run.tokens is None:
        found.append(f"tokens: {result['tokens_are']}; name your own with --tokens")
    if not run.layout.is_native:
        found.append(
            "FSDP2 under this layout is torchtitan's; Seodang's own trainer has data parallelism, "
            "alone or with the experts spread over all devices"
        )
    if config.mtp_layers:
        found.append(
            f"training includes {config.mtp_layers} multi-token-prediction layer(s) of "
            "DeepSeek-V3's shape; the parameters and the forward FLOPs do not"
        )
    return found
