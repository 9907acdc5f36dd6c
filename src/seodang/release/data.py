"""The released part of the training data: documents and soft labels whose licences allow it.

    data/
    ├── README.md                     the card; Hugging Face `datasets` opens the parts by it
    ├── selection.json                rule, seed, counts: what was chosen of what
    ├── LICENSES/                     the notices that came with the packages
    └── permissive/                   one folder for each class of licences that occurs
        ├── documents.parquet
        └── soft-labels/              a store of soft labels

Only documents that were trained on are eligible: held-out ones stay what they are for. Of each
source and licence the share with the smallest SHA-256 of seed and content is taken, so that the
choice depends on nothing but the documents. What they may be passed on by is in
:mod:`seodang.release.licenses`; soft labels need the teacher's licence to allow it as well.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seodang.artifact import (
    Artifact,
    Source,
    canonical_json,
    sha256_bytes,
    write_atomically,
    write_json,
)
from seodang.corpus.build import read_documents
from seodang.errors import WorkFailed
from seodang.packages import open_package
from seodang.recipe import ReleasedDataConfig, SourceConfig
from seodang.release.licenses import CLASSES, LicenseClass, license_class, strictest
from seodang.release.provenance import origin
from seodang.softlabels.export import export_documents
from seodang.softlabels.store import SoftLabelStore

DOCUMENTS = "documents.parquet"
NOTICES = "LICENSES"
SELECTION = "selection.json"
SOFT_LABELS = "soft-labels"
COUNTS = ("documents", "tokens", "sequences", "labelled_tokens")
_NOTICE = re.compile(
    r".+\.dist-info/(licenses/.+|[^/]+)|[^/]+/[^/]+|usr/share/doc/[^/]+/copyright", re.IGNORECASE
)
_NOTICE_NAME = re.compile(r"(licen[cs]e|copying|copyright|notice|authors)[^/]*", re.IGNORECASE)
_MAX_NOTICE = 1 << 18  # bytes

Row = dict[str, Any]


def digest(document: Row) -> str:
    """SHA-256, in hexadecimal, of a document's ``text`` or ``messages`` and nothing else."""
    body = {key: document[key] for key in ("text", "messages") if document.get(key) is not None}
    return sha256_bytes(canonical_json(body))


