"""What a release is built from, for tests: real artifacts of a tiny student, synthetic figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seodang.artifact import Artifact, Draft, Manifest, Source, begin
from seodang.corpus.build import build as build_corpus
from seodang.corpus.build import read_sequences
from seodang.recipe import CorpusConfig, ReleaseConfig, SourceConfig
from seodang.release.keys import new_keys
from tiny import TEXT, tiny_teacher, tiny_tokenizer
from tiny_store import config_of, synthetic_store

CONFIG = ReleaseConfig(
    name="tiny-student",
    license="Apache-2.0",
    description="A student with random weights, made by a test.",
    quantizations=["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"],
    parity_positions=16,
)
TEACHER = Source(
    name="tiny teacher | with a bar", license="MIT", version="1.0", attribution="Nobody, 2026"
)
METRICS = {  # synthetic: no model has these figures
    "models": {
        "teacher": {"kl": 0.0, "top1_agreement": 1.0, "perplexity": 7.11},
        "student": {"kl": 0.4321, "top1_agreement": 0.777, "perplexity": 9.22},
        "untrained": {"kl": 5.4321, "top1_agreement": 0.05, "perplexity": 901.33},
        "cross_entropy": {"kl": 0.9876, "top1_agreement": 0.61, "perplexity": 12.44},
    },
    "calibration": {},
    "held_out": {"documents": 4, "positions": 321},
    "partition": "full vocabulary of 600",
    "gate": {
        "passed": True,
        "checks": [
            {
                "name": "beats.untrained.kl",
                "model": "student",
                "value": 0.4321,
                "threshold": 4.4321,
                "comparison": "<",
                "passed": True,
            }
        ],
    },
}
for figures in METRICS["models"].values():  # type: ignore[attr-defined]
    figures |= {"calibration_error": 0.0123, "parameters": 2_345_678, "bytes": 9_382_712}
    figures |= {"tokens_per_second": 1234.0}


class Inputs(dict[str, Any]):
    """The keyword arguments of ``bundle.build``."""


def finished(path: Path, kind: str, **finish: Any) -> Callable[[Callable[[Path], None]], Artifact]:
    def make(write: Callable[[Path], None]) -> Artifact:
        draft = begin(path, kind, {"learning_rate": 0.001, "layers": 2}, {"from": "a test"})
        assert isinstance(draft, Draft)
        write(path)
        return draft.finish(**finish)

    return make


def texts_and_chats() -> list[dict[str, Any]]:
    """Plain documents and conversations."""
    lines = TEXT.splitlines()
    return [{"text": line} for line in lines] + [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(lines[:6], lines[6:12], strict=True)
    ]


def source(folder: Path, name: str, license_: str, documents: Sequence[dict[str, Any]]) -> Any:
    """A source of these documents, written below ``folder``."""
    file = folder / f"{len(list(folder.iterdir()))}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in documents))
    attribution = "The authors of these tests"
    return SourceConfig(name=name, license=license_, attribution=attribution, path=str(file))


def make_inputs(
    root: Path,
    sources: Sequence[SourceConfig] = (),
    *,
    teacher: Source = TEACHER,
    labelled: bool = False,
    **config: Any,
) -> Inputs:
    """Everything ``bundle.build`` wants, made below ``root``; ``config`` replaces keys of it.

    ``labelled``: the soft labels are a real store of random labels, not an empty file.
    """
    (root / "sources").mkdir(parents=True)
    sources = sources or [source(root / "sources", "help | texts", "CC-BY-4.0", texts_and_chats())]
    corpus = build_corpus(
        CorpusConfig(sources=list(sources), held_out=0.3),
        tiny_tokenizer(),
        "fingerprint",
        root / "corpus",
    )

    def write_student(path: Path) -> None:
        tiny_teacher(path, layers=2)
        (path / "training.jsonl").write_text('{"step": 1, "loss": 2.5}\n')

    def write_evaluation(path: Path) -> None:
        (path / "metrics.json").write_text(json.dumps(METRICS))
        (path / "samples.json").write_text("[]")
        (path / "report.html").write_text("<!doctype html><title>Report</title>")

    def write_labels(path: Path) -> None:
        (path / "labels-00000.parquet").write_bytes(b"\0" * 5000)

    summary = {"tokens": 1000, "sequences": 14, "estimator": "head-tail"}
    summary |= {"parameters": {"threshold": 0.06}, "layout": "fast", "vocab_size": 600}
    of_labels = [*corpus.manifest.sources, teacher]
    if labelled:
        items = read_sequences(corpus.path, "train")
        made = synthetic_store(
            root / "soft-labels", config_of("head-tail"), items, vocabulary=600, shard_size=7
        )
        content = made.manifest.model_dump(exclude={"checksum"}) | {"sources": of_labels}
        content["summary"] = summary | content["summary"]
        labels = Artifact(made.path, Manifest.make(**content))
    else:
        labels = finished(root / "soft-labels", "soft-labels", sources=of_labels, summary=summary)(
            write_labels
        )
    return Inputs(
        config=CONFIG.model_copy(update=config),
        corpus=corpus,
        soft_labels=labels,
        student=finished(root / "student", "student", summary={"tokens": 1000})(write_student),
        evaluation=finished(
            root / "evaluation", "evaluation", measured=["metrics.json", "report.html"]
        )(write_evaluation),
        key=new_keys(root)[0],
    )
