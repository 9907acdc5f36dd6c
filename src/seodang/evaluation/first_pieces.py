"""Models with and without a trimmed vocabulary, side by side: what each reads, what is compared.

A model with a trimmed vocabulary reads text spelled out and predicts pieces. All are compared over
the first piece of the next token, a partition of the teacher's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from seodang.causal_lm import CausalLM, row_chunks
from seodang.corpus.sequences import TokenSequence, observed_tokens
from seodang.student.trimmed import TrimmedVocabulary


@dataclass(frozen=True)
class Reading:
    """What one model reads of some sequences, and where its predictions of their tokens stand.

    ``positions`` of each sequence, (labelled,), are where the next token is predicted, or its
    first piece. Where that token has more pieces, ``inside`` holds the positions that predict
    them, ``pieces`` what they should predict and ``inside_rows`` the labelled position that they
    belong to, counted through all sequences.
    """

    token_ids: list[npt.NDArray[np.int32]]
    positions: list[npt.NDArray[np.int64]]
    inside: list[npt.NDArray[np.int64]]
    inside_rows: npt.NDArray[np.int64]
    pieces: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence], vocabulary: TrimmedVocabulary | None) -> Self:
        """As a model with this trimmed vocabulary reads them; None for the teacher's."""
        if vocabulary is None:
            nothing = np.empty(0, np.int64)
            return cls(
                [s.token_ids for s in sequences],
                [s.labelled.astype(np.int64) for s in sequences],
                [nothing for _ in sequences],
                nothing,
                nothing,
            )
        token_ids, positions, inside, rows, pieces = [], [], [], [], []
        before = 0
        for sequence in sequences:
            ids, last = vocabulary.spell_out(sequence.token_ids)
            at = last[sequence.labelled]
            observed = observed_tokens(sequence)
            more = np.where(observed >= 0, vocabulary.lengths[observed.clip(0)] - 1, 0)
            row = np.repeat(np.arange(len(at)), more)
            within = at[row] + 1 + np.arange(len(row)) - (np.cumsum(more) - more)[row]
            token_ids.append(ids)
            positions.append(at)
            inside.append(within)
            rows.append(before + row)
            pieces.append(ids[within + 1].astype(np.int64))
            before += len(at)
        return cls(token_ids, positions, inside, np.concatenate(rows), np.concatenate(pieces))

    def hidden_states(self, model: CausalLM) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states at the labelled positions (N, H), and at those inside tokens (M, H)."""
        states = model.hidden_states(self.token_ids)
        found = []
        for positions in (self.positions, self.inside):
            rows = [
                hidden_TH[torch.from_numpy(at).to(hidden_TH.device)]
                for hidden_TH, at in zip(states, positions, strict=True)
            ]
            found.append(torch.cat(rows))
        return found[0], found[1]

    def inside_nll(self, model: CausalLM, hidden_MH: torch.Tensor) -> torch.Tensor:
        """For each of the N positions, the -log p of the token's pieces after the first."""
        total_N = torch.zeros(sum(map(len, self.positions)), device=hidden_MH.device)
        pieces, rows = (
            torch.from_numpy(a).to(hidden_MH.device) for a in (self.pieces, self.inside_rows)
        )
        for part in row_chunks(len(pieces), model.vocab_size):
            log_probs = model.log_probs(hidden_MH[part]).gather(1, pieces[part, None])
            total_N.index_add_(0, rows[part], -log_probs[:, 0])
        return total_N


class FirstPieces:
    """The map from the teacher's tokens to the first pieces of a trimmed vocabulary."""

    def __init__(self, vocabulary: TrimmedVocabulary) -> None:
        first = vocabulary.first.astype(np.int64)
        self.size = vocabulary.size
        # Ids without a text go to one more category, which is then left out.
        self.first_V = torch.from_numpy(np.where(first < 0, self.size, first))
        self.moved_V = torch.from_numpy((vocabulary.new_ids < 0) & (first >= 0))

    def log_probs(self, log_probs_NV: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the first pieces, given that the token has a text."""
        p_NV = log_probs_NV.exp()
        p_NC = p_NV.new_zeros(len(p_NV), self.size + 1)
        p_NC.scatter_add_(1, self.first_V.to(p_NV.device).expand_as(p_NV), p_NV)
        p_NC = p_NC[:, : self.size]
        p_NC = p_NC / p_NC.sum(-1, keepdim=True)
        return p_NC.clamp_(min=torch.finfo(p_NC.dtype).tiny).log_()

    def moved_mass(self, log_probs_NV: torch.Tensor) -> float:
        """Sum over rows of the probability of tokens that are spelled out."""
        moved_V = self.moved_V.to(log_probs_NV.device)
        return float(log_probs_NV[:, moved_V].exp().sum(dtype=torch.float64))

    def of_tokens(self, targets_N: torch.Tensor) -> torch.Tensor:
        """The first pieces of observed tokens; -100 stays."""
        first_N = self.first_V.to(targets_N.device)[targets_N.clamp(min=0)]
        return torch.where(targets_N >= 0, first_N, targets_N)
