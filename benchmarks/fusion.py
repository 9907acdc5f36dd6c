"""What each weight of the search beside a model's log-odds makes of a ranking.

    python benchmarks/fusion.py runs/enterprise_search/student/student

Mean nDCG@10 on the validation queries of `recipes/enterprise_search`, which no model was trained on
and no result is reported of, for each `fusion` that the recipe may have, and of the search alone.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from seodang.causal_lm import CausalLM
from seodang.evaluation.responding import respond
from seodang.evaluation.task_metrics import AT, evaluate_responses
from seodang.evaluation.tasks import load_task
from seodang.recipe import Language, TaskConfig

WEIGHTS = [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 1e6]  # the last: the search alone
LANGUAGES: tuple[Language, ...] = ("ko", "en")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model directory")
    parser.add_argument("--tasks", type=Path, default=Path("runs/enterprise_search/tasks"))
    options = parser.parse_args()
    model = CausalLM.load(options.model)
    file = options.tasks / "relevance.validation.jsonl"
    scores = options.tasks / "relevance.validation.first-stage.jsonl"
    for language in LANGUAGES:
        task = load_task(
            TaskConfig(
                name=f"relevance_{language}",
                kind="ranking",
                languages=[language],
                held_out=str(file),
                first_stage=str(scores),
                fusion=1.0,
            )
        )
        responses = respond(model, task, task.name)
        for weight in WEIGHTS:
            found = evaluate_responses(replace(task, fusion=weight), responses)
            figure = fmean(row[f"ndcg@{AT}"] for row in found.rows)
            print(f"{task.name}, {len(found.rows)} queries, {weight:g}: {figure:.4f}")


if __name__ == "__main__":
    main()
