"""The ``post_training`` section of a foundation recipe: Think-Fusion's four steps."""

from __future__ import annotations

from pydantic import Field

from seodang.recipe import Section


class FineTuningConfig(Section):
    """Supervised fine-tuning on the answers of generated problems."""

    problems: int | None = Field(None, gt=0, description="of those there are (default: all)")
    epochs: int = Field(1, gt=0, description="times that every problem is seen")
    batch_sequences: int = Field(16, gt=0, description="answers of one optimizer step")
    text_sequences: int = Field(
        4, ge=0, description="windows of pretraining text beside them, so that it is not forgotten"
    )
    text_weight: float = Field(0.3, ge=0, description="of that text's loss beside the answers'")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW, at its highest")


class PolicyConfig(Section):
    """On-policy reinforcement learning from what whole answers earn (GRPO)."""

    rounds: int = Field(48, gt=0, description="times of answering, scoring and learning: steps")
    instructions: int = Field(64, gt=0, description="problems of a round, each asked in both modes")
    answers: int = Field(8, gt=1, description="to each prompt, compared with each other")
    checkpoint_rounds: int = Field(10, gt=0, description="rounds between two checkpoints")
    learning_rate: float = Field(1e-2, gt=0, description="of AdamW, at its highest")
    temperature: float = Field(1.0, gt=0, description="of the answers")
    kl_weight: float = Field(
        0.1, ge=0, description="reward that a nat away from the model before it costs, by answer"
    )


class PostTrainingConfig(Section):
    """Two fine-tunings, their merge, fine-tuning on both modes, reinforcement learning."""

    problems: int = Field(8000, gt=0, description="generated problems to train on")
    overlap_problems: int = Field(
        2000, gt=0, description="further ones, answered in both modes after the merge"
    )
    held_out: int = Field(500, gt=0, description="generated problems that only measure")
    instruct: FineTuningConfig = FineTuningConfig()
    reasoning: FineTuningConfig = FineTuningConfig()
    reasoning_weight: float = Field(
        0.8, ge=0, le=1, description="of the Reasoning model in the merge; the rest is Instruct"
    )
    overlap: FineTuningConfig = FineTuningConfig(learning_rate=5e-4)
    policy: PolicyConfig = PolicyConfig()
    max_new_tokens: int = Field(160, gt=0, description="of an answer, thoughts included")
    temperature: float = Field(0.6, gt=0, description="of the answers that are measured")
    top_p: float = Field(0.95, gt=0, le=1, description="of the answers that are measured")
    seed: int = Field(0, ge=0, description="of problems, order and answers")
    checkpoint_steps: int = Field(50, gt=0, description="fine-tuning steps between two checkpoints")
