"""What the cards and the bill of materials say: facts of the artifacts, gathered once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from seodang.artifact import Artifact, FileEntry, Source, new_sources
from seodang.recipe import ReleaseConfig
from seodang.release.provenance import DataSource, training_data

METRICS = "metrics.json"


@dataclass(frozen=True)
class Facts:
    """Everything a release is made of. ``parity`` is gguf-parity.json, None without GGUF.

    ``weights`` are the released files that hold the model; ``portion`` is selection.json of the
    released data, None without; ``key`` is the fingerprint of the public key that verifies the
    release.
    """

    config: ReleaseConfig
    student: Artifact
    evaluation: Artifact
    corpus: Artifact
    soft_labels: Artifact
    weights: list[FileEntry]
    parity: dict[str, Any] | None
    portion: dict[str, Any] | None
    key: str

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """metrics.json of the evaluation."""
        metrics: dict[str, Any] = json.loads((self.evaluation.path / METRICS).read_bytes())
        return metrics

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """config.json of the student."""
        config: dict[str, Any] = json.loads((self.student.path / "config.json").read_bytes())
        return config

    @property
    def data(self) -> list[Source]:
        """The sources of the documents."""
        return self.corpus.manifest.sources

    @cached_property
    def training_data(self) -> list[DataSource]:
        """The sources of the documents that were trained on, by category."""
        return training_data(self.corpus)

    @property
    def teachers(self) -> list[Source]:
        """The sources of the soft labels that are not documents: the teacher."""
        documents = {source.name for source in self.data}
        return [s for s in self.soft_labels.manifest.sources if s.name not in documents]

    @property
    def started_from(self) -> list[Source]:
        """The sources of the model that the student started from, if that is not the teacher."""
        known = [*self.data, *self.soft_labels.manifest.sources]
        return new_sources(self.student.manifest.sources, known)

    @property
    def sources(self) -> list[Source]:
        """Everything the release comes from."""
        return [*self.data, *self.teachers, *self.started_from]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the soft-label store per labelled token."""
        manifest = self.soft_labels.manifest
        return sum(entry.size for entry in manifest.files) / int(manifest.summary["tokens"])
