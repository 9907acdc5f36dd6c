"""Think-Fusion: one model with two modes, in four steps (A.X K1, arXiv 2601.09200).

    post_train(PostTrainingConfig(), base, tokens, Stages(Path("runs/nano/post-training")))

1. From the base, two fine-tunings: Instruct answers at once, Reasoning thinks first.
2. Their linear merge, mostly Reasoning.
3. Fine-tuning on mode-overlap data: the same prompt with both kinds of answer.
4. On-policy reinforcement learning at sequence level, each instruction in both modes.

Every step is an artifact, a Hugging Face directory that can be loaded, and each is measured in
both modes on the same held-out problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from seodang.artifact import Artifact, begin
from seodang.foundation.post_training.config import PostTrainingConfig
from seodang.foundation.post_training.fine_tuning import fine_tune
from seodang.foundation.post_training.merge import merge_linear
from seodang.foundation.post_training.modes import measure_modes
from seodang.foundation.post_training.policy_optimization import optimize_policy
from seodang.foundation.post_training.problem import MODES
from seodang.foundation.post_training.reasoning_data import build_reasoning_data
from seodang.foundation.post_training.trainers import copy_model_files
from seodang.stages import Stages

STEPS = ("instruct", "reasoning", "merged", "overlap", "policy")


@dataclass(frozen=True)
class PostTrained:
    """The steps' models in order, and what was measured of each; ``model`` is the last one."""

    models: dict[str, Artifact]
    measured: dict[str, Artifact]

    @property
    def model(self) -> Artifact:
        """The model after the last step."""
        return self.models[STEPS[-1]]

    def to_json(self) -> list[dict[str, Any]]:
        """A row for each step, with the figures of both modes."""
        return [{"step": step, **a.manifest.summary} for step, a in self.measured.items()]


def post_train(
    config: PostTrainingConfig, base: Artifact, tokens: Artifact, stage: Stages
) -> PostTrained:
    """Run the four steps on ``base``, a model directory with its tokenizer.

    ``tokens`` are those of its pretraining, some of which every fine-tuning brings back.
    The folder of ``stage`` then holds ``data``, a folder for each of ``STEPS``, and
    ``measured/STEP``. What is finished there is not done again, what was stopped goes on.

    Raises ``InputError`` if TRL or reasoning-gym is not installed, or ``base`` cannot be loaded.
    """
    data = stage("data", partial(build_reasoning_data, config))
    models: dict[str, Artifact] = {}
    models["instruct"] = stage(
        "instruct",
        partial(fine_tune, config, config.instruct, base, data, "train", ["instant"], tokens),
    )
    models["reasoning"] = stage(
        "reasoning",
        partial(fine_tune, config, config.reasoning, base, data, "train", ["think"], tokens),
    )
    models["merged"] = stage(
        "merged", partial(merge, config, models["reasoning"], models["instruct"])
    )
    models["overlap"] = stage(
        "overlap",
        partial(
            fine_tune, config, config.overlap, models["merged"], data, "overlap", MODES, tokens
        ),
    )
    models["policy"] = stage("policy", partial(optimize_policy, config, models["overlap"], data))
    measured = {
        step: stage(f"measured/{step}", partial(measure_modes, config, step, models[step], data))
        for step in STEPS
    }
    return PostTrained(models, measured)


def merge(
    config: PostTrainingConfig, reasoning: Artifact, instruct: Artifact, out: Path
) -> Artifact:
    """The weighted average of the two models, into ``out``."""
    weight = config.reasoning_weight
    inputs = {"reasoning": reasoning.digest, "instruct": instruct.digest}
    draft = begin(out, "merged", {"reasoning_weight": weight}, inputs)
    if isinstance(draft, Artifact):
        return draft
    merge_linear({reasoning.path: weight, instruct.path: 1 - weight}, draft.path)
    copy_model_files(reasoning.path, draft.path)
    return draft.finish(sources=reasoning.manifest.sources)
