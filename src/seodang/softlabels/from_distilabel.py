"""Labels from the column that distilabel's tasks write when log-probabilities are asked for.

Read from distilabel 1.5.3 (its wheel): `typing/models.py`, `models/llms/vllm.py`, `openai.py` and
`huggingface/inference_endpoints.py`, and `steps/tasks/base.py`.

A task T writes `llm_T_logprobs`: a row per token, each a list of `{"token": ..., "logprob": ...}`.
The rows are those of the generated tokens, `distilabel_metadata.raw_output_T`. With `echo=True`
the raw output begins with the prompt and so do the rows, the first of which is null. Row r is the
distribution of token r itself, given the text before it.

Tokens are written as text, so that an id is known only where no other id of the tokenizer is
spelled alike; vLLM's server writes `token_id:NUMBER` with --return-tokens-as-token-ids. The ids of
the text itself are those of the tokenizer, so rows and tokens must be equal in number; one more
row is that of the token that ended the reply.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.corpus.formats import Record, names
from seodang.errors import InputError
from seodang.softlabels.imported import (
    ImportedSequence,
    Labelled,
    as_written_by,
    document_id,
    is_conversation,
    logarithm,
    numbered,
    records,
)
from seodang.softlabels.spelling import Spelling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMN = re.compile(r"llm_(.+)_logprobs")


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[ImportedSequence]:
    """The sequences of a file that a distilabel task wrote; failed generations are left out.

    Raises ``InputError`` for rows that do not fit their tokens, and for a token whose text does
    not name one id.
    """
    vocabulary = _Vocabulary(tokenizer)
    for record in records(path):
        column, task = _column(record)
        if record.value[column] is None:  # the generation failed
            continue
        with as_written_by("distilabel", record):
            text = _text(record, task, tokenizer)
            sequence = _sequence(record, path, column, text, vocabulary)
        if sequence.labels:
            yield sequence


def _column(record: Record) -> tuple[str, str]:
    """The column of log-probabilities and the name of its task."""
    found = [match for key in record.value if (match := _COLUMN.fullmatch(key))]
    if len(found) != 1:
        raise InputError(
            f"{record.where}: wants one column `llm_TASK_logprobs`, found "
            f"{names(match[0] for match in found)} among {names(record.value)}"
        )
    return found[0][0], found[0][1]


class _Vocabulary:
    """The ids that are spelled as a given text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _ids(self) -> dict[str, list[int]]:
        spelling = Spelling(self.tokenizer)
        ids: dict[str, list[int]] = {}
        for token in sorted(self.tokenizer.get_vocab().values()):
            ids.setdefault(spelling.token(token), []).append(token)
        return ids

    def id(self, token: str, where: str) -> int:
        """The id of a token's text; raises ``InputError`` if it names none, or several."""
        number = numbered(token)
        if number is not None:
            return number
        found = self._ids.get(token, [])
        if len(found) != 1:
            which = (
                f"{len(found)} ids of the tokenizer are" if found else "no id of the tokenizer is"
            )
            raise InputError(
                f"{where}: {which} spelled {token!r}, so it cannot be told which one is meant; "
                "generate again with ids (vLLM's --return-tokens-as-token-ids)"
            )
        return found[0]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those that a tokenizer adds around it."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return found


@dataclass(frozen=True)
class _Text:
    """Prompt and reply as the engine saw them.

    ``end`` follows the reply where its turn ends; ``echoed``: the rows begin with the prompt's;
    ``chat``: the prompt is a conversation, so that only the reply is labelled.
    """

    prompt: str
    reply: str
    end: str
    echoed: bool
    chat: bool


def _text(record: Record, task: str, tokenizer: PreTrainedTokenizerBase) -> _Text:
    row, where = record.value, record.where
    metadata = row.get("distilabel_metadata") or {}
    reply = metadata.get(f"raw_output_{task}", row.get("generation"))
    given: Any = metadata.get(f"raw_input_{task}")
    if given is None and isinstance(row.get("instruction"), str):
        system = row.get("system_prompt")
        given = [{"role": "system", "content": system}] if system else []
        given.append({"role": "user", "content": row["instruction"]})
    chat = is_conversation(given)
    if not isinstance(reply, str) or not (chat or isinstance(given, str)):
        raise InputError(
            f"{where}: wants the prompt in `distilabel_metadata.raw_input_{task}` or "
            f"`instruction`, and the reply in `distilabel_metadata.raw_output_{task}` or "
            "`generation`, of one generation a row (not `group_generations`)"
        )
    if chat:
        prompt = _render(given, tokenizer, where, add_generation_prompt=True)
        turn = [*given, {"role": "assistant", "content": "x"}]
        end = _render(turn, tokenizer, where)[len(prompt) :].rpartition("x")[2]
    else:
        prompt, end = given, str(tokenizer.eos_token or "")
    echoed = bool(prompt) and reply.startswith(prompt)
    return _Text(prompt, reply.removeprefix(prompt) if echoed else reply, end, echoed, chat)


def _render(
    conversation: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    **options: Any,
) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise InputError(f"{where}: a conversation, but the tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses the conversation: {error}") from None


def _sequence(
    record: Record, path: Path, column: str, text: _Text, vocabulary: _Vocabulary
) -> ImportedSequence:
    where, rows = record.where, record.value[column]
    prompt, reply = vocabulary.encode(text.prompt), vocabulary.encode(text.reply)
    first = 0 if text.echoed else len(prompt)  # the token that the first row is about
    tokens = [*prompt, *reply]
    if len(rows) == len(tokens) - first + 1:
        tokens += vocabulary.encode(text.end)[:1]
    if len(rows) != len(tokens) - first:
        what = "prompt and reply have" if text.echoed else "the reply has"
        raise InputError(
            f"{where}: `{column}` has {len(rows)} rows, {what} {len(tokens) - first} tokens with "
            "this tokenizer: the file was made with another one, or the model wrote its text in "
            "other tokens than the tokenizer would"
        )
    labels = []
    for index, entries in enumerate(rows):
        position = first + index - 1  # the label of a token stands at the one before it
        if not entries or position < (len(prompt) - 1 if text.chat else 0):
            continue
        at = f"{where}: row {index} of `{column}`"
        if not all(isinstance(e, dict) and {"token", "logprob"} <= e.keys() for e in entries):
            raise InputError(f'{at}: wants {{"token": ..., "logprob": ...}}')
        labels.append(
            Labelled(
                position,
                [vocabulary.id(entry["token"], at) for entry in entries],
                [logarithm(entry["logprob"], at) for entry in entries],
            )
        )
    return ImportedSequence(where, document_id(record, path), tokens, labels)
