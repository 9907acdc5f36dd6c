"""Answers drawn from a student: batched, and each from random numbers of its own.

A token is drawn by inverting the cumulative distribution at one uniform number, which is given
for every row and step. So an answer follows from the model, its prompt and its own numbers, not
from the batch it happens to stand in (up to the rounding that padding changes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from seodang.causal_lm import CausalLM, TokenIds, length_batches
from seodang.progress import track
from seodang.softlabels.estimators import draw

BATCH_TOKENS = 8192  # of prompts and answers that are in the cache at a time


def stop_ids(model: CausalLM) -> list[int]:
    """The tokens that end an answer: those of the generation config and of the tokenizer."""
    named = getattr(model.model.generation_config, "eos_token_id", None)
    found = set(named if isinstance(named, list) else [named]) | {model.tokenizer.eos_token_id}
    return sorted(int(token) for token in found if token is not None)


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
    stop = stop_ids(model)
    answers: list[TokenIds] = [np.empty(0, np.int32)] * len(prompts)
    lengths = [len(prompt) + steps for prompt in prompts]
    with track("Generating answers", len(prompts), "answers") as advance:
        for batch in length_batches(lengths, BATCH_TOKENS):
            ids_BT, mask_BT = _left_padded([prompts[index] for index in batch])
            drawn_BT = _generate(
                model, ids_BT, mask_BT, np.stack([uniforms[i] for i in batch]), temperature, stop
            )
            for index, drawn_T in zip(batch, drawn_BT, strict=True):
                ends = np.flatnonzero(np.isin(drawn_T, stop))
                answers[index] = drawn_T[: ends[0] + 1] if len(ends) else drawn_T
            advance(len(batch))
    return answers


def _left_padded(prompts: Sequence[TokenIds]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as int64 (number, longest), and where they are not padding."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


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


def _generate(
    model: CausalLM,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    uniforms_BT: npt.NDArray[np.float64],
    temperature: float,
    stop: list[int],
) -> npt.NDArray[np.int32]:
    network: Any = model.model
    # What a model's own generation config asks for (penalties, top-p) is another distribution.
    own, network.generation_config = network.generation_config, GenerationConfig()
    try:
        out_BT = network.generate(
            ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=uniforms_BT.shape[1],
                eos_token_id=stop or None,
                pad_token_id=stop[0] if stop else 0,
            ),
            logits_processor=LogitsProcessorList(
                [_Draw(ids_BT.shape[1], uniforms_BT, temperature)]
            ),
        )
    finally:
        network.generation_config = own
    drawn_BT: npt.NDArray[np.int32] = out_BT[:, ids_BT.shape[1] :].cpu().numpy().astype(np.int32)
    return drawn_BT
