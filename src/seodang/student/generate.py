"""Answers drawn from a student: batched, and each from random numbers of its own.

A token is drawn by inverting the cumulative distribution at one uniform number, which is given
for every row and step. So an answer follows from the model, its prompt and its own numbers, not
from the batch it happens to stand in (up to the rounding that padding changes).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor

from seodang.causal_lm import CausalLM, TokenIds, length_batches
from seodang.progress import track
from seodang.softlabels.estimators import draw

BATCH_TOKENS = 8192  # of prompts and answers that are in the cache at a time


def sample(
    model: CausalLM,
    prompts: Sequence[TokenIds],
    uniforms: Sequence[npt.NDArray[np.float64]],
    temperature: float,
) -> list[TokenIds]:
    """One answer to each prompt, with the token that ended it if it ended.

    Args:
        model: whose distribution is drawn from, at ``temperature`` and over all of its ids.
        prompts: token ids (length,) of the model's own tokenizer.
        uniforms: for each prompt as many numbers in [0, 1) as its answer has tokens at most; the
            same number for all.
        temperature: by which the logits are divided.

    Returns:
        token ids (length,) int32, at least one each.
    """
    steps = len(uniforms[0]) if uniforms else 0
    stop = model.stop_ids
    answers: list[TokenIds] = [np.empty(0, np.int32)] * len(prompts)
    lengths = [len(prompt) + steps for prompt in prompts]
    with track("Generating answers", len(prompts), "answers") as advance:
        for batch in length_batches(lengths, BATCH_TOKENS):
            longest = max(len(prompts[index]) for index in batch)
            drawing = _Draw(longest, np.stack([uniforms[index] for index in batch]), temperature)
            drawn_BT = model.generate(
                [prompts[index] for index in batch],
                [drawing],
                do_sample=False,
                max_new_tokens=steps,
                eos_token_id=stop or None,
                pad_token_id=stop[0] if stop else 0,
            )
            for index, drawn_T in zip(batch, drawn_BT.numpy().astype(np.int32), strict=True):
                ends = np.flatnonzero(np.isin(drawn_T, stop))
                answers[index] = drawn_T[: ends[0] + 1] if len(ends) else drawn_T
            advance(len(batch))
    return answers


class _Draw(LogitsProcessor):
    """Leaves one token possible: the one that a row's number of this step draws."""

    def __init__(
        self, prompt_length: int, uniforms_BT: npt.NDArray[np.float64], temperature: float
    ) -> None:
        self.prompt_length = prompt_length
        self.uniforms_BT = uniforms_BT
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        p_BV = torch.softmax(scores.float() / self.temperature, dim=-1)
        drawn_B1 = torch.from_numpy(draw(p_BV, self.uniforms_BT[:, step : step + 1]))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1.to(scores.device), 0.0)
