"""The plan's memory against what real models hold: sharded states, and activations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seodang.foundation.model_config import ModelConfig, hf_config
from seodang.foundation.planning.activations import checkpoint_bytes, layer_bytes
from seodang.foundation.planning.layout import PUBLISHED, Layout, pipeline_stages
from seodang.foundation.planning.memory import (
    FSDP2,
    MEGATRON,
    device_memory,
    held_parameters,
    stage_memory,
)
from seodang.foundation.planning.parameters import mtp_layer, total_parameters


def preset(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"preset": name, **changes})


NANO = preset("laptop-nano", layers=3, vocabulary=2048)

# Two steps, so that the optimizer has its states and gradients are there.
TWO_PROCESSES = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AXK1ForCausalLM
from seodang.foundation.model_config import ModelConfig, hf_config

config = ModelConfig.model_validate(json.loads(sys.argv[1]))
dist.init_process_group("gloo")
torch.manual_seed(0)
model = AXK1ForCausalLM(hf_config(config, config.vocabulary))
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for part in (*model.model.layers, model):
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.randint(0, config.vocabulary, (1, 32))
for _ in range(2):
    optimizer.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()

def held(tensor):
    local = tensor.to_local()
    return local.numel() * local.element_size()

moments = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
found = {
    "weights": sum(held(p) for p in model.parameters()),
    "gradients": sum(held(p.grad) for p in model.parameters()),
    "optimizer": sum(held(value) for value in moments),
}
with open(f"{sys.argv[2]}/{dist.get_rank()}.json", "w") as file:
    json.dump(found, file)
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def test_two_sharded_processes_hold_what_is_planned(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", script, json.dumps(NANO.model_dump()), tmp_path),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    measured = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    planned = device_memory(NANO, Layout(dp=2), 32, FSDP2, recompute=False)
    total = total_parameters(NANO)
    for what, each in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
        assert sum(process[what] for process in measured) == each * total
        # Rows of odd matrices are not shared out evenly.
        assert max(process[what] for process in measured) == pytest.approx(
            getattr(planned, what), rel=0.01
        )


def kept_bytes(config: ModelConfig, sequence: int, dtype: torch.dtype) -> int:
    """Bytes of all storages that a forward pass and its loss keep for the backward pass."""
    from transformers import AXK1ForCausalLM

    torch.manual_seed(0)
    model: Any = AXK1ForCausalLM(hf_config(config, config.vocabulary))
    model.to(dtype).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # tensors are held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept.setdefault(address, tensor)
        return tensor

    ids = torch.randint(0, config.vocabulary, (2, sequence))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "sequence"),
    [
        (NANO, 64),
        (preset("laptop-nano", layers=4, dense_layers=4, vocabulary=512), 32),
        (preset("laptop-nano", layers=5, vocabulary=512, experts_per_token=9, heads=7), 96),
    ],
)
def test_forward_pass_keeps_what_is_planned(
    config: ModelConfig, sequence: int, dtype: torch.dtype
) -> None:
    size = dtype.itemsize
    planned = sum(
        layer_bytes(config, kind, size, "transformers")
        for kind in pipeline_stages(config, Layout())[0]
    )
    # On a CPU attention keeps its matrix, in float32, and copies of what it multiplied.
    c = config
    matrix = 4 * (sequence + 2 * c.qk_head_dim + c.v_head_dim)
    kernel = size * (2 * c.qk_head_dim + c.qk_nope_head_dim + c.v_head_dim) + 4
    planned += c.layers * c.heads * (matrix - kernel)
    assert kept_bytes(config, sequence, dtype) == pytest.approx(2 * sequence * planned, rel=0.02)


def test_fused_kernels_keep_less() -> None:
    for kind in ("dense", "sparse", "mtp", "head"):
        fused = layer_bytes(NANO, kind, 2, "fused")
        assert checkpoint_bytes(NANO, 2) < fused < layer_bytes(NANO, kind, 2, "transformers")


@settings(max_examples=40, deadline=None)
@given(
    pp=st.integers(1, 8),
    ep=st.sampled_from([1, 2, 4, 8]),
    cp=st.sampled_from([1, 2]),
    dp=st.sampled_from([4, 8]),
    mtp_layers=st.integers(0, 2),
)
def test_devices_of_a_replica_hold_the_model_once(
    pp: int, ep: int, cp: int, dp: int, mtp_layers: int
) -> None:
    """All experts of ``ep`` devices and the common part of one, summed over the stages."""
    config = preset("1b", mtp_layers=mtp_layers)
    layout = Layout(pp=pp, ep=ep, cp=cp, dp=dp)
    stages = [
        [held_parameters(config, kind, layout) for kind in kinds]
        for kinds in pipeline_stages(config, layout)
    ]
    held = sum(part.common + ep * part.experts for stage in stages for part in stage)
    assert held == total_parameters(config) + mtp_layers * mtp_layer(config).total


def test_sharding_leaves_the_sum_as_it_is() -> None:
    config = preset("30b")
    layout = Layout(ep=8, dp=64)
    native = device_memory(config, layout, 4096, FSDP2, recompute=False)
    total = total_parameters(config)
    assert native.weights * 64 == pytest.approx(4 * total)
    assert native.optimizer * 64 == pytest.approx(8 * total)
    whole = device_memory(config, layout, 4096, MEGATRON, recompute=False)
    experts = whole.parameters - (total - _experts(config))
    assert experts == _experts(config) // 8
    assert whole.weights == 2 * whole.parameters
    assert whole.gradients == 4 * whole.parameters
    assert whole.optimizer * 64 == pytest.approx(12 * total)


def test_only_what_others_hold_a_part_of_is_gathered() -> None:
    config = preset("30b")
    gathered = {
        layout: stage_memory(config, layout, 4096, FSDP2)[0].gathered
        for layout in (Layout(), Layout(ep=64, dp=64), Layout(dp=64))
    }
    alone, spread, whole = gathered.values()
    dense, sparse = (held_parameters(config, kind, Layout()) for kind in ("dense", "sparse"))
    ends = 2 * config.vocabulary * config.hidden_size + config.hidden_size
    assert alone == 0
    # The vocabulary and two layers; the gradient of the vocabulary is larger than that of a layer.
    assert spread == 4 * (ends + 2 * dense.common) + 4 * ends
    layer = sparse.common + sparse.experts
    assert whole == 4 * (ends + 2 * layer) + 4 * layer


def _experts(config: ModelConfig) -> int:
    each = 3 * config.hidden_size * config.expert_intermediate_size
    return config.moe_layers * config.experts * each


def test_tied_embedding_is_on_both_ends_of_a_pipeline() -> None:
    config = preset("laptop-nano")
    vocabulary = config.vocabulary * config.hidden_size
    one = stage_memory(config, Layout(), 512, MEGATRON)
    two = stage_memory(config, Layout(pp=2), 512, MEGATRON)
    assert sum(stage.parameters for stage in two) == one[0].parameters + vocabulary


def test_tensor_and_context_parallelism_share_out_activations() -> None:
    config = preset("a.x-k1")
    one = stage_memory(config, Layout(pp=16, ep=8, dp=64), 8192, MEGATRON)[0]
    for layout in (PUBLISHED, Layout(tp=4, pp=16, ep=8, dp=16)):
        shared = stage_memory(config, layout, 8192, MEGATRON)[0]
        assert shared.activations * 4 == pytest.approx(one.activations)
        assert shared.recomputed * 4 == pytest.approx(one.recomputed)


def test_earlier_stages_of_a_pipeline_wait_with_more_micro_batches() -> None:
    config = preset("30b")  # of equal layers but the first
    stages = stage_memory(config, Layout(pp=8, dp=8), 4096, MEGATRON)
    inner = [stage.activations for stage in stages[1:-1]]
    assert inner == pytest.approx([inner[-1] / 2 * waiting for waiting in range(7, 1, -1)])


def test_published_layout_fits_its_devices() -> None:
    config = preset("a.x-k1")
    assert device_memory(config, PUBLISHED, 4096, MEGATRON, recompute=False).total < 141e9
    assert device_memory(config, Layout(), 4096, MEGATRON, recompute=False).total > 100 * 141e9 / 2
