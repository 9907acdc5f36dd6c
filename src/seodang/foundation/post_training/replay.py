"""Pretraining text between the answers of a fine-tuning, so that the model does not forget it.

As InstructGPT mixes pretraining into its reinforcement learning (Ouyang et al., arXiv 2203.02155),
and continued pretraining replays a share of the old data (Ibrahim et al., arXiv 2403.08763).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from seodang.foundation.pretraining.tokens import TokenStore


def text_windows(store: TokenStore, lengths: Sequence[int], seed: list[int]) -> list[list[int]]:
    """Token ids of a random window of text for each of ``lengths``.

    Every token of the store is as likely as any other; a window ends with its document.
    """
    generator = np.random.default_rng(seed)
    ends = np.cumsum(store.lengths)
    windows = []
    for length in lengths:
        place = int(generator.integers(ends[-1]))
        document = int(np.searchsorted(ends, place, side="right"))
        size = int(store.lengths[document])
        begin = min(place - int(ends[document]) + size, max(0, size - length))
        windows.append(store.tokens(document, begin, min(begin + length, size)).tolist())
    return windows


def with_text(
    rows: Sequence[dict[str, Any]], batch: int, store: TokenStore, count: int, seed: list[int]
) -> list[dict[str, Any]]:
    """``rows``, with ``count`` windows of text after every ``batch``, as long as its longest."""
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    lengths = [max(len(row["input_ids"]) for row in members) for members in batches]
    windows = text_windows(store, np.repeat(lengths, count).tolist(), seed)
    mixed: list[dict[str, Any]] = []
    for number, members in enumerate(batches):
        mixed += members
        for ids in windows[number * count : (number + 1) * count]:
            mixed.append({"input_ids": ids, "labels": ids})
    return mixed
