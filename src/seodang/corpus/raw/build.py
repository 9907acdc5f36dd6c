"""The raw-corpus stage: sources to clean, deduplicated, licensed documents.

    from seodang.corpus.raw.build import build_raw_corpus
    corpus = build_raw_corpus(recipe.corpus, Path("runs/nano/raw-corpus"), recipe_folder)

A run of datatrove pipelines (Penedo et al. 2024, "FineWeb"), in its order: read, identify the
language, filter by quality, mask personal data, keep benchmarks out; then exact and MinHash
deduplication over everything; then the held-out part. The number of shards is the config's, so
the result is the same with any number of workers; a stopped run goes on with the shards that were
not finished.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # of datatrove: we show our own progress

import multiprocess
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig

from seodang.artifact import Artifact, Source, begin, write_json
from seodang.corpus.raw.config import Benchmark, RawCorpusConfig, origin_name
from seodang.corpus.raw.formats import read_texts
from seodang.corpus.raw.held_out import WriteSides
from seodang.corpus.raw.language import LanguageFilter
from seodang.corpus.raw.overlap import Contamination, ContaminationFilter
from seodang.corpus.raw.personal_data import MaskPersonalData
from seodang.corpus.raw.quality import QualityFilter
from seodang.corpus.raw.reading import KIND
from seodang.corpus.raw.report import REPORT, make_report
from seodang.corpus.raw.shards import ShardReader, shard_writer
from seodang.corpus.raw.sources import (
    ReadSources,
    list_files,
    local_files,
    origin_digest,
    plan,
)
from seodang.corpus.raw.words import WORDS
from seodang.errors import InputError
from seodang.packages import open_package
from seodang.progress import say, track

WORK = "work"


def build_raw_corpus(
    config: RawCorpusConfig, out: Path, folder: Path, workers: int | None = None
) -> Artifact:
    """Make the raw corpus at ``out``, or open it if it is there already.

    ``folder`` is what relative paths of the sources start from; ``workers`` is how many processes
    work at a time (default: one per core). Raises ``InputError`` naming source and file for what
    is not on this machine or cannot be read, and for a corpus with nothing to train on or nothing
    held out.
    """
    origins = [("source", s) for s in config.sources] + [
        ("benchmark", b) for b in config.benchmarks
    ]
    inputs = {f"{kind}:{origin.name}": origin_digest(origin, folder) for kind, origin in origins}
    draft = begin(out, KIND, _portable(config), inputs)
    if isinstance(draft, Artifact):
        return draft
    work = out / WORK
    _run(_stages(config, folder, out, work), work, workers or os.cpu_count() or 1)
    report = make_report(config, out, work)
    _refuse_empty(report)
    write_json(out / REPORT, report)
    kept = report["kept"]
    say(
        f"raw corpus: {kept['documents']:,} documents, {kept['bytes'] / 1e6:.1f} MB kept; "
        + "; ".join(f"{s['name']}: {s['dropped']['documents']:,} dropped" for s in report["steps"])
    )
    sources = [_source(config, index, inputs, report) for index in range(len(config.sources))]
    summary = {key: report[key] for key in ("came_in", "kept", "train", "held_out", "languages")}
    return draft.finish(sources=sources, summary=summary, temporary=[WORK])


Stage = tuple[str, list[PipelineStep], int]
"""A datatrove pipeline: its name, its steps, and the number of tasks that it is cut into."""


def _stages(config: RawCorpusConfig, folder: Path, out: Path, work: Path) -> list[Stage]:
    """The pipelines in order; each reads what earlier ones wrote to ``work``."""
    for name in ("exact-found", "minhash-found", "minhash-clusters"):
        (work / name).mkdir(parents=True, exist_ok=True)  # datatrove asks for them if empty, too
    shards = plan(config, folder)
    dropped = work / "dropped"
    hashes = HashConfig(hash_fc="sha1")  # datatrove's xxhash needs xxhash below version 4
    exact = ExactDedupConfig(content_getter=_comparable, hash_config=hashes)
    minhash = MinhashConfig(
        n_grams=config.deduplication.ngram,
        num_buckets=config.deduplication.buckets,
        hashes_per_bucket=config.deduplication.bucket_hashes,
        seed=config.seed,
        hash_config=hashes,
    )
    return [
        (
            "clean",
            [
                ReadSources(config, folder, shards),
                LanguageFilter(
                    list(config.languages),
                    config.min_language_probability,
                    shard_writer(dropped / "language"),
                ),
                QualityFilter(config.quality, shard_writer(dropped / "quality")),
                MaskPersonalData(),
                ContaminationFilter(
                    _contamination(config, folder), shard_writer(dropped / "contamination")
                ),
                shard_writer(work / "clean"),
            ],
            config.shards,
        ),
        (
            "exact-signatures",
            [ShardReader(work / "clean"), ExactDedupSignature(str(work / "exact"), exact)],
            config.shards,
        ),
        (
            "exact-duplicates",
            [ExactFindDedups(str(work / "exact"), str(work / "exact-found"), exact)],
            1,
        ),
        (
            "minhash-signatures",
            [
                ShardReader(work / "clean"),
                ExactDedupFilter(
                    str(work / "exact-found"), exact, shard_writer(dropped / "exact-duplicates")
                ),
                shard_writer(work / "distinct"),
                MinhashDedupSignature(str(work / "minhash"), minhash, language=WORDS),
            ],
            config.shards,
        ),
        (
            "minhash-buckets",
            [
                MinhashDedupBuckets(
                    str(work / "minhash"), str(work / "minhash-found"), config=minhash
                )
            ],
            minhash.num_buckets,
        ),
        (
            "minhash-clusters",
            [
                MinhashDedupCluster(
                    str(work / "minhash-found"),
                    str(work / "minhash-clusters"),
                    config=minhash,
                    save_cluster_id=True,
                )
            ],
            1,
        ),
        (
            "near-duplicates",
            [
                ShardReader(work / "distinct"),
                MinhashDedupFilter(
                    str(work / "minhash-clusters"),
                    shard_writer(dropped / "near-duplicates"),
                    load_cluster_ids=True,
                ),
                shard_writer(work / "unique"),
            ],
            config.shards,
        ),
        (
            "held-out",
            [
                WriteSides(
                    work / "unique",
                    out,
                    shard_writer(dropped / "held-out-repeats"),
                    config.held_out,
                    config.deduplication,
                )
            ],
            config.shards,
        ),
    ]


def _run(stages: Sequence[Stage], work: Path, workers: int) -> None:
    # Workers are forked from a server that has imported what they need, not from this process.
    multiprocess.set_forkserver_preload(["seodang.corpus.raw.workers", __name__])
    with track("Raw corpus", sum(tasks for _, _, tasks in stages), "tasks") as advance:
        for name, pipeline, tasks in stages:
            LocalPipelineExecutor(
                pipeline,
                tasks=tasks,
                workers=min(workers, tasks),
                logging_dir=str(work / "logs" / name),
            ).run()
            advance(tasks, name)


def _comparable(document: Document) -> str:
    """What exact duplicates have in common: the words, whatever their case and spacing."""
    return " ".join(document.text.casefold().split())


def _contamination(config: RawCorpusConfig, folder: Path) -> Contamination:
    found = Contamination(config.benchmark_ngram)
    for benchmark in config.benchmarks:
        found.add(benchmark.name, iter(_records(benchmark, folder)))
    return found


def _records(benchmark: Benchmark, folder: Path) -> list[str]:
    """The texts of a benchmark's records."""
    texts: list[str] = []
    pin = benchmark.pin()
    if pin is None:
        files = {n: path.read_bytes() for n, path in local_files(benchmark, folder).items()}
    else:
        with open_package(pin) as package:
            files = {name: package.read(name) for name in list_files(benchmark, folder, package)}
    for name, data in files.items():
        where = f"benchmark {benchmark.name!r}: {name}"
        texts += [text for _, text in read_texts(data, name, where, None)[1]]
    return texts


def _refuse_empty(report: dict[str, Any]) -> None:
    steps = ", ".join(f"{s['name']} {s['dropped']['documents']:,}" for s in report["steps"])
    came = f"{report['came_in']['documents']:,} came in; dropped: {steps}"
    if not report["train"]["documents"]:
        raise InputError(f"the raw corpus has no document to train on ({came})")
    if not report["held_out"]["documents"]:
        raise InputError(
            f"the raw corpus has no document held out ({came}); raise `held_out`, or add sources"
        )


def _source(
    config: RawCorpusConfig, index: int, inputs: dict[str, str], report: dict[str, Any]
) -> Source:
    source = config.sources[index]
    return Source(
        name=source.name,
        license=source.license,
        version=str(source.pin()) if source.package else None,
        sha256=inputs[f"source:{source.name}"],
        attribution=source.attribution,
        documents=report["sources"][index]["kept"]["documents"],
    )


def _portable(config: RawCorpusConfig) -> dict[str, Any]:
    """The config without this machine's folders."""
    dumped = config.model_dump()
    for entry in (*dumped["sources"], *dumped["benchmarks"]):
        if entry["path"] is not None:
            entry["path"] = origin_name(re.sub(r"[/\\]+$", "", entry["path"]))
    return dumped
