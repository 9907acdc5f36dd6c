"""The loss of a base model on held-out documents, in nats per byte of their text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from seodang.foundation.pretraining.batches import Piece, batch, cut
from seodang.foundation.pretraining.tokens import TokenStore
from seodang.progress import track
from seodang.training.attention import use_packed_attention

PACK_TOKENS = 4096
MOST_TOKENS = 100_000  # of a language that are measured


def nats_per_byte(
    model: Any, store: TokenStore, context: int | None = None, most: int = MOST_TOKENS
) -> dict[str, float]:
    """Held-out loss by language, and of ``all`` documents.

    The sum of -log p of every token of a document, its end included, over the bytes of its UTF-8
    text: comparable between tokenizers. Documents longer than ``context`` (default: the model's)
    are cut, and each piece sees only itself. Of each language the first documents are taken, until
    they hold ``most`` tokens.
    """
    attention = model.config._attn_implementation
    use_packed_attention(model)
    device = next(model.parameters()).device
    nats: dict[str, float] = {}
    taken = _taken(store, most)
    size = {language: int(store.bytes[documents].sum()) for language, documents in taken.items()}
    total = sum(int((store.lengths[documents] - 1).sum()) for documents in taken.values())
    longest = context or model.config.max_position_embeddings
    with track("Held-out loss", total, "tok") as advance, torch.inference_mode():
        for language, pieces in _packs(store, taken, longest):
            tokens = batch(store, pieces).to(device)
            hidden_TH = model.model(
                tokens.ids[None],
                position_ids=tokens.positions[None],
                use_cache=False,
                document_lengths=tokens.lengths,
            ).last_hidden_state[0]
            logits_TV = model.lm_head(hidden_TH).float()
            loss = cross_entropy(logits_TV, tokens.targets, reduction="none").double().sum()
            nats[language] = nats.get(language, 0.0) + float(loss)
            advance(len(tokens.ids))
    model.set_attn_implementation(attention)
    found = {language: nats[language] / size[language] for language in sorted(nats)}
    return {**found, "all": sum(nats.values()) / sum(size.values())}


def _taken(store: TokenStore, most: int) -> dict[str, list[int]]:
    """The documents of each language that are measured."""
    taken: dict[str, list[int]] = {language: [] for language in sorted(set(store.languages))}
    held = dict.fromkeys(taken, 0)
    for index, language in enumerate(store.languages):
        if held[language] < most:
            taken[language].append(index)
            held[language] += int(store.lengths[index])
    return taken


def _packs(
    store: TokenStore, taken: dict[str, list[int]], context: int
) -> Iterator[tuple[str, list[Piece]]]:
    """Pieces of one language, about ``PACK_TOKENS`` together."""
    for language, documents in taken.items():
        pieces = [p for i in documents for p in cut(i, int(store.lengths[i]), context)]
        pack: list[Piece] = []
        held = 0
        for piece in pieces:
            pack.append(piece)
            held += piece.end - piece.begin
            if held >= PACK_TOKENS:
                yield language, pack
                pack, held = [], 0
        if pack:
            yield language, pack
