"""What matching words makes of the policy questions of `recipes/customer_service`.

    python benchmarks/matching_words.py [--tasks runs/customer_service/tasks] [--language en]

No model: each answer that a question may have stands behind a point of the passage; the one is
taken whose point shares the largest share of its pairs of letters with the question, and the
refusal if no point shares enough. What a specialist knows beyond words shows where this fails.
Figures are those of `seodang evaluate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from seodang.corpus.task_writing import user_text
from seodang.corpus.tasks import Example, read_examples
from seodang.lexical_search import letter_pairs

REFUSAL = "NO_ANSWER"
ENOUGH = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=Path, default=Path("runs/customer_service/tasks"))
    parser.add_argument("--language", choices=["ko", "en"], default="en")
    options = parser.parse_args()
    train, held_out = (
        read_examples(options.tasks / f"policy.{side}.jsonl", "answer", [options.language])
        for side in ("train", "held-out")
    )
    enough = max(ENOUGH, key=lambda share: right(train, share))
    print(f"{len(held_out)} held-out questions, {enough:g} of a point's pairs (chosen on "
          f"{len(train)} to train on): exact_match {right(held_out, enough):.3f}")  # fmt: skip
    for group in sorted({str(question.group) for question in held_out}):
        members = [question for question in held_out if question.group == group]
        print(f"  {len(members)} {group}: {right(members, enough):.3f}")


def right(asked: list[Example], enough: float) -> float:
    """The share of questions that are answered rightly."""
    return fmean(matching(question, enough) == question.answer for question in asked)


def matching(question: Example, enough: float) -> str:
    """The answer whose point has most of its pairs of letters in the question."""
    title, *passage, asked = user_text(question).splitlines()
    wanted = letter_pairs(asked.replace(title.partition(": ")[2], ""))
    shares: dict[str, float] = {}
    for line in passage:
        for choice in question.choices or []:
            point, cut, rest = line.rpartition(choice)
            pairs = letter_pairs(point)
            if cut and not rest.strip(" .*|") and pairs and choice != REFUSAL:
                share = len(wanted & pairs) / len(pairs)
                shares[choice] = max(shares.get(choice, 0.0), share)
    best = max(shares, key=lambda choice: shares[choice], default=REFUSAL)
    return best if shares.get(best, 0.0) >= enough else REFUSAL


if __name__ == "__main__":
    main()
