"""The foundation teacher's tokenizer: what its entries are, what it costs, how it writes chats."""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from seodang.artifact import Artifact
from seodang.causal_lm import load_tokenizer
from seodang.corpus.documents import Document
from seodang.corpus.sequences import observed_tokens, tokenize
from seodang.errors import InputError
from seodang.foundation.tokenizer.bpe import train_bpe
from seodang.foundation.tokenizer.config import RESERVED, TokenizerConfig
from seodang.foundation.tokenizer.train import sample, train_tokenizer
from seodang.release.gguf import pre_tokenizer
from seodang.student.byte_level_bpe import byte_characters
from tiny_raw import KOREAN, tiny_documents, tiny_raw

CONFIG = TokenizerConfig(vocabulary=700, min_character_count=5, spare_tokens=4)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tiny_raw(tmp_path_factory.mktemp("raw") / "corpus")


@pytest.fixture(scope="module")
def made(raw: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return train_tokenizer(CONFIG, raw, tmp_path_factory.mktemp("made") / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(made: Artifact) -> Any:
    return load_tokenizer(made.path)


def entry_bytes(entry: str) -> bytes:
    return bytes(byte_characters().index(character) for character in entry)


def test_size_and_files(made: Artifact, tokenizer: Any) -> None:
    assert len(tokenizer) == CONFIG.vocabulary
    assert sorted(tokenizer.get_vocab().values()) == list(range(CONFIG.vocabulary))
    assert not made.verify()
    assert set(made.manifest.summary["tokens_per_character"]) == {"ko", "en", "code"}
    assert [s.name for s in made.manifest.sources] == ["tests"]


def test_same_bytes_again(raw: Artifact, made: Artifact, tmp_path: Path) -> None:
    again = train_tokenizer(CONFIG, raw, tmp_path / "again")
    assert again.digest == made.digest
    documents = [d.text for d in _train(raw)]
    one, other = (train_bpe(t, 600, 5).to_str() for t in (documents, documents[::-1]))
    assert one == other


def _train(raw: Artifact) -> Any:
    from seodang.corpus.raw.reading import read_raw

    return list(read_raw(raw.path, "train"))


def test_entries_never_cross_half_a_character(made: Artifact) -> None:
    model = json.loads((made.path / "tokenizer.json").read_bytes())["model"]
    whole, prefixes = 0, 0
    for entry in model["vocab"]:
        spelled = entry_bytes(entry)
        if len(spelled) == 1:
            continue
        text = spelled.decode(errors="ignore")
        if text:
            assert text.encode() == spelled
            whole += 1
        else:  # the beginning of a character
            assert 0xC2 <= spelled[0] <= 0xF4
            assert all(0x80 <= byte <= 0xBF for byte in spelled[1:])
            prefixes += 1
    assert whole > 300
    assert prefixes > 10


def test_frequent_syllables_are_entries_and_rare_ones_bytes(tokenizer: Any) -> None:
    assert len(tokenizer("다")["input_ids"]) == 1
    assert len(tokenizer("뷁")["input_ids"]) in (2, 3)
    assert tokenizer.decode(tokenizer("뷁뗋")["input_ids"]) == "뷁뗋"


def test_an_eojeol_is_cut_by_the_counts_alone(tokenizer: Any) -> None:
    pieces = tokenizer.tokenize(" 결제를 취소하려면")
    assert tokenizer.convert_tokens_to_string(pieces) == " 결제를 취소하려면"
    assert len(pieces) < 8


def test_digits_stand_alone(tokenizer: Any) -> None:
    assert tokenizer.tokenize("1234567") == list("1234567")


def test_decomposed_hangul_is_the_same_text(tokenizer: Any) -> None:
    for line in KOREAN:
        apart = unicodedata.normalize("NFD", line)
        assert tokenizer(apart)["input_ids"] == tokenizer(line)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_every_text_is_written_back_composed(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    normalized = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(ids) == normalized


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("가나다라뷁ᄀ ᆨab12.\n"), max_size=30))
def test_merges_are_byte_level_bpe(made: Artifact, tokenizer: Any, text: str) -> None:
    """The file's own merges, applied one by one as BPE is defined, give the same tokens."""
    model = json.loads((made.path / "tokenizer.json").read_bytes())["model"]
    rank = {tuple(pair): i for i, pair in reversed(list(enumerate(model["merges"])))}
    backend = tokenizer.backend_tokenizer
    expected: list[str] = []
    text = backend.normalizer.normalize_str(text)
    for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text):
        parts = list(piece)
        while True:
            found = [(rank[p], i) for i, p in enumerate(pairwise(parts)) if p in rank]
            if not found:
                break
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        expected += parts
    assert backend.encode(text).tokens == expected


def test_the_sample_weighs_as_the_mixture_says(tmp_path: Path) -> None:
    raw = tiny_raw(tmp_path / "raw", [d for d in tiny_documents() if d[0] != "en"])
    config = TokenizerConfig(mixture={"ko": 3.0, "code": 1.0}, vocabulary=700)
    texts, sampled = sample(config, raw)
    assert sampled["ko"] / sampled["code"] == pytest.approx(3, rel=0.1)
    assert sum(sampled.values()) == sum(len(t.encode()) for t in texts)
    few = sample(config.model_copy(update={"sample_bytes": 2000}), raw)[1]
    assert 2000 <= sum(few.values()) < 2500


