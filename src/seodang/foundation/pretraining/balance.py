"""Keeping the routed experts equally busy, and measuring whether they are.

**Router bias**, auxiliary-loss-free (Wang et al., arXiv 2408.15664, algorithm 1): a bias per expert
is added to the scores by which experts are chosen, never to the weights by which their outputs are
added up. After every step the bias of an expert that had more than the mean load goes down by
``rate``, that of the others up.

The released A.X K1 has no such bias. It cannot be folded into the router's weights exactly, which
are linear in the token; so it is *annealed*: from ``fold_from`` to ``fold_until`` of the steps it
goes linearly to zero while a balance loss takes over, and the rest of the training runs without.
What is released is what was trained at the end, and the load that the log shows over the last steps
is the load of the released model. Like the bias, that loss looks at all tokens of a forward pass
together: asking for equal loads in every sequence keeps experts from a language or subject of their
own (Qiu et al., arXiv 2501.11873).

**Sequence-wise loss** alone (DeepSeek-V3, arXiv 2412.19437, eq. 17-20) is the other method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from seodang.foundation.pretraining.config import BalancingConfig
from seodang.training.parallel import Processes

LATE = 0.1  # share of the steps that the summary is about


class Balance(torch.nn.Module):
    """Watches every router of ``module``, and moves their biases.

    ``steps`` is the length of the training. Call :meth:`begin` before each forward pass and
    :meth:`count` after it; :meth:`after_step` is the loop's hook. The number of steps ``done`` and
    the loads of the last tenth of them, ``late_loads``, are buffers, so that checkpoints keep them.
    """

    done: torch.Tensor
    late_loads: torch.Tensor

    def __init__(
        self, module: torch.nn.Module, config: BalancingConfig, steps: int, processes: Processes
    ) -> None:
        from transformers.models.axk1.modeling_axk1 import AXK1TopkRouter

        super().__init__()
        self.config = config
        self.steps = steps
        self.processes = processes
        self.register_buffer("done", torch.zeros(1, dtype=torch.int64))
        self.routers: list[Any] = [m for m in module.modules() if isinstance(m, AXK1TopkRouter)]
        experts = self.routers[0].num_experts if self.routers else 0
        none_LE = torch.zeros(len(self.routers), experts, dtype=torch.int64)
        self.register_buffer("late_loads", none_LE)
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._found_LE: torch.Tensor | None = None
        for router in self.routers:
            router.register_forward_hook(self._see)

    def _see(self, router: Any, inputs: Any, output: Any) -> None:
        logits_TE, _, chosen_TK = output
        self._seen.append((logits_TE, chosen_TK))

    @property
    def bias_left(self) -> float:
        """How much of the bias is left after the steps done: 1, then falling linearly to 0."""
        begin, end = self.config.fold_from * self.steps, self.config.fold_until * self.steps
        return min(1.0, max(0.0, (end - int(self.done)) / (end - begin)))

    @property
    def loss_weight(self) -> float:
        """Weight of the balance loss in the step that comes."""
        config = self.config
        if config.method == "none":
            return 0.0
        left = self.bias_left if config.method == "bias" else 0.0
        return left * config.weight + (1 - left) * config.fold_weight

    def begin(self) -> None:
        """Forget what earlier forward passes showed."""
        self._seen.clear()

    def count(self, lengths: Sequence[int]) -> torch.Tensor:
        """Count the tokens of each expert in this pass; gives the balance loss.

        ``lengths`` of the sequences that stand end to end. The loss, summed over layers, counts
        each sequence as often as it has tokens, so that it is a sum over tokens like the others.
        """
        together = lengths if self.config.method == "sequence" else [sum(lengths)]
        found, losses = [], []
        for logits_TE, chosen_TK in self._seen:
            chosen_TE = torch.zeros_like(logits_TE).scatter_(1, chosen_TK, 1.0)
            losses.append(balance_loss(logits_TE, chosen_TE, together))
            entropy = score_entropy(logits_TE)
            found.append(torch.cat([chosen_TE.detach().sum(0), entropy[None]]).double())
        found_LE = torch.stack(found)
        self._found_LE = found_LE if self._found_LE is None else self._found_LE + found_LE
        self._seen.clear()
        return torch.stack(losses).sum()

    def after_step(self, step: int) -> dict[str, float]:
        """Move the biases by the loads of a step; gives load figures for the log.

        ``load_max/i``: load of the busiest expert of MoE layer i over the mean; ``load_entropy/i``:
        entropy of the loads over that of equal ones; ``router_entropy/i``: mean entropy of a
        token's normalised scores over its largest value; ``dead/i``: experts without a token.
        """
        before = self.bias_left
        self.done.fill_(step)
        if self._found_LE is None:
            return {}
        values = self.processes.add(self._found_LE.flatten().tolist())
        found_LE = torch.tensor(values, dtype=torch.float64).view_as(self._found_LE.cpu())
        self._found_LE = None
        loads_LE, entropy_L = found_LE[:, :-1], found_LE[:, -1]
        if step > (1 - LATE) * self.steps:
            self.late_loads += loads_LE.to(self.late_loads)
        if self.config.method == "bias":
            self._move(loads_LE, before)
        figures: dict[str, float] = {}
        experts = loads_LE.shape[1]
        for layer, load_E in enumerate(loads_LE):
            share_E = load_E / load_E.sum()
            tokens = float(load_E.sum()) / self.routers[layer].top_k
            load_entropy = float(-torch.xlogy(share_E, share_E).sum()) / math.log(experts)
            figures[f"load_max/{layer + 1}"] = float(share_E.max() * experts)
            figures[f"load_entropy/{layer + 1}"] = load_entropy
            figures[f"router_entropy/{layer + 1}"] = float(entropy_L[layer]) / tokens
            figures[f"dead/{layer + 1}"] = float((load_E == 0).sum())
        return figures

    def late_summary(self) -> dict[str, float]:
        """Loads added up over the last tenth of the steps; empty without routed experts.

        ``load_max``: of the busiest expert over the mean of its layer, in the worst layer;
        ``dead``: experts of all layers without a token.
        """
        if not self.routers:
            return {}
        loads_LE = self.late_loads.double().cpu()
        worst = (loads_LE.max(1).values / loads_LE.mean(1)).max()
        return {"load_max": float(worst), "dead": int((loads_LE == 0).sum())}

    @torch.no_grad()
    def _move(self, loads_LE: torch.Tensor, left_before: float) -> None:
        left = self.bias_left
        for router, load_E in zip(self.routers, loads_LE, strict=True):
            bias_E = router.e_score_correction_bias
            if left < 1.0:
                bias_E *= left / left_before if left else 0.0
            else:
                bias_E += self.config.rate * (load_E.mean() - load_E).sign().to(bias_E)


def balance_loss(
    logits_TE: torch.Tensor, chosen_TE: torch.Tensor, lengths: Sequence[int]
) -> torch.Tensor:
    """Balance loss of one layer, without its factor; DeepSeek-V3, eq. 17-20.

    Per sequence: sum over experts of f_i P_i, where f_i is the share of the sequence's tokens that
    chose expert i over the share under equal load, and P_i the mean of its normalised scores.
    ``logits_TE`` (tokens, experts) before the sigmoid, ``chosen_TE`` ones and zeros. Gives the sum
    over sequences of loss times length; 1 per token if the load is equal.
    """
    scores_TE = logits_TE.sigmoid()
    scores_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    experts = logits_TE.shape[1]
    length_S = torch.tensor(lengths, device=logits_TE.device)
    owner_T = torch.repeat_interleave(length_S, output_size=len(logits_TE))
    zeros_SE = scores_TE.new_zeros(len(lengths), experts)
    load_SE = zeros_SE.index_add(0, owner_T, chosen_TE)
    score_SE = zeros_SE.index_add(0, owner_T, scores_TE)
    frequency_SE = load_SE * (experts / load_SE.sum(1, keepdim=True))
    return (frequency_SE * score_SE).sum()


def score_entropy(logits_TE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the entropy of their normalised scores, over its largest value."""
    scores_TE = logits_TE.detach().sigmoid()
    share_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    entropy_T = -torch.xlogy(share_TE, share_TE).sum(1)
    return entropy_T.sum() / math.log(logits_TE.shape[1])
