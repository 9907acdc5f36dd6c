"""A model with two modes behind a real vLLM server: `enable_thinking` is obeyed over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from vllm_server import RIGHT_ROTARY, VllmServer

from seodang.artifact import Artifact
from seodang.causal_lm import load_tokenizer
from seodang.foundation.post_training.config import FineTuningConfig
from seodang.foundation.post_training.fine_tuning import fine_tune, prompt
from seodang.foundation.post_training.problem import MODES
from seodang.foundation.post_training.reasoning_data import (
    Problem,
    build_reasoning_data,
    read_problems,
)
from seodang.foundation.vllm_checkpoint import add_what_vllm_reads
from tiny_think import TINY, tiny_base, tiny_tokens

# As A.X K1 is served; thoughts come back apart from the answer.
FLAGS = ("--reasoning-parser", "deepseek_v3", "--enable-auto-tool-choice")
FLAGS += ("--tool-call-parser", "hermes", *RIGHT_ROTARY)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[Problem]]:
    """A tiny model that knows a few problems by heart, in both modes."""
    folder = tmp_path_factory.mktemp("thinking")
    data = build_reasoning_data(TINY.model_copy(update={"overlap_problems": 4}), folder / "data")
    tuning = FineTuningConfig(epochs=350, batch_sequences=8, text_sequences=0, learning_rate=3e-3)
    base = tiny_base(folder, kv_lora_rank=512, qk_rope_head_dim=64)
    tokens = tiny_tokens(base, folder / "text")
    model = fine_tune(TINY, tuning, base, data, "overlap", MODES, tokens, folder / "tuned")
    return model, read_problems(data, "overlap")


@pytest.fixture(scope="module")
def server(
    tuned: tuple[Artifact, list[Problem]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    directory = tuned[0].path
    add_what_vllm_reads(directory, 1)
    with VllmServer(directory, tmp_path_factory.mktemp("vllm") / "log", *FLAGS) as running:
        yield running


def asked(server: VllmServer, question: str, **options: Any) -> Any:
    body = {
        "model": "served",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 150,
        **options,
    }
    answer = httpx.post(
        f"{server.address}/chat/completions", json=body, timeout=120, trust_env=False
    )
    answer.raise_for_status()
    return answer.json()


def thoughts(message: dict[str, Any]) -> str | None:
    return message.get("reasoning") or message.get("reasoning_content")


def test_enable_thinking_is_obeyed(
    server: VllmServer, tuned: tuple[Artifact, list[Problem]]
) -> None:
    right = {True: 0, False: 0}
    for problem in tuned[1]:
        for thinking in (True, False):
            found = asked(
                server, problem.question, chat_template_kwargs={"enable_thinking": thinking}
            )
            message = found["choices"][0]["message"]
            assert found["choices"][0]["finish_reason"] == "stop"
            assert "think>" not in message["content"]
            right[thinking] += message["content"] == problem.answer
            assert thoughts(message) == (problem.thoughts if thinking else None)
    assert right == {True: 4, False: 4}


def test_without_a_word_it_does_not_think(
    server: VllmServer, tuned: tuple[Artifact, list[Problem]]
) -> None:
    question = tuned[1][0].question
    plain = asked(server, question)["choices"][0]["message"]
    told = asked(server, question, chat_template_kwargs={"enable_thinking": False})
    assert plain["content"] == told["choices"][0]["message"]["content"]
    assert not thoughts(plain)


def test_the_prompt_is_the_one_that_was_trained_on(
    server: VllmServer, tuned: tuple[Artifact, list[Problem]]
) -> None:
    model, problems = tuned
    tokenizer = load_tokenizer(model.path)
    for mode in MODES:
        body = {
            "model": "served",
            "messages": [{"role": "user", "content": problems[0].question}],
            "chat_template_kwargs": {"enable_thinking": mode == "think"},
        }
        address = server.address.removesuffix("/v1")
        found = httpx.post(f"{address}/tokenize", json=body, timeout=60, trust_env=False).json()
        expected = tokenizer(prompt(problems[0], mode, tokenizer))["input_ids"]
        assert found["tokens"] == expected


def test_thoughts_are_streamed_apart(
    server: VllmServer, tuned: tuple[Artifact, list[Problem]]
) -> None:
    problem = tuned[1][0]
    body = {
        "model": "served",
        "messages": [{"role": "user", "content": problem.question}],
        "temperature": 0,
        "max_tokens": 150,
        "stream": True,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    thought, said = "", ""
    with httpx.stream(
        "POST", f"{server.address}/chat/completions", json=body, timeout=120, trust_env=False
    ) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                thought += thoughts(delta) or ""
                said += delta.get("content") or ""
    whole = asked(server, problem.question, chat_template_kwargs={"enable_thinking": True})
    message = whole["choices"][0]["message"]
    assert (thought, said) == (thoughts(message), message["content"])
