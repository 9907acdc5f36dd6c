"""The model that is pretrained, together with its losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from seodang.foundation.model_config import ModelConfig, hf_config
from seodang.foundation.pretraining.balance import Balance
from seodang.foundation.pretraining.batches import TokenBatch
from seodang.foundation.pretraining.mtp import MultiTokenPrediction, shifted
from seodang.student.losses import sparse_kd_terms
from seodang.training.attention import use_packed_attention
from seodang.training.experts import use_grouped_experts
from seodang.training.products import use_fast_products


class PretrainingSums(NamedTuple):
    """Sums over tokens, in nats, times a factor; ``total`` is differentiable.

    ``mtp_loss`` is the mean over the multi-token-prediction layers, ``balance_loss`` the
    routers' without its factor, summed over layers.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    mtp_loss: torch.Tensor
    balance_loss: torch.Tensor


class Pretraining(torch.nn.Module):
    """``AXK1ForCausalLM`` of ``transformers`` with its extra layers: maps a batch to loss terms."""

    def __init__(self, config: ModelConfig, vocabulary: int, mtp_weight: float) -> None:
        from transformers import AXK1ForCausalLM

        super().__init__()
        self.model = AXK1ForCausalLM(hf_config(config, vocabulary))
        self.mtp_weight = mtp_weight
        layers = config.mtp_layers if mtp_weight else 0
        self.mtp = torch.nn.ModuleList(
            MultiTokenPrediction(self.model.config) for _ in range(layers)
        )
        self.mtp.apply(self.model._init_weights)
        self.balance: Balance | None = None
        use_packed_attention(self.model)
        use_grouped_experts(self.model)
        use_fast_products(self)

    @property
    def layers(self) -> list[torch.nn.Module]:
        """Every decoder layer: what FSDP shards one by one."""
        return [*self.model.model.layers, *self.mtp]

    def forward(self, batch: TokenBatch, scale: float = 1.0) -> PretrainingSums:
        """Sums over the batch's tokens, times ``scale``."""
        if self.balance:
            self.balance.begin()
        model: Any = self.model
        state_TH = model.model(
            batch.ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            document_lengths=batch.lengths,
        ).last_hidden_state[0]
        cross_entropy = self._cross_entropy(state_TH, batch.targets, scale)
        mtp_loss = torch.zeros_like(cross_entropy)
        targets_T = batch.targets
        if len(self.mtp):
            rotary = model.model.rotary_emb(state_TH[None], batch.positions[None])
        for layer in self.mtp:
            embedding_TH = model.model.embed_tokens(targets_T.clamp(min=0))
            state_TH = layer(state_TH, embedding_TH, rotary, batch.lengths)
            targets_T = shifted(targets_T, batch.lengths)
            mtp_loss = mtp_loss + self._cross_entropy(state_TH, targets_T, scale) / len(self.mtp)
        total = cross_entropy + self.mtp_weight * mtp_loss if len(self.mtp) else cross_entropy
        balance_loss = torch.zeros_like(cross_entropy)
        if self.balance and self.balance.routers:
            balance_loss = self.balance.count(batch.lengths) * scale
            total = total + self.balance.loss_weight * balance_loss
        return PretrainingSums(total, cross_entropy, mtp_loss, balance_loss)

    def _cross_entropy(
        self, state_TH: torch.Tensor, targets_T: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Sum of the cross-entropies times ``scale``, without a matrix of all logits."""
        if torch.is_autocast_enabled(state_TH.device.type):
            state_TH = state_TH.to(torch.get_autocast_dtype(state_TH.device.type))
        none = targets_T.new_zeros(0)
        terms = sparse_kd_terms(
            state_TH,
            self.model.lm_head.weight,
            targets_T.new_zeros(len(targets_T) + 1),
            none,
            none.float(),
            cross_entropy_targets=targets_T,
            cross_entropy_weight=1.0,
            reduction="sum",
            scale=scale,
        )
        return terms.total
