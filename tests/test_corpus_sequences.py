"""Labelled positions against decoding, windows, and templates that cannot be followed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import processors

import seodang.foundation.tokenizer
from seodang.corpus.documents import Document, normalise
from seodang.corpus.sequences import tokenize
from seodang.errors import InputError
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TRIMMING = tiny_tokenizer()
TRIMMING.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
LONG = 1_000_000
TWO_MODES = Path(seodang.foundation.tokenizer.__file__).parent / "chat_template.j2"


def chat(*contents: str, system: str | None = None) -> Document:
    """A conversation of ``contents``, the user's first."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return Document("d", "s", "MIT", "f.jsonl#1", messages=first + turns)


def labelled_text(document: Document, tokenizer: Any = TOKENIZER) -> str:
    """The next tokens of the labelled positions, decoded."""
    (sequence,) = tokenize(document, tokenizer, LONG)
    return tokenizer.decode(sequence.token_ids[sequence.labelled + 1])


# Leading white space may be one token with the line end of the template's header.
contents = st.text(max_size=60).map(lambda text: normalise(text).lstrip())


@pytest.mark.parametrize("tokenizer", [TOKENIZER, TRIMMING], ids=["offsets", "trimmed offsets"])
@given(turns=st.lists(contents, min_size=2, max_size=6), system=st.none() | contents)
@example(turns=["", ""], system=None)
@example(turns=["Hi", ">"], system=None)
@settings(max_examples=60, deadline=None)
def test_labelled_positions_predict_the_answers_and_their_ends(
    tokenizer: Any, turns: list[str], system: str | None
) -> None:
    expected = "".join(f"{answer}<|im_end|>" for answer in turns[1::2])
    assert labelled_text(chat(*turns, system=system), tokenizer) == expected


@given(text=st.text(min_size=1, max_size=200), max_length=st.integers(2, 40))
@settings(max_examples=100, deadline=None)
def test_every_token_of_a_text_is_labelled_in_consecutive_windows(
    text: str, max_length: int
) -> None:
    windows = tokenize(Document("d", "s", "MIT", "o", text=text), TOKENIZER, max_length)
    joined = np.concatenate([window.token_ids for window in windows])
    assert joined.tolist() == TOKENIZER(text)["input_ids"]
    assert {len(window.token_ids) for window in windows[:-1]} <= {max_length}
    for window in windows:
        assert window.labelled.tolist() == list(range(len(window.token_ids)))


@given(turns=st.lists(contents, min_size=2, max_size=6), max_length=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_windows_of_a_conversation_keep_the_labels_of_the_whole(
    turns: list[str], max_length: int
) -> None:
    (whole,) = tokenize(chat(*turns), TOKENIZER, LONG)
    wanted = np.zeros(len(whole.token_ids), dtype=bool)
    wanted[whole.labelled] = True
    expected = [
        (whole.token_ids[i : i + max_length], np.flatnonzero(wanted[i : i + max_length]))
        for i in range(0, len(wanted), max_length)
    ]
    windows = tokenize(chat(*turns), TOKENIZER, max_length)
    assert [(w.token_ids.tolist(), w.labelled.tolist()) for w in windows] == [
        (token_ids.tolist(), labelled.tolist()) for token_ids, labelled in expected if len(labelled)
    ]


def test_the_digest_covers_tokens_and_positions() -> None:
    (sequence,) = tokenize(chat("Hi", "Hello"), TOKENIZER, LONG)
    assert sequence.token_ids.dtype == sequence.labelled.dtype == np.int32
    data = b"".join(int(i).to_bytes(4, "little") for i in sequence.token_ids) + b"|"
    data += b"".join(int(i).to_bytes(4, "little") for i in sequence.labelled)
    assert sequence.digest == hashlib.sha256(data).hexdigest()


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_without_end_marker_ends_turns_by_white_space() -> None:
    tokenizer = with_template(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    for trim in (False, True):
        if trim:
            tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        assert labelled_text(chat("Hi", "Yes.", "Why?", "So."), tokenizer) == " Yes.\n\n So.\n\n"


def test_a_template_that_trims_contents_and_adds_a_system_prompt() -> None:
    tokenizer = with_template(
        "<|im_start|>Be kind.<|im_end|>{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] | trim) + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert labelled_text(chat("Hi", "  Yes. "), tokenizer) == "Yes.<|im_end|>"


REFUSED = {
    "no template": (None, chat("Hi", "Yes"), "has no chat template"),
    "rewrites earlier turns": (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        chat("Hi", "Yes", "Hi", "No"),
        "does not render the first 1 messages as the beginning",
    ),
    "refuses": (
        "{{ raise_exception('no such conversation') }}",
        chat("Hi", "Yes"),
        "the chat template refuses the conversation: no such conversation",
    ),
    "assistant first": (
        TOKENIZER.chat_template,
        Document(
            "d", "s", "MIT", "f.jsonl#1", messages=[{"role": "assistant", "content": "Welcome"}]
        ),
        "begins with the assistant",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conversations_that_cannot_be_labelled_are_refused(case: str) -> None:
    template, document, message = REFUSED[case]
    with pytest.raises(InputError, match=rf"f\.jsonl#1: .*{message}"):
        tokenize(document, with_template(template), LONG)


def test_thoughts_are_labelled_where_a_prompt_opens_them() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TWO_MODES.read_text()
    thought = chat("2+2?", "4", "and 3+3?", "<think>twice 3</think>6")
    assert labelled_text(thought, tokenizer) == "4<|im_end|>twice 3</think>6<|im_end|>"
    assert labelled_text(chat("2+2?", "4"), tokenizer) == "4<|im_end|>"


def test_nothing_labelled_gives_no_sequence() -> None:
    assert tokenize(chat("Hi"), TOKENIZER, LONG) == []
    assert tokenize(chat(), TOKENIZER, LONG) == []
    assert tokenize(Document("d", "s", "MIT", "o", text=""), TOKENIZER, LONG) == []
