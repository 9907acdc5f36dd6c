"""The real teacher, SmolLM2-135M-Instruct, behind a real vLLM server."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from against_local import K, assert_labels_are_local, windows, without_weights
from vllm_server import VllmServer

from seodang.causal_lm import CausalLM, model_fingerprint
from seodang.errors import InputError
from seodang.softlabels import open as open_store
from seodang.teacher import parity
from seodang.teacher.served import ServedTeacher
from tiny import TEXT, tiny_tokenizer
from tiny_run import seodang


@pytest.fixture(scope="module")
def teacher(server: VllmServer) -> ServedTeacher:
    return ServedTeacher.connect(server.address, "served", None)


def test_what_is_connected_to(teacher: ServedTeacher, directory: Path) -> None:
    assert teacher.directory == directory  # the server says where its model lies
    assert (teacher.vocab_size, teacher.max_length) == (49_152, 254)
    assert teacher.fingerprint == model_fingerprint(directory)


def test_parity_with_the_local_weights(teacher: ServedTeacher) -> None:
    found = teacher.check_parity(windows(teacher, 6), K)
    assert found["route"] == "local weights"
    assert found["positions"] > 300
    assert found["max_difference"] < 1e-3


def test_parity_with_the_servers_own_decoding(
    server: VllmServer, directory: Path, tmp_path: Path
) -> None:
    bare = without_weights(directory, tmp_path / "bare")
    teacher = ServedTeacher.connect(server.address, "served", bare)
    found = teacher.check_parity(windows(teacher, 6), K)
    assert (found["route"], found["positions"]) == ("decode", 3 * parity.DECODED_TOKENS)
    assert found["max_difference"] < 1e-3


def test_more_than_the_server_allows(teacher: ServedTeacher) -> None:
    # Both windows are refused; which answer comes first is the server's affair.
    refused = r"document (longest|at-0): .*max allowed: 20.*--max-logprobs 21"
    with pytest.raises(InputError, match=refused):
        list(teacher.top_log_probs(windows(teacher, 2), 21))


def test_longer_than_the_server_allows(teacher: ServedTeacher) -> None:
    (longest, *_) = windows(replace(teacher, max_length=255), 2)
    with pytest.raises(InputError, match=r"document longest: 255 tokens .*--max-model-len 257"):
        list(teacher.top_log_probs([longest], K))
    with pytest.raises(InputError, match=r"document longest: .* answers 400: "):
        list(replace(teacher, max_length=999).top_log_probs([longest], K))


def test_another_tokenizer(server: VllmServer, directory: Path, tmp_path: Path) -> None:
    other = without_weights(directory, tmp_path / "other")
    tiny_tokenizer().save_pretrained(other)
    teacher = ServedTeacher.connect(server.address, "served", other)
    with pytest.raises(InputError, match="tokenizes differently"):
        teacher.check_parity(windows(teacher, 3), K)


def test_labels_survive_the_death_of_the_server(
    server: VllmServer, teacher: ServedTeacher, directory: Path
) -> None:
    """Killed with requests in flight and started again: every label is there, and right."""
    model = CausalLM.load(directory, torch.device("cpu"))
    asked = windows(teacher, 12)
    assert_labels_are_local(teacher, model, asked)
    results = teacher.top_log_probs(asked, K)
    done = [next(results)[0]]
    server.kill()
    again = threading.Thread(target=server.start)
    again.start()
    done += [index for index, _, _ in results]
    again.join()
    assert sorted(done) == list(range(12))
    assert_labels_are_local(teacher, model, asked[:4])


def test_capture_from_the_command_line(server: VllmServer, directory: Path, tmp_path: Path) -> None:
    """A store whose labels are those of the local weights, and that says how it was made."""
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "labels"
    corpus.write_text(json.dumps({"id": "doc", "text": TEXT[:600]}) + "\n")
    options = ["--teacher", server.address, "--model", "served", "--corpus", corpus, "--out", out]
    done = seodang("capture", *options, "--max-length", "100", "--layout", "small", "--json")
    assert done.returncode == 0, done.stderr
    assert "the store will hold `residual` labels" in done.stderr
    found = json.loads(done.stdout)
    assert (found["estimator"], found["parameters"]) == ("residual", {"k": 16})
    assert json.loads((out / "parity.json").read_bytes())["route"] == "local weights"
    assert seodang("labels", "verify", out).returncode == 0
    model, store = CausalLM.load(directory), open_store(out)
    for sequence in store:
        (hidden,) = model.hidden_states([sequence.token_ids])
        with torch.inference_mode():
            p = model.log_probs(hidden).exp()[torch.from_numpy(sequence.labelled).long()]
        best = torch.topk(p, 16).indices.numpy()
        stored = sequence.ids.reshape(-1, 16)
        same = [len(set(a) & set(b)) for a, b in zip(best.tolist(), stored.tolist(), strict=True)]
        assert np.mean(same) > 15.9
    again = seodang("capture", *options, "--max-length", "100", "--layout", "small", "--json")
    assert json.loads(again.stdout)["digest"] == found["digest"]