def choose(documents: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The chosen documents, in their order: only those whose licence may be passed on.

    Of each source and licence ⌈share · n⌉ of its n documents, those with the smallest
    SHA-256 of ``SEED:DIGEST``.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    ranks = [sha256_bytes(f"{seed}:{digest(document)}".encode()) for document in documents]
    for document, rank in zip(documents, ranks, strict=True):
        groups[document["source"], document["license"]].append(rank)
    limits = {
        (source, license_): sorted(found)[math.ceil(share * len(found)) - 1]
        for (source, license_), found in groups.items()
        if license_class(license_) is not None
    }
    return [
        document
        for document, rank in zip(documents, ranks, strict=True)
        if rank <= limits.get((document["source"], document["license"]), "")
    ]


def write(
    out: Path,
    config: ReleasedDataConfig,
    corpus: Artifact,
    soft_labels: Artifact,
    teachers: Sequence[Source],
) -> dict[str, Any]:
    """Write the data below ``out``, all but its card, and return what selection.json holds.

    Equal input gives equal bytes. Raises ``WorkFailed`` if no document may be passed on, or if a
    file of the corpus or the soft labels is not what its manifest says.
    """
    for artifact in (corpus, soft_labels):
        if problems := artifact.verify():
            raise WorkFailed(f"{artifact.path}: {'; '.join(problems)}; delete it and run again")
    everything = read_documents(corpus.path)
    trained = [document for document in everything if document["split"] == "train"]
    chosen = choose(trained, config.share, config.seed)
    if not chosen:
        refused = ", ".join(sorted({document["license"] for document in trained}))
        raise WorkFailed(
            f"{corpus.path}: no document's licence lets it be passed on ({refused}); release "
            "without data: leave `release.data` out"
        )
    of_teachers = [license_class(teacher.license) for teacher in teachers]
    allowed = [found for found in of_teachers if found is not None]
    teacher = strictest(*allowed) if allowed and len(allowed) == len(teachers) else None
    classes: dict[LicenseClass, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    labelled: dict[LicenseClass, list[Row]] = defaultdict(list)
    for name in CLASSES:
        if rows := [row for row in chosen if license_class(row["license"]) == name]:
            (out / name).mkdir(parents=True)
            _write_documents(rows, out / name / DOCUMENTS)
            classes[name] |= {"documents": len(rows), "tokens": sum(row["tokens"] for row in rows)}
            if teacher is not None:
                labelled[strictest(name, teacher)] += rows
    if labelled:
        store = SoftLabelStore(soft_labels)
        # A store names documents by their ids alone, so that an id of two of them says too little.
        times = Counter(document["id"] for document in everything)
        ids = {sequence.document_id for sequence in store if times[sequence.document_id] == 1}
        for name, rows in labelled.items():
            if found := [row for row in rows if row["id"] in ids]:
                part = export_documents(
                    store,
                    {row["id"] for row in found},
                    out / name / SOFT_LABELS,
                    sources=[*_released_sources(corpus.manifest.sources, found), *teachers],
                    notes=["A part of a larger store: see the card of the data set it is in."],
                )
                for count, key in (("sequences", "sequences"), ("labelled_tokens", "tokens")):
                    classes[name][count] = part.manifest.summary[key]
    _write_notices(corpus, {row["source"] for row in chosen}, out / NOTICES)
    selection = {
        "share": config.share,
        "seed": config.seed,
        "corpus": corpus.digest,
        "soft_labels": soft_labels.digest,
        "classes": {name: classes[name] for name in CLASSES if name in classes},
        "sources": _chosen_of(corpus.manifest.sources, trained, chosen),
        "teachers": [
            {"name": t.name, "license": t.license, "class": c}
            for t, c in zip(teachers, of_teachers, strict=True)
        ],
    }
    write_json(out / SELECTION, selection)
    return selection


def _released_sources(sources: Sequence[Source], rows: Sequence[Row]) -> list[Source]:
    """The sources of these documents, with what is released of each."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["source"], row["license"]].append(row)
    return [
        origin(sources, *key).model_copy(
            update={"documents": len(own), "tokens": sum(row["tokens"] for row in own)}
        )
        for key, own in sorted(groups.items())
    ]


def _chosen_of(
    sources: Sequence[Source], trained: Sequence[Row], chosen: Sequence[Row]
) -> list[dict[str, Any]]:
    """By source and licence: its class (None if refused), documents trained on, and released."""
    released = Counter((row["source"], row["license"]) for row in chosen)
    return [
        {
            **source.model_dump(exclude={"documents", "tokens"}),
            "class": license_class(source.license),
            "documents": source.documents,
            "released": released[source.name, source.license],
        }
        for source in _released_sources(sources, trained)
    ]


def _write_documents(rows: Sequence[Row], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("digest", pa.string()),
            ("source", pa.string()),
            ("license", pa.string()),
            ("origin", pa.string()),
            ("synthetic", pa.bool_()),
            ("tokens", pa.int64()),
            ("text", pa.string()),
            ("messages", pa.list_(message)),
        ]
    )
    columns = {
        name: [digest(row) if name == "digest" else row.get(name) for row in rows]
        for name in schema.names
    }
    pq.write_table(pa.table(columns, schema=schema), file, compression="zstd")


def _write_notices(corpus: Artifact, names: set[str], folder: Path) -> None:
    """The licence and copyright notices of the packages that documents were taken from."""
    configs = [SourceConfig.model_validate(s) for s in corpus.manifest.config["sources"]]
    pins = [config.pin() for config in configs if config.name in names]
    for pin in dict.fromkeys(pin for pin in pins if pin is not None):
        with open_package(pin) as package:
            found = [
                f"{name}\n\n{package.read(name).decode(errors='replace').strip()}"
                for name in package.names
                if _NOTICE.fullmatch(name)
                and _NOTICE_NAME.fullmatch(name.rpartition("/")[2])
                and package.sizes[name] <= _MAX_NOTICE
            ]
        if found:
            folder.mkdir(exist_ok=True)
            target = folder / f"{pin.package.replace('/', '-')}-{pin.version}.txt"
            write_atomically(target, f"\n\n{'-' * 80}\n\n".join(found).encode() + b"\n")
