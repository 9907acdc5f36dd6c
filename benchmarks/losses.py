"""How far is the loss from its three matrix products, and how far are the others?

    python benchmarks/losses.py [--vocab 49152 163840] [--json]

Forward and backward of the loss on the same rows, in turns within one run; synthetic inputs, since
the time does not depend on the values. "products" are the three bare matrix products that any
loss needs (logits, gradient of hidden, gradient of head), at the chunk size that suits them best
and with no bound on memory: PyTorch's own, which go to MKL in float32, and those of oneDNN, through
which the loss goes. TRL's and Liger's losses are given the teacher's full distributions,
as they need: TRL dense logits, Liger the teacher's hidden states and head (its product counts as
part of its work: it cannot do without). Extra memory is the peak beyond inputs and gradients: on
the CPU of PyTorch's allocations, counted by the profiler in a process of its own, on a GPU of the
allocator. On the CPU float32 with 1024 rows of hidden 576; on a GPU bfloat16 with 8192 rows of
hidden 4096, where Liger's fused linear cross-entropy is the rival in memory.

Needs the `bench` extra: trl, liger-kernel.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seodang.training.products import linear

K = 16  # stored ids a position
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)  # of rows, for the bare products
TILES = (1024, 2048, 4096, 8192, 16384)  # of the vocabulary, for those of oneDNN


class Shape(NamedTuple):
    rows: int
    hidden: int
    vocab: int
    dtype: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--vocab", type=int, nargs="+", default=[128256 if gpu else 49152, 163840])
    parser.add_argument("--rows", type=int, default=8192 if gpu else 1024)
    parser.add_argument("--hidden", type=int, default=4096 if gpu else 576)
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of the losses to run (default: all)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds-only", action="store_true", help="leave memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # child process: one peak
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_bytes(options.memory_of, shape_of(options, options.vocab[0])))
        return
    results = {"device": device_name(options), "rows": options.rows, "hidden": options.hidden}
    results |= {"dtype": options.dtype, "torch": torch.__version__}
    results["vocabularies"] = {
        str(v): measure(options, shape_of(options, v)) for v in options.vocab
    }
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)


def shape_of(options: argparse.Namespace, v: int) -> Shape:
    return Shape(options.rows, options.hidden, v, options.dtype)


def device_name(options: argparse.Namespace) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    return f"{model}, {options.threads} threads"


def measure(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Seconds (least of the rounds, taken in turns) and extra bytes of each loss."""
    inputs.cache_clear()
    chunks = [rows for rows in CHUNKS if rows <= shape.rows]
    steps = {f"products {rows}": bare_products(shape, rows) for rows in chunks}
    tiles = [] if torch.cuda.is_available() or shape.dtype != "float32" else TILES
    steps |= {f"products oneDNN {rows}": onednn_products(shape, rows) for rows in tiles}
    steps |= {k: v for k, v in makers(shape).items() if k in (options.only or makers(shape))}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, make in steps.items():
            step = make()
            taken = timed(step)
            del step
            for leaf in inputs(shape):
                leaf.grad = None
            gc.collect()
            if turn:
                seconds[name].append(taken)
    floor_chunk = min(chunks, key=lambda rows: min(seconds[f"products {rows}"]))
    floor = seconds[f"products {floor_chunk}"]
    logits = shape.rows * shape.vocab * 4
    found: dict[str, Any] = {"products": row(floor, floor, 0, logits) | {"chunk": floor_chunk}}
    if tiles:
        best = min((seconds[f"products oneDNN {rows}"] for rows in tiles), key=min)
        found["products by oneDNN"] = row(best, floor, 0, logits)
    for name in steps:
        if not name.startswith("products"):
            extra = 0 if options.seconds_only else memory_in_a_child(name, shape, options.threads)
            found[name] = row(seconds[name], floor, extra, logits)
    return found


def row(seconds: list[float], floor: list[float], extra: int, logits: int) -> dict[str, Any]:
    return {
        "seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
        "of_products": min(seconds) / min(floor),
        "extra_bytes": extra,
        "of_logits": extra / logits,
    }


