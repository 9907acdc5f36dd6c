"""The corpus stage: a recipe's sources to documents and token sequences.

    from seodang.corpus.build import build, read_sequences
    corpus = build(recipe.corpus, tokenizer, fingerprint, Path("runs/demo/corpus"))
    train = read_sequences(corpus.path, "train")

Sources are read, exact duplicates dropped and near-duplicates clustered. The clusters are taken
in the order of their digests. A budget (``max_tokens`` of a source, ``train_tokens``,
``held_out_tokens``) takes documents in that order until it is met: the last one may go beyond it.

The training examples of tasks are documents among the others. What is a near-duplicate of a task's
held-out example, wherever it comes from, is dropped.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.artifact import Artifact, Source, begin, canonical_json, sha256_bytes, sha256_file
from seodang.corpus.documents import Document
from seodang.corpus.readers import read_source, source_digest
from seodang.corpus.sequences import TokenSequence, tokenize
from seodang.corpus.split import (
    Cluster,
    Side,
    clusters,
    comparable,
    split,
    without_duplicates,
)
from seodang.corpus.tasks import task_documents
from seodang.errors import InputError
from seodang.progress import say, track
from seodang.recipe import CorpusConfig, SourceConfig, TaskConfig

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

DOCUMENTS = "documents.jsonl"
SEQUENCES = "sequences.parquet"

_Dropped = dict[str, Counter[str]]
"""How many documents of a source were dropped, by reason."""


@dataclass(frozen=True)
class _Entry:
    """A document with its windows and the digest of its cluster."""

    document: Document
    cluster: str
    sequences: list[TokenSequence]

    @property
    def tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def labelled_tokens(self) -> int:
        return sum(len(sequence.labelled) for sequence in self.sequences)


def build(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_fingerprint: str,
    out: Path,
    tasks: Sequence[TaskConfig] = (),
) -> Artifact:
    """Make the corpus artifact at ``out``, or open it if it is there already.

    Raises ``InputError`` for sources that cannot be read (see ``read_source``) or tasks (see
    ``read_examples``), conversations that the chat template cannot take (see ``tokenize``), and a
    corpus that is empty or too small to split.
    """
    names = [source.name for source in config.sources]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"corpus.sources: several have the name {repeated[0]!r}; rename one")
    inputs = {f"source:{source.name}": source_digest(source) for source in config.sources}
    inputs |= {f"task:{task.name}": _task_digest(task) for task in tasks}
    inputs["tokenizer"] = tokenizer_fingerprint
    draft = begin(out, "corpus", _portable(config), inputs)
    if isinstance(draft, Artifact):
        return draft
    import pyarrow.parquet as pq

    dropped: _Dropped = defaultdict(Counter, {name: Counter() for name in names})
    sides_of_tasks = [task_documents(task) for task in tasks]
    examples = [example for train, _ in sides_of_tasks for example in train]
    held_out = [example for _, measured in sides_of_tasks for example in measured]
    documents = _distinct(config, examples, dropped)
    groups = _apart_from(held_out, documents, config.near_duplicate, dropped)
    entries = _tokenize(groups, tokenizer, config, dropped)
    if not entries:
        reasons = "; ".join(f"{name!r}: {_listed(counts)}" for name, counts in dropped.items())
        raise InputError(f"the corpus is empty, no source gives a usable document ({reasons})")
    kept = {entry.cluster for entry in entries}
    sides = split([group for group in groups if group.digest in kept], config.held_out)
    taken = _within_budgets(entries, sides, config, dropped)

    lines = [json.dumps(_line(e, sides[e.cluster]), ensure_ascii=False) + "\n" for e in taken]
    (out / DOCUMENTS).write_text("".join(lines), encoding="utf-8", newline="\n")
    pq.write_table(_sequence_table(taken, sides), out / SEQUENCES, compression="zstd")
    sources = [_source(source, inputs[f"source:{source.name}"], taken) for source in config.sources]
    sources += _task_sources([e for e in examples if e.source not in names], taken)
    for source in sources:
        if not source.documents:
            say(f"corpus: the source {source.name!r} gave nothing: {_listed(dropped[source.name])}")
    summary = _summary(taken, sides, dropped)
    say(
        "corpus: {train:,} documents to train on, {held_out:,} held out; ".format(
            **summary["documents"]
        )
        + "{train:,} and {held_out:,} tokens; ".format(**summary["tokens"])
        + f"dropped: {_listed(summary['dropped'])}"
    )
    return draft.finish(sources=sources, summary=summary)


def extend(
    corpus: Artifact,
    documents: Callable[[], list[Document]],
    digest: str,
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
) -> Artifact:
    """``corpus`` with further ``documents`` on its training side, which ``digest`` identifies.

    What has the words of a document that is there is left out, and counted. In ``documents.jsonl``
    the new ones have the key ``written_by_teacher``. Raises what :func:`build` raises for them.
    """
    draft = begin(out, "corpus", corpus.manifest.config, {"corpus": corpus.digest, "added": digest})
    if isinstance(draft, Artifact):
        return draft
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = read_documents(corpus.path)
    known = {line["id"] for line in lines}
    dropped: _Dropped = defaultdict(Counter)
    given = documents()
    added = [d for d in without_duplicates(given) if d.id not in known]
    repeated = Counter(d.source for d in given) - Counter(d.source for d in added)
    for name, count in repeated.items():
        dropped[name]["exact duplicate"] = count
    groups = [Cluster(sha256_bytes(document.id.encode()), [document]) for document in added]
    entries = _tokenize(groups, tokenizer, config, dropped)
    sides: dict[str, Side] = {entry.cluster: "train" for entry in entries}
    lines += [_line(entry, "train") | {"written_by_teacher": True} for entry in entries]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / DOCUMENTS).write_text(text, encoding="utf-8", newline="\n")
    before = pq.read_table(corpus.path / SEQUENCES)
    new_rows = _sequence_table(entries, sides).cast(before.schema)
    pq.write_table(pa.concat_tables([before, new_rows]), out / SEQUENCES, compression="zstd")
    summary = dict(corpus.manifest.summary)
    new = _summary(entries, sides, dropped)
    for key in ("documents", "tokens", "labelled_tokens"):
        summary[key] = {side: count + new[key][side] for side, count in summary[key].items()}
    summary["dropped"] = dict(Counter(summary["dropped"]) + Counter(new["dropped"]))
    say(f"corpus: {len(entries):,} documents more to train on; dropped: {_listed(new['dropped'])}")
    sources = [*corpus.manifest.sources]
    for source in _task_sources([entry.document for entry in entries], entries):
        sources.append(source.model_copy(update={"name": f"{source.name}; the teacher's answers"}))
    return draft.finish(sources=sources, summary=summary)


def read_documents(corpus: Path, side: Side | None = None) -> list[dict[str, Any]]:
    """The documents of a corpus artifact (of one ``side`` of the split) as in documents.jsonl."""
    Artifact.open(corpus, "corpus")
    with (corpus / DOCUMENTS).open(encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    return [document for document in documents if side in (None, document["split"])]


def read_sequences(corpus: Path, side: Side) -> list[TokenSequence]:
    """The sequences of one side of a corpus artifact, documents in the order of documents.jsonl."""
    import pyarrow.parquet as pq

    Artifact.open(corpus, "corpus")
    table = pq.read_table(corpus / SEQUENCES, filters=[("split", "=", side)])
    arrays = ([row.values.to_numpy() for row in table[name]] for name in ("token_ids", "labelled"))
    documents = table["document_id"].to_pylist()
    return [TokenSequence(*row) for row in zip(documents, *arrays, strict=True)]


def _portable(config: CorpusConfig) -> dict[str, Any]:
    """The config without this machine's folders."""
    dumped = config.model_dump()
    for source in dumped["sources"]:
        if source["path"] is not None:
            source["path"] = Path(source["path"]).name
    return dumped


