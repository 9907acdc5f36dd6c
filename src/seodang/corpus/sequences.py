"""Documents to token sequences, with the positions whose soft label is wanted.

The label of position t is the distribution of the token after t. In a plain document every
position is labelled; in a conversation those whose next token is the assistant's: its words and
the tokens that end its turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from seodang.corpus.documents import Document
from seodang.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


UNOBSERVED = -100  # no token; what torch's losses ignore


class Labelled(Protocol):
    """Whatever has tokens and labelled positions."""

    @property
    def token_ids(self) -> npt.NDArray[np.int32]: ...  # noqa: D102
    @property
    def labelled(self) -> npt.NDArray[np.int32]: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """A window of a document: ``token_ids`` int32 (T,), ``labelled`` int32 (P,), ascending."""

    document_id: str
    token_ids: npt.NDArray[np.int32]
    labelled: npt.NDArray[np.int32]

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the token ids, ``|`` and the labelled positions (as <i4)."""
        token_ids, labelled = (a.astype("<i4").tobytes() for a in (self.token_ids, self.labelled))
        return hashlib.sha256(token_ids + b"|" + labelled).hexdigest()


def labelled_throughout(sequence: TokenSequence) -> TokenSequence:
    """The sequence with the label of every position wanted, whoever speaks."""
    return replace(sequence, labelled=np.arange(len(sequence.token_ids), dtype=np.int32))


def observed_tokens(sequence: Labelled) -> npt.NDArray[np.int64]:
    """The token that follows each labelled position, (L,) int64; -100 after the last token."""
    following = np.append(sequence.token_ids[1:], UNOBSERVED).astype(np.int64)
    return following[sequence.labelled]


def tokenize(
    document: Document, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[TokenSequence]:
    """The document as consecutive windows of at most ``max_length`` tokens.

    Windows without a labelled position are left out. The last position of a window is labelled
    like any other, though its observed next token is then in the following window.

    Raises ``InputError`` for a conversation if the tokenizer has no chat template, gives no
    character offsets, or has a template that refuses or rewrites the conversation.
    """
    if document.messages is None:
        token_ids = tokenizer(document.content, verbose=False)["input_ids"]
        wanted = np.ones(len(token_ids), dtype=bool)
    else:
        token_ids, wanted = _conversation(document, document.messages, tokenizer)
    ids = np.asarray(token_ids, dtype=np.int32)
    windows = (slice(start, start + max_length) for start in range(0, len(ids), max_length))
    return [
        TokenSequence(document.id, ids[window], np.flatnonzero(wanted[window]).astype(np.int32))
        for window in windows
        if wanted[window].any()
    ]


def tokenize_all(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[TokenSequence]:
    """The windows of all documents in order; of one without any labelled token, an empty one.

    So whoever labels them can say which documents gave nothing.
    """
    nothing = np.empty(0, np.int32)
    return [
        sequence
        for document in documents
        for sequence in tokenize(document, tokenizer, max_length)
        or [TokenSequence(document.id, nothing, nothing)]
    ]


def _conversation(
    document: Document, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], npt.NDArray[np.bool_]]:
    if not any(message["role"] == "assistant" for message in messages):
        return [], np.zeros(0, dtype=bool)
    if messages[0]["role"] == "assistant":
        raise InputError(
            f"{document.origin}: the conversation begins with the assistant, which chat templates "
            "cannot render; put the message it answers before it"
        )
    if tokenizer.chat_template is None:
        raise InputError(
            f"{document.origin}: a conversation, but the teacher's tokenizer has no chat "
            "template; use `text`, or a teacher with a chat template"
        )
    if not tokenizer.is_fast:
        raise InputError(
            f"{document.origin}: conversations need a tokenizer that gives character offsets; "
            "save this one as tokenizer.json"
        )
    rendered = _render(document, messages, tokenizer)
    encoded = tokenizer(
        rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    begin, end = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    wanted = np.zeros(len(begin), dtype=bool)
    for start, stop in _assistant_spans(document, messages, tokenizer, rendered):
        of_assistant = (end > start) & (begin < stop)
        wanted[:-1] |= of_assistant[1:]
    return encoded["input_ids"], wanted


def _assistant_spans(
    document: Document,
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    rendered: str,
) -> Iterator[tuple[int, int]]:
    """Character spans of the assistant's turns: from after the header to the end-of-turn token."""

    def length_of_prefix(count: int, **options: Any) -> int:
        # Where a prompt says whether the answer begins with thoughts, either may have been said.
        for mode in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            prefix = _render(document, messages[:count], tokenizer, **options, **mode)
            if rendered.startswith(prefix):
                break
        else:
            raise InputError(
                f"{document.origin}: the chat template does not render the first {count} messages "
                "as the beginning of the whole conversation, so the assistant's tokens cannot be "
                "told apart; give the conversation as `text`"
            )
        return len(prefix)

    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = length_of_prefix(index, add_generation_prompt=True)
            stop = length_of_prefix(index + 1)
            turn = rendered[start:stop].rstrip()
            # White space that ends the turn is a separator if a marker stands before it;
            # without a marker it is itself what ends the turn.
            has_marker = turn.lstrip() != message["content"].strip()
            yield start, start + len(turn) if has_marker else stop


def _render(
    document: Document,
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise InputError(
            f"{document.origin}: the chat template refuses the conversation: {error}"
        ) from None
