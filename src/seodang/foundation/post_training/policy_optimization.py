"""On-policy reinforcement learning through TRL: both modes of an instruction, sequence by sequence.

Every instruction is asked twice, the prompt ending in ``<think>`` or ``</think>``, and answered
several times; an answer's advantage is its reward against those of the same prompt, divided neither
by their deviation nor by its length (Dr. GRPO: Liu et al., arXiv 2503.20783). A round is one
optimizer step, so the policy that learns is the one that answered, and nothing is to be clipped.

Only the gains of the norms are trained, a few thousand weights: what hundreds of answers show of a
reward is mostly noise to millions of them (the gradients of two rounds hardly agree), and a step
that follows noise in all of them does harm. Norms alone teach a network much (Frankle et
al., arXiv 2003.00152). That the policy stays near the model it started from (``kl_weight``, nats
per answer: Ziegler et al., arXiv 1909.08593) undoes what has no direction, and not what is asked
for again and again. DAPO (Yu et al., arXiv 2503.14476) has no such term; nor is its dynamic
sampling here, which asks again where all answers earn the same, as TRL does not have it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from seodang.artifact import Artifact, begin
from seodang.causal_lm import copy_tokenizer
from seodang.foundation.post_training.config import PostTrainingConfig
from seodang.foundation.post_training.fine_tuning import prompt
from seodang.foundation.post_training.problem import MODES, Mode
from seodang.foundation.post_training.reasoning_data import Problem, read_problems
from seodang.foundation.post_training.rewards import reward
from seodang.foundation.post_training.trainers import (
    finish,
    fit,
    load,
    shared_arguments,
    trl_imports,
)

KIND = "policy-optimized"
AT_ONCE = 128  # answers of one forward pass: what it keeps is large
WARMUP = 0.1  # share of the rounds; Adam's first steps, which no average yet tempers, do harm


def optimize_policy(
    config: PostTrainingConfig, model: Artifact, data: Artifact, out: Path
) -> Artifact:
    """Reinforce ``model`` on problems of ``data``, into ``out``.

    Instructions are the training part's, of all tasks and languages alike. Resumes what ``out``
    holds, with the same result as if it had never stopped.

    Raises ``InputError`` if TRL is not installed or the model cannot be loaded.
    """
    policy = config.policy
    used = {"policy": policy.model_dump(exclude={"checkpoint_rounds"}), "seed": config.seed}
    used["max_new_tokens"] = config.max_new_tokens
    draft = begin(out, KIND, used, {"model": model.digest, "data": data.digest})
    if isinstance(draft, Artifact):
        return draft
    with trl_imports():
        from datasets import Dataset
        from trl.trainer.grpo_config import GRPOConfig

        from seodang.foundation.post_training.policy_trainer import PolicyTrainer
    loaded = load(model, draft.path)
    loaded.model.config._name_or_path = str(model.path)  # the reference, of a resumed run too
    for name, weight in loaded.model.named_parameters():
        weight.requires_grad_(name.endswith("norm.weight"))
    problems = in_turns(read_problems(data, "train"), policy.rounds * policy.instructions)
    asked = [(problem, mode) for problem in problems for mode in MODES]
    rows = [
        {"prompt": prompt(problem, mode, loaded.tokenizer), "number": number}
        for number, (problem, mode) in enumerate(asked)
    ]
    batch = policy.instructions * len(MODES) * policy.answers
    passes = math.ceil(batch / AT_ONCE)
    arguments = GRPOConfig(
        **shared_arguments(draft.path, config.seed, policy.checkpoint_rounds, adam_beta2=0.99),
        max_steps=policy.rounds,
        warmup_steps=round(WARMUP * policy.rounds),
        per_device_train_batch_size=math.ceil(batch / passes),
        gradient_accumulation_steps=passes,
        num_generations=policy.answers,
        shuffle_dataset=False,
        learning_rate=policy.learning_rate,
        max_completion_length=config.max_new_tokens,
        temperature=policy.temperature,
        beta=policy.kl_weight,
        importance_sampling_level="token",
        loss_type="dr_grpo",
        scale_rewards="none",
        mask_truncated_completions=False,
        disable_dropout=True,
    )
    trainer = PolicyTrainer(
        loaded,
        config.seed,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        reward_funcs=reward_functions(asked, int(loaded.tokenizer.eos_token_id)),
    )
    fit(trainer, loaded, draft, "Reinforcement learning", arguments.max_steps)
    copy_tokenizer(model.path, draft.path)
    return finish(
        draft, model, data, {"instructions": len(problems), "answers": batch * policy.rounds}
    )


def in_turns(problems: Sequence[Problem], count: int) -> list[Problem]:
    """At most ``count`` of ``problems`` from the first on, every task in every language in turn.

    No question comes twice in all of them, so that what follows is ever rarer: few of the tasks
    whose worlds are small, which a policy that is not asked them any more unlearns.
    """
    of_task: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        of_task[problem.task, problem.language].append(problem)
    turns = zip_longest(*(of_task[key] for key in sorted(of_task)))
    return [problem for turn in turns for problem in turn if problem is not None][:count]


def reward_functions(asked: list[tuple[Problem, Mode]], eos: int) -> list[Any]:
    """The two parts of the reward as TRL calls them, logged under their names."""

    def judged(completions: list[str], ids: list[list[int]], numbers: list[int]) -> list[Any]:
        return [
            reward(*asked[number], said, ended=token_ids[-1:] == [eos])
            for said, token_ids, number in zip(completions, ids, numbers, strict=True)
        ]

    def correct(
        completions: list[str], completion_ids: list[list[int]], number: list[int], **_: Any
    ) -> list[float]:
        return [float(r.correct) for r in judged(completions, completion_ids, number)]

    def format(
        completions: list[str], completion_ids: list[list[int]], number: list[int], **_: Any
    ) -> list[float]:
        return [float(r.format) for r in judged(completions, completion_ids, number)]

    return [correct, format]
