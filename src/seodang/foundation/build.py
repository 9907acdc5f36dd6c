"""The road from raw text to a teacher: corpus, tokenizer, tokens, pretraining, post-training.

    seodang foundation run recipes/foundation-nano.yaml --out runs/nano

Each stage is an artifact; one whose inputs and config did not change is not run again.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seodang.artifact import MANIFEST, Artifact, begin, write_json
from seodang.causal_lm import copy_tokenizer
from seodang.errors import InputError
from seodang.foundation import teacher_card
from seodang.foundation.recipe import FoundationRecipe
from seodang.foundation.vllm_checkpoint import add_what_vllm_reads
from seodang.packages import open_package
from seodang.stages import Stages, claimed

REPORT = "teacher.json"


@dataclass
class Built:
    """What a foundation run made: the stages in order, and the teacher's directory."""

    out: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Artifact] = field(default_factory=dict)

    @property
    def post_training(self) -> list[dict[str, Any]]:
        """A row for each step of the post-training, with the figures of both modes."""
        return [{"step": step, **made.manifest.summary} for step, made in self.measured.items()]

    @property
    def teacher(self) -> Path:
        """A plain Hugging Face directory."""
        return self.out / "teacher"

    def to_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        return {
            "out": str(self.out),
            "stages": self.stages,
            "pretraining": self.pretraining,
            "post_training": self.post_training,
            "teacher": str(self.teacher),
        }


def build_teacher(recipe: FoundationRecipe, folder: Path, out: Path) -> Built:
    """Run the recipe's stages in ``out``, resuming what an earlier run left there.

    Relative paths of the corpus start from ``folder``. Raises ``InputError`` before any work if
    ``out`` belongs to another recipe or something the recipe needs is not on this machine, and
    whatever the stages raise.
    """
    with claimed(recipe, out):
        return _build(recipe, folder, out)


def _build(recipe: FoundationRecipe, folder: Path, out: Path) -> Built:
    for pin in recipe.packages():
        open_package(pin).close()
    from seodang.corpus.raw.build import build_raw_corpus
    from seodang.foundation.pretraining.pretrain import pretrain
    from seodang.foundation.pretraining.tokens import tokenize_raw
    from seodang.foundation.tokenizer.train import train_tokenizer

    stage = Stages(out)
    built = Built(out, stage.done)
    corpus = stage("raw-corpus", lambda path: build_raw_corpus(recipe.corpus, path, folder))
    tokenizer = stage("tokenizer", lambda path: train_tokenizer(recipe.tokenizer, corpus, path))
    tokens = stage("tokens", lambda path: tokenize_raw(corpus, tokenizer, path))
    base = stage(
        "base",
        lambda path: pretrain(recipe.pretraining, recipe.model, tokens, tokenizer, path),
    )
    built.pretraining = base.manifest.summary
    last = base
    if recipe.post_training is not None:
        from seodang.foundation.post_training.think_fusion import post_train

        after = Stages(out / "post-training")
        trained = post_train(recipe.post_training, base, tokens, after)
        stage.done |= {f"post-training/{name}": made for name, made in after.done.items()}
        built.measured = trained.measured
        last = trained.model
    stage("teacher", lambda path: _teacher(recipe, built, base, last, path))
    return built


def pretrain_alone(recipe: FoundationRecipe, out: Path) -> Artifact:
    """The pretraining stage alone, of a run whose tokens are finished.

    Started by torchrun, its processes train the one model together; :func:`build_teacher` finds
    it finished then. Raises ``InputError`` if ``out`` holds no tokens.
    """
    from seodang.foundation.pretraining.pretrain import pretrain
    from seodang.training.parallel import is_first_process

    if not (out / "tokens" / MANIFEST).exists():
        raise InputError(
            f"{out / 'tokens'}: no finished tokens; make them first with `seodang foundation run`, "
            "which may be stopped once they are there"
        )
    tokens, tokenizer = Artifact.open(out / "tokens"), Artifact.open(out / "tokenizer")
    with claimed(recipe, out) if is_first_process() else nullcontext():
        return pretrain(recipe.pretraining, recipe.model, tokens, tokenizer, out / "base")


def _teacher(
    recipe: FoundationRecipe, built: Built, base: Artifact, last: Artifact, out: Path
) -> Artifact:
    """The last model's directory without the traces of its training; its card, what was measured.

    In it is also what vLLM reads of a model of this design and ``transformers`` does not write.
    """
    from seodang.foundation.pretraining.pretrain import ROUTING

    draft = begin(out, "teacher", {"card": teacher_card.VERSION}, {"model": last.digest})
    if isinstance(draft, Artifact):
        return draft
    copy_tokenizer(last.path, out)
    model = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
    for file in sorted(file for pattern in model for file in last.path.glob(pattern)):
        shutil.copyfile(file, out / file.name)
    add_what_vllm_reads(out, recipe.model.dense_layers)
    if (base.path / ROUTING).exists():
        shutil.copyfile(base.path / ROUTING, out / ROUTING)
    report = {"pretraining": built.pretraining, "post_training": built.post_training}
    write_json(out / REPORT, report)
    sources = last.manifest.sources
    text = teacher_card.teacher_card(recipe, report, sources)
    (out / teacher_card.CARD).write_text(text, encoding="utf-8")
    return draft.finish(sources=sources)
