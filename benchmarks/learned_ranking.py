"""How much can any ranker gain over the lexical search that the search recipe starts from?

    OMP_NUM_THREADS=1 python benchmarks/learned_ranking.py

Gradient-boosted trees (scikit-learn) rank the twenty candidates of a query by what words can tell:
the search's scores and places, TF-IDF over runs of letters in title, beginning and text, exact
matches, and lengths. They learn from all labels of the training queries, of which the recipe shows
its models half. Prints mean nDCG@10 over the queries that the search finds an answer to, of BM25,
of the search with its titles weighed, and of the trees, and the paired test of the last two. Where
trees gain nothing, what is left to gain takes more than words.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.feature_extraction.text import TfidfVectorizer

RECIPE = Path(__file__).parent.parent / "recipes" / "enterprise_search"
sys.path.insert(0, str(RECIPE))

from make_tasks import (  # noqa: E402
    DEPTH,
    Collection,
    Search,
    learned_collections,
    split_queries,
)

from seodang.corpus.task_writing import open_packages  # noqa: E402
from seodang.evaluation.statistics import difference, mean_of  # noqa: E402
from seodang.evaluation.task_metrics import AT, ranking_metrics  # noqa: E402
from seodang.lexical_search import letter_pairs  # noqa: E402

PARTS = {"title": 0, "beginning": 250, "text": 4000}  # characters


class Features:
    """What words tell of each candidate of a query."""

    def __init__(self, collection: Collection) -> None:
        self.collection, self.search = collection, Search(collection)
        self.rows = {page: row for row, page in enumerate(collection.pages)}
        self.parts = {
            part: [text[:length] if length else title for title, text in collection.pages.values()]
            for part, length in PARTS.items()
        }
        runs = {"analyzer": "char_wb", "ngram_range": (2, 4), "sublinear_tf": True}
        self.letters = {part: TfidfVectorizer(**runs) for part in PARTS}
        self.matrices = {p: self.letters[p].fit_transform(self.parts[p]) for p in PARTS}

    def of(self, query: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Features (candidates, 22), their two scores by the search, and their pages."""
        hits = self.search.hits(query)[:DEPTH]
        rows = [self.rows[hit.page] for hit in hits]
        words, wanted = re.findall(r"\w+", query.casefold()), letter_pairs(query)
        columns = []
        for part in PARTS:
            asked = self.letters[part].transform([query]).T
            alike = (self.matrices[part][rows] @ asked).toarray()[:, 0]
            columns += [alike, alike / (alike.max() or 1)]
            texts = [self.parts[part][row].casefold() for row in rows]
            columns.append([np.mean([word in text for word in words]) for text in texts])
            columns.append([text.count(query.casefold()) for text in texts])
            columns.append([math.log(1 + len(text)) for text in texts])
        titles = [letter_pairs(self.parts["title"][row]) for row in rows]
        columns.append([len(wanted & named) / max(1, len(wanted)) for named in titles])
        columns.append([len(wanted & named) / max(1, len(named)) for named in titles])
        best = max(hit.with_title for hit in hits)
        columns += [
            [hit.with_title / best for hit in hits],
            *np.array([hit.of_best for hit in hits]).T,
        ]
        columns += list(np.array([hit.places for hit in hits]).T)
        scores = np.array([hit.score for hit in hits]), np.array([hit.with_title for hit in hits])
        return np.column_stack(columns), *scores, [hit.page for hit in hits]


def main() -> None:
    packages = open_packages(RECIPE / "packages.yaml")
    for collection, of_train, of_held_out in learned_collections(packages):
        features = Features(collection)
        sides = split_queries(collection, of_train, of_held_out)
        answers = collection.answers
        known = set().union(*(answers[query] for query in sides["train"]))
        seen, right = [], []
        for query in sides["train"]:
            if features.search.hits(query):
                rows, _, _, pages = features.of(query)
                kept = [page in known for page in pages]  # as the recipe's training lists
                seen.append(rows[kept])
                right += [page in answers[query] for page in pages if page in known]
        trees = HistGradientBoostingClassifier(
            max_iter=150,
            learning_rate=0.05,
            max_leaf_nodes=8,
            l2_regularization=1.0,
            early_stopping=False,
        ).fit(np.concatenate(seen), right)
        for side in ("validation", "held-out"):
            found = []
            for query in sides[side]:
                if not features.search.hits(query):
                    continue
                rows, bm25, weighed, pages = features.of(query)
                relevant = np.array([float(page in answers[query]) for page in pages])
                if relevant.any():
                    ways = (bm25, weighed, trees.decision_function(rows))
                    orders = [np.argsort(-scores, kind="stable") for scores in ways]
                    found.append([ranking_metrics(relevant[o])[f"ndcg@{AT}"] for o in orders])
            figures = np.array(found)
            means = ", ".join(
                f"{name} {mean:.3f}"
                for name, mean in zip(
                    ("BM25", "titles weighed", "trees"), figures.mean(axis=0), strict=True
                )
            )
            p = difference(mean_of(figures[:, 2]), mean_of(figures[:, 1])).p
            print(f"{collection.name}, {len(found)} {side} queries: {means}; p {p:.2f}", flush=True)


if __name__ == "__main__":
    main()
