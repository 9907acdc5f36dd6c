"""Synthetic token sequences, soft labels and stores for tests: random, made without a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from seodang.artifact import Artifact, Draft, begin
from seodang.corpus.sequences import TokenSequence
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels.estimators import Entries
from seodang.softlabels.labelling import generator, label_rows
from seodang.softlabels.shards import StoreHeader, write_shard
from seodang.softlabels.store import shard_name

PARAMETERS = {
    "top-k": {"k": 5},
    "residual": {"k": 5},
    "sampled": {"draws": 12},
    "head-tail": {"threshold": 0.05},
}
UNBIASED = ["sampled", "head-tail"]
LAYOUTS = ["fast", "small"]


class Head:
    """Stands for a model where its hidden states are the logits themselves."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def config_of(estimator: str, **changes) -> SoftLabelsConfig:
    """The settings of an estimator in these tests."""
    return SoftLabelsConfig(**{"estimator": estimator, **PARAMETERS[estimator], **changes})


def logits_of(rows: int, vocabulary: int, seed: int, sharpness: float = 2.0) -> torch.Tensor:
    """Normal logits, (rows, vocabulary) float32."""
    g = torch.Generator().manual_seed(seed)
    return sharpness * torch.randn(rows, vocabulary, generator=g)


def probabilities(logits: torch.Tensor) -> np.ndarray:
    """The full distributions in float64."""
    return torch.softmax(logits.double(), -1).numpy()


def labels_of(config: SoftLabelsConfig, logits: torch.Tensor, seed: int) -> Entries:
    """The entries of one sequence, quantised, as capture makes them."""
    (entries,) = label_rows(Head(logits.shape[1]), logits, [config], [np.random.default_rng(seed)])
    return entries


def dense(counts: np.ndarray, ids: np.ndarray, weights: np.ndarray, vocabulary: int) -> np.ndarray:
    """Entries as a matrix of weights, (positions, vocabulary) float64."""
    out = np.zeros((len(counts), vocabulary))
    np.add.at(out, (np.repeat(np.arange(len(counts)), counts), ids), weights)
    return out


def sequences(count: int, seed: int = 0, longest: int = 40, vocabulary: int = 500):
    """Sequences of 2 to ``longest`` - 1 tokens, every other one labelled throughout."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        ids = rng.integers(0, vocabulary, rng.integers(2, longest)).astype(np.int32)
        some = rng.random(len(ids)) < (1.0 if number % 2 else 0.5)
        some[0] = True
        out.append(TokenSequence(f"doc{number}", ids, np.flatnonzero(some).astype(np.int32)))
    return out


def header_of(
    config: SoftLabelsConfig, vocabulary: int = 500, tokenizer: str = "synthetic"
) -> StoreHeader:
    """The header of a synthetic store."""
    return StoreHeader(
        estimator=config.estimator,
        parameters=config.parameters(),
        layout=config.layout,
        vocab_size=vocabulary,
        teacher="synthetic",
        tokenizer=tokenizer,
    )


def shards_of(items: Sequence[TokenSequence], size: int) -> Iterator[Sequence[TokenSequence]]:
    """Runs of ``size`` sequences."""
    return (items[start : start + size] for start in range(0, len(items), size))


def synthetic_store(
    path: Path,
    config: SoftLabelsConfig,
    items: Sequence[TokenSequence],
    *,
    shard_size: int = 1000,
    vocabulary: int = 500,
    tokenizer: str = "synthetic",
    entries: Sequence[Entries] | None = None,
) -> Artifact:
    """A store of ``items`` with random labels, or with these ``entries``."""
    header = header_of(config, vocabulary, tokenizer)
    draft = begin(path, "soft-labels", header.model_dump(), {"teacher": "synthetic"})
    assert isinstance(draft, Draft)
    rows = []
    for number, part in enumerate(shards_of(items, shard_size)):
        start = number * shard_size
        write_shard(
            path / shard_name(number),
            header,
            part,
            [
                random_labels(config, item, vocabulary) if entries is None else entries[start + i]
                for i, item in enumerate(part)
            ],
        )
        rows.append(len(part))
    tokens = sum(len(item.labelled) for item in items)
    return draft.finish(summary={"synthetic": True, "tokens": tokens, "rows": rows})


def random_labels(config: SoftLabelsConfig, item: TokenSequence, vocabulary: int) -> Entries:
    """Labels of random logits, which follow from the sequence and the seed alone."""
    rng = generator(config.seed, item)
    logits = torch.from_numpy(4 * rng.standard_normal((len(item.labelled), vocabulary)))
    (entries,) = label_rows(Head(vocabulary), logits.float(), [config], [rng])
    return entries
