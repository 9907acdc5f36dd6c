"""Which sequences each optimizer step takes, and which process takes which of them.

Everything follows from the lengths, the recipe and the seed, so that a run that was stopped goes
on with the same batches, on any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def plan_steps(
    lengths: Sequence[int], batch_tokens: int, epochs: int, seed: int
) -> list[list[int]]:
    """Indices of the sequences of every step, at most ``batch_tokens`` together.

    Each epoch is another shuffle, cut into steps; a longer sequence has a step of its own.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        tokens = batch_tokens + 1
        for index in np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist():
            tokens += lengths[index]
            if tokens > batch_tokens:
                steps.append([])
                tokens = lengths[index]
            steps[-1].append(index)
    return steps


def share(
    step: Sequence[int], lengths: Sequence[int], processes: int, pack_tokens: int | None
) -> list[list[list[int]]]:
    """The packs of every process: ``share(...)[process][i]`` are the sequences of its i-th pack.

    Every process has the same number of packs, as each of them is a collective operation; some
    may be empty. Packs hold at most ``pack_tokens`` (None: any number) unless a sequence is longer,
    and are as equal as placing the longest sequences first makes them.
    """
    total = sum(lengths[index] for index in step)
    packs = processes * max(1, math.ceil(total / (processes * (pack_tokens or total or 1))))
    while True:
        bins: list[list[int]] = [[] for _ in range(packs)]
        sums = [0] * packs
        for index in sorted(step, key=lambda i: (-lengths[i], i)):
            least = sums.index(min(sums))
            bins[least].append(index)
            sums[least] += lengths[index]
        too_full = pack_tokens is not None and any(
            tokens > pack_tokens and len(members) > 1
            for tokens, members in zip(sums, bins, strict=True)
        )
        if not too_full:
            return [bins[process::processes] for process in range(processes)]
        packs += processes
