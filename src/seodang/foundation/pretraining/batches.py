"""Which tokens every step of pretraining takes: documents, cut to the context and mixed.

Everything follows from the index of the tokens, the recipe and the seed, so that a run that was
stopped goes on with the same batches, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from seodang.errors import InputError
from seodang.foundation.pretraining.config import PretrainingConfig, StageConfig
from seodang.foundation.pretraining.tokens import TokenStore
from seodang.training.loop import on_device
from seodang.training.plan import plan_steps


class Piece(NamedTuple):
    """Tokens [begin, end) of a document are predicted, each from those before it in the piece."""

    document: int
    begin: int
    end: int


@dataclass(frozen=True)
class TokenBatch:
    """Pieces of documents end to end, none of which sees another.

    ``ids``, ``positions`` and ``targets`` (T,) int64: the tokens, their places in their pieces and
    the tokens that follow; ``lengths`` of the pieces, T in sum.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: list[int]
    documents: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on ``device``."""
        return on_device(self, device)

    def apart(self) -> list[TokenBatch]:
        """A batch of each piece."""
        columns = (
            tensor.split(self.lengths) for tensor in (self.ids, self.positions, self.targets)
        )
        pieces = zip(*columns, self.lengths, self.documents, strict=True)
        return [TokenBatch(i, p, t, [n], [name]) for i, p, t, n, name in pieces]


def batch(store: TokenStore, pieces: Sequence[Piece]) -> TokenBatch:
    """The tokens of ``pieces``; of no piece at all, one token that predicts nothing."""
    if not pieces:
        one = torch.zeros(1, dtype=torch.int64)
        return TokenBatch(one, one, one - 100, [1])
    found = [store.tokens(p.document, p.begin - 1, p.end) for p in pieces]
    lengths = [len(tokens) - 1 for tokens in found]
    return TokenBatch(
        ids=torch.from_numpy(np.concatenate([tokens[:-1] for tokens in found])),
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        targets=torch.from_numpy(np.concatenate([tokens[1:] for tokens in found])),
        lengths=lengths,
        documents=[store.ids[p.document] for p in pieces],
    )


def cut(document: int, length: int, context: int) -> list[Piece]:
    """The pieces of a document of ``length`` tokens: every token but the first, once."""
    return [
        Piece(document, begin, min(begin + context, length)) for begin in range(1, length, context)
    ]


def plan_pretraining(
    store: TokenStore, config: PretrainingConfig, context: int
) -> list[list[Piece]]:
    """The pieces of every step.

    Each language or source deals its documents, in a random order, to the stages one after the
    other; when it has no more, it begins again. A stage's documents are cut to its context and
    shuffled. Raises ``InputError`` if a mixture names what the corpus does not have, a stage's
    context is beyond ``context``, the model's, or the corpus is smaller than one batch.
    """
    stages = config.stages or [StageConfig(share=1.0)]
    available = int((store.lengths - 1).sum())
    if available < config.batch_tokens:
        raise InputError(
            f"{store.artifact.path}: the corpus has {available:,} tokens to train on, less than "
            f"one batch: lower pretraining.batch_tokens ({config.batch_tokens:,}), or add text"
        )
    total = config.tokens or available
    dealt: dict[str, _Dealer] = {}
    steps: list[list[Piece]] = []
    for number, stage in enumerate(stages):
        longest = stage.context or context
        if longest > context:
            raise InputError(
                f"pretraining.stages.{number}.context is {longest}, the model's is {context}: "
                "raise model.context, or lower it"
            )
        pieces: list[Piece] = []
        for name, share in _shares(store, stage, number).items():
            dealer = dealt.setdefault(name, _Dealer(store, name, config.seed))
            pieces += dealer.deal(round(total * stage.share * share), longest)
        lengths = [piece.end - piece.begin for piece in pieces]
        order = plan_steps(lengths, config.batch_tokens, 1, config.seed * 1000 + number)
        steps += [[pieces[index] for index in step] for step in order]
    return steps


def _members(store: TokenStore, name: str) -> list[int]:
    """The documents of a language or source."""
    languages, sources = store.languages, store.sources
    return [i for i in range(len(store)) if name in (languages[i], sources[i])]


def _shares(store: TokenStore, stage: StageConfig, number: int) -> dict[str, float]:
    """How much of a stage each language or source is."""
    weights = dict(stage.mixture)
    if not weights:
        for language, tokens in zip(store.languages, store.lengths.tolist(), strict=True):
            weights[language] = weights.get(language, 0.0) + tokens - 1
    known = {*store.languages, *store.sources}
    for name in weights:
        if name not in known:
            raise InputError(
                f"pretraining.stages.{number}.mixture: {name!r} is neither a language nor a source "
                f"of the corpus: it has {', '.join(sorted(known))}"
            )
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


class _Dealer:
    """The documents of a language or source, in a random order, again and again."""

    def __init__(self, store: TokenStore, name: str, seed: int) -> None:
        self._lengths = store.lengths
        key = int.from_bytes(name.encode(), "little") % (1 << 63)
        order = np.random.default_rng([seed, key]).permutation(_members(store, name))
        self._order: list[int] = order.tolist()
        self._next = 0

    def deal(self, tokens: int, context: int) -> list[Piece]:
        """Pieces of the next documents, ``tokens`` long together."""
        pieces: list[Piece] = []
        while tokens > 0:
            document = self._order[self._next % len(self._order)]
            self._next += 1
            for piece in cut(document, int(self._lengths[document]), context):
                if tokens > 0:
                    pieces.append(piece._replace(end=min(piece.end, piece.begin + tokens)))
                    tokens -= pieces[-1].end - pieces[-1].begin
        return pieces
