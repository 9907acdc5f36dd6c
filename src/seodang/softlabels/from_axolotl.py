"""Labels from the columns of axolotl's knowledge distillation.

Read from `src/axolotl/integrations/kd/` of axolotl 0.21.0 (its wheel) and of its main branch at
commit 139786bf (2026): `chat_template.py`, `utils.py`, `collator.py` and `README.md`.

Input columns (`ChatTemplateStrategyWithKD` and `...KDv2`): a conversation, and a column of
log-probabilities, one row per token, right-aligned to the rendered conversation: of R rows and n
tokens, row r is the distribution of token n - R + r itself. A row is a list of
`{"token": "token_id:123", "logprob": -0.5}`, or a list of numbers with the ids in the column
`target_token_ids`. What vLLM gives for the first token is null.

Prepared columns (`axolotl preprocess`): `input_ids`, `labels`, `target_token_ids`,
`target_logprobs`, `target_mask`, one row per token. Which token a row is about has changed:

- up to 0.21.0 row j is the distribution of token j itself, and its mask is that of `labels[j]`
  ("we shift for causal models in the trainer", which the trainer no longer does);
- since 139786bf row j is the distribution of token j + 1, and its mask is that of `labels[j + 1]`.

The mask tells them apart: with A the positions of unmasked rows and L those of labels other than
-100, the first layout has A = L from where the rows begin to the end of the sequence, the second
A + 1 within L. A + 1 within L cannot be in the first: its last row would need a label after the
last one.

Prepared rows are renormalised over the stored ids and rescaled to `kd_temperature`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.corpus.documents import Document
from seodang.corpus.formats import Record, names
from seodang.corpus.sequences import tokenize
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREPARED = ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")
_UNTRAINED = -100


def read(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[ImportedSequence]:
    """The sequences of a file with axolotl's columns, prepared or not.

    Raises ``InputError`` for rows that do not fit their tokens or contradict each other.
    """
    shifts: dict[int, str] = {}
    for record in records(path):
        with as_written_by("axolotl", record):
            if "target_logprobs" in record.value:
                sequence, shift = _prepared(record, path)
                shifts.setdefault(shift, record.where)
            else:
                sequence = _conversation(record, path, tokenizer)
        if len(shifts) > 1:
            raise InputError(
                f"{record.where}: its masks follow another layout than those of "
                f"{next(iter(shifts.values()))}: the file mixes two versions of axolotl"
            )
        if sequence.labels:
            yield sequence


def _prepared(record: Record, path: Path) -> tuple[ImportedSequence, int]:
    """A prepared row, and by how many positions its rows lie behind their tokens."""
    where, row = record.where, record.value
    if missing := [name for name in _PREPARED if row.get(name) is None]:
        raise InputError(
            f"{where}: no column {', '.join(missing)}: the prepared columns are "
            f"{', '.join(_PREPARED)}, and without all of them it cannot be told which token a row "
            "is about"
        )
    lengths = {name: len(row[name]) for name in _PREPARED}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"{where}: columns of unequal length: {listed}")
    labelled = {i for i, label in enumerate(row["labels"]) if label != _UNTRAINED}
    kept: dict[int, Labelled] = {}
    for position, (ids, log_probs, mask) in enumerate(
        zip(row["target_token_ids"], row["target_logprobs"], row["target_mask"], strict=True)
    ):
        if not len(ids) == len(log_probs) == len(mask):
            raise InputError(
                f"{where}: row {position}: {len(ids)} ids, {len(log_probs)} log-probabilities and "
                f"{len(mask)} masks"
            )
        pairs = [
            (i, logarithm(p, where))
            for i, p, valid in zip(ids, log_probs, mask, strict=True)
            if valid
        ]
        if pairs:
            kept[position] = Labelled(position, [i for i, _ in pairs], [p for _, p in pairs])
    if {position + 1 for position in kept} <= labelled:
        shift = 0
    elif kept.keys() <= labelled:
        shift = 1
    else:
        raise InputError(
            f"{where}: `target_mask` fits neither its own token's `labels` nor the next one's, so "
            "it cannot be told which token a row is about"
        )
    labels = [
        Labelled(position - shift, label.ids, label.log_probs)
        for position, label in kept.items()
        if position >= shift  # nothing stands before the first token
    ]
    return ImportedSequence(where, document_id(record, path), list(row["input_ids"]), labels), shift


def _conversation(
    record: Record, path: Path, tokenizer: PreTrainedTokenizerBase
) -> ImportedSequence:
    where, row = record.where, record.value
    column = _logprobs_column(row, where)
    name = document_id(record, path)
    document = Document(
        id=name, source=path.name, license="", origin=where, messages=_messages(row, where)
    )
    windows = tokenize(document, tokenizer, sys.maxsize)
    if not windows:
        raise InputError(f"{where}: the conversation has no assistant's turn")
    (window,) = windows
    tokens = len(window.token_ids)
    rows = _rows(row, column, where)
    if len(rows) > tokens:
        raise InputError(
            f"{where}: `{column}` has {len(rows)} rows, the conversation {tokens} tokens with "
            "this tokenizer and its chat template: the file was made with others"
        )
    first = tokens - len(rows) - 1  # the position whose label the first row is
    wanted = set(window.labelled.tolist())
    labels = [
        Labelled(first + index, ids, log_probs)
        for index, (ids, log_probs) in enumerate(rows)
        if ids and first + index in wanted
    ]
    return ImportedSequence(where, name, window.token_ids.tolist(), labels)


def _logprobs_column(row: dict[str, Any], where: str) -> str:
    found = [key for key, value in row.items() if key.endswith("logprobs") and value is not None]
    if len(found) != 1:
        raise InputError(
            f"{where}: wants one column whose name ends in `logprobs`, or axolotl's prepared "
            f"columns {', '.join(_PREPARED)}; it has {names(row)}"
        )
    return found[0]


def _rows(row: dict[str, Any], column: str, where: str) -> list[tuple[list[int], list[float]]]:
    """Ids and log-probabilities of each row; both are empty where the file has none."""
    values = row[column]
    ids = row.get("target_token_ids")
    if ids is not None and len(ids) != len(values):
        raise InputError(
            f"{where}: `target_token_ids` has {len(ids)} rows, `{column}` {len(values)}"
        )
    rows: list[tuple[list[int], list[float]]] = []
    for index, entries in enumerate(values):
        at = f"{where}: row {index} of `{column}`"
        if not entries:
            rows.append(([], []))
        elif ids is not None:
            rows.append((list(ids[index] or []), [logarithm(entry, at) for entry in entries]))
        else:
            rows.append(_pairs(entries, at))
    return rows


def _pairs(entries: list[Any], where: str) -> tuple[list[int], list[float]]:
    ids, log_probs = [], []
    for entry in entries:
        if not isinstance(entry, dict) or not {"token", "logprob"} <= entry.keys():
            raise InputError(
                f'{where}: wants {{"token": "token_id:123", "logprob": -0.5}}, or numbers with '
                "the ids in `target_token_ids`"
            )
        token = numbered(entry["token"])
        if token is None:
            raise InputError(
                f"{where}: token {entry['token']!r} is no `token_id:NUMBER`, as vLLM writes it "
                "with --return-tokens-as-token-ids; import it as `distilabel`, which spells tokens"
            )
        ids.append(token)
        log_probs.append(logarithm(entry["logprob"], where))
    return ids, log_probs


def _messages(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """The one column of a row that is a conversation: messages of ``role`` and ``content``."""
    found = {key: value for key, value in row.items() if is_conversation(value)}
    if len(found) != 1:
        raise InputError(
            f"{where}: wants one column of messages with `role` and `content`, found "
            f"{names(found)} among {names(row)}"
        )
    (conversation,) = found.values()
    return [{"role": m["role"], "content": m["content"]} for m in conversation]
