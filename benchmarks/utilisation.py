"""Model FLOPs utilisation of training a preset, against the matrix products that the device can do.

    python benchmarks/utilisation.py --preset 1b --micro-batch-tokens 8192     # on a GPU
    python benchmarks/utilisation.py --preset laptop-nano --steps 3            # on a CPU

The ceiling is measured in the same run: the best of a few square bfloat16 products. FLOPs of a
token are those of `seodang foundation plan` (forward, twice that backward, nothing recomputed).
Tokens are random numbers: what is timed does not depend on what they say, but for the routers,
which a balanced model loads as evenly as random ones do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from seodang.foundation.model_config import ModelConfig
from seodang.foundation.planning.flops import training_flops
from seodang.foundation.pretraining.balance import Balance
from seodang.foundation.pretraining.batches import TokenBatch
from seodang.foundation.pretraining.config import PretrainingConfig
from seodang.foundation.pretraining.module import Pretraining
from seodang.foundation.pretraining.optimizers import make_optimizers
from seodang.training.parallel import Processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="1b")
    parser.add_argument("--context", type=int, help="default: the preset's")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ModelConfig(preset=options.preset)
    context = min(options.context or model.context, options.micro_batch_tokens)

    ceiling = best_product(device)
    seconds = training_seconds(model, context, options.micro_batch_tokens, options.steps, device)
    tokens = options.micro_batch_tokens // context * context
    achieved = training_flops(model, context) * tokens / seconds
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {options.preset}, {tokens:,} tokens a step in sequences of {context:,}")
    print(f"products, measured: {ceiling / 1e12:.2f} TFLOP/s in bfloat16")
    print(f"training: {tokens / seconds:,.0f} tokens/s, {achieved / 1e12:.2f} TFLOP/s of the model")
    print(f"utilisation of the measured ceiling: {achieved / ceiling:.1%}")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def best_product(device: torch.device) -> float:
    """FLOP/s of the fastest square product of a few sizes."""
    sizes = (4096, 8192, 16_384) if device.type == "cuda" else (512, 1024, 2048)
    found = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        found.append(2 * size**3 / timed(lambda a=a, b=b: a @ b, device, 10))
    return max(found)


def training_seconds(
    model: ModelConfig, context: int, tokens: int, steps: int, device: torch.device
) -> float:
    """Median seconds of an optimizer step, in bfloat16 with float32 weights."""
    config = PretrainingConfig(precision="bfloat16")
    torch.manual_seed(0)
    module = Pretraining(model, model.vocabulary, 0.0).to(device).train()
    module.balance = Balance(module, config.balancing, 100, Processes(0, 1, device)).to(device)
    optimizers = make_optimizers(module, config)
    sequences = tokens // context
    ids = torch.randint(model.vocabulary, (sequences * context + 1,))
    places = torch.arange(context).repeat(sequences)
    batch = TokenBatch(ids[:-1], places, ids[1:], [context] * sequences).to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            sums = module(batch, 1 / len(batch.ids))
        sums.total.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        module.balance.after_step(1)

    return timed(step, device, steps)


def timed(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Median seconds of ``work`` after two warm-ups."""
    seconds = []
    for _ in range(times + 2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
