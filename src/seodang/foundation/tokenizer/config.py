"""The ``tokenizer`` section of a foundation recipe."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from seodang.recipe import Section

BYTES = 256
RESERVED = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)


class TokenizerConfig(Section):
    """A byte-level BPE tokenizer, and the text that it is trained on."""

    vocabulary: int = Field(16_384, gt=0, description="entries, reserved and spare tokens included")
    mixture: dict[Literal["ko", "en", "code"], Annotated[float, Field(gt=0)]] = Field(
        {"ko": 0.4, "en": 0.4, "code": 0.2},
        min_length=1,
        description="how much each language weighs in the sample, by bytes",
    )
    sample_bytes: int = Field(
        50_000_000, gt=0, description="text to train on, at most; less if a language runs out"
    )
    min_character_count: int = Field(
        50, gt=0, description="occurrences in the sample that earn a character an entry"
    )
    spare_tokens: int = Field(32, ge=0, description="reserved for what comes later")

    @model_validator(mode="after")
    def _room_for_words(self) -> Self:
        fixed = BYTES + len(RESERVED) + self.spare_tokens
        if self.vocabulary <= fixed:
            raise ValueError(
                f"`vocabulary` must be more than {fixed}: {BYTES} bytes, {len(RESERVED)} reserved "
                f"and {self.spare_tokens} spare tokens"
            )
        return self

    def shares(self) -> dict[str, float]:
        """The mixture, so that it adds up to one."""
        total = sum(self.mixture.values())
        return {language: weight / total for language, weight in self.mixture.items()}
