"""A store and its sequences in a form that people read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from seodang.errors import InputError
from seodang.softlabels.estimators import BIASED
from seodang.softlabels.shards import read_footer, readable
from seodang.softlabels.spelling import Spelling, laid_out, named, visible
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore
from seodang.softlabels.store import open as open_store
from seodang.softlabels.surprise import (
    BANDS,
    COLOURS,
    INK,
    Label,
    ShownToken,
    labels,
    percent,
    shown_tokens,
    surprise_in_words,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def describe(path: Path) -> dict[str, Any]:
    """What ``labels inspect`` says about the store at ``path``."""
    store = open_store(path)
    return {
        "path": str(path),
        "digest": store.artifact.digest,
        "tokens": store.num_tokens,
        "sequences": len(store),
        "bytes_per_token": store.bytes_per_token,
        **store.header.model_dump(),
        "biased": store.estimator in BIASED,
        "sources": [s.model_dump(exclude_none=True) for s in store.artifact.manifest.sources],
    }


def choose(
    store: SoftLabelStore, sequences: Sequence[int], first: int, document: str | None
) -> list[int]:
    """The sequences to show: those named, else those of a document, else the ``first`` ones.

    Raises ``InputError`` for a sequence or a document that the store does not hold.
    """
    for index in sequences:
        if not -len(store) <= index < len(store):
            raise InputError(f"{store.path}: has sequences 0 to {len(store) - 1}, not {index}")
    if sequences:
        return [index % len(store) for index in sequences]
    if document is None:
        return list(range(min(first, len(store))))
    found = [i for i, name in enumerate(_document_ids(store)) if name == document]
    if not found:
        raise InputError(f"{store.path}: holds no document {document!r}")
    return found


def _document_ids(store: SoftLabelStore) -> list[str]:
    names: list[str] = []
    for shard in sorted(store.path.glob("labels-*.parquet")):
        read_footer(shard)  # it is as it was written
        with readable(shard):
            table = pq.read_table(shard, columns=["document_id"], page_checksum_verification=True)
        names += table["document_id"].to_pylist()
    return names


def spelling_of(store: SoftLabelStore, tokenizer: Path | None) -> Spelling:
    """The spelling by the tokenizer in a directory, or by ids without one.

    Raises ``InputError`` if it is not the tokenizer that the labels were made with.
    """
    if tokenizer is None:
        return Spelling()
    from seodang.causal_lm import load_tokenizer, tokenizer_fingerprint

    loaded = load_tokenizer(tokenizer)
    store.check_tokenizer(tokenizer_fingerprint(loaded))
    return Spelling(loaded)


def rows(
    sequence: SoftLabelSequence, found: Sequence[Label], spelling: Spelling
) -> list[dict[str, Any]]:
    """Labels as JSON objects.

    ``next`` is the token that came. If the label does not hold it, its weight is 0 and
    ``surprise`` null.
    """
    return [
        {
            "position": label.position,
            "token": spelling.token(int(sequence.token_ids[label.position])),
            "entropy": label.entropy,
            "next": label.came and asdict(label.came),
            "surprise": label.surprise,
            "entries": [asdict(entry) for entry in label.largest],
        }
        for label in found
    ]


def as_json(
    store: SoftLabelStore, number: int, spelling: Spelling, positions: int, top: int
) -> dict[str, Any]:
    """A sequence and its first labelled ``positions`` as a JSON object."""
    sequence = store[number]
    found = list(itertools.islice(labels(sequence, store.header, spelling, top), positions))
    return {
        "document": sequence.document_id,
        "digest": sequence.digest,
        "positions": rows(sequence, found, spelling),
    }


def plain_lines(
    store: SoftLabelStore, number: int, spelling: Spelling, positions: int, top: int
) -> Iterator[str]:
    """A sequence and its first labelled ``positions`` as lines for a file or a pipe."""
    sequence = store[number]
    yield f"document {visible(sequence.document_id)}, {len(sequence.labelled)} labelled tokens"
    found = itertools.islice(labels(sequence, store.header, spelling, top), positions)
    for row in rows(sequence, list(found), spelling):
        entries = "  ".join(f"{e['token']!r} {e['weight']:.3f}" for e in row["entries"])
        token = repr(row["token"])
        yield f"{row['position']:>5} {token:<18} {row['entropy']:5.2f} nats -> {entries}"


def print_coloured(
    console: Console,
    store: SoftLabelStore,
    number: int,
    spelling: Spelling,
    positions: int,
    top: int,
) -> None:
    """Print a sequence on a terminal: its coloured text, and a table of the first positions."""
    sequence = store[number]
    found = list(labels(sequence, store.header, spelling, top))
    title = f"document {visible(sequence.document_id)}, {len(found)} labelled tokens"
    text = running_text(shown_tokens(sequence, found, spelling), spelling.separator)
    text.rstrip()
    console.print()
    console.print(title, style="bold", markup=False, highlight=False)
    console.print(text)
    if positions:
        console.print()
        console.print(label_table(found[:positions]))


def running_text(tokens: Sequence[ShownToken], separator: str) -> Text:
    """The tokens one after the other, coloured by how much each surprised the teacher."""
    from rich.text import Text

    text = Text()
    for token in tokens:
        style = "dim" if token.expected is None else band_style(token.expected.band)
        text.append(laid_out(token.text) or "▏", style=style)
        text.append(separator)
    return text


def band_style(band: int) -> str:
    """The terminal's colours of a band; what was expected keeps the terminal's own."""
    if band == 0:
        return ""
    underline = "underline " if band == len(BANDS) - 1 else ""
    return f"{underline}{INK[0]} on {COLOURS[band][0]}"


def legend(store: SoftLabelStore) -> Text:
    """The colour scale in words."""
    from rich.text import Text

    text = Text("the teacher gave it ")
    for band, (_, name) in enumerate(BANDS):
        text.append(f" {name} ", style=band_style(band)).append(" ")
    text.append("not labelled", style="dim")
    if store.estimator not in BIASED:
        text.append("\n≈ estimated from draws: right on average, not each by itself", style="dim")
    return text


def label_table(found: Sequence[Label]) -> Table:
    """The labels one by one: the token that came, its surprise, and what was expected."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("position", "entropy", "surprise"):
        table.add_column(name, justify="right")
    table.add_column("token")
    table.add_column("what the teacher expected", overflow="fold")
    for label in found:
        came = label.came
        expected = Text("   ").join(
            Text.assemble(
                (named(entry.id, entry.token), "bold" if came and entry.id == came.id else ""),
                (f" {percent(entry.weight, entry.estimate)}", "dim"),
            )
            for entry in label.largest
        )
        token = named(came.id, came.token) if came else "–"
        table.add_row(
            str(label.position + 1),
            f"{label.entropy:.2f}",
            surprise_in_words(label),
            Text.assemble((token, band_style(label.band) if came else "dim")),
            expected,
        )
    return table
