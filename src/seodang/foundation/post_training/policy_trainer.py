"""TRL's GRPO, with answers and their log-probabilities computed without padding.

Answers that think are long, those at once are a word, and TRL pads them all alike. Here answers
that have ended leave the batch, a token is drawn by one random number instead of one for each of
the vocabulary, and what is scored comes in batches of like length, without the logits of padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.grpo_trainer import GRPOTrainer

from seodang.causal_lm import CausalLM, length_batches
from seodang.student.generate import sample
from seodang.training.experts import use_grouped_experts

BATCH_TOKENS = 32_768  # of prompts and answers that are in the cache at a time
SCORED_TOKENS = 4096  # of one forward pass


class PolicyTrainer(GRPOTrainer):
    """Trains ``policy``, whose config names the directory of the reference model.

    Answers follow from ``seed`` and the step, so that a resumed run draws the same.
    """

    def __init__(self, policy: CausalLM, seed: int, **given: Any) -> None:
        super().__init__(model=policy.model, processing_class=policy.tokenizer, **given)
        if self.ref_model is not None:
            use_grouped_experts(self.ref_model)
        self.policy = policy
        self.answer_seed = seed

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *_: Any, **__: Any
    ) -> tuple[list[list[int]], None]:
        steps = self.max_completion_length
        assert steps is not None
        numbers = np.random.default_rng([self.answer_seed, self.state.global_step])
        uniforms = [*numbers.random((len(prompt_ids), steps))]
        prompts = [np.array(ids, np.int32) for ids in prompt_ids]
        said = sample(self.policy, prompts, uniforms, self.temperature, batch_tokens=BATCH_TOKENS)
        return [ids.tolist() for ids in said], None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        network = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            found = token_log_probs(
                network, input_ids, attention_mask, logits_to_keep, self.temperature
            )
        return (*found, None)


def token_log_probs(
    network: Any,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    last: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the ``last`` tokens, and the entropies that they were drawn from.

    Args:
        network: a causal language model of `transformers`.
        ids_BT: (answers, tokens) prompts, padded on the left, and answers, padded on the right.
        mask_BT: 1 where they are not padding.
        last: tokens of the longest answer.
        temperature: by which the logits are divided.

    Returns:
        two tensors (answers, last) float32, in nats, 0 in the padding; the first has a gradient.
    """
    whole = [ids[shown.bool()] for ids, shown in zip(ids_BT, mask_BT, strict=True)]
    said = mask_BT[:, -last:].sum(1).tolist()
    rows, places, log_ps, entropies = [], [], [], []
    for batch in length_batches([len(ids) for ids in whole], SCORED_TOKENS):
        padded_RT = pad_sequence([whole[row] for row in batch], batch_first=True)
        state_RTH = network.base_model(padded_RT, use_cache=False).last_hidden_state
        index = [(r, t) for r, row in enumerate(batch) for t in range(said[row])]
        row_N, place_N = torch.tensor(index, dtype=torch.int64, device=ids_BT.device).view(-1, 2).T
        asked = torch.tensor([len(whole[row]) - said[row] for row in batch], device=ids_BT.device)
        at_N = asked[row_N] + place_N
        logits_NV = network.get_output_embeddings()(state_RTH[row_N, at_N - 1])
        log_NV = torch.log_softmax(logits_NV.float() / temperature, -1)
        log_ps.append(log_NV.gather(1, padded_RT[row_N, at_N, None])[:, 0])
        known_NV = log_NV.detach()
        entropies.append(-(known_NV.exp() * known_NV).sum(-1))
        rows.append(torch.tensor(batch, device=ids_BT.device)[row_N])
        places.append(place_N)
    none_BT = log_ps[0].new_zeros(len(whole), last)
    where = (torch.cat(rows), torch.cat(places))
    log_p_BT, entropy_BT = (
        none_BT.index_put(where, torch.cat(each)) for each in (log_ps, entropies)
    )
    return log_p_BT, entropy_BT
