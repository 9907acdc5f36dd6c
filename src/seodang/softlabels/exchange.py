"""Labels into a store, from the files that axolotl's distillation and distilabel write.

    seodang labels import data.parquet --format axolotl --tokenizer teacher --teacher NAME
        --license apache-2.0 --out labels

The file is read twice: once to check all of it, once to write. A file that is refused leaves
nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seodang.artifact import (
    Artifact,
    Source,
    begin,
    canonical_json,
    sha256_bytes,
    sha256_file,
    write_atomically,
)
from seodang.causal_lm import load_tokenizer, tokenizer_fingerprint
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.progress import say, track
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels import from_axolotl, from_distilabel
from seodang.softlabels.capture import SHARD_TOKENS, SHARDS
from seodang.softlabels.card import CARD, IMPORTED, data_card
from seodang.softlabels.estimators import Entries
from seodang.softlabels.imported import ImportedSequence, Survey, probabilities
from seodang.softlabels.shards import StoreHeader, write_shard
from seodang.softlabels.store import shard_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Read = Callable[[Path, "PreTrainedTokenizerBase"], Iterator[ImportedSequence]]
Labelled = tuple[TokenSequence, Entries]

FORMATS: dict[str, Read] = {"axolotl": from_axolotl.read, "distilabel": from_distilabel.read}

_RENORMALISED = (
    "The file’s probabilities sum to 1 at every position, as axolotl prepares them: they were "
    "renormalised over the stored ids. How much the teacher gave to all the others is not known, "
    "so the estimator is `top-k`, and the weights of a position are too large by that share."
)


def import_labels(
    path: Path,
    form: str,
    tokenizer_directory: Path,
    teacher: str,
    license_name: str,
    out: Path,
    temperature: float = 1.0,
) -> Artifact:
    """Write the labels of ``path`` as a store in ``out``.

    ``form`` is a key of ``FORMATS``. ``teacher`` is a name for the cards; the header identifies
    the teacher by it and the file's SHA-256. ``license_name`` is that of the file. ``temperature``
    is the one that its probabilities were computed at.

    The estimator is ``residual``, exact for any set of ids, or ``top-k`` if the probabilities were
    renormalised. Only those can be brought back to temperature 1 from another: p^T restores their
    ratios, while the mass of ids that are not stored cannot be restored.

    Raises ``InputError`` for what cannot be believed (:mod:`seodang.softlabels.imported`) before
    anything is written.
    """
    if form not in FORMATS:
        raise InputError(f"--format {form}: unknown; known formats: {', '.join(FORMATS)}")
    if not 0 < temperature < float("inf"):
        raise InputError(f"--temperature {temperature}: must be a positive number")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    read = FORMATS[form]
    tokenizer = load_tokenizer(tokenizer_directory)
    say(f"Checking {path}")
    survey = Survey(_vocab_size(tokenizer, tokenizer_directory))
    for sequence in read(path, tokenizer):
        survey.add(sequence)
    if not survey.tokens:
        raise InputError(f"{path}: no row has a labelled token")
    survey.check_alignment(path)
    if temperature != 1 and not survey.renormalised:
        raise InputError(
            f"{path}: probabilities at temperature {temperature} of some of the ids cannot be "
            "brought to temperature 1, as the others’ share is not known; generate them again at 1"
        )
    digest = sha256_file(path)
    header = StoreHeader(
        estimator="top-k" if survey.renormalised else "residual",
        parameters={"k": survey.k},
        layout=SoftLabelsConfig().layout,
        vocab_size=survey.vocab_size,
        teacher=IMPORTED + sha256_bytes(canonical_json([teacher, digest])),
        tokenizer=tokenizer_fingerprint(tokenizer),
    )
    about = {"format": form, "teacher": teacher, "license": license_name}
    config = header.model_dump(exclude={"teacher", "tokenizer"})
    config |= {"imported": about | {"temperature": temperature}}
    inputs = {"teacher": header.teacher, "tokenizer": header.tokenizer, "file": digest}
    draft = begin(out, "soft-labels", config, inputs)
    if isinstance(draft, Artifact):
        return draft
    size, rows = 0, []
    with track("Importing soft labels", survey.tokens, "tok") as advance:
        labelled = ((_tokens(s), _entries(s, temperature)) for s in read(path, tokenizer))
        for number, shard in enumerate(_shards(labelled, survey.tokens)):
            file = draft.path / shard_name(number)
            sequences, entries = zip(*shard, strict=True)
            write_shard(file, header, sequences, entries)
            size += file.stat().st_size
            rows.append(len(shard))
            advance(sum(len(sequence.labelled) for sequence in sequences))
    summary = {
        "tokens": survey.tokens,
        "sequences": survey.sequences,
        "estimator": header.estimator,
        "parameters": header.parameters,
        "layout": header.layout,
        "vocab_size": header.vocab_size,
        "record_bytes": size,
        "rows": rows,
    }
    sources = [
        Source(name=path.name, license=license_name, sha256=digest),
        Source(name=teacher, license="not stated"),
    ]
    notes = [_RENORMALISED] if survey.renormalised else []
    write_atomically(draft.path / CARD, data_card(header, summary, sources, notes).encode())
    return draft.finish(sources=sources, summary=summary)


def _vocab_size(tokenizer: PreTrainedTokenizerBase, directory: Path) -> int:
    """Number of the teacher's outputs: its config's if there is one, else the tokenizer's ids."""
    known = 1 + max(tokenizer.get_vocab().values(), default=-1)
    try:
        config = json.loads((directory / "config.json").read_bytes())
        return max(known, int(config["vocab_size"]))
    except (OSError, ValueError, KeyError, TypeError):
        return known


def _shards(labelled: Iterator[Labelled], total: int) -> Iterator[list[Labelled]]:
    """Consecutive sequences, as many in a shard as a capture puts there."""
    size = max(SHARD_TOKENS, total // SHARDS)
    shard: list[Labelled] = []
    tokens = 0
    for sequence, entries in labelled:
        shard.append((sequence, entries))
        tokens += len(sequence.labelled)
        if tokens >= size:
            yield shard
            shard, tokens = [], 0
    if shard:
        yield shard


def _tokens(sequence: ImportedSequence) -> TokenSequence:
    return TokenSequence(
        sequence.document_id,
        np.asarray(sequence.token_ids, np.int32),
        np.asarray([label.position for label in sequence.labels], np.int32),
    )


def _entries(sequence: ImportedSequence, temperature: float) -> Entries:
    """The labels of a sequence, each by falling weight.

    ``entropy`` is that of the stored distribution with one outcome for all other ids, which is
    all that is known of the teacher's: a lower bound.
    """
    ids, weights, head_mass, entropy = [], [], [], []
    for label in sequence.labels:
        p = probabilities(label, temperature)
        order = np.argsort(-p, kind="stable")
        ids.append(np.asarray(label.ids, np.int32)[order])
        weights.append(p[order])
        outcomes = np.append(p, max(0.0, 1.0 - p.sum()))
        outcomes = outcomes[outcomes > 0]
        head_mass.append(p.sum())
        entropy.append(-(outcomes * np.log(outcomes)).sum())
    return Entries(
        counts=np.asarray([len(row) for row in ids], np.int64),
        ids=np.concatenate(ids),
        weights=np.concatenate(weights),
        head_mass=np.asarray(head_mass, np.float32),
        entropy=np.asarray(entropy, np.float32),
    )
