"""On-policy reinforcement learning through TRL: both modes of an instruction, sequence by sequence.

Every instruction is asked twice, the prompt ending in ``<think>`` or ``</think>``, and answered
several times; an answer's advantage is its reward against those of the same prompt, not divided
by their deviation, which would make most of what one lucky guess earned (Dr. GRPO: Liu et al.,
arXiv 2503.20783). Importance ratios and clipping are of whole sequences, each of which counts the
same however long (GSPO: Zheng et al., arXiv 2507.18071), with a higher clip upwards and no
reference model (DAPO: Yu et al., arXiv 2503.14476). Two parts of DAPO are left out: dynamic
sampling, which asks again where all answers earn the same and which TRL does not have (such prompts
teach nothing in their round), and the mask on answers that grow too long (not to end is what the
format reward punishes).
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


def optimize_policy(
    config: PostTrainingConfig, model: Artifact, data: Artifact, out: Path
) -> Artifact:
    """Reinforce ``model`` on problems that it has not been fine-tuned on last, into ``out``.

    Instructions are the training part's, from its end, of all tasks and languages alike. Resumes
    what ``out`` holds, with the same result as if it had never stopped.

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
        from trl.trainer.grpo_trainer import GRPOTrainer
    loaded = load(model, draft.path)
    problems = in_turns(read_problems(data, "train"), policy.rounds * policy.instructions)
    asked = [(problem, mode) for problem in problems for mode in MODES]
    rows = [
        {"prompt": prompt(problem, mode, loaded.tokenizer), "number": number}
        for number, (problem, mode) in enumerate(asked)
    ]
    batch = policy.instructions * len(MODES) * policy.answers
    every = policy.steps_per_round
    passes = math.ceil(batch / every / AT_ONCE)
    saved = every * policy.checkpoint_rounds  # whole rounds: answers are not in a checkpoint
    arguments = GRPOConfig(
        **shared_arguments(draft.path, config.seed, saved, logging_steps=every),
        max_steps=policy.rounds * every,
        per_device_train_batch_size=math.ceil(batch / every / passes),
        gradient_accumulation_steps=passes,
        steps_per_generation=every * passes,
        num_generations=policy.answers,
        shuffle_dataset=False,
        learning_rate=policy.learning_rate,
        max_completion_length=config.max_new_tokens,
        temperature=policy.temperature,
        beta=0.0,
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=policy.clip_low,
        epsilon_high=policy.clip_high,
        scale_rewards="none",
        mask_truncated_completions=False,
        disable_dropout=True,
    )
    trainer = GRPOTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=loaded.tokenizer,
        reward_funcs=reward_functions(asked, int(loaded.tokenizer.eos_token_id)),
    )
    fit(trainer, loaded, draft, "Reinforcement learning", arguments.max_steps)
    copy_tokenizer(model.path, draft.path)
    return finish(draft, data, {"instructions": len(problems), "answers": batch * policy.rounds})


def in_turns(problems: Sequence[Problem], count: int) -> list[Problem]:
    """At most ``count`` of the last ``problems``, every task in every language in turn.

    No question comes twice, so the end of a long list holds few of the tasks whose worlds are
    small; a policy that is not asked them any more unlearns them.
    """
    of_task: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in reversed(problems):
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
