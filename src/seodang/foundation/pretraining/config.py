"""The ``pretraining`` section of a foundation recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from seodang.recipe import Section, TrainingConfig

Weight = Annotated[float, Field(gt=0)]


class StageConfig(Section):
    """A part of the training with a context length and a mixture of its own."""

    share: float = Field(gt=0, le=1, description="of the tokens")
    context: int | None = Field(
        None, gt=1, description="tokens of a document seen together (default: the model's context)"
    )
    mixture: dict[str, Weight] = Field(
        {},
        description="share of the tokens of each language or source; the rest is left out "
        "(default: as in the corpus)",
    )


class BalancingConfig(Section):
    """How the routed experts are kept equally busy (see ``pretraining.balance``)."""

    method: Literal["bias", "sequence", "none"] = Field(
        "bias", description="router bias, auxiliary-loss-free; or the sequence-wise loss alone"
    )
    rate: float = Field(0.001, gt=0, description="by which a step changes the router bias")
    fold_from: float = Field(
        0.4, ge=0, lt=1, description="share of the steps after which the bias is folded away"
    )
    fold_until: float = Field(
        0.6, gt=0, le=1, description="share of the steps after which there is none"
    )
    weight: float = Field(
        0.05, ge=0, description="of the balance loss, before the bias is folded away"
    )
    fold_weight: float = Field(0.1, ge=0, description="of the balance loss, once the bias is gone")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.fold_from >= self.fold_until:
            raise ValueError("`fold_from` must be below `fold_until`")
        return self


class SpikesConfig(Section):
    """When a loss counts as a spike (see ``seodang.training.spikes``)."""

    window: int = Field(64, ge=4, description="steps before it that it is compared with")
    threshold: float = Field(8.0, gt=0, description="robust standard deviations above them")
    most: int = Field(32, ge=2, description="steps left out, before the training is given up")


class PretrainingConfig(TrainingConfig):
    """Training from random weights on the tokens of a raw corpus."""

    tokens: int | None = Field(None, gt=0, description="to train on (default: all, once)")
    stages: list[StageConfig] = Field(
        [], description="in order; their shares add up to 1 (default: one stage)"
    )
    batch_tokens: int = Field(16_384, gt=0, description="tokens of one optimizer step, about")
    micro_batch_tokens: int | None = Field(
        4096, gt=0, description="tokens of one forward pass, about (null: the whole batch)"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="of the hidden matrices; all else is trained by AdamW"
    )
    learning_rate: float = Field(2e-3, gt=0, description="of AdamW, at its highest")
    muon_learning_rate: float = Field(
        1e-2, gt=0, description="of Muon, at its highest; updates are scaled as AdamW's"
    )
    schedule: Literal["cosine", "wsd"] = Field(
        "wsd", description="of the learning rates: cosine, or warm-up, stable, decay"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.1, ge=0, description="of matrices")
    balancing: BalancingConfig = BalancingConfig()
    mtp_weight: float = Field(
        0.3, ge=0, description="of the multi-token-prediction loss, if the model has such layers"
    )
    expert_parallel: bool = Field(
        False, description="each process keeps some of the experts, and tokens travel to them"
    )
    spikes: SpikesConfig | None = SpikesConfig()

    @model_validator(mode="after")
    def _stages_are_a_whole(self) -> Self:
        total = sum(stage.share for stage in self.stages)
        if self.stages and abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the stages add up to {total:g}, not to 1")
        return self
