"""Multi-token prediction: layers that predict tokens further ahead (DeepSeek-V3, section 2.2).

Layer k takes the states from which token i+k was predicted and the embedding of that token, and
predicts token i+k+1 with the model's own embedding and head (arXiv 2412.19437, eq. 21-25). It makes
the model plan ahead; it is no part of the released model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IGNORE = -100


class MultiTokenPrediction(torch.nn.Module):
    """One of the layers: joins states and embeddings, and runs a decoder layer over them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.axk1.modeling_axk1 import AXK1DecoderLayer, AXK1RMSNorm

        self.state_norm = AXK1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.embedding_norm = AXK1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.join = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = AXK1DecoderLayer(config, config.num_hidden_layers - 1)  # like the last
        self.norm = AXK1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        state_TH: torch.Tensor,
        embedding_TH: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """The states (T, H) from which the token after the embedded one is predicted."""
        both = torch.cat([self.state_norm(state_TH), self.embedding_norm(embedding_TH)], -1)
        hidden = self.layer(
            self.join(both)[None],
            position_embeddings=position_embeddings,
            attention_mask=None,
            document_lengths=lengths,
        )
        found: torch.Tensor = self.norm(hidden)[0]
        return found


def shifted(targets_T: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Targets one token further on within each sequence; -100 at its end."""
    ends_S = torch.tensor(lengths, device=targets_T.device).cumsum(0) - 1
    found_T = targets_T.roll(-1)
    found_T[ends_S] = IGNORE
    return found_T
