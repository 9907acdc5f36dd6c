"""The foundation recipe: how a teacher is built from raw text, checked before any work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from seodang.corpus.raw.config import RawCorpusConfig
from seodang.foundation.model_config import ModelConfig
from seodang.foundation.post_training.config import PostTrainingConfig
from seodang.foundation.pretraining.config import PretrainingConfig
from seodang.foundation.tokenizer.config import TokenizerConfig
from seodang.packages import PackagePin
from seodang.recipe import Section
from seodang.recipe_file import RecipeReader, read_as


class FoundationRecipe(Section):
    """A teacher from raw text: corpus, tokenizer, shape, pretraining and post-training."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="whose runs may share a directory"
    )
    description: str = Field("", description="one sentence, for the report")
    corpus: RawCorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    pretraining: PretrainingConfig = PretrainingConfig()
    post_training: PostTrainingConfig | None = Field(
        None, description="two thinking modes (default: the pretrained model is the teacher)"
    )

    @model_validator(mode="after")
    def _every_token_has_an_embedding(self) -> Self:
        if self.tokenizer.vocabulary > self.model.vocabulary:
            raise ValueError(
                f"`tokenizer.vocabulary` {self.tokenizer.vocabulary} is more than the embedding's "
                f"{self.model.vocabulary} rows (`model.vocabulary`)"
            )
        return self

    def packages(self) -> list[PackagePin]:
        """Every package that the recipe names, once."""
        return self.corpus.packages()


def is_foundation_recipe(file: Path) -> bool:
    """Whether a recipe builds a teacher: a ``model`` is trained from raw text, and no student."""
    data = RecipeReader(file).read()
    return isinstance(data, dict) and "model" in data and "student" not in data


def load_foundation_recipe(file: Path | str, settings: list[str] | None = None) -> FoundationRecipe:
    """Read, override (``settings``: ``section.key=value``) and check a foundation recipe.

    Raises ``InputError`` with file, line, key and the nearest valid key for whatever is wrong.
    """
    recipe, _ = read_as(FoundationRecipe, file, settings)
    return recipe