def _task_digest(task: TaskConfig) -> str:
    """SHA-256 of what decides which documents a task gives and forbids."""
    files = [
        None if file is None else sha256_file(Path(file)) for file in (task.train, task.held_out)
    ]
    return sha256_bytes(canonical_json([task.kind, task.languages, *files]))


def _apart_from(
    held_out: list[Document], documents: list[Document], near_duplicate: float, dropped: _Dropped
) -> list[Cluster]:
    """The clusters of those documents that are no near-duplicates of a held-out example."""
    texts = {comparable(example) for example in held_out}
    for document in documents:
        if comparable(document) in texts:
            dropped[document.source]["held out for a task"] += 1
    apart = [document for document in documents if comparable(document) not in texts]
    groups = []
    measured = {id(example) for example in held_out}
    for group in clusters([*apart, *without_duplicates(held_out)], near_duplicate):
        if not any(id(document) in measured for document in group.documents):
            groups.append(group)
            continue
        for document in group.documents:
            if id(document) not in measured:
                dropped[document.source]["near-duplicate of a held-out example"] += 1
    return groups


def _distinct(config: CorpusConfig, examples: list[Document], dropped: _Dropped) -> list[Document]:
    """The usable documents of all sources and tasks, exact duplicates once."""
    read = [*_usable(config, dropped), *examples]
    distinct = without_duplicates(read)
    repeated = Counter(d.source for d in read) - Counter(d.source for d in distinct)
    for source, count in repeated.items():
        dropped[source]["exact duplicate"] = count
    return distinct


