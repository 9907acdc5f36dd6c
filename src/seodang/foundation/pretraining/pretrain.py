"""Pretraining: a model from random weights on the tokens of a raw corpus.

The stage is read from top to bottom: check what can be checked, plan the steps, make the model and
its optimizers, run the loop that trains students too, write the weights, measure them on held-out
text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seodang.artifact import Artifact, Draft, begin, write_json
from seodang.causal_lm import copy_tokenizer, load_tokenizer
from seodang.errors import InputError
from seodang.foundation.model_config import ModelConfig, hf_config
from seodang.foundation.pretraining.balance import Balance
from seodang.foundation.pretraining.batches import TokenBatch, batch, plan_pretraining
from seodang.foundation.pretraining.config import PretrainingConfig
from seodang.foundation.pretraining.expert_parallel import spread_experts
from seodang.foundation.pretraining.held_out import nats_per_byte
from seodang.foundation.pretraining.module import Pretraining
from seodang.foundation.pretraining.optimizers import make_optimizers
from seodang.foundation.pretraining.routing_plot import draw_routing
from seodang.foundation.pretraining.tokens import TokenStore, boundary_id
from seodang.training.log import EVENTS, LOG, SPEED, read_rows
from seodang.training.loop import CHECKPOINTS, Plan, run
from seodang.training.parallel import Processes, join, whole_state
from seodang.training.plan import share
from seodang.training.spikes import SpikeWatch

KIND = "base-model"
REPORT = "pretraining.json"
ROUTING = "routing.svg"
_NOT_IDENTITY = {"checkpoint_steps", "keep_checkpoints", "expert_parallel"}


def pretrain(
    config: PretrainingConfig,
    model_config: ModelConfig,
    tokens: Artifact,
    tokenizer: Artifact,
    out: Path,
) -> Artifact:
    """Train a model of ``model_config`` on ``tokens``; resumes what ``out`` holds.

    Gives a Hugging Face directory with ``tokenizer``, the log, ``pretraining.json`` (held-out loss
    in nats per byte by language, load of the experts over the last tenth of the steps) and
    ``routing.svg``. Started by torchrun, all its processes train the one model.

    Raises ``InputError`` if model, tokens and tokenizer do not fit together, and ``WorkFailed`` if
    the loss stops being finite, or jumps too often.
    """
    with join() as processes:
        draft: Draft | Artifact | None = None
        if processes.first:
            draft = _begin(config, model_config, tokens, tokenizer, out)
        (finished,) = processes.add([float(isinstance(draft, Artifact))])
        if finished:
            return draft if isinstance(draft, Artifact) else Artifact.open(out, KIND)
        model, routing = _fit(config, model_config, tokens, out, processes)
        if isinstance(draft, Draft):
            _write(model, tokenizer, out)
            report = _measure(model, routing, tokens, out)
            draft.finish(
                sources=tokens.manifest.sources,
                summary=report,
                measured=[SPEED, EVENTS],
                temporary=[CHECKPOINTS],
            )
        processes.wait()
        return Artifact.open(out, KIND)


def _begin(
    config: PretrainingConfig,
    model_config: ModelConfig,
    tokens: Artifact,
    tokenizer: Artifact,
    out: Path,
) -> Draft | Artifact:
    """Check what can be checked before any work, and open ``out``."""
    if tokens.manifest.inputs["tokenizer"] != tokenizer.digest:
        raise InputError(f"{tokens.path}: made with another tokenizer than {tokenizer.path}")
    hf_config(model_config, tokens.manifest.summary["vocabulary"])
    plan_pretraining(TokenStore(tokens, "train"), config, model_config.context)
    used = {
        "pretraining": config.model_dump(exclude=_NOT_IDENTITY),
        "model": model_config.model_dump(exclude={"preset"}),
    }
    inputs = {"tokens": tokens.digest, "tokenizer": tokenizer.digest}
    draft = begin(out, KIND, used, inputs)
    if isinstance(draft, Draft) and (problems := tokens.verify()):
        raise InputError(f"{tokens.path}: " + "; ".join(problems))
    return draft


def _fit(
    config: PretrainingConfig,
    model_config: ModelConfig,
    tokens: Artifact,
    out: Path,
    processes: Processes,
) -> tuple[Any, dict[str, float]]:
    """Train; gives the model, whole in the first process, and the load of its experts."""
    store = TokenStore(tokens, "train")
    steps = plan_pretraining(store, config, model_config.context)

    def start() -> Pretraining:
        torch.manual_seed(config.seed)
        return Pretraining(model_config, store.vocabulary, config.mtp_weight)

    module = start().to(processes.device).train()
    if config.gradient_checkpointing:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    module.balance = Balance(module, config.balancing, len(steps), processes).to(processes.device)
    spread = spread_experts(module, processes) if config.expert_parallel else []
    processes.shard(module, module.layers, spread)

    def packs(step: int) -> Sequence[TokenBatch]:
        pieces = steps[step]
        lengths = [piece.end - piece.begin for piece in pieces]
        members = range(len(pieces))
        shared = share(members, lengths, processes.count, config.micro_batch_tokens)
        return [batch(store, [pieces[i] for i in pack]) for pack in shared[processes.rank]]

    sizes = [sum(piece.end - piece.begin for piece in step) for step in steps]
    run(
        "Pretraining",
        module,
        Plan(tokens=sizes, labelled=sizes, packs=packs),
        config,
        make_optimizers(module, config),
        out,
        processes,
        after_step=module.balance.after_step,
        spikes=SpikeWatch(**config.spikes.model_dump()) if config.spikes else None,
    )
    routing = module.balance.late_summary()
    model: Any = module.model
    if processes.count > 1:
        state = whole_state(module)
        if processes.first:
            module = start()
            module.load_state_dict(state, strict=False)  # balancing is over
            model = module.model
    return model.eval().cpu(), routing


def _write(model: Any, tokenizer: Artifact, out: Path) -> None:
    """The Hugging Face directory: weights without a router bias, configuration, tokenizer."""
    encoder = load_tokenizer(tokenizer.path)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = boundary_id(encoder)
        settings.eos_token_id = encoder.eos_token_id
        settings.pad_token_id = encoder.pad_token_id
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("e_score_correction_bias")
    }
    model.save_pretrained(out, state_dict=state)
    copy_tokenizer(tokenizer.path, out)


def _measure(model: Any, routing: dict[str, float], tokens: Artifact, out: Path) -> dict[str, Any]:
    """Measure the model on held-out text; write the report and the plot."""
    rows = read_rows(out / LOG)
    report = {
        "steps": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_nats_per_byte": nats_per_byte(model, TokenStore(tokens, "held-out")),
        "routing": routing,
    }
    write_json(out / REPORT, report)
    if routing:
        draw_routing(rows, out / ROUTING)
    return json.loads(json.dumps(report))  # type: ignore[no-any-return]
