"""oneDNN against `torch.nn.functional.linear` here: from how many rows on is it faster?

    python benchmarks/products.py [--threads 1]

Float32, without gradients. For the weights of SmolLM2-135M and of a small student: how many times
as long the usual product takes (above 1, oneDNN is faster). `seodang.training.products` takes the
usual one below ``FEW_ROWS`` rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from seodang.machine import cpu
from seodang.training.products import FEW_ROWS

SHAPES = {
    "gate, up": (1536, 576),
    "query": (576, 576),
    "key, value": (192, 576),
    "down": (576, 1536),
    "head": (49152, 576),
    "small": (112, 448),
}
ROWS = [1, 4, 8, 16, 32, 128, 512]
ROUNDS = 7  # alternating, and the fastest of each counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{cpu().model}, {options.threads} threads; oneDNN is used from {FEW_ROWS} rows on")
    print(f"{'rows':<14}" + "".join(f"{rows:>7}" for rows in ROWS))
    for name, (outer, inner) in SHAPES.items():
        weight = torch.randn(outer, inner)
        ratios = [ratio(torch.randn(rows, inner), weight) for rows in ROWS]
        print(f"{name:<14}" + "".join(f"{r:>7.2f}" for r in ratios), flush=True)


def ratio(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds of the usual product over those of oneDNN's."""

    def by_onednn() -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return found

    with torch.inference_mode():
        pairs = [
            (seconds(lambda: torch.nn.functional.linear(x, weight)), seconds(by_onednn))
            for _ in range(ROUNDS)
        ]
    usual, fast = (min(times) for times in zip(*pairs, strict=True))
    return usual / fast


def seconds(work: Callable[[], torch.Tensor]) -> float:
    """Of one call, after another one."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
