"""Where the training data came from, in the categories of the European Union's template.

The template for the public summary of training content (Regulation (EU) 2024/1689, Article
53(1)(d); European Commission, July 2025) asks for data sources by category. The category follows
from what the corpus records of each document, and from nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from seodang.artifact import Artifact, Source
from seodang.corpus.build import read_documents

Category = Literal["public", "synthetic", "files"]


@dataclass(frozen=True)
class DataSource:
    """Documents of one source and licence that were trained on.

    ``source`` counts them and their tokens. ``category``: ``synthetic`` where the documents say
    that they were generated, ``public`` for packages of a public registry, else ``files``.
    """

    source: Source
    category: Category


def training_data(corpus: Artifact) -> list[DataSource]:
    """The sources of a corpus' training side, those of the recipe in its order first."""
    packages = {s["name"] for s in corpus.manifest.config["sources"] if s.get("package")}
    documents: dict[tuple[str, str, Category], list[int]] = defaultdict(list)
    for document in read_documents(corpus.path, "train"):
        name = document["source"]
        category: Category = "public" if name in packages else "files"
        if document.get("synthetic"):
            category = "synthetic"
        documents[name, document["license"], category].append(document["tokens"])
    order = {source.name: number for number, source in enumerate(corpus.manifest.sources)}
    found = []
    for key in sorted(documents, key=lambda key: (order.get(key[0], len(order)), key)):
        name, license_, category = key
        counts = {"documents": len(documents[key]), "tokens": sum(documents[key])}
        source = origin(corpus.manifest.sources, name, license_)
        found.append(DataSource(source.model_copy(update=counts), category))
    return found


def origin(sources: Sequence[Source], name: str, license_: str) -> Source:
    """The source of that name, as its documents of that licence have it."""
    named = [source for source in sources if source.name == name]
    exact = [source for source in named if source.license == license_]
    found = next(iter([*exact, *named]), Source(name=name, license=license_))
    return found.model_copy(update={"license": license_})