def timed(step: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@functools.cache
def inputs(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and head, the same for all."""
    g = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(shape.rows, shape.hidden, generator=g)
    head = torch.randn(shape.vocab, shape.hidden, generator=g) * 0.02
    hidden, head = (x.to(device, getattr(torch, shape.dtype)) for x in (hidden, head))
    return hidden.requires_grad_(), head.requires_grad_()


def bare_products(shape: Shape, chunk: int) -> Callable[[], Callable[[], None]]:
    def make() -> Callable[[], None]:
        hidden, head = (x.detach() for x in inputs(shape))
        logits = torch.empty(chunk, shape.vocab, dtype=hidden.dtype, device=hidden.device)
        grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)

        def step() -> None:
            for start in range(0, len(hidden), chunk):
                x = hidden[start : start + chunk]
                torch.mm(x, head.T, out=logits[: len(x)])
                torch.mm(logits[: len(x)], head, out=grad_hidden[start : start + chunk])
                grad_head.addmm_(logits[: len(x)].T, x, beta=1 if start else 0)

        return step

    return make


def onednn_products(shape: Shape, tile: int) -> Callable[[], Callable[[], None]]:
    def make() -> Callable[[], None]:
        hidden, head = (x.detach() for x in inputs(shape))
        grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)
        transposed = hidden.T.contiguous()

        def step() -> None:
            for start in range(0, len(head), tile):
                part = head[start : start + tile]
                logits = linear(part, hidden)
                grad_head[start : start + tile] = linear(logits, transposed)
                found = linear(logits.T, part.T)
                if start:
                    grad_hidden.add_(found)
                else:
                    grad_hidden.copy_(found)

        return step

    return make


def makers(shape: Shape) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Name -> a function that makes inputs and returns a step of forward and backward."""
    n, v = shape.rows, shape.vocab
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, v, (n, K), generator=g)
    weights = torch.rand(n, K, generator=g) / K
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels = [x.to(device) for x in (torch.arange(0, n * K + 1, K), ids.reshape(-1))]
    labels.append(weights.reshape(-1).to(device))
    targets = ids[:, 0].to(device)

    def ours(residual: bool = False) -> Callable[[], Any]:
        from seodang.student.losses import sparse_kd_loss

        hidden, head = inputs(shape)
        return lambda: sparse_kd_loss(hidden, head, *labels, residual=residual).backward()

    def ours_without_onednn() -> Callable[[], Any]:
        step = ours()

        def switched() -> None:
            torch.backends.mkldnn.enabled = False
            try:
                step()
            finally:
                torch.backends.mkldnn.enabled = True

        return switched

    def trl() -> Callable[[], Any]:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        hidden, head = inputs(shape)
        teacher = torch.randn(n, v, dtype=hidden.dtype, device=device)  # dense, counted as input
        return lambda: GKDTrainer.generalized_jsd_loss(
            (hidden @ head.T)[None], teacher[None], labels=targets[None], beta=0.0
        ).backward()

    def liger() -> Callable[[], Any]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        hidden, head = inputs(shape)
        teacher, teacher_head = (x.detach() for x in inputs(shape))
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=256
        )
        return lambda: loss(hidden, head, teacher, teacher_head, targets).backward()

    def liger_cross_entropy() -> Callable[[], Any]:
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )

        hidden, head = inputs(shape)
        loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        return lambda: loss(head, hidden, targets).backward()

    found: dict[str, Callable[[], Callable[[], Any]]] = {
        "sparse_kd_loss": ours,
        "sparse_kd_loss, residual": lambda: ours(True),
        "TRL generalized_jsd_loss": trl,
        "Liger fused linear JSD": liger,
    }
    if device == "cpu":
        found["sparse_kd_loss, without oneDNN"] = ours_without_onednn
    else:
        found["Liger fused linear cross-entropy"] = liger_cross_entropy
    return found


def memory_in_a_child(name: str, shape: Shape, threads: int) -> int:
    command = [sys.executable, __file__, "--memory-of", name, "--threads", str(threads)]
    for option, value in shape._asdict().items():
        command += [f"--{option}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(done.stdout.split()[-1])


def peak_bytes(name: str, shape: Shape) -> int:
    """Peak of what one step allocates, less the gradients that it leaves."""
    step = makers(shape)[name]()
    itemsize = getattr(torch, shape.dtype).itemsize
    gradients = (shape.rows + shape.vocab) * shape.hidden * itemsize
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before - gradients
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - gradients


def show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    for v, rows in results["vocabularies"].items():
        title = f"{results['rows']} rows, hidden {results['hidden']}, vocabulary {v}, "
        table = Table(title=title + f"{results['dtype']}: {results['device']}")
        for column in ("", "seconds", "of the products", "extra MB", "of (N, V) float32"):
            table.add_column(column, justify="left" if not column else "right")
        for name, found in rows.items():
            label = f"{name} (chunks of {found['chunk']})" if "chunk" in found else name
            memory = ("", "") if name.startswith("products") else (
                f"{found['extra_bytes'] / 1e6:.0f}", f"{found['of_logits']:.3f}"
            )  # fmt: skip
            table.add_row(label, f"{found['seconds']:.3f}", f"{found['of_products']:.2f}", *memory)
        console.print(table)


if __name__ == "__main__":
    main()