def test_what_the_corpus_cannot_give(raw: Artifact, tmp_path: Path) -> None:
    korean = tiny_raw(tmp_path / "raw", [d for d in tiny_documents() if d[0] == "ko"])
    with pytest.raises(InputError, match=r"tokenizer\.mixture: .* no text of language 'en'"):
        train_tokenizer(CONFIG, korean, tmp_path / "a")
    with pytest.raises(InputError, match=r"tokenizer\.vocabulary: .* gives .* not 16,384"):
        train_tokenizer(TokenizerConfig(), raw, tmp_path / "b")
    tight = TokenizerConfig(vocabulary=310, min_character_count=1, spare_tokens=4)
    with pytest.raises(InputError, match="raise min_character_count or the vocabulary"):
        train_tokenizer(tight, raw, tmp_path / "c")


def test_bad_config() -> None:
    with pytest.raises(ValidationError, match="more than 298: 256 bytes, 10 reserved and 32 spare"):
        TokenizerConfig(vocabulary=298)
    with pytest.raises(ValidationError, match="greater than 0"):
        TokenizerConfig(mixture={"ko": 0.0})
    with pytest.raises(ValidationError, match=r"mixture\.fr"):
        TokenizerConfig.model_validate({"mixture": {"fr": 1.0}})


def test_reserved_tokens(tokenizer: Any) -> None:
    for text in (*RESERVED, "<|spare_3|>"):
        assert len(tokenizer(text)["input_ids"]) == 1
    ids = tokenizer("<think>a</think>b<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>b"
    named = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    assert named == ["<|endoftext|>", "<|im_end|>", "<|pad|>"]


QUESTION = [{"role": "system", "content": "짧게 답하라."}, {"role": "user", "content": "1+1?"}]


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def test_enable_thinking_decides_how_the_prompt_ends(tokenizer: Any) -> None:
    asked = {"add_generation_prompt": True}
    thinking = rendered(tokenizer, QUESTION, enable_thinking=True, **asked)
    instant = rendered(tokenizer, QUESTION, enable_thinking=False, **asked)
    assert thinking.endswith("<|im_start|>assistant\n<think>")
    assert instant == thinking.removesuffix("<think>") + "</think>"
    assert rendered(tokenizer, QUESTION, **asked) == instant


def test_an_answer_with_its_thoughts(tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "2", "reasoning_content": "1+1=2"}
    expected = "<|im_start|>assistant\n<think>1+1=2</think>2<|im_end|>\n"
    assert rendered(tokenizer, [*QUESTION, answer]).endswith(expected)
    inline = {"role": "assistant", "content": "<think>1+1=2</think>2"}
    assert rendered(tokenizer, [*QUESTION, inline]).endswith(expected)
    # What was thought before is not said again.
    later = [*QUESTION, inline, {"role": "user", "content": "2+2?"}]
    assert "<|im_start|>assistant\n</think>2<|im_end|>\n" in rendered(tokenizer, later)
    assert "1+1=2" not in rendered(tokenizer, later)


def test_tools_are_written_as_hermes_does(tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "날씨", "parameters": {"type": "object"}}}
    call = {"function": {"name": "날씨", "arguments": {"city": "서울"}}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "맑음"},
    ]
    text = rendered(tokenizer, messages, tools=[tool], add_generation_prompt=True)
    assert f"<tools>\n{json.dumps(tool, ensure_ascii=False)}\n</tools>" in text
    before, _, after = text.rpartition("</tool_call>")
    found = json.loads(before.rpartition("<tool_call>")[2])
    assert found == {"name": "날씨", "arguments": {"city": "서울"}}
    assert "<|im_start|>tool\n<tool_response>\n맑음\n</tool_response><|im_end|>\n" in after
    assert text.count("<|im_start|>system") == 1
    spelled = {"function": {"name": "날씨", "arguments": '{"city": "서울"}'}}
    messages[2] = {"role": "assistant", "content": None, "tool_calls": [spelled]}
    assert rendered(tokenizer, messages, tools=[tool], add_generation_prompt=True) == text


def test_the_assistants_tokens_are_what_soft_labels_want(tokenizer: Any) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "결제를 취소합니다."}]
    messages += [{"role": "user", "content": "정말?"}, {"role": "assistant", "content": "네."}]
    document = Document(id="d", source="s", license="l", origin="o", messages=messages)
    (sequence,) = tokenize(document, tokenizer, 1000)
    assert (
        tokenizer.decode(observed_tokens(sequence)) == "결제를 취소합니다.<|im_end|>네.<|im_end|>"
    )


def test_llama_cpp_knows_how_it_splits_text(made: Artifact) -> None:
    assert pre_tokenizer(json.loads((made.path / "tokenizer.json").read_bytes())) == "qwen2"
