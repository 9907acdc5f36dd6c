"""The served teacher against a small HTTP server that answers like vLLM, and then misbehaves.

The answers are those of a real tiny model; what is made up are the faults, which a healthy vLLM
cannot be made to show. The real engine: tests/engines.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seodang.causal_lm import CausalLM, model_fingerprint
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError, WorkFailed
from seodang.evaluation.comparison import Named
from seodang.evaluation.harness import HarnessModel
from seodang.machine import Memory
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels.capture import capture, capture_each
from seodang.teacher import parity, served
from seodang.teacher.prompt_logprobs import read_prompt_logprobs
from seodang.teacher.served import IN_FLIGHT, ServedTeacher
from tiny import TEXT, tiny_teacher, tiny_tokenizer

K = 5
CONTEXT = 64
Answer = dict[str, Any]


class Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 2 * IN_FLIGHT

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave, and connections that were cut, are part of the tests."""


class Vllm:
    """A server on a port of this machine; ``edit`` changes its answers to /completions.

    ``failures`` are statuses that the next requests get, ``hidden`` pages that it has not. With a
    ``key`` it answers nobody else.
    """

    def __init__(self, model: CausalLM, root: Path) -> None:
        self.model, self.root = model, root
        self.tokenizer: Any = model.tokenizer
        self.edit: Callable[[Answer], object] = lambda answer: None
        self.failures: list[int] = []
        self.hidden: set[str] = set()
        self.key: str | None = None
        self.requests: list[Answer] = []
        self.held = self.most_held = 0
        self.lock = threading.Lock()
        self.port = 0
        self.up()

    def up(self) -> None:
        """Listen, on the same port as before if there was one."""
        vllm = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(*vllm.reply(self.path, {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(*vllm.reply(self.path, body))

            def reply(self, status: int, content: Any) -> None:
                if vllm.key and self.headers["Authorization"] != f"Bearer {vllm.key}":
                    status, content = 401, {"error": "Unauthorized"}
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = Http(("127.0.0.1", self.port), Handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def down(self) -> None:
        """Cut every connection and refuse new ones."""
        self.http.shutdown()
        self.http.server_close()
        for connection in self.http.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def reply(self, path: str, body: Answer) -> tuple[int, Any]:
        if path in self.hidden:
            return 404, {"detail": "Not Found"}
        if path == "/v1/models":
            card = {"id": "tiny", "root": str(self.root), "max_model_len": CONTEXT}
            return 200, {"object": "list", "data": [card]}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return 200, {"count": len(ids), "max_model_len": CONTEXT, "tokens": ids}
        assert path == "/v1/completions"
        with self.lock:
            self.requests.append(body)
            if self.failures:
                return self.failures.pop(0), {"error": {"message": "synthetic trouble"}}
            self.held += 1
            self.most_held = max(self.most_held, self.held)
        try:
            return 200, self.complete(body)
        finally:
            with self.lock:
                self.held -= 1

    @torch.inference_mode()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        (hidden,) = self.model.hidden_states([np.array(ids, np.int32)])
        return self.model.log_probs(hidden)

    def complete(self, body: Answer) -> Answer:
        """Greedy generation, and vLLM's two kinds of log-probabilities."""
        prompt, tokens, steps = body["prompt"], [], []
        assert len(prompt) + body["max_tokens"] <= CONTEXT
        for _ in range(body["max_tokens"]):
            steps.append(self.log_probs(prompt + tokens)[-1])
            tokens.append(int(steps[-1].argmax()))
        choice: Answer = {"index": 0, "token_ids": tokens, "prompt_token_ids": prompt}
        if (k := body.get("prompt_logprobs")) is not None:
            rows = self.log_probs(prompt)[:-1]
            after = zip(prompt[1:], rows, strict=True)
            choice["prompt_logprobs"] = [None, *(entries(row, k, t) for t, row in after)]
        if (k := body.get("logprobs")) is not None:
            named = [
                {f"token_id:{t}": e["logprob"] for t, e in entries(row, k, token).items()}
                for token, row in zip(tokens, steps, strict=True)
            ]
            names = [f"token_id:{token}" for token in tokens]
            choice["logprobs"] = {"tokens": names, "top_logprobs": named}
        answer = {"object": "text_completion", "model": "tiny", "choices": [choice]}
        self.edit(answer)
        return answer


def entries(log_probs: torch.Tensor, k: int, observed: int, equal: bool = True) -> Answer:
    """One position of ``prompt_logprobs``: the observed token first, then ranks 1 to k.

    Whether tokens as probable as the observed one push its rank down differs among vLLM's versions.
    """
    best = torch.topk(log_probs, k)
    more = log_probs > log_probs[observed]
    rank = int((log_probs >= log_probs[observed] if equal else more).sum()) + (not equal)
    found = {str(observed): {"logprob": float(log_probs[observed]), "rank": rank}}
    for r, (p, token) in enumerate(zip(best.values, best.indices, strict=True), 1):
        found[str(int(token))] = {"logprob": float(p), "rank": r}
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("served") / "teacher", layers=2)


@pytest.fixture(scope="module")
def model(directory: Path) -> CausalLM:
    return CausalLM.load(directory, torch.device("cpu"))


@pytest.fixture
def vllm(model: CausalLM, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("seodang.teacher.server.LONGEST_WAIT", 0.1)
    server = Vllm(model, directory)
    yield server
    server.down()


@pytest.fixture
def teacher(vllm: Vllm) -> ServedTeacher:
    return replace(ServedTeacher.connect(vllm.address, "tiny", None), patience=30)


def sequences(number: int = 3) -> list[TokenSequence]:
    """Windows of the tests' text, not all positions labelled."""
    ids = np.resize(np.array(tiny_tokenizer()(TEXT)["input_ids"], np.int32), 50 + 11 * number)
    return [
        TokenSequence(
            f"doc-{i}", ids[11 * i : 11 * i + 30 + i % 7], np.arange(i % 4, 30, dtype=np.int32)
        )
        for i in range(number)
    ]


# What a healthy server gives


def test_every_label_is_the_local_models(
    teacher: ServedTeacher, vllm: Vllm, model: CausalLM
) -> None:
    asked = sequences(2 * IN_FLIGHT)
    vllm.edit = lambda answer: time.sleep(0.05)  # so that requests meet each other
    last = asked[3]
    asked[3] = TokenSequence("to-the-end", last.token_ids, np.arange(len(last.token_ids)))
    found = {index: (ids, p) for index, ids, p in teacher.top_log_probs(asked, K)}
    assert sorted(found) == list(range(len(asked)))
    for index, (ids, log_probs) in found.items():
        assert ids.dtype == np.int32
        assert log_probs.dtype == np.float32
        rows = vllm.log_probs(asked[index].token_ids.tolist())[asked[index].labelled]
        best = torch.topk(rows, K)
        np.testing.assert_array_equal(ids, best.indices)
        np.testing.assert_allclose(log_probs, best.values, atol=1e-5)
    assert 1 < vllm.most_held <= IN_FLIGHT


def test_the_whole_vocabulary_may_be_asked_for(teacher: ServedTeacher) -> None:
    ((_, ids, log_probs),) = teacher.top_log_probs(sequences(1), teacher.vocab_size)
    assert (np.sort(ids, 1) == np.arange(teacher.vocab_size)).all()
    np.testing.assert_allclose(np.exp(log_probs.astype(float)).sum(1), 1, atol=1e-5)


def test_stores_of_one_pass_are_those_of_their_own_captures(
    teacher: ServedTeacher, vllm: Vllm, tmp_path: Path
) -> None:
    configs = {
        "few": SoftLabelsConfig(estimator="residual", k=3),
        "many": SoftLabelsConfig(estimator="top-k", k=9),
    }
    items = sequences()
    for name, config in configs.items():
        capture(teacher, items, config, tmp_path / "alone" / name)
    vllm.requests.clear()
    stores = {tmp_path / "one pass" / name: config for name, config in configs.items()}
    capture_each(teacher, items, stores)
    assert {request.get("prompt_logprobs", 9) for request in vllm.requests} == {9}
    for path in stores:
        for file in path.glob("*.parquet"):
            assert file.read_bytes() == (tmp_path / "alone" / path.name / file.name).read_bytes()


def test_a_reader_that_stops_early_leaves_a_usable_teacher(teacher: ServedTeacher) -> None:
    results = teacher.top_log_probs(sequences(2 * IN_FLIGHT), K)
    next(results)
    results.close()
    assert len(list(teacher.top_log_probs(sequences(2), K))) == 2


def test_the_longest_sequence_fits(teacher: ServedTeacher) -> None:
    ids = np.resize(sequences(1)[0].token_ids, teacher.max_length)
    whole = TokenSequence("long", ids, np.arange(len(ids)))
    ((_, found, _),) = teacher.top_log_probs([whole], K)
    assert len(found) == teacher.max_length == CONTEXT - 2


@given(st.data())
def test_the_k_best_are_read_whatever_was_observed(data: st.DataObject) -> None:
    """Also where values are equal: the observed token's rank then counts all of them, or none."""
    vocab = data.draw(st.integers(2, 12))
    k = data.draw(st.integers(1, vocab))
    length = data.draw(st.integers(1, 6))
    logits = data.draw(
        st.lists(st.lists(st.integers(-3, 3), min_size=vocab, max_size=vocab), min_size=length)
    )[:length]
    rows = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    sent = data.draw(st.lists(st.integers(0, vocab - 1), min_size=length + 1, max_size=length + 1))
    after = zip(sent[1:], rows, strict=True)
    counted = data.draw(st.booleans())
    scored = [entries(row, k, token, counted) for token, row in after]
    choice = {"prompt_logprobs": [None, *scored]}
    ids, log_probs = read_prompt_logprobs(choice, sent, np.arange(length, dtype="i4"), k, vocab)
    np.testing.assert_allclose(log_probs, torch.topk(rows, k).values, rtol=1e-6)
    np.testing.assert_allclose(log_probs, rows.gather(1, torch.tensor(ids).long()), rtol=1e-6)
    assert all(len(set(row)) == k for row in ids.tolist())


# Answers that cannot be labels


def prompt_rows(answer: Answer) -> list[Any]:
    rows = answer["choices"][0].get("prompt_logprobs", [])
    assert isinstance(rows, list)
    return rows


def cap(answer: Answer) -> None:
    """Give three entries and the observed token, as a server limited to three might."""
    for row in prompt_rows(answer)[1:]:
        for token in [t for i, (t, e) in enumerate(row.items()) if i and e["rank"] > 3]:
            del row[token]


def truncate(answer: Answer) -> None:
    del prompt_rows(answer)[-4:]


def truncate_tokens(answer: Answer) -> None:
    choice = answer["choices"][0]
    choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]


def nothing(answer: Answer) -> None:
    answer["choices"][0]["prompt_logprobs"] = None


def empty_position(answer: Answer) -> None:
    prompt_rows(answer)[7].clear()


def swap_ranks(answer: Answer) -> None:
    best = {e["rank"]: e for e in prompt_rows(answer)[7].values()}
    best[1]["rank"], best[3]["rank"] = 3, 1


def repeat_rank(answer: Answer) -> None:
    best = {e["rank"]: e for e in prompt_rows(answer)[7].values()}
    best[3]["rank"] = 2


def shift_back(answer: Answer) -> None:
    """Row i for the token after i, as an engine that is off by one gives it."""
    rows = prompt_rows(answer)
    rows[:] = [*rows[1:], None]


def shift_forth(answer: Answer) -> None:
    rows = prompt_rows(answer)
    rows[:] = [None, *rows[:-1]]


def other_observed(answer: Answer) -> None:
    """Two neighbouring positions swapped."""
    rows = prompt_rows(answer)
    rows[7], rows[8] = rows[8], rows[7]


def null_value(answer: Answer) -> None:
    list(prompt_rows(answer)[7].values())[-1]["logprob"] = None


def not_a_number(answer: Answer) -> None:
    for entry in prompt_rows(answer)[7].values():
        entry["logprob"] = float("nan")


def raw_logits(answer: Answer) -> None:
    for row in prompt_rows(answer)[1:]:
        for entry in row.values():
            entry["logprob"] += 9.0


def foreign_ids(answer: Answer) -> None:
    for row in prompt_rows(answer)[1:]:
        row["600"] = row.pop(max(row, key=lambda t: row[t]["logprob"]))
        for token in range(600):  # the observed token stays
            row.setdefault(str(token), {"logprob": -99.0, "rank": 99})


def better_than_the_best(answer: Answer) -> None:
    """The observed token is not among the k best, and more probable than they are."""
    beyond = next(e for row in prompt_rows(answer)[7:] for e in row.values() if e["rank"] > K)
    beyond["logprob"] = -0.001


def no_ranks(answer: Answer) -> None:
    for row in prompt_rows(answer)[1:]:
        for token, entry in row.items():
            row[token] = entry["logprob"]


def no_choice(answer: Answer) -> None:
    answer["choices"] = []


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (cap, "position 1: 3 of the 5 best .* --max-logprobs 5"),
        (truncate, "27 tokens were scored of 31: the server truncates"),
        (truncate_tokens, "other tokens than it was sent"),
        (nothing, "no prompt_logprobs"),
        (empty_position, "position 6: no log-probabilities"),
        (swap_ranks, "position 6: .* reorders"),
        (repeat_rank, "position 6: .* reorders"),
        (better_than_the_best, r"position \d+: .* reorders"),
        (shift_back, "the first token has log-probabilities: .* shifts"),
        (shift_forth, "position 1: .* shifts|position 1: no log-prob"),
        (other_observed, "position 6: the observed token .* shifts"),
        (null_value, "position 6: .*not finite"),
        (not_a_number, "position 6: .*not finite"),
        (raw_logits, "position 1: the probabilities sum to more than 1"),
        (foreign_ids, "position 1: an id outside the vocabulary of 600"),
        (no_ranks, "position 1: .*format"),
        (no_choice, "without a completion"),
    ],
)
def test_an_answer_that_cannot_be_a_label_is_refused(
    teacher: ServedTeacher, vllm: Vllm, fault: Callable[[Answer], object], problem: str
) -> None:
    vllm.edit = fault
    with pytest.raises(WorkFailed, match=f"(?s)document doc-1: .*(?:{problem})"):
        list(teacher.top_log_probs(sequences(2)[1:], K))


def test_one_bad_answer_among_many_stops_the_rest(teacher: ServedTeacher, vllm: Vllm) -> None:
    asked = sequences(3 * IN_FLIGHT)
    bad = asked[20].token_ids.tolist()

    def edit(answer: Answer) -> None:
        if answer["choices"][0]["prompt_token_ids"][:8] == bad[:8]:
            empty_position(answer)

    vllm.edit = edit
    with pytest.raises(WorkFailed, match="document doc-20: position 6"):
        list(teacher.top_log_probs(asked, K))
    assert len(vllm.requests) < len(asked)


# A server in trouble


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_trouble_that_passes_is_waited_for(
    teacher: ServedTeacher, vllm: Vllm, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    vllm.failures = [status] * 5
    found = list(teacher.top_log_probs(sequences(3), K))
    assert sorted(index for index, _, _ in found) == [0, 1, 2]
    assert len(vllm.requests) == 8
    said = capfd.readouterr().err
    assert f"{status}: synthetic trouble; trying again" in said
    assert said.count("trying again") == 1


def test_a_server_that_comes_back_is_found_again(teacher: ServedTeacher, vllm: Vllm) -> None:
    """Connections that were open are cut, new ones are refused, until it listens again."""
    results = teacher.top_log_probs(sequences(2 * IN_FLIGHT), K)
    found = [next(results)[0]]
    vllm.down()
    back = threading.Timer(0.5, vllm.up)
    back.start()
    found += [index for index, _, _ in results]
    back.join()
    assert sorted(found) == list(range(2 * IN_FLIGHT))


def test_patience_ends(teacher: ServedTeacher, vllm: Vllm) -> None:
    vllm.failures = [503] * 10_000
    hasty = replace(teacher, patience=0.3)
    with pytest.raises(
        WorkFailed, match=r"document doc-\d: .*synthetic.*shards are kept.*same com"
    ):
        list(hasty.top_log_probs(sequences(3), K))


def test_many_errors_at_once_are_one(
    teacher: ServedTeacher, vllm: Vllm, caplog: pytest.LogCaptureFixture
) -> None:
    vllm.down()
    with pytest.raises(WorkFailed, match="no usable answer for 0 seconds"):
        list(replace(teacher, patience=0).top_log_probs(sequences(IN_FLIGHT), K))
    vllm.up()
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_server_may_want_a_key(
    teacher: ServedTeacher, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.key = "open sesame"
    monkeypatch.setenv("OPENAI_API_KEY", vllm.key)  # meant for another server: stays here
    header = HarnessModel.served(vllm.address, "tiny", None).lm.header
    assert "Authorization" not in header
    for ask in (
        lambda: ServedTeacher.connect(vllm.address, "tiny", teacher.directory),
        lambda: Named(vllm.address, model="tiny").check(),
    ):
        with pytest.raises(InputError, match=r"answers 401.*set SEODANG_API_KEY"):
            ask()
    monkeypatch.setenv("SEODANG_API_KEY", vllm.key)
    assert ServedTeacher.connect(vllm.address, "tiny", teacher.directory).model == "tiny"
    Named(vllm.address, model="tiny").check()
    header = HarnessModel.served(vllm.address, "tiny", None).lm.header
    assert header["Authorization"] == f"Bearer {vllm.key}"


def test_what_the_server_refuses_is_told_in_its_words(teacher: ServedTeacher, vllm: Vllm) -> None:
    vllm.failures = [400]
    with pytest.raises(InputError, match=r"document doc-0: .* answers 400: synthetic trouble$"):
        list(teacher.top_log_probs(sequences(1), K))
    assert len(vllm.requests) == 1


def test_an_answer_that_is_no_json(
    teacher: ServedTeacher, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "complete", lambda body: b"<html>proxy</html>")
    with pytest.raises(WorkFailed, match="not JSON"):
        list(teacher.top_log_probs(sequences(1), K))


# What is refused before anything is sent


@pytest.mark.parametrize(
    ("sequence", "k", "problem"),
    [
        (sequences(1)[0], 0, "k = 0"),
        (sequences(1)[0], 601, "k = 601: .* 600 ids"),
        (
            TokenSequence("long", np.zeros(63, np.int32), np.arange(3)),
            K,
            "document long: 63 tokens and 2 more .* context of 64: .*--max-model-len 65",
        ),
        (
            TokenSequence("none", np.zeros(3, np.int32), np.arange(0)),
            K,
            "document none: no position",
        ),
    ],
)
def test_bad_input_is_not_sent(
    teacher: ServedTeacher, vllm: Vllm, sequence: TokenSequence, k: int, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        list(teacher.top_log_probs([*sequences(2), sequence], k))
    assert not vllm.requests


# Finding the server, the model and its tokenizer


def test_what_is_connected_to(vllm: Vllm, directory: Path) -> None:
    teacher = ServedTeacher.connect(f"{vllm.address}/", "tiny", None)
    assert (teacher.vocab_size, teacher.max_length) == (600, CONTEXT - 2)
    assert teacher.directory == directory
    assert teacher.fingerprint == model_fingerprint(directory)
    assert len(list(teacher.top_log_probs(sequences(1), K))) == 1


def without_weights(directory: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_without_weights_the_fingerprint_is_of_name_and_config(
    vllm: Vllm, model: CausalLM, directory: Path, tmp_path: Path
) -> None:
    same = [without_weights(directory, tmp_path / name) for name in "ab"]
    other = without_weights(directory, tmp_path / "c", rope_theta=1.0)
    second = Vllm(model, directory)
    found = [
        ServedTeacher.connect(address, "tiny", path).fingerprint
        for address in (vllm.address, second.address)
        for path in (*same, other)
    ]
    second.down()
    assert found[0] == found[1] == found[3] == found[4]
    assert found[2] == found[5] != found[0]
    assert model_fingerprint(directory) not in found


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda d: (d / "config.json").unlink(), "config.json: missing"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: missing, or not"),
        (lambda d: (d / "config.json").write_text("{}"), "no vocab_size"),
        (lambda d: (d / "config.json").write_text('{"vocab_size": 9}'), "do not belong together"),
    ],
)
def test_an_unfit_local_directory_is_refused(
    vllm: Vllm, directory: Path, tmp_path: Path, edit: Callable[[Path], object], problem: str
) -> None:
    copied = without_weights(directory, tmp_path / "copy")
    edit(copied)
    with pytest.raises(InputError, match=problem):
        ServedTeacher.connect(vllm.address, "tiny", copied)


def test_no_tokenizer_on_this_machine(vllm: Vllm, tmp_path: Path) -> None:
    vllm.root = tmp_path / "elsewhere"
    with pytest.raises(InputError, match="--tokenizer"):
        ServedTeacher.connect(vllm.address, "tiny", None)


def test_a_model_that_is_not_served(vllm: Vllm) -> None:
    with pytest.raises(InputError, match="serves tiny, not huge"):
        ServedTeacher.connect(vllm.address, "huge", None)


@pytest.mark.parametrize("address", ["127.0.0.1:8000/v1", "ftp://a/v1", "http://", "http://a:b/v1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match=r"not (an|the) address"):
        ServedTeacher.connect(address, "tiny", None)


def test_nobody_answers(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "START_PATIENCE", 0.2)
    vllm.down()
    with pytest.raises(WorkFailed, match=r"no usable answer .*ends in /v1"):
        ServedTeacher.connect(vllm.address, "tiny", None)
    vllm.up()


def test_another_kind_of_server(vllm: Vllm, directory: Path) -> None:
    vllm.hidden.add("/v1/models")
    with pytest.raises(InputError, match="404: Not Found"):
        ServedTeacher.connect(vllm.address, "tiny", directory)


# The parity check


def test_parity_with_local_weights(teacher: ServedTeacher) -> None:
    found = teacher.check_parity(sequences(9), K)
    assert found["route"] == "local weights"
    assert found["positions"] == sum(len(sequences(9)[i].token_ids) for i in (0, 4, 8))
    assert found["mean_difference"] <= found["max_difference"] < 1e-5


def test_parity_with_the_servers_own_decoding(vllm: Vllm, directory: Path, tmp_path: Path) -> None:
    bare = without_weights(directory, tmp_path / "bare")
    found = ServedTeacher.connect(vllm.address, "tiny", bare).check_parity(sequences(9), K)
    assert (found["route"], found["positions"]) == ("decode", 3 * parity.DECODED_TOKENS)
    assert found["max_difference"] < 1e-5


def flatten(answer: Answer) -> None:
    """Temperature 2 with the same ranks: proper distributions, of another model."""
    for row in prompt_rows(answer)[1:]:
        values = np.array([entry["logprob"] for entry in row.values()]) / 2
        for entry, value in zip(row.values(), values - 3, strict=True):
            entry["logprob"] = float(value)


def drift(answer: Answer) -> None:
    """Only what stands late is wrong, as with a broken rotary kernel."""
    for row in prompt_rows(answer)[20:]:
        for entry in row.values():
            entry["logprob"] -= 1.0


def single(answer: Answer) -> None:
    """A single position is far off."""
    if len(rows := prompt_rows(answer)) > 12:
        for entry in rows[12].values():
            entry["logprob"] -= 2.5


@pytest.mark.parametrize(
    ("fault", "weights"),
    [(flatten, True), (drift, True), (single, True), (flatten, False), (drift, False)],
)
def test_a_shifted_server_fails_the_parity_check(
    vllm: Vllm, directory: Path, tmp_path: Path, fault: Callable[[Answer], object], weights: bool
) -> None:
    local = directory if weights else without_weights(directory, tmp_path / "bare")
    teacher = ServedTeacher.connect(vllm.address, "tiny", local)
    vllm.edit = fault
    asked = sequences(9)
    list(teacher.top_log_probs(asked, K))  # nothing that the answers themselves show
    with pytest.raises(
        WorkFailed,
        match=r"document doc-\d, position \d+, token \d+ \('.*'\) next: -\d+\.\d+ from the server, "
        r"-\d+\.\d+ from .*nats apart.*rotary_embedding",
    ):
        teacher.check_parity(asked, K)


def test_weights_that_memory_cannot_hold_are_not_loaded(
    teacher: ServedTeacher, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "memory", lambda: Memory(10**6, 10**5))
    assert teacher.check_parity(sequences(3), K)["route"] == "decode"
    assert "two routes of the server" in capfd.readouterr().err


def test_decoding_without_log_probabilities_is_no_parity(
    vllm: Vllm, directory: Path, tmp_path: Path
) -> None:
    bare = without_weights(directory, tmp_path / "bare")
    teacher = ServedTeacher.connect(vllm.address, "tiny", bare)
    vllm.edit = lambda answer: answer["choices"][0].pop("logprobs", None)
    with pytest.raises(WorkFailed, match="document doc-0: the generated tokens"):
        teacher.check_parity(sequences(3), K)


def test_a_token_that_one_side_lacks_counts() -> None:
    sequence = TokenSequence("d", np.zeros(1, np.int32), np.zeros(1, np.int32))

    def scores(ids: list[int], values: list[float]) -> parity.Scores:
        return parity.Scores(np.array([ids], np.int32), np.array([values], np.float32))

    equal = scores([1, 2], [-1.0, -2.0]), scores([1, 3], [-1.0, -2.0])
    assert all(d.size == 0 for d in parity.differences(sequence, *equal))
    lacking = scores([2, 3], [-2.0, -4.0]), scores([1, 2], [-0.5, -2.0])
    sizes = {d.token: d.size for d in parity.differences(sequence, *lacking)}
    assert sizes == {1: 3.5, 2: 0.0, 3: 0.0}


# The tokenizer check


def test_a_server_that_tokenizes_differently_is_refused(teacher: ServedTeacher, vllm: Vllm) -> None:
    vllm.tokenizer = copy.deepcopy(vllm.tokenizer)
    korean = "카드"
    vllm.tokenizer.add_tokens([korean])
    ids = np.array(teacher.tokenizer(f"My {korean} is lost")["input_ids"], np.int32)
    asked = [*sequences(6), TokenSequence("korean", ids, np.arange(len(ids)))]
    with pytest.raises(InputError, match=r"document korean: .*tokenizes differently.*--tokenizer"):
        teacher.check_parity(asked, K)
    assert not vllm.requests


def test_a_server_without_tokenize_is_said_to_be_unchecked(
    teacher: ServedTeacher, vllm: Vllm, capfd: pytest.CaptureFixture[str]
) -> None:
    vllm.hidden.add("/tokenize")
    assert teacher.check_parity(sequences(3), K)["route"] == "local weights"
    assert "unknown" in capfd.readouterr().err
