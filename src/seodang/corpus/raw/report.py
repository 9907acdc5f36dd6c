"""What came in, what each step dropped, and what is left: the facts that the report shows.

Everything is counted from the documents themselves, those that were kept and those that every
step set aside. Samples are masked like the corpus, also those dropped before masking.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from seodang.artifact import sha256_bytes
from seodang.corpus.raw.config import RawCorpusConfig
from seodang.corpus.raw.personal_data import KINDS, mask
from seodang.corpus.raw.shards import read_shards

REPORT = "report.json"
SAMPLES = 10  # of what a step dropped, and of each other list
SAMPLE_CHARACTERS = 320
STEPS = {
    "language": "In a language that was not asked for, or none.",
    "quality": "Too short, too repetitive, or not made of words or code.",
    "contamination": "Shares words in a row with an evaluation set.",
    "exact-duplicates": "The same words as another document.",
    "near-duplicates": "Nearly the same as another document, which was kept.",
    "held-out-repeats": "Repeats a document that is held out.",
}

_Count = dict[str, int]


def make_report(config: RawCorpusConfig, out: Path, work: Path) -> dict[str, Any]:
    """The content of ``report.json``, from the finished sides in ``out`` and the steps' files."""
    train, held_out = _Tally(), _Tally()
    for side, tally in (("train", train), ("held-out", held_out)):
        for row in read_shards(out / side):
            tally.add(row)
    kept = train.plus(held_out)
    steps, dropped = [], _Tally()
    for name, meaning in STEPS.items():
        tally = _Tally()
        samples = _Samples(config.seed)
        for row in read_shards(work / "dropped" / name):
            tally.add(row)
            samples.add(row)
        dropped = dropped.plus(tally)
        steps.append(
            {
                "name": name,
                "meaning": meaning,
                "dropped": tally.total(),
                "reasons": dict(tally.reasons.most_common()),
                "samples": samples.rows(),
            }
        )
    came_in = kept.plus(dropped)
    return {
        "came_in": came_in.total(),
        "kept": kept.total(),
        "train": train.total(),
        "held_out": held_out.total(),
        "languages": {
            name: {
                "train": train.languages[name].json(),
                "held_out": held_out.languages[name].json(),
            }
            for name in sorted(kept.languages)
        },
        "licenses": {name: kept.licenses[name].json() for name in sorted(kept.licenses)},
        "sources": [
            {
                "name": source.name,
                "license": source.license,
                "attribution": source.attribution,
                "origin": str(source.pin() or "files of this machine"),
                "registry": source.registry if source.package else None,
                "came_in": came_in.sources[source.name].json(),
                "kept": kept.sources[source.name].json(),
                "languages": {
                    name: size.json()
                    for name, size in sorted(kept.source_languages[source.name].items())
                },
            }
            for source in config.sources
        ],
        "steps": steps,
        "sizes": {name: dict(sorted(kept.sizes[name].items())) for name in sorted(kept.sizes)},
        "encodings": _encodings(work),
        "near_duplicates": _clusters(work),
        "personal_data": _personal_data(work, config.seed),
        "contamination": _contamination(config, steps),
    }


class _Size:
    """A number of documents and their bytes in UTF-8."""

    def __init__(self, documents: int = 0, size: int = 0) -> None:
        self.documents = documents
        self.bytes = size

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.documents + other.documents, self.bytes + other.bytes)

    def json(self) -> _Count:
        return {"documents": self.documents, "bytes": self.bytes}


