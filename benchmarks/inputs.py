"""What a student gains from labels of what is asked, and not of the answers alone.

    python benchmarks/inputs.py recipes/policy-desk.yaml runs/customer_service/student-policy

Takes the teacher and the answers of a finished run of the recipe, leaves every ninth answered
request out, and trains the recipe's student on the others twice: on the labels of the answers
(`soft_labels.inputs: false`), and on those of whole conversations, in the same steps. Prints how
many labels each learns from, its seconds and, for each metric of the task, how well it says what
the teacher says on the requests that were left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from seodang.artifact import write_atomically
from seodang.causal_lm import CausalLM
from seodang.corpus.build import read_documents, read_sequences
from seodang.evaluation.responding import respond
from seodang.evaluation.task_evaluation import figures
from seodang.evaluation.task_metrics import evaluate_responses
from seodang.evaluation.tasks import load_task
from seodang.recipe_file import load_recipe
from seodang.softlabels.capture import capture
from seodang.softlabels.store import open as open_store
from seodang.student.train import train
from seodang.teacher.local import LocalTeacher
from seodang.teacher_answers import ANSWERS

EVERY = 9  # of so many answered requests one is left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path, help="a finished run of the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/inputs"))
    parser.add_argument("--epochs", type=int, help="default: the recipe's")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    (config,) = (task for task in recipe.tasks if task.requests is not None)

    with (options.run / "answers" / ANSWERS).open(encoding="utf-8") as file:
        answered = [json.loads(line) for line in file]
    left_out = [line for line in answered if line.pop("dropped") is None][::EVERY]
    questions = {line["messages"][-1]["content"] for line in left_out}
    lines = [json.dumps(_request(line) | {"answer": line["answer"]}) + "\n" for line in left_out]
    options.out.mkdir(parents=True, exist_ok=True)
    file_left_out = options.out / "left-out.jsonl"
    write_atomically(file_left_out, "".join(lines).encode())
    asked = {"train": None, "requests": None, "held_out": str(file_left_out)}
    task = load_task(config.model_copy(update=asked))

    corpus = options.run / "corpus-with-answers"
    unseen = {
        document["id"]
        for document in read_documents(corpus, "train")
        if any(message["content"] in questions for message in document.get("messages", []))
    }
    sequences = [s for s in read_sequences(corpus, "train") if s.document_id not in unseen]
    print(f"{len(sequences):,} conversations to learn from, {len(left_out):,} requests left out")
    teacher = options.run / "teacher"
    for inputs in (False, True):
        name = "inputs-too" if inputs else "answers-alone"
        labels = recipe.soft_labels.model_copy(update={"inputs": inputs})
        capture(LocalTeacher(teacher), sequences, labels, options.out / f"labels-{name}")
        store = open_store(options.out / f"labels-{name}")
        student = recipe.student
        if options.epochs is not None:
            student = student.model_copy(update={"epochs": options.epochs})
        began = time.perf_counter()
        made = train(store, teacher, student, options.out / f"student-{name}")
        seconds = time.perf_counter() - began
        result = evaluate_responses(task, respond(CausalLM.load(made.path), task))
        shown = ", ".join(
            f"{metric} {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
            for metric, figure in figures(result).items()
            if metric != "by_language"
        )
        print(f"{name}: {made.manifest.summary['labelled']:,} labels, {seconds:.0f} s: {shown}")


def _request(line: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in line.items() if key not in ("task", "answer", "dropped")}


if __name__ == "__main__":
    main()
