"""A trimmed tokenizer: what it keeps, that it writes anything, and that kept text keeps its ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from seodang.causal_lm import CausalLM
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.recipe import VocabularyConfig
from seodang.softlabels.store import SoftLabelStore
from seodang.student.byte_level_bpe import ByteLevelBPE, byte_characters, pair_of
from seodang.student.vocabulary import (
    TrimmedVocabulary,
    check_vocabulary,
    choose_vocabulary,
    trim_model,
    trim_tokenizer,
)
from synthetic_bpe import naive_bpe, synthetic_bpe
from tiny import TEXT, tiny_teacher
from tiny_store import config_of, synthetic_store

SIZES = {"gpt2": 163_840, "llama3": 6_000, "qwen": 6_000, "tiny": 600}
TRIMS = {"gpt2": 8192, "llama3": 1500, "qwen": 1500, "tiny": 400}


@dataclass
class Trimmed:
    """A tokenizer, a store of text in it, and both trimmed."""

    source: Path
    out: Path
    store: SoftLabelStore
    bpe: ByteLevelBPE
    vocabulary: TrimmedVocabulary
    old: Any
    new: Any

    @property
    def kept_texts(self) -> list[str]:
        """The texts of kept entries that are whole characters."""
        kept = [int(i) for i in self.vocabulary.kept if i >= 0 and int(i) not in self.bpe.added]
        return [text for text in map(self.old.decode, ([i] for i in kept)) if "\ufffd" not in text]


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trimmed]:
    """Trimmed tokenizers by name, each made once."""

    @cache
    def make(name: str) -> Trimmed:
        folder = tmp_path_factory.mktemp(name)
        if name == "tiny":
            source = tiny_teacher(folder / "source")
        else:
            source = synthetic_bpe(folder / "source", SIZES[name], name)
        old = AutoTokenizer.from_pretrained(source)
        store = store_of(folder / "store", [*words_of(old), TEXT], old, SIZES[name])
        vocabulary = choose_vocabulary(source, store, VocabularyConfig(trim=TRIMS[name]))
        out = folder / "out"
        out.mkdir()
        trim_tokenizer(source, vocabulary, out)
        new = AutoTokenizer.from_pretrained(out)
        return Trimmed(source, out, store, ByteLevelBPE(source), vocabulary, old, new)

    return make


def words_of(tokenizer: Any, count: int = 40) -> list[str]:
    """Texts of random entries, the early ones more often."""
    rng = np.random.default_rng(1)
    ids = (len(tokenizer) * rng.random((count, 60)) ** 2).astype(int).tolist()
    return [tokenizer.decode(row, skip_special_tokens=True).replace("\ufffd", "") for row in ids]


def store_of(path: Path, texts: list[str], tokenizer: Any, size: int) -> SoftLabelStore:
    """The texts with random labels, two of each labelled."""
    items = []
    for number, text in enumerate(texts):
        ids = np.array(tokenizer(text)["input_ids"], np.int32)
        items.append(TokenSequence(f"doc{number}", ids, np.array([0, len(ids) - 2], np.int32)))
    config = config_of("head-tail")
    return SoftLabelStore(synthetic_store(path, config, items, vocabulary=size))


@pytest.mark.parametrize("name", SIZES)
def test_size_bytes_and_special_tokens(trimmed: Callable[[str], Trimmed], name: str) -> None:
    made = trimmed(name)
    entries = made.new.get_vocab()
    assert len(entries) == made.vocabulary.size == TRIMS[name]
    assert sorted(entries.values()) == list(range(TRIMS[name]))
    assert set(byte_characters()) <= set(entries)
    assert made.new.chat_template == made.old.chat_template
    assert made.new.all_special_tokens == made.old.all_special_tokens
    assert made.new.eos_token_id == made.vocabulary.new_ids[made.old.eos_token_id]
    for old, token in made.old.added_tokens_decoder.items():
        new = int(made.vocabulary.new_ids[old])
        assert str(made.new.added_tokens_decoder[new]) == str(token)
    kept = made.vocabulary.kept[made.vocabulary.kept >= 0]
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize("name", SIZES)
def test_closed_under_merges(trimmed: Callable[[str], Trimmed], name: str) -> None:
    made = trimmed(name)
    content = json.loads((made.out / "tokenizer.json").read_bytes())["model"]
    vocab, merges = content["vocab"], [pair_of(m) for m in content["merges"]]
    assert all(a in vocab and b in vocab and a + b in vocab for a, b in merges)
    rank = {pair_of(m): i for i, m in enumerate(made.bpe.content["model"]["merges"])}
    ranks = [rank[pair] for pair in merges]
    assert ranks == sorted(ranks)
    old, new = (made.bpe.content["model"], content)
    bare_old, bare_new = (bare(model) for model in (old, new))
    reached = 0
    for text in vocab:
        before = bare_old.encode(text).ids
        if before == [old["vocab"][text]]:
            reached += 1
            assert bare_new.encode(text).ids == [vocab[text]]
    assert reached > 0.7 * len(vocab)


def bare(model: dict[str, Any]) -> Tokenizer:
    """The merges alone: text is one word of byte characters, and never looked up whole."""
    return Tokenizer(
        models.BPE(vocab=model["vocab"], merges=[pair_of(merge) for merge in model["merges"]])
    )


@pytest.mark.parametrize("name", ["llama3", "tiny"])
def test_pieces_are_what_bpe_as_it_is_defined_gives(
    trimmed: Callable[[str], Trimmed], name: str
) -> None:
    made = trimmed(name)
    content = json.loads((made.out / "tokenizer.json").read_bytes())["model"]
    merges = [pair_of(m) for m in content["merges"]]
    vocabulary = made.vocabulary
    removed = np.flatnonzero(vocabulary.new_ids < 0)
    for old in removed[:: max(1, len(removed) // 40)]:
        expected = naive_bpe(made.bpe.text[int(old)], content["vocab"], merges)
        assert vocabulary.spell_out(np.array([old]))[0].tolist() == expected
        assert len(expected) > 1


NAMES = st.sampled_from(sorted(SIZES))


@settings(max_examples=150)
@given(name=NAMES, text=st.text())
def test_any_string_comes_back(trimmed: Callable[[str], Trimmed], name: str, text: str) -> None:
    made = trimmed(name)
    ids = made.new(text, add_special_tokens=False)["input_ids"]
    normalised = made.old.decode(made.old(text, add_special_tokens=False)["input_ids"])
    assert made.new.decode(ids) == normalised
    if name != "qwen":  # which composes characters
        assert normalised == text


@settings(max_examples=150)
@given(name=NAMES, data=st.binary())
def test_any_bytes_come_back(trimmed: Callable[[str], Trimmed], name: str, data: bytes) -> None:
    made = trimmed(name)
    characters = byte_characters()
    written = "".join(characters[byte] for byte in data)
    pieces = [token.value for token in made.new.backend_tokenizer.model.tokenize(written)]
    assert bytes(characters.index(c) for c in "".join(pieces)) == data


@settings(max_examples=150)
@given(name=NAMES, data=st.data())
def test_text_of_kept_tokens_has_the_same_tokens(
    trimmed: Callable[[str], Trimmed], name: str, data: st.DataObject
) -> None:
    made = trimmed(name)
    words = data.draw(st.lists(st.sampled_from(made.kept_texts), max_size=12))
    text = data.draw(st.sampled_from(["", " "])).join(words)
    check_same(made, text)
    check_same(made, data.draw(st.text()))


def check_same(made: Trimmed, text: str) -> None:
    """Kept tokens stay; whatever else there was, spelled out it is the same text."""
    old = np.array(made.old(text)["input_ids"], np.int64)
    new = made.new(text)["input_ids"]
    if (made.vocabulary.new_ids[old] >= 0).all():
        assert new == made.vocabulary.new_ids[old].tolist()
    spelled, last = made.vocabulary.spell_out(old)
    assert made.new.decode(spelled) == made.old.decode(old)
    assert len(last) == len(old)
    if len(last):
        assert last[-1] == len(spelled) - 1


def test_conversations_begin_and_end_as_before(trimmed: Callable[[str], Trimmed]) -> None:
    made = trimmed("llama3")
    messages = [{"role": "user", "content": "안녕 <|im_end|> 하세요"}]
    old, new = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for tokenizer in (made.old, made.new)
    )
    assert made.new.decode(new) == made.old.decode(old)
    assert new.count(made.new.eos_token_id) == old.count(made.old.eos_token_id) == 2
    assert made.new("a")["input_ids"][0] == made.new.bos_token_id


def test_what_is_used_most_is_kept(trimmed: Callable[[str], Trimmed]) -> None:
    made = trimmed("gpt2")
    tokens = np.concatenate([s.token_ids for s in made.store])
    ids, counts = np.unique(tokens, return_counts=True)
    assert (made.vocabulary.new_ids[ids[counts > 1]] >= 0).all()
    labels = np.concatenate([s.ids[s.weights > 0.5] for s in made.store])
    assert (made.vocabulary.new_ids[labels] >= 0).all()


@pytest.mark.parametrize("share", [0.95, 0.99, 1.0])
def test_a_share_of_the_text_stays(trimmed: Callable[[str], Trimmed], share: float) -> None:
    made = trimmed("qwen")
    tokens = np.concatenate([s.token_ids for s in made.store])
    found = choose_vocabulary(made.source, made.store, VocabularyConfig(keep=share))
    assert (found.new_ids[tokens] >= 0).mean() >= share
    fewer = VocabularyConfig(trim=found.size - 12)  # one entry brings at most its derivation
    without = choose_vocabulary(made.source, made.store, fewer)
    assert (without.new_ids[tokens] >= 0).mean() < share


def test_choosing_is_deterministic_and_saved_exactly(
    trimmed: Callable[[str], Trimmed], tmp_path: Path
) -> None:
    made = trimmed("llama3")
    again = choose_vocabulary(made.source, made.store, VocabularyConfig(trim=TRIMS["llama3"]))
    for number, vocabulary in enumerate((made.vocabulary, again)):
        vocabulary.save(tmp_path / f"{number}.safetensors")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    loaded = TrimmedVocabulary.load(tmp_path / "0.safetensors")
    assert np.array_equal(loaded.kept, again.kept)
    assert np.array_equal(loaded.pieces, again.pieces)
    assert np.array_equal(loaded.piece_offsets, again.piece_offsets)
    (tmp_path / "0.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="not a trimmed vocabulary"):
        TrimmedVocabulary.load(tmp_path / "0.safetensors")


def test_bytes_that_the_teacher_lacks_are_added(tmp_path: Path) -> None:
    source = tiny_teacher(tmp_path / "source", tie_embeddings=False)
    content = json.loads((source / "tokenizer.json").read_bytes())
    lacking = [byte_characters()[byte] for byte in (0xF1, 0xFF)]
    for character in lacking:  # their ids stay empty, as rows that pad an embedding
        del content["model"]["vocab"][character]
    (source / "tokenizer.json").write_text(json.dumps(content))
    old = AutoTokenizer.from_pretrained(source)
    store = store_of(tmp_path / "store", [TEXT], old, 600)
    vocabulary = choose_vocabulary(source, store, VocabularyConfig(trim=420))
    trim_tokenizer(source, vocabulary, tmp_path)
    new = AutoTokenizer.from_pretrained(tmp_path)
    text = "\U00040000 payment"
    assert old.decode(old(text)["input_ids"]) != text
    assert new.decode(new(text)["input_ids"]) == text
    assert vocabulary.size == len(new) == 420
    assert vocabulary.kept[-2:].tolist() == [-1, -1]
    assert (vocabulary.lengths == 0).sum() == 2
    model = CausalLM.load(source).model
    head = model.get_output_embeddings().weight.detach().clone()
    trim_model(model, vocabulary)
    torch.testing.assert_close(
        model.get_output_embeddings().weight[-2:], head.mean(0).expand(2, -1)
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"type": "Unigram"}, "a Unigram tokenizer"),
        ({"byte_fallback": True}, "falls back to bytes"),
        ({"end_of_word_suffix": "</w>"}, "beginning or the end of a word"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    source = synthetic_bpe(tmp_path, 400)
    content = json.loads((source / "tokenizer.json").read_bytes())
    content["model"] |= change
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{reason}.*leave out student.vocabulary"):
        check_vocabulary(source, VocabularyConfig(trim=300))


def test_text_not_split_to_bytes_is_refused(tmp_path: Path) -> None:
    source = synthetic_bpe(tmp_path, 400)
    content = json.loads((source / "tokenizer.json").read_bytes())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="does not write text as bytes"):
        check_vocabulary(source, VocabularyConfig(trim=300))
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        check_vocabulary(source, VocabularyConfig(trim=300))


def test_too_few_and_too_many_entries_are_refused(tmp_path: Path) -> None:
    source = synthetic_bpe(tmp_path, 400)
    with pytest.raises(InputError, match="alone are 260: ask for at least 260"):
        check_vocabulary(source, VocabularyConfig(trim=259))
    check_vocabulary(source, VocabularyConfig(trim=260))
    check_vocabulary(source, VocabularyConfig(trim=399))
    with pytest.raises(InputError, match="has only 400 entries"):
        check_vocabulary(source, VocabularyConfig(trim=400))
    old = AutoTokenizer.from_pretrained(source)
    store = store_of(tmp_path / "store", [TEXT], old, 390)
    with pytest.raises(InputError, match="do not belong together"):
        choose_vocabulary(source, store, VocabularyConfig(trim=300))


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_gives_the_logits_of_what_is_kept(
    trimmed: Callable[[str], Trimmed], tmp_path: Path, tied: bool
) -> None:
    vocabulary = trimmed("tiny").vocabulary
    source = tiny_teacher(tmp_path / "source", tie_embeddings=tied)
    before, model = CausalLM.load(source), CausalLM.load(source).model
    model.generation_config.eos_token_id = [model.config.eos_token_id, 0]
    model.generation_config.suppress_tokens = [int(np.flatnonzero(vocabulary.new_ids < 0)[0])]
    trim_model(model, vocabulary)
    model.save_pretrained(tmp_path / "student")
    trim_tokenizer(source, vocabulary, tmp_path / "student")
    after = CausalLM.load(tmp_path / "student")
    assert after.model.config.vocab_size == after.vocab_size == vocabulary.size
    new_ids = vocabulary.new_ids
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after.model.config, name) == new_ids[getattr(before.model.config, name)]
    ends = [before.model.config.eos_token_id, 0]
    assert after.model.generation_config.eos_token_id == new_ids[ends].tolist()
    assert after.model.generation_config.suppress_tokens == []
    saved = before.parameters - after.parameters
    assert saved == (600 - vocabulary.size) * 64 * (1 if tied else 2)
    ids = np.flatnonzero(new_ids >= 0)[:50].astype(np.int32)
    (old,), (new,) = (
        model.hidden_states([sequence])
        for model, sequence in ((before, ids), (after, new_ids[ids]))
    )
    with torch.inference_mode():
        expected = before.logits(old)[:, torch.from_numpy(vocabulary.kept).long()]
        torch.testing.assert_close(after.logits(new), expected)


def test_a_head_with_a_bias(trimmed: Callable[[str], Trimmed]) -> None:
    vocabulary = trimmed("tiny").vocabulary
    config = LlamaConfig(
        vocab_size=600, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(600.0))
    trim_model(model, vocabulary)
    assert model.lm_head.bias.tolist() == vocabulary.kept.tolist()
    assert model.lm_head.out_features == vocabulary.size
    assert model.model.embed_tokens.num_embeddings == vocabulary.size
    with pytest.raises(ValueError, match="the model has 400 entries, but"):
        trim_model(model, vocabulary)