class _Tally:
    """Documents counted by source, language, licence, size and reason."""

    def __init__(self) -> None:
        self.sources: dict[str, _Size] = defaultdict(_Size)
        self.languages: dict[str, _Size] = defaultdict(_Size)
        self.licenses: dict[str, _Size] = defaultdict(_Size)
        self.source_languages: dict[str, dict[str, _Size]] = defaultdict(lambda: defaultdict(_Size))
        self.sizes: dict[str, Counter[int]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()

    def add(self, row: dict[str, Any]) -> None:
        size = _Size(1, len(row["text"].encode()))
        source, language = row["source"], row["language"] or "none"
        self.sources[source] += size
        self.languages[language] += size
        self.licenses[row["license"]] += size
        self.source_languages[source][language] += size
        self.sizes[language][size.bytes.bit_length()] += 1
        if row.get("filter_reason"):
            self.reasons[row["filter_reason"]] += 1

    def plus(self, other: _Tally) -> _Tally:
        result = _Tally()
        for tally in (self, other):
            for name in ("sources", "languages", "licenses"):
                for key, size in getattr(tally, name).items():
                    getattr(result, name)[key] += size
            for source, languages in tally.source_languages.items():
                for language, size in languages.items():
                    result.source_languages[source][language] += size
            for language, sizes in tally.sizes.items():
                result.sizes[language].update(sizes)
        return result

    def total(self) -> _Count:
        return sum(self.sources.values(), _Size()).json()


class _Samples:
    """A fixed random choice of rows: those whose ids have the smallest digests under a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept: list[tuple[int, str, dict[str, Any]]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Consider a row (``id``, ``origin`` and what ``rows`` shows)."""
        tag = f"{self.seed}:{row['id']}:{row['origin']}"
        entry = (-int(sha256_bytes(tag.encode())[:15], 16), tag, row)
        if len(self._kept) < SAMPLES:
            heapq.heappush(self._kept, entry)
        elif entry[:2] > self._kept[0][:2]:
            heapq.heapreplace(self._kept, entry)

    def rows(self) -> list[dict[str, Any]]:
        """The chosen rows, as the report shows them."""
        chosen = sorted(self._kept, key=lambda entry: entry[:2], reverse=True)
        return [
            {
                "source": row["source"],
                "origin": row["origin"],
                "language": row["language"],
                "reason": row.get("filter_reason"),
                "text": excerpt(row["text"]),
            }
            for _, _, row in chosen
        ]


def excerpt(text: str) -> str:
    """The beginning of a text, masked."""
    masked = mask(text[: 2 * SAMPLE_CHARACTERS], samples=0).text
    return masked if len(masked) <= SAMPLE_CHARACTERS else masked[:SAMPLE_CHARACTERS] + "…"


def _encodings(work: Path) -> _Count:
    """How many of the files that gave a document were in which encoding."""
    files: dict[str, str] = {}
    folders = [work / "clean", *(work / "dropped" / name for name in STEPS)]
    for folder in folders:
        for row in read_shards(folder):
            files[row["key"].partition("#")[0]] = row["encoding"] or "utf-8"
    return dict(Counter(files.values()).most_common())


def _clusters(work: Path) -> dict[str, Any]:
    """The clusters of near-duplicates: how many of which size, and the largest ones."""
    members: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in read_shards(work / "dropped" / "near-duplicates"):
        members[row["minhash_cluster_id"]].append(row)
    kept = {
        row["minhash_cluster_id"]: row["origin"]
        for row in read_shards(work / "unique")
        if row["minhash_cluster_id"] is not None and row["minhash_cluster_id"] >= 0
    }
    sizes = Counter(len(rows) + 1 for rows in members.values())
    largest = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))[:SAMPLES]
    return {
        "clusters": len(members),
        "sizes": {str(size): count for size, count in sorted(sizes.items())},
        "largest": [
            {
                "documents": len(rows) + 1,
                "kept": kept.get(number),
                "dropped": [row["origin"] for row in rows[:5]],
                "text": excerpt(rows[0]["text"]),
            }
            for number, rows in largest
        ],
    }


def _personal_data(work: Path, seed: int) -> dict[str, Any]:
    """How much of each kind was masked in the documents that passed the filters."""
    found: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    samples = {kind.name: _Samples(seed) for kind in KINDS}
    for row in _masked_rows(work):
        counts = json.loads(row["personal_data"])
        found.update(counts)
        documents.update(counts.keys())
        for name, context in json.loads(row["personal_samples"]):
            samples[name].add({**row, "text": context})
    return {
        kind.name: {
            "found": found[kind.name],
            "documents": documents[kind.name],
            "samples": samples[kind.name].rows(),
        }
        for kind in KINDS
    }


def _masked_rows(work: Path) -> Iterator[dict[str, Any]]:
    for folder in (work / "clean", work / "dropped" / "contamination"):
        for row in read_shards(folder):
            if row["personal_data"] not in (None, "{}"):
                yield row


def _contamination(
    config: RawCorpusConfig, steps: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What was looked for, and how many documents held some of it."""
    reasons = next(step["reasons"] for step in steps if step["name"] == "contamination")
    return [
        {
            "benchmark": benchmark.name,
            "origin": str(benchmark.pin() or "files of this machine"),
            "ngram": config.benchmark_ngram,
            "documents": reasons.get(benchmark.name, 0),
        }
        for benchmark in config.benchmarks
    ]
