"""Supervised fine-tuning through TRL: Instruct, Reasoning, and both modes in one.

The loss is on what the assistant says: after ``<think>`` the thoughts and the answer, after
``</think>`` the answer alone, and the token that ends the turn. The loss of the pretraining text
that every step brings back is added with a weight of its own, as answers may be few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seodang.artifact import Artifact, begin
from seodang.causal_lm import copy_tokenizer
from seodang.corpus.sequences import UNOBSERVED
from seodang.foundation.post_training.config import FineTuningConfig, PostTrainingConfig
from seodang.foundation.post_training.problem import Mode
from seodang.foundation.post_training.reasoning_data import Problem, Split, read_problems
from seodang.foundation.post_training.replay import with_text
from seodang.foundation.post_training.trainers import (
    finish,
    fit,
    load,
    shared_arguments,
    trl_imports,
)
from seodang.foundation.pretraining.tokens import TokenStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "fine-tuned"
WARMUP = 0.05  # share of the steps


def fine_tune(
    config: PostTrainingConfig,
    tuning: FineTuningConfig,
    model: Artifact,
    data: Artifact,
    split: Split,
    modes: Sequence[Mode],
    tokens: Artifact,
    out: Path,
) -> Artifact:
    """Fine-tune ``model`` on the answers of a part of ``data``, in each of ``modes``, into ``out``.

    With both modes every problem is there twice: the same prompt with both kinds of answer. Text
    to remember comes from ``tokens``, those that the model was pretrained on.
    Resumes what ``out`` holds, with the same result as if it had never stopped.

    Raises ``InputError`` if TRL is not installed or the model cannot be loaded.
    """
    used: dict[str, Any] = {"tuning": tuning.model_dump(), "split": split, "modes": list(modes)}
    used["seed"] = config.seed
    inputs = {"model": model.digest, "data": data.digest, "tokens": tokens.digest}
    draft = begin(out, KIND, used, inputs)
    if isinstance(draft, Artifact):
        return draft
    with trl_imports():
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

    class Tuner(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any
        ) -> torch.Tensor:
            return completion_loss(model, **inputs, text_weight=tuning.text_weight)

    loaded = load(model, draft.path)
    problems = read_problems(data, split)[: tuning.problems]
    examples = [example(p, mode, loaded.tokenizer) for p in problems for mode in modes]
    lengths = [len(row["input_ids"]) for row in examples]
    rows = [
        examples[index]
        for epoch in range(tuning.epochs)
        for index in batch_order(lengths, tuning.batch_sequences, [config.seed, epoch])
    ]
    steps = -(-len(rows) // tuning.batch_sequences)
    rows = with_text(
        rows,
        tuning.batch_sequences,
        TokenStore(tokens, "train"),
        tuning.text_sequences,
        [config.seed, tuning.epochs],
    )
    arguments = SFTConfig(
        **shared_arguments(draft.path, config.seed, config.checkpoint_steps, adam_beta2=0.95),
        num_train_epochs=1,
        per_device_train_batch_size=tuning.batch_sequences + tuning.text_sequences,
        learning_rate=tuning.learning_rate,
        warmup_steps=round(WARMUP * steps),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = Tuner(
        model=loaded.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
    )
    fit(trainer, loaded, draft, f"Fine-tuning ({', '.join(modes)})", steps)
    copy_tokenizer(model.path, draft.path)
    return finish(draft, model, data, {"problems": len(problems), "examples": len(examples)})


def completion_loss(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor,
    text_weight: float = 0.0,
    **_: Any,
) -> torch.Tensor:
    """Mean negative log-likelihood of the labelled tokens; all tensors (sequences, tokens).

    What TRL computes; but without a GPU it computes the logits of prompts and padding as well.
    Sequences that are labelled from their first token on are text: their mean, times
    ``text_weight``, is added to that of the others.
    """
    found = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    labelled = labels[:, 1:] != UNOBSERVED
    logits_NV = model.get_output_embeddings()(found.last_hidden_state[:, :-1][labelled])
    targets_N = labels[:, 1:][labelled]
    losses_N = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
    is_text_N = (labels[:, :1] != UNOBSERVED).expand_as(labelled)[labelled]
    loss = losses_N[~is_text_N].mean()
    return loss + text_weight * losses_N[is_text_N].mean() if is_text_N.any() else loss


def batch_order(lengths: Sequence[int], batch_size: int, seed: list[int]) -> list[int]:
    """Indices in an order whose batches hold equal lengths, nearly, and are shuffled.

    Of one length, which examples come together is random as well. Only the last batch may be
    smaller than ``batch_size``.
    """
    generator = np.random.default_rng(seed)
    by_length = np.lexsort((generator.permutation(len(lengths)), np.array(lengths)))
    full = len(lengths) // batch_size * batch_size
    rest = generator.permutation(by_length)[full:] if full < len(lengths) else by_length[:0]
    kept = by_length[~np.isin(by_length, rest)]
    batches = kept.reshape(-1, batch_size)
    order: list[int] = [*generator.permutation(batches).ravel().tolist(), *rest.tolist()]
    return order


def prompt(problem: Problem, mode: Mode, tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation up to ``<think>`` or ``</think>``."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=mode == "think",
        )
    )


def example(problem: Problem, mode: Mode, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Token ids, and labels that are -100 before the completion."""
    asked = tokenizer(prompt(problem, mode, tokenizer), add_special_tokens=False)["input_ids"]
    said = tokenizer(problem.completion(mode) + str(tokenizer.eos_token), add_special_tokens=False)[
        "input_ids"
    ]
    return {"input_ids": asked + said, "labels": [UNOBSERVED] * len(asked) + said}
