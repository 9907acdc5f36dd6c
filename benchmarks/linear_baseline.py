"""What a linear model over runs of letters makes of a task: the least that others must beat.

    python benchmarks/linear_baseline.py runs/manufacturing/tasks work_order
    python benchmarks/linear_baseline.py runs/customer_service/tasks routing --language ko

It learns from the labelled examples alone, each field of a JSON answer by itself, and says nothing
that it did not see: logistic regression over TF-IDF of one to four letters (scikit-learn), its
strength chosen by cross-validation. Its figures are those of `seodang evaluate`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from seodang.corpus.task_writing import user_text
from seodang.corpus.tasks import Example, read_examples
from seodang.evaluation.structured import field_f1

STRENGTHS = [1.0, 10.0, 100.0, 1000.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("task")
    parser.add_argument("--language", choices=["ko", "en"])
    options = parser.parse_args()
    kind = "json" if (options.folder / f"{options.task}.schema.json").exists() else "choice"
    languages = [options.language] if options.language else None
    train, held_out = (
        read_examples(options.folder / f"{options.task}.{side}.jsonl", kind, languages)
        for side in ("train", "held-out")
    )
    said: list[dict[str, Any]] = [{} for _ in held_out]
    right = [_fields(example) for example in held_out]
    for field in right[0]:
        known = [(user_text(e), json.dumps(_fields(e)[field])) for e in train]
        words, answers = zip(*known, strict=True)
        model = GridSearchCV(
            make_pipeline(
                TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True),
                LogisticRegression(max_iter=300),
            ),
            {"logisticregression__C": STRENGTHS},
            cv=3,
        )
        model.fit(words, answers)
        for value, found in zip(model.predict([user_text(e) for e in held_out]), said, strict=True):
            found[field] = json.loads(value)
        hits = [a[field] == b[field] for a, b in zip(said, right, strict=True)]
        print(f"{field}: {np.mean(hits):.3f} right, C = {model.best_params_}")
    groups = defaultdict(list)
    for example, found, true in zip(held_out, said, right, strict=True):
        for group in ("all", example.group):
            groups[group].append((field_f1(found, true), found == true))
    for group, scores in groups.items():
        f1, exact = np.mean(scores, axis=0)
        print(f"{group}: field_f1 {f1:.3f}, exact_match {exact:.3f} of {len(scores)}")


def _fields(example: Example) -> dict[str, Any]:
    """The answer's fields; of a choice, one."""
    if example.choices is not None:
        return {"answer": example.answer}
    answer: dict[str, Any] = json.loads(example.answer)
    return answer


if __name__ == "__main__":
    main()
