"""What weighing titles makes of the lexical search that the search recipe starts from.

    python benchmarks/lexical.py

Mean nDCG@10 over all queries of each collection of `recipes/enterprise_search`, also those that the
search finds no answer to: BM25 over title and text together, as the recipe's first stage, and with
the title's own BM25 added, times a weight. Choose the weight on the training queries.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

import numpy as np

RECIPE = Path(__file__).parent.parent / "recipes" / "enterprise_search"
sys.path.insert(0, str(RECIPE))

from make_tasks import Search, learned_collections, split_queries  # noqa: E402

from seodang.corpus.task_writing import open_packages  # noqa: E402
from seodang.evaluation.task_metrics import AT, ranking_metrics  # noqa: E402

WEIGHTS = [0.0, 0.25, 0.5, 1.0, 2.0]


def main() -> None:
    packages = open_packages(RECIPE / "packages.yaml")
    for collection, of_train, of_held_out in learned_collections(packages):
        search = Search(collection)
        sides = split_queries(collection, of_train, of_held_out)
        for side, queries in sides.items():
            found = [(search.scores(query), collection.answers[query]) for query in queries]
            for weight in WEIGHTS:
                figure = fmean(ndcg(scores, answers, weight) for scores, answers in found)
                print(f"{collection.name}, {len(queries)} {side} queries, weight of the title "
                      f"{weight}: {figure:.3f}", flush=True)  # fmt: skip


def ndcg(
    scores: tuple[dict[str, float], dict[str, float]], answers: set[str], weight: float
) -> float:
    """nDCG@10 of the pages that either index finds, by the weighed sum of their scores."""
    pages, titles = scores
    fused = {page: score + weight * titles.get(page, 0.0) for page, score in pages.items()}
    ranked = sorted(fused, key=lambda page: -fused[page])
    missed = len(answers - fused.keys())  # behind everything that is found
    relevance = [page in answers for page in ranked] + [False] * AT + [True] * missed
    return ranking_metrics(np.array(relevance, np.float64))[f"ndcg@{AT}"]


if __name__ == "__main__":
    main()
