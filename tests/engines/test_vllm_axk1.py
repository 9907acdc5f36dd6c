"""A tiny random model of the A.X K1 architecture behind a real vLLM server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from against_local import K, assert_labels_are_local, windows, without_weights
from tiny_axk1 import tiny_axk1
from vllm_server import RIGHT_ROTARY, VllmServer

from seodang.causal_lm import CausalLM
from seodang.errors import WorkFailed
from seodang.teacher.served import ServedTeacher


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