def _usable(config: CorpusConfig, dropped: _Dropped) -> Iterator[Document]:
    for source in config.sources:
        for document in read_source(source, config.max_document_bytes):
            if not document.content.strip():
                dropped[source.name]["empty"] += 1
            elif document.messages is not None and not any(
                message["role"] == "assistant" and message["content"]
                for message in document.messages
            ):
                dropped[source.name]["without an answer"] += 1
            else:
                yield document


def _tokenize(
    groups: list[Cluster],
    tokenizer: PreTrainedTokenizerBase,
    config: CorpusConfig,
    dropped: _Dropped,
) -> list[_Entry]:
    """The documents with their windows, those of each source until its budget is met."""
    budgets = {source.name: source.max_tokens or math.inf for source in config.sources}
    used: Counter[str] = Counter()
    entries = []
    documents = [(group.digest, document) for group in groups for document in group.documents]
    with track("Corpus", len(documents), "documents") as advance:
        for cluster, document in documents:
            advance(1)
            source = document.source
            if used[source] >= budgets.get(source, math.inf):
                dropped[source]["beyond a token budget"] += 1
                continue
            windows = tokenize(document, tokenizer, config.max_length)
            windows = [window for window in windows if len(window.token_ids) >= 2]
            if not windows:
                dropped[source]["shorter than two tokens"] += 1
                continue
            entries.append(_Entry(document, cluster, windows))
            used[source] += entries[-1].tokens
    return entries


def _within_budgets(
    entries: list[_Entry], sides: dict[str, Side], config: CorpusConfig, dropped: _Dropped
) -> list[_Entry]:
    """The documents of each side until its budget is met."""
    budgets = {"train": config.train_tokens, "held_out": config.held_out_tokens}
    used: Counter[str] = Counter()
    taken = []
    for entry in entries:
        side = sides[entry.cluster]
        if used[side] < (budgets[side] or math.inf):
            used[side] += entry.tokens
            taken.append(entry)
        else:
            dropped[entry.document.source]["beyond a token budget"] += 1
    return taken


def _source(source: SourceConfig, sha256: str, entries: list[_Entry]) -> Source:
    """A source as the manifest and the cards name it, with what was taken of it."""
    own = [entry for entry in entries if entry.document.source == source.name]
    return Source(
        name=source.name,
        license=source.license,
        version=str(source.pin()) if source.package else None,
        sha256=sha256,
        attribution=source.attribution,
        documents=len(own),
        tokens=sum(entry.tokens for entry in own),
    )


def _task_sources(examples: list[Document], entries: list[_Entry]) -> list[Source]:
    """Where the tasks' training examples came from, by source and licence."""
    named = sorted({(example.source, example.license) for example in examples})
    found = []
    for name, license_ in named:
        own = [e for e in entries if (e.document.source, e.document.license) == (name, license_)]
        tokens = sum(entry.tokens for entry in own)
        found.append(Source(name=name, license=license_, documents=len(own), tokens=tokens))
    return found


def _line(entry: _Entry, side: Side) -> dict[str, Any]:
    document = entry.document
    return {
        "id": document.id,
        "source": document.source,
        "license": document.license,
        "split": side,
        "cluster": entry.cluster[:16],
        "tokens": entry.tokens,
        "origin": document.origin,
        **({"synthetic": True} if document.synthetic else {}),
        **document.body,
    }


def _sequence_table(entries: list[_Entry], sides: dict[str, Side]) -> pa.Table:
    import pyarrow as pa

    rows = [(sides[entry.cluster], window) for entry in entries for window in entry.sequences]
    columns = {
        "document_id": pa.array([window.document_id for _, window in rows], pa.string()),
        "split": pa.array([side for side, _ in rows], pa.string()),
        "digest": pa.array([window.digest for _, window in rows], pa.string()),
        "token_ids": pa.array([window.token_ids for _, window in rows], pa.list_(pa.int32())),
        "labelled": pa.array([window.labelled for _, window in rows], pa.list_(pa.int32())),
    }
    return pa.table(columns)


def _summary(
    entries: list[_Entry], sides: dict[str, Side], dropped: _Dropped
) -> dict[str, dict[str, int]]:
    def total(measure: Callable[[_Entry], int]) -> dict[str, int]:
        return {
            side: sum(measure(entry) for entry in entries if sides[entry.cluster] == side)
            for side in ("train", "held_out")
        }

    return {
        "documents": total(lambda entry: 1),
        "tokens": total(lambda entry: entry.tokens),
        "labelled_tokens": total(lambda entry: entry.labelled_tokens),
        "dropped": dict(sum(dropped.values(), Counter())),
    }


def _listed(counts: dict[str, int]) -> str:
    """Reasons and counts in words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "nothing"
