"""A mixture of experts against the dense model of equal active parameters, on the same tokens.

    python benchmarks/pretraining.py runs/nano --out runs/moe-or-dense
    python benchmarks/pretraining.py runs/nano --speed

The dense model is the same but for its MLPs, which are as wide as the experts that see a token and
the router together. The first call trains both and prints their held-out loss in nats per byte; it
resumes what `--out` holds. The second takes the same steps of both in turns and prints the ratio of
their times: start it on a machine that does nothing else. Its experts are those of the run's base:
routers of random weights are not balanced yet. The defaults are those of
`recipes/foundation-nano.yaml`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM
from seodang.foundation.model_config import ModelConfig
from seodang.foundation.pretraining.balance import Balance
from seodang.foundation.pretraining.batches import batch, cut
from seodang.foundation.pretraining.config import BalancingConfig, PretrainingConfig
from seodang.foundation.pretraining.module import Pretraining
from seodang.foundation.pretraining.optimizers import make_optimizers
from seodang.foundation.pretraining.pretrain import pretrain
from seodang.foundation.pretraining.tokens import TokenStore
from seodang.foundation.recipe import load_foundation_recipe
from seodang.training.log import SPEED, read_rows
from seodang.training.parallel import Processes

RECIPE = Path(__file__).parents[1] / "recipes" / "foundation-nano.yaml"


def dense(moe: ModelConfig) -> ModelConfig:
    """The dense model that has at least the active parameters of ``moe``."""
    per_token = moe.experts_per_token + moe.shared_experts
    experts = 3 * moe.hidden_size * moe.expert_intermediate_size * per_token
    active = moe.moe_layers * (experts + moe.hidden_size * (moe.experts + 1))
    active += moe.dense_layers * 3 * moe.hidden_size * moe.intermediate_size
    width = math.ceil(active / (3 * moe.hidden_size * moe.layers * 8)) * 8
    return ModelConfig(
        **{**moe.model_dump(), "dense_layers": moe.layers, "intermediate_size": width}
    )


def active_parameters(config: ModelConfig, module: Pretraining) -> int:
    """Parameters that a token meets."""
    idle = config.experts - config.experts_per_token
    expert = 3 * config.hidden_size * config.expert_intermediate_size
    total = sum(p.numel() for p in module.model.parameters())
    return total - config.moe_layers * idle * expert


def main() -> None:
    nano = load_foundation_recipe(RECIPE).pretraining
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a foundation run, for its tokens and its tokenizer")
    parser.add_argument("--preset", default="laptop-nano")
    parser.add_argument("--train-tokens", type=int, default=nano.tokens)
    parser.add_argument("--batch-tokens", type=int, default=nano.batch_tokens)
    parser.add_argument("--micro-batch-tokens", type=int, default=nano.micro_batch_tokens)
    parser.add_argument("--learning-rate", type=float, default=nano.learning_rate)
    parser.add_argument("--bias-rate", type=float, default=nano.balancing.rate)
    parser.add_argument("--balance-weight", type=float, default=nano.balancing.weight)
    parser.add_argument("--only", nargs="*", default=["moe", "dense"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--steps", type=int, default=6, help="of --speed")
    parser.add_argument("--precision", default=nano.precision, choices=["bfloat16", "float32"])
    options = parser.parse_args()

    moe = ModelConfig(preset=options.preset)
    models = {name: {"moe": moe, "dense": dense(moe)}[name] for name in options.only}
    config = PretrainingConfig(
        tokens=options.train_tokens,
        batch_tokens=options.batch_tokens,
        micro_batch_tokens=options.micro_batch_tokens,
        learning_rate=options.learning_rate,
        precision=options.precision,
        balancing=BalancingConfig(rate=options.bias_rate, weight=options.balance_weight),
        checkpoint_steps=10,
    )
    tokens = Artifact.open(options.run / "tokens")
    if options.speed:
        speed(models, config, TokenStore(tokens, "train"), options.steps, options.run / "base")
        return
    tokenizer = Artifact.open(options.run / "tokenizer")
    for name, model in models.items():
        out = options.out / name
        base = pretrain(config, model, tokens, tokenizer, out)
        seconds = sum(row["seconds"] for row in read_rows(out / SPEED))
        found = base.manifest.summary
        print(f"{name}: {found['parameters'] / 1e6:.2f} M parameters, {found['tokens']:,} tokens")
        print(f"  {seconds / 60:.1f} minutes, {found['tokens'] / seconds:,.0f} tokens/s")
        print(f"  held-out nats per byte: {json.dumps(found['held_out_nats_per_byte'])}")
        print(f"  routing over the last tenth: {json.dumps(found['routing'])}", flush=True)


def speed(
    models: dict[str, ModelConfig],
    config: PretrainingConfig,
    store: TokenStore,
    steps: int,
    base: Path,
) -> None:
    """Take ``steps`` optimizer steps of every model in turns."""
    alone = Processes(0, 1, torch.device("cpu"))
    made = {}
    for name, model in models.items():
        module = Pretraining(model, store.vocabulary, 0.0).train()
        if name == "moe":
            trained = CausalLM.load(base, torch.device("cpu")).model
            module.model.load_state_dict(trained.state_dict())
        module.balance = Balance(module, config.balancing, 100, alone)
        made[name] = module, make_optimizers(module, config)
        active = active_parameters(model, module) / 1e6
        total = sum(p.numel() for p in module.parameters()) / 1e6
        print(f"{name}: {total:.2f} M parameters, {active:.2f} M active")
    pieces = [
        piece
        for document in range(min(len(store), 4000))
        for piece in cut(document, int(store.lengths[document]), moe_context(models))
        if piece.end - piece.begin > moe_context(models) // 2
    ]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    micro = config.micro_batch_tokens or config.batch_tokens
    per_pack = max(1, micro // moe_context(models))
    for step in range(steps + 1):
        packs = []
        for _ in range(config.batch_tokens // micro):
            taken, pieces = pieces[:per_pack], pieces[per_pack:]
            packs.append(batch(store, taken))
        count = sum(len(pack.ids) for pack in packs)
        for name, (module, optimizers) in made.items():
            started = time.perf_counter()
            for pack in packs:
                with torch.autocast("cpu", torch.bfloat16, config.precision == "bfloat16"):
                    loss = module(pack).total / count
                loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            module.balance.after_step(step + 1)
            if step:  # the first one allocates
                seconds[name].append((time.perf_counter() - started) / count)
    for name, values in seconds.items():
        print(f"{name}: {1 / statistics.median(values):,.0f} tokens/s")
    if len(seconds) == 2:
        ratios = [d / m for m, d in zip(seconds["moe"], seconds["dense"], strict=True)]
        print(f"moe / dense tokens per second: {statistics.median(ratios):.3f}", flush=True)


def moe_context(models: dict[str, ModelConfig]) -> int:
    """The context that the models share."""
    return next(iter(models.values())).context


if __name__ == "__main__":
    main()
