"""What is written for torchtitan, and what torchtitan's own parser and model make of it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from seodang.cli_foundation import foundation_app
from seodang.foundation.model_config import ModelConfig, hf_config
from seodang.foundation.planning.export import (
    TORCHTITAN,
    choose_batch,
    module_names,
    write_torchtitan,
)
from seodang.foundation.planning.layout import PUBLISHED, Layout
from seodang.foundation.planning.parameters import mtp_layer, total_parameters

# A directory of its own (`make torchtitan`), as it pins versions that nothing else here wants.
PACKAGES = Path(__file__).parents[1] / ".torchtitan"
needs_torchtitan = pytest.mark.skipif(
    not (PACKAGES / "torchtitan").is_dir() and importlib.util.find_spec("torchtitan") is None,
    reason=f"needs torchtitan {TORCHTITAN} (make torchtitan)",
)


def preset(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"preset": name, **changes})


def read_by_torchtitan(directory: Path, *arguments: str | Path) -> dict[str, Any]:
    paths = [str(PACKAGES), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("torchtitan_reads.py"), directory, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@needs_torchtitan
def test_published_model_and_layout_are_read_by_the_librarys_parser(tmp_path: Path) -> None:
    config = preset("a.x-k1")
    chosen = write_torchtitan(config, PUBLISHED, 4096, 9.26e12, tmp_path)
    found = read_by_torchtitan(tmp_path, "parse")
    assert found["parameters"] == total_parameters(config) == 518_983_052_288
    assert found["layout"] == {"tp": 1, "pp": 16, "ep": 8, "cp": 4, "dp": 16}
    assert found["steps"] == chosen["steps"]
    assert len(found["stages"]) == 16
    held = {name for stage in found["stages"] for name in stage}
    assert all(
        any(name == part or name.startswith(f"{part}.") for part in held)
        for name in found["modules"]
    )
    # On a machine without such a device the library refuses FP8 for that reason alone.
    assert found["fp8"] == "read" or "only supported on NVIDIA SM89" in found["fp8"]


@needs_torchtitan
def test_prediction_layers_are_exported_where_torchtitan_has_them(tmp_path: Path) -> None:
    config = preset("1b", mtp_layers=1)
    write_torchtitan(config, Layout(ep=8, dp=8), 4096, 1e10, tmp_path)
    found = read_by_torchtitan(tmp_path, "parse")
    assert found["parameters"] == total_parameters(config) + mtp_layer(config).total
    assert "mtp_layers.0.moe_norm.weight" in found["modules"]


@needs_torchtitan
def test_torchtitan_computes_what_transformers_computes(tmp_path: Path) -> None:
    """The same weights, read by the exported adapter, give the same distributions.

    torchtitan computes experts in bfloat16, always: 0.001 nats is that, and a layer norm left out
    or a rotary embedding of another layout would be tenths.
    """
    from transformers import AXK1ForCausalLM

    config = preset("laptop-nano", tied_embeddings=False, vocabulary=512, layers=3)
    write_torchtitan(config, Layout(), 64, 1e6, tmp_path)
    torch.manual_seed(0)
    model = AXK1ForCausalLM(hf_config(config, 512)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # norms that do something, logits that differ
            weight.mul_(3) if weight.ndim > 1 else weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "model")
    read_by_torchtitan(tmp_path, "logits", tmp_path / "model", "64")
    theirs = torch.load(tmp_path / "model" / "log_probs.pt", weights_only=True)
    with torch.no_grad():
        ours = model(torch.arange(64)[None]).logits[0].log_softmax(-1)
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    assert divergence.median() < 1e-3
    assert divergence.mean() < 1e-2  # a token whose experts are a tie may go elsewhere
    entropy = -(ours.exp() * ours).sum(-1).mean()
    assert entropy < torch.tensor(512.0).log() - 0.1  # the distributions are not flat


@pytest.mark.parametrize("pp", [1, 3, 16])
def test_stages_name_every_module_once(pp: int) -> None:
    config = preset("a.x-k1", mtp_layers=0)
    names = [name for stage in module_names(config, Layout(pp=pp)) for name in stage]
    expected = ["tok_embeddings", *(f"layers.{i}" for i in range(61)), "norm", "lm_head"]
    assert names == expected


@given(
    pp=st.integers(1, 16),
    dp=st.integers(1, 64),
    tokens=st.floats(1e6, 1e13),
    flops=st.floats(1e15, 1e25),
)
def test_steps_cover_the_tokens_with_whole_shares(
    pp: int, dp: int, tokens: float, flops: float
) -> None:
    batch = choose_batch(Layout(pp=pp, dp=dp), 4096, tokens, flops)
    assert batch.total % (batch.local * dp) == 0
    assert batch.local >= pp
    assert (batch.steps - 1) * batch.total * 4096 < tokens <= batch.steps * batch.total * 4096


def test_command_writes_files_that_say_how_they_are_started(tmp_path: Path) -> None:
    arguments = ["export", "--preset", "a.x-k1", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(foundation_app, arguments)
    assert done.exit_code == 0, done.output
    chosen = json.loads(done.stdout)
    assert chosen["engine"] == f"torchtitan {TORCHTITAN}"
    assert chosen["devices"] == 1024
    assert chosen["multi_token_prediction"] == 0  # torchtitan has none in a pipeline
    compile((tmp_path / "axk1.py").read_text(), "axk1.py", "exec")
    for name in ("launch.sh", "launch.sbatch"):
        text = (tmp_path / name).read_text()
        assert "--nnodes 128 --nproc-per-node 8" in text
        assert subprocess.run(["sh", "-n", tmp_path / name], check=False).returncode == 0
    again = (tmp_path / "axk1.py").read_bytes()
    CliRunner().invoke(foundation_app, arguments)
    assert (tmp_path / "axk1.py").read_bytes() == again


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--preset", "laptop-nano"], "set `tied_embeddings` to false"),
        (["--preset", "1b", "--layout", "ep=5", "--devices", "5"], "must divide the routed"),
        (["--preset", "1b", "--devices", "12"], "whole nodes of 8"),
        (["--preset", "a.x-k1", "--sequence", "65536"], "only 32,768 positions"),
        ([], "name a recipe or one --preset"),
    ],
)
def test_command_refuses_what_cannot_be_exported(
    tmp_path: Path, arguments: list[str], problem: str
) -> None:
    done = CliRunner().invoke(foundation_app, ["export", *arguments, "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert problem in done.output
    assert not (tmp_path / "x").exists()
