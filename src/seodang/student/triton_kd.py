"""The pass of :mod:`seodang.student.one_pass` on a GPU: cuBLAS products and one Triton kernel.

Per chunk of rows: the logits by a product, then a kernel with one program per row that finds the
maximum and the sum online (Milakov and Gimelshein 2018, arXiv 1805.02867), computes the row's loss
and overwrites its logits with the gradient, then the two products of the gradient. Liger-Kernel
(arXiv 2410.10989) does so for cross-entropy. A row's entries are found by their offsets on the
device, so that nothing in the loop waits for the GPU. TRITON_INTERPRET=1 runs the same on the CPU.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from seodang.student.one_pass import Divergence, Gradients, Labels

CHUNK_BYTES = 512 * 2**20  # of one chunk of logits
MOST_ENTRIES = 2048  # a position on average: the kernel compares each entry with its whole row


def fits(hidden: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether these inputs are for the kernel: on a GPU with Triton there, few ids a position."""
    return (
        (hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
        and hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and len(ids) <= MOST_ENTRIES * len(hidden)
        and importlib.util.find_spec("triton") is not None
    )


def run(
    divergence: Divergence,
    hidden_NH: torch.Tensor,
    head_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels: Labels,
    scale: float,
    gradients: Gradients,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`seodang.student.one_pass.run`."""
    from seodang.student.kd_kernel import loss_and_gradient

    n, v = len(hidden_NH), len(head_VH)
    head = head_VH.to(hidden_NH.dtype)
    bias = None if bias_V is None else bias_V.to(hidden_NH.dtype)
    offsets, ids = labels.offsets.contiguous(), labels.ids.contiguous()
    weights = labels.weights.float().contiguous()
    scratch = torch.empty_like(weights)  # the logits of the entries
    values_N2 = torch.zeros(n, 2, device=hidden_NH.device)
    step = max(1, min(n, CHUNK_BYTES // (v * hidden_NH.itemsize)))
    keep = any(gradient is not None for gradient in gradients)
    targets = None if labels.targets is None else labels.targets.contiguous()
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        x_RH = hidden_NH[rows]
        logits_RV = torch.nn.functional.linear(x_RH, head, bias)
        loss_and_gradient[(len(x_RH),)](
            logits_RV,
            offsets[start:],
            ids,
            weights,
            scratch,
            offsets if targets is None else targets[rows],
            values_N2[rows],
            v,
            scale,
            labels.cross_entropy_weight,
            KIND=divergence.name,
            HAS_TARGETS=targets is not None,
            KEEP=keep,
            BLOCK_V=_block(v, 4096),
            BLOCK_E=64,
            num_warps=8,
        )
        if gradients.hidden is not None:
            torch.mm(logits_RV, head, out=gradients.hidden[rows])
        if gradients.head is not None:
            _add_product(gradients.head, logits_RV.T, x_RH)
        if gradients.bias is not None:
            gradients.bias.add_(logits_RV.sum(0, dtype=gradients.bias.dtype))
    distillation, cross_entropy = values_N2.double().sum(0)
    return distillation, cross_entropy


def _block(v: int, most: int) -> int:
    return min(most, 1 << max(4, (v - 1).bit_length()))


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``out += a @ b``, out in float32 also where a and b are shorter."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
