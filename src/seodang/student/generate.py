"""Answers drawn from a student: batched, and each from random numbers of its own.

A token is drawn by inverting the cumulative distribution at one uniform number, which is given
for every row and step. So an answer follows from the model, its prompt and its own numbers, not
from the batch it happens to stand in (up to the rounding that padding changes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seodang.causal_lm import CausalLM, TokenIds, left_padded, length_batches
from seodang.softlabels.estimators import draw

BATCH_TOKENS = 8192
STAYING = 7 / 8  # of a batch: where fewer of its answers go on, the others leave it


def sample(
    model: CausalLM,
    prompts: Sequence[TokenIds],
    uniforms: Sequence[npt.NDArray[np.float64]],
    temperature: float,
    *,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda answers: None,
) -> list[TokenIds]:
    """One answer to each prompt, with the token that ended it if it ended.

    Args:
        model: whose distribution is drawn from, at ``temperature`` and over all of its ids.
        prompts: token ids (length,) of the model's own tokenizer.
        uniforms: for each prompt as many numbers in [0, 1) as its answer has tokens at most; the
            same number for all.
        temperature: by which the logits are divided.
        batch_tokens: of prompts and answers that are in the cache at a time, at most.
        advance: told of every batch how many answers it gave.

    Returns:
        token ids (length,) int32, at least one each.
    """
    steps = len(uniforms[0]) if uniforms else 0
    answers: list[TokenIds] = [np.empty(0, np.int32)] * len(prompts)
    lengths = [len(prompt) + steps for prompt in prompts]
    for batch in length_batches(lengths, batch_tokens):
        numbers_BT = np.stack([uniforms[index] for index in batch])
        some = _sample_batch(model, [prompts[i] for i in batch], numbers_BT, temperature)
        for index, answer in zip(batch, some, strict=True):
            answers[index] = answer
        advance(len(batch))
    return answers


def _sample_batch(
    model: CausalLM,
    prompts: Sequence[TokenIds],
    uniforms_BT: npt.NDArray[np.float64],
    temperature: float,
) -> list[TokenIds]:
    """As :func:`sample`, all answers in one batch; ``uniforms_BT`` has a row for each prompt.

    Answers that have ended leave the batch once they are a good part of it.
    """
    stop = set(model.stop_ids)
    said: list[list[int]] = [[] for _ in prompts]
    rows = np.arange(len(prompts))  # of the batch, as prompts
    ids_RT, mask_RL = left_padded(prompts)
    going = np.ones(len(rows), bool)
    cache: Any = None
    for uniform_B in uniforms_BT.T:
        logits_RV, cache = model.read(ids_RT, mask_RL, cache)
        p_RV = torch.softmax(logits_RV / temperature, -1)
        drawn_R = draw(p_RV, uniform_B[rows, None])[:, 0]
        for place in np.flatnonzero(going):
            said[rows[place]].append(int(drawn_R[place]))
            going[place] = drawn_R[place] not in stop
        if not going.any():
            break
        if going.mean() < STAYING:
            kept = torch.from_numpy(np.flatnonzero(going))
            cache.batch_select_indices(kept.to(model.device))
            rows, drawn_R, mask_RL = rows[going], drawn_R[going], mask_RL[kept]
            going = going[going]
        ids_RT = torch.from_numpy(drawn_R)[:, None]
        mask_RL = torch.cat([mask_RL, torch.ones(len(rows), 1, dtype=mask_RL.dtype)], 1)
    return [np.array(ids, np.int32) for ids in said]
