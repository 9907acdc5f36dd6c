"""Duplicates, near-duplicates, and which side of the split a document is on.

Near-duplicates are found exactly, not by sketches. Two sets of n and m shingles whose Jaccard
similarity is at least t share one of the n - ⌈tn⌉ + 1 (and m - ⌈tm⌉ + 1) rarest of each ("prefix
filtering": Chaudhuri et al. 2006, Bayardo et al. 2007). So an index of the rarest finds every
candidate, and each candidate is compared in full. Rare shingles stand in few documents: the work
stays close to linear.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from seodang.artifact import sha256_bytes
from seodang.corpus.documents import Document
from seodang.errors import InputError

Side = Literal["train", "held_out"]

# Han and kana are written without spaces: there a character counts as a word.
_HAN_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_HAN_KANA}]|[^\\W{_HAN_KANA}]+")


@dataclass(frozen=True)
class Cluster:
    """Documents that must not be separated; the digest (hex) depends on nothing but them."""

    digest: str
    documents: list[Document]

    @property
    def draw(self) -> float:
        """A number in [0, 1), from a part of the digest that does not decide the order."""
        return int(self.digest[32:48], 16) / 2**64


def comparable(document: Document) -> str:
    """What exact duplicates have in common: the words, whatever their case and spacing."""
    return " ".join(document.content.casefold().split())


def without_duplicates(documents: Iterable[Document]) -> list[Document]:
    """The first document of every ``comparable`` text, in their order."""
    first: dict[str, Document] = {}
    for document in documents:
        first.setdefault(comparable(document), document)
    return list(first.values())


def words(text: str) -> list[str]:
    """The words of ``text`` in one case, without punctuation."""
    return _WORD.findall(text.casefold())


def shingles(text: str) -> set[str]:
    """The runs of three words of ``text``; of a shorter text, its words together."""
    found = words(text) or text.split()
    return {" ".join(found[start : start + 3]) for start in range(max(1, len(found) - 2))}


def clusters(documents: list[Document], threshold: float) -> list[Cluster]:
    """Group distinct documents so that no two groups hold near-duplicates of each other.

    Two documents are near-duplicates if the Jaccard similarity of their shingles is at least
    ``threshold`` (in (0, 1]); a cluster is what hangs together by such pairs. The clusters come
    in the order of their digests: random, but fixed, whatever the order of the documents and
    whichever documents are outside the cluster.
    """
    numbers: dict[str, int] = {}
    sets = [
        {
            numbers.setdefault(shingle, len(numbers))
            for shingle in shingles(document.compared or document.content)
        }
        for document in documents
    ]
    frequency = Counter(element for elements in sets for element in elements)
    parents = list(range(len(sets)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    # For each of the rarest shingles, the documents that hold it, by the root they had then:
    # of a cluster that a document has joined, no further member is looked at.
    index: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, elements in enumerate(sets):
        least_overlap = math.ceil(threshold * len(elements) - 1e-9)
        by_rarity = sorted(elements, key=lambda element: (frequency[element], element))
        rarest = by_rarity[: len(elements) - least_overlap + 1]
        compared = set()
        for element in rarest:
            for group, holders in index[element].items():
                for j in holders:
                    if root(group) == root(i):
                        break
                    if j not in compared and _jaccard(elements, sets[j]) >= threshold:
                        parents[root(i)] = root(j)
                    compared.add(j)
        for element in rarest:
            index[element][root(i)].append(i)

    members: dict[int, list[Document]] = defaultdict(list)
    for i, document in enumerate(documents):
        members[root(i)].append(document)
    return sorted(map(_cluster, members.values()), key=lambda cluster: cluster.digest)


def split(groups: list[Cluster], held_out: float) -> dict[str, Side]:
    """The side of every cluster, by digest; ``held_out`` is the expected share of clusters.

    A cluster keeps its side when others come and go. Only where all would be on one side does the
    one nearest to the border cross it. Raises ``InputError`` for fewer than two clusters.
    """
    if len(groups) < 2:
        raise InputError(
            "the corpus is too small to hold a part of it out: no two documents differ enough "
            "(`corpus.near_duplicate`); add documents"
        )
    draws = sorted(cluster.draw for cluster in groups)
    border = min(max(held_out, draws[1]), draws[-1])
    return {cluster.digest: "held_out" if cluster.draw < border else "train" for cluster in groups}


def _cluster(documents: list[Document]) -> Cluster:
    least = min(sha256_bytes(comparable(document).encode()) for document in documents)
    # Hashed again, since the least of many hashes is not a fair draw.
    digest = sha256_bytes(least.encode())
    return Cluster(digest, sorted(documents, key=lambda document: document.id))


def _jaccard(a: set[int], b: set[int]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
