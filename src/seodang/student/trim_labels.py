"""Soft labels of the teacher's vocabulary as soft labels of a trimmed one.

Tokens. A token that is kept stays; any other is replaced by its pieces, so that a sequence grows.
Pieces are not tokenized again: BPE on the text might also merge across the edges of a spelled-out
token (`benchmarks/vocabulary.py` counts how rarely that changes a text).

Labels. The label of a position is an estimate of p, the teacher's distribution of the next token.
What the student must learn there is the next *piece*, whose distribution is p mapped by "first
piece": entry (id, w) becomes (first piece of id, w), and equal ids add up. This map is linear, so
an unbiased estimate stays unbiased, and it loses nothing: only ids without any text (rows that pad
an embedding) are left out, which leaves the teacher's distribution given that its token has one.
The bucket of ``residual`` holds the ids that were not stored, some of which may begin with a
stored piece: there the k+1 categories are no longer exact.

Inside a spelled-out token. Where the observed token y has the pieces y1 ... ym, the positions
after y1 ... y(m-1) need labels too, and the teacher gave none: it was only asked before y. Let E
be the entries of that label whose spelling begins with y1 ... yj and goes on. The label after yj
is

    1 of y(j+1)  +  sum over E of w * (1 of the next piece of v  -  1 of y(j+1))

The first term alone is what cross-entropy would use. On text drawn from the teacher it is an
unbiased draw of the next piece given that the token goes on; the sum then has the mean zero and
takes away as much of the draw's noise as the label knows about: it is a control variate. Where the
teacher was sure (the w of E sum to 1) the label is the teacher's own distribution, where it knew
nothing the observed piece. It is linear in w, so that drawn weights do not bias it, with one
exception: if they sum to more than 1 they are scaled down to it, for no weight may be negative.
Whether a token goes on at all is learnt from the text: where it ended with y1 ... yj, the label
there is the teacher's, of what follows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from seodang.corpus.sequences import observed_tokens
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore
from seodang.student.losses import ROUNDING
from seodang.student.trimmed import Int32, Int64, TrimmedVocabulary

Float32 = npt.NDArray[np.float32]
_FLUSH = 1 << 20  # ids that are counted at once


def trim_sequence(sequence: SoftLabelSequence, vocabulary: TrimmedVocabulary) -> SoftLabelSequence:
    """The sequence in the new ids: tokens spelled out, labels mapped as the module says.

    Ids are unique within a position. The label of an old position stands at the last piece of its
    token; positions inside spelled-out tokens are added to ``labelled`` if the token's own
    prediction was, so that ``observed_tokens`` gives the next piece everywhere. ``digest``,
    ``entropy`` and ``head_mass`` remain those of the stored sequence.

    Raises ``ValueError`` if a token has no text.
    """
    token_ids, last = vocabulary.spell_out(sequence.token_ids)
    labelled = last[sequence.labelled]
    rows = np.repeat(np.arange(len(labelled)), np.diff(sequence.offsets)[sequence.labelled])
    ids, weights = vocabulary.first[sequence.ids], sequence.weights
    if (vocabulary.new_ids[sequence.ids] < 0).any():
        rows, ids, weights = _add_up_moved(sequence.ids, rows, ids, weights, vocabulary)
    positions = labelled[rows]
    if len(token_ids) > len(sequence.token_ids):
        inside = _inside(sequence, labelled, vocabulary)
        if len(inside[0]):
            labelled = np.sort(np.concatenate([labelled, np.unique(inside[0])]))
            positions = np.concatenate([positions, inside[0]])
            order = np.argsort(positions, kind="stable")
            positions = positions[order]
            ids = np.concatenate([ids, inside[1]])[order]
            weights = np.concatenate([weights, inside[2]])[order]
    offsets = np.zeros(len(token_ids) + 1, np.int64)
    np.cumsum(np.bincount(positions, minlength=len(token_ids)), out=offsets[1:])
    return replace(
        sequence,
        token_ids=token_ids,
        labelled=labelled.astype(np.int32),
        offsets=offsets,
        ids=ids,
        weights=weights,
    )


def _add_up_moved(
    old_ids: Int32, rows: Int64, ids: Int32, weights: Float32, vocabulary: TrimmedVocabulary
) -> tuple[Int64, Int32, Float32]:
    """Entries without those that have no piece, equal ids of a row added up, in their order.

    Only rows with an entry that is not kept can hold equal ids.
    """
    moved = vocabulary.new_ids[old_ids] < 0
    touched = np.zeros(rows[-1] + 1, bool)
    touched[rows[moved]] = True
    among = np.flatnonzero(touched[rows])
    keys = rows[among] * (vocabulary.size + 1) + ids[among] + 1
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    among = among[order]
    weights, stays = weights.copy(), ids >= 0
    sums = np.add.reduceat(weights[among], starts, dtype=np.float64)
    weights[among[starts]] = sums
    stays[np.delete(among, starts)] = False
    return rows[stays], ids[stays], weights[stays]


def _inside(
    sequence: SoftLabelSequence, labelled: Int64, vocabulary: TrimmedVocabulary
) -> tuple[Int64, Int32, Float32]:
    """Positions, ids and weights of the labels inside spelled-out tokens; see the module.

    ``labelled`` (L,) are the new positions of the stored labels.
    """
    pieces, lengths = vocabulary.pieces, vocabulary.lengths
    observed = observed_tokens(sequence)
    rows = np.flatnonzero((observed >= 0) & (lengths[observed.clip(0)] > 1))
    observed, labelled = observed[rows], labelled[rows]
    count, start = lengths[observed], vocabulary.piece_offsets[observed]
    entry_counts = np.diff(sequence.offsets)[sequence.labelled]
    first_entry = (np.cumsum(entry_counts) - entry_counts)[rows]
    entry_counts = entry_counts[rows]
    # The entries of these rows: their row, number and start of their pieces, and weight.
    row = np.repeat(np.arange(len(rows)), entry_counts)
    shift = first_entry - (np.cumsum(entry_counts) - entry_counts)
    entry = shift[row] + np.arange(len(row))
    ids, weights = sequence.ids[entry], sequence.weights[entry].astype(np.float64)
    entries = np.stack([row, lengths[ids], vocabulary.piece_offsets[ids]])
    found: list[tuple[Int64, Int32, npt.NDArray[np.float64]]] = []
    for depth in range(1, int(count.max(initial=1))):
        row, length, begin = entries
        alive = np.flatnonzero((length > depth) & (count[row] > depth))
        same = pieces[begin[alive] + depth - 1] == pieces[start[row[alive]] + depth - 1]
        entries, weights = entries[:, alive[same]], weights[alive[same]]
        row, _, begin = entries
        goes_on = np.flatnonzero(count > depth)
        known = np.bincount(row, weights, len(rows))
        scale = 1.0 / np.maximum(known, 1.0)
        found.append(
            (
                np.concatenate([labelled[goes_on], labelled[row]]) + depth,
                pieces[np.concatenate([start[goes_on], begin]) + depth],
                np.concatenate([1.0 - (scale * known)[goes_on], weights * scale[row]]),
            )
        )
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    position, piece, weight = (np.concatenate(columns) for columns in zip(*found, strict=True))
    keys, inverse = np.unique(position * vocabulary.size + piece, return_inverse=True)
    position, piece = np.divmod(keys, vocabulary.size)
    summed = np.bincount(inverse, weight).astype(np.float32)
    some = summed > ROUNDING
    return position[some], piece[some].astype(np.int32), summed[some]


def trimmed_lengths(store: SoftLabelStore, vocabulary: TrimmedVocabulary) -> tuple[Int64, Int64]:
    """Tokens and labelled tokens of every sequence as :func:`trim_sequence` gives them."""
    tokens, labelled = np.zeros((2, len(store)), np.int64)
    for index, sequence in enumerate(store):
        lengths = vocabulary.lengths[sequence.token_ids]
        following = np.append(lengths[1:], 1)[sequence.labelled]
        tokens[index], labelled[index] = lengths.sum(), following.sum()
    return tokens, labelled


def usage(store: SoftLabelStore) -> tuple[Int64, npt.NDArray[np.float64]]:
    """How often every id stands in the text, and the sum of its weights in the labels, (V,)."""
    counts, mass = np.zeros(store.vocab_size, np.int64), np.zeros(store.vocab_size)
    waiting: list[SoftLabelSequence] = []
    size = 0

    def flush() -> None:
        nonlocal size
        if waiting:
            tokens = np.concatenate([s.token_ids for s in waiting])
            ids = np.concatenate([s.ids for s in waiting])
            weights = np.concatenate([s.weights for s in waiting])
            counts[:] += np.bincount(tokens, minlength=len(counts))
            mass[:] += np.bincount(ids, weights, len(mass))
        waiting.clear()
        size = 0

    for sequence in store:
        waiting.append(sequence)
        size += len(sequence.ids) + len(sequence.token_ids)
        if size > _FLUSH:
            flush()
    flush()
    return counts, mass


def trimming_report(store: SoftLabelStore, vocabulary: TrimmedVocabulary) -> dict[str, Any]:
    """What trimming does to a store, as plain values.

    ``entries`` that are kept, ``of`` the teacher's; ``spelled_out``: share of the text's tokens
    that are not kept; ``growth``: new tokens over old; ``moved_mass``: share of the labels' weight
    that is now at the first piece of a token that is not kept; ``lost_mass``: share at ids without
    a text, which is left out.
    """
    counts, mass = usage(store)
    removed, lost = vocabulary.new_ids < 0, vocabulary.first < 0
    tokens, weight = max(1, counts.sum()), max(1e-300, mass.sum())
    return {
        "entries": vocabulary.size,
        "of": vocabulary.old_size,
        "spelled_out": float(counts[removed].sum() / tokens),
        "growth": float((counts * vocabulary.lengths).sum() / tokens),
        "moved_mass": float(mass[removed & ~lost].sum() / weight),
        "lost_mass": float(mass[lost].sum() / weight),
    }
