"""A tiny random model of the A.X K1 architecture behind a real vLLM server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from against_local import K, assert_labels_are_local, windows, without_weights
from tiny_axk1 import tiny_axk1
from transformers import AXK1ForCausalLM
from vllm_server import RIGHT_ROTARY, VllmServer

from seodang.causal_lm import CausalLM
from seodang.errors import WorkFailed
from seodang.foundation.model_config import ModelConfig, hf_config
from seodang.foundation.vllm_checkpoint import add_what_vllm_reads
from seodang.teacher.served import ServedTeacher
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_axk1(tmp_path_factory.mktemp("axk1") / "teacher")


def test_labels_are_those_of_the_local_weights(directory: Path, tmp_path: Path) -> None:
    with VllmServer(directory, tmp_path / "log", *RIGHT_ROTARY) as server:
        teacher = ServedTeacher.connect(server.address, "served", None)
        asked = windows(teacher, 8)
        found = teacher.check_parity(asked, K)
        assert found["route"] == "local weights"
        assert found["max_difference"] < 1e-3
        bare = without_weights(directory, tmp_path / "bare")
        found = ServedTeacher.connect(server.address, "served", bare).check_parity(asked, K)
        assert found["route"] == "decode"
        assert found["max_difference"] < 1e-3
        assert_labels_are_local(teacher, CausalLM.load(directory, torch.device("cpu")), asked)


def test_the_parity_check_finds_the_wrong_rotary_kernel(directory: Path, tmp_path: Path) -> None:
    """vLLM's own kernel shifts log-probabilities by nats, and the answers look healthy."""
    with VllmServer(directory, tmp_path / "log") as server:
        teacher = ServedTeacher.connect(server.address, "served", None)
        asked = windows(teacher, 8)
        assert len(list(teacher.top_log_probs(asked, K))) == 8
        with pytest.raises(WorkFailed, match=r"nats apart.*rotary_embedding"):
            teacher.check_parity(asked, K)
        bare = without_weights(directory, tmp_path / "bare")
        with pytest.raises(WorkFailed, match=r"its own decoding.*rotary_embedding"):
            ServedTeacher.connect(server.address, "served", bare).check_parity(asked, K)


def test_a_foundation_model_of_nano_shape_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied embeddings, and latents of a size that vLLM's own kernel for CPUs does not take."""
    tokenizer = tiny_tokenizer()
    nano = ModelConfig(preset="laptop-nano")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AXK1ForCausalLM(hf_config(nano, len(tokenizer)))
        for weight in model.parameters():
            weight.data.mul_(3.0)  # else a random teacher's distributions are almost uniform
    directory = tmp_path / "teacher"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    add_what_vllm_reads(directory, nano.dense_layers)
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    with VllmServer(directory, tmp_path / "log", *RIGHT_ROTARY) as server:
        teacher = ServedTeacher.connect(server.address, "served", None)
        asked = windows(teacher, 4)
        assert teacher.check_parity(asked, K)["max_difference"] < 1e-3
        assert_labels_are_local(teacher, CausalLM.load(directory, torch.device("cpu")), asked)
