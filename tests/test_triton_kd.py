"""The GPU's pass against the definition: on a GPU, or else interpreted, and compiled for one."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from dense_divergences import Problem, compare, problems
from seodang.student import triton_kd
from seodang.student.divergences import sparse_divergence_terms
from seodang.student.losses import sparse_kd_terms

pytest.importorskip("triton")
KINDS = ["cross-entropy", "residual", "reverse-kl", "jsd"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


def total(problem, kind):
    """The loss of the problem's labels, computed where the kernel runs."""

    def loss(hidden, head, bias):
        labels = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for name, value in problem.labels().items()
        }
        labels["bias"] = None if bias is None else bias.to(DEVICE)
        hidden, head = hidden.to(DEVICE), head.to(DEVICE)
        assert not len(hidden) or triton_kd.fits(hidden, labels["ids"])
        if kind in ("reverse-kl", "jsd"):
            found = sparse_divergence_terms(hidden, head, **labels, divergence=kind)
        else:
            found = sparse_kd_terms(hidden, head, **labels, residual=kind == "residual")
        return found.total.cpu()

    return loss


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_matches_the_definition(kind):
    @settings(deadline=None, max_examples=10)
    @given(problem=problems(partition=kind != "cross-entropy"))
    def check(problem):
        problem.weights = problem.weights.float()  # as a store has them
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_kd, "CHUNK_BYTES", 4 * 4 * len(problem.head))
            compare(problem, kind, total(problem, kind), torch.float32, 3e-5)

    check()


@runs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_in_bfloat16(kind):
    """Against the definition on the same rounded numbers, at the size of bfloat16's rounding."""
    g = torch.Generator().manual_seed(0)
    n, v, k = 20, 700, 6
    problem = Problem(
        hidden=torch.randn(n, 8, generator=g).bfloat16().double(),
        head=torch.randn(v, 8, generator=g).bfloat16().double(),
        offsets=torch.arange(0, n * k + 1, k),
        ids=torch.rand(n, v, generator=g).topk(k).indices.reshape(-1),
        weights=torch.rand(n * k, generator=g) / k,
        cross_entropy_targets=torch.randint(0, v, (n,), generator=g),
        bias=None,
        cross_entropy_weight=0.3,
        reduction="mean",
    )
    compare(problem, kind, total(problem, kind), torch.bfloat16, 2e-3)


def test_kernel_in_the_interpreter():
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "kernel"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_targets", [False, True])
def test_compiles_for_an_h100_without_one(kind, has_targets):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from seodang.student.kd_kernel import loss_and_gradient

    constants = {"KIND": kind, "HAS_TARGETS": has_targets, "KEEP": True}
    constants |= {"BLOCK_V": 4096, "BLOCK_E": 64}
    types = ["*bf16", "*i64", "*i64", "*fp32", "*fp32", "*i64", "*fp32", "i32", "fp32", "fp32"]
    signature = dict(zip(loss_and_gradient.arg_names, types, strict=False))
    source = ASTSource(
        loss_and_gradient, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert "ptx" in compiled.asm
