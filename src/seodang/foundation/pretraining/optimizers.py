"""The optimizers of pretraining: AdamW, or Muon for hidden matrices and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch

from seodang.foundation.pretraining.config import PretrainingConfig

BETAS = (0.9, 0.95)  # of large language models since GPT-3 (arXiv 2005.14165, appendix B)
_NOT_HIDDEN = ("embed_tokens", "lm_head", "gate.weight")


def make_optimizers(
    module: torch.nn.Module, config: PretrainingConfig
) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters of ``module``.

    Muon (Jordan et al. 2024; scaled as in Liu et al., arXiv 2502.16982) takes the matrices between
    embedding and head; routers and the stacked matrices of experts stay with AdamW, as
    ``torch.optim.Muon`` takes two-dimensional parameters only. Norms have no weight decay.
    """
    muon: list[torch.nn.Parameter] = []
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in module.named_parameters():
        hidden = parameter.ndim == 2 and not any(part in name for part in _NOT_HIDDEN)
        if config.optimizer == "muon" and hidden:
            muon.append(parameter)
        else:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": plain, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=BETAS,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not muon:
        return [adamw]
    return [
        torch.optim.Muon(
            muon,
            lr=config.muon_learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        adamw,
    ]
