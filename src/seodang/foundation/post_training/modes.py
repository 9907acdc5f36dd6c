"""Both modes of a model on held-out problems: is the switch obeyed, and does thinking help?

Each problem is asked once with the prompt ending in ``<think>`` and once in ``</think>``; answers
are drawn at the temperature of the config, from random numbers that follow from its seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seodang.artifact import Artifact, begin, write_atomically, write_json
from seodang.causal_lm import CausalLM, length_batches
from seodang.foundation.post_training.config import PostTrainingConfig
from seodang.foundation.post_training.fine_tuning import prompt
from seodang.foundation.post_training.problem import MODES, Mode
from seodang.foundation.post_training.reasoning_data import Problem, read_problems
from seodang.foundation.post_training.rewards import Reward, keeps_to, reward
from seodang.progress import track

if TYPE_CHECKING:
    from rich.table import Table

KIND = "modes"
TABLE = "modes.json"
ANSWERS = "answers.jsonl"
BATCH_TOKENS = 32_768  # of prompts and answers that are in the cache at a time


@dataclass(frozen=True)
class Answered:
    """One answer: what was said, whether the turn ended, and what it earned."""

    problem: Problem
    mode: Mode
    said: str
    ended: bool
    tokens: int

    @property
    def obeyed(self) -> bool:
        """Whether the answer is of the mode that was asked for, and ends."""
        return self.ended and keeps_to(self.mode, self.said)

    def to_json(self) -> dict[str, Any]:
        """A line of the file of answers."""
        rest = {k: v for k, v in asdict(self).items() if k != "problem"}
        return {"question": self.problem.question, "expected": self.problem.answer, **rest}

    @property
    def earned(self) -> Reward:
        """What the answer is worth."""
        return reward(self.problem, self.mode, self.said, self.ended)


def measure_modes(
    config: PostTrainingConfig, step: str, model: Artifact, data: Artifact, out: Path
) -> Artifact:
    """Ask ``model`` every held-out problem of ``data`` in both modes; the answers are in ``out``.

    ``step`` is what the row of the table is called. The summary holds, for each mode: ``prompts``,
    ``obeyed``, ``accuracy``, ``reward``, ``tokens`` of an answer, ``accuracy`` by task and
    language.
    """
    used = config.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
    draft = begin(out, KIND, used | {"step": step}, {"model": model.digest, "data": data.digest})
    if isinstance(draft, Artifact):
        return draft
    problems = read_problems(data, "held-out")
    loaded = CausalLM.load(model.path)
    found = {mode: answer(loaded, problems, mode, config) for mode in MODES}
    rows = [a.to_json() for mode in MODES for a in found[mode]]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(draft.path / ANSWERS, "".join(lines).encode())
    summary: dict[str, Any] = {mode: figures(found[mode]) for mode in MODES}
    write_json(draft.path / TABLE, {"step": step, **summary})
    return draft.finish(sources=data.manifest.sources, summary=summary)


def answer(
    model: CausalLM, problems: Sequence[Problem], mode: Mode, config: PostTrainingConfig
) -> list[Answered]:
    """An answer of the model to each problem, in their order."""
    tokenizer = model.tokenizer
    prompts = [
        tokenizer(prompt(problem, mode, tokenizer), add_special_tokens=False)["input_ids"]
        for problem in problems
    ]
    eos = int(tokenizer.eos_token_id)
    found: dict[int, Answered] = {}
    lengths = [len(ids) + config.max_new_tokens for ids in prompts]
    with track(f"Answering ({mode})", len(prompts), "answers") as advance:
        for batch in length_batches(lengths, BATCH_TOKENS):
            with torch.random.fork_rng():
                torch.manual_seed(config.seed * 1_000_003 + batch[0])
                drawn_BT = model.generate(
                    [prompts[i] for i in batch],
                    do_sample=True,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    top_k=0,
                    max_new_tokens=config.max_new_tokens,
                    eos_token_id=eos,
                    pad_token_id=int(tokenizer.pad_token_id),
                )
            for index, ids in zip(batch, drawn_BT.tolist(), strict=True):
                kept = ids[: ids.index(eos)] if eos in ids else ids
                said = str(tokenizer.decode(kept))
                found[index] = Answered(problems[index], mode, said, eos in ids, len(kept))
            advance(len(batch))
    return [found[index] for index in range(len(problems))]


def figures(answers: Sequence[Answered]) -> dict[str, Any]:
    """What a row of the table says of the answers in one mode."""
    earned = [a.earned for a in answers]
    right = [found.correct == 1 for found in earned]

    def share(values: Sequence[bool]) -> float:
        return round(sum(values) / len(values), 4)

    def by(key: str) -> dict[str, float]:
        kinds = sorted({getattr(a.problem, key) for a in answers})
        return {
            kind: share(
                [r for a, r in zip(answers, right, strict=True) if getattr(a.problem, key) == kind]
            )
            for kind in kinds
        }

    return {
        "prompts": len(answers),
        "obeyed": share([a.obeyed for a in answers]),
        "accuracy": share(right),
        "reward": round(sum(found.total for found in earned) / len(earned), 4),
        "tokens": round(sum(a.tokens for a in answers) / len(answers), 1),
        "accuracy_by_task": by("task"),
        "accuracy_by_language": by("language"),
    }


def table(measured: Mapping[str, Artifact]) -> Table:
    """Both modes of every step as rows, for a terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(title="Held-out problems (synthetic), both modes", box=box.SIMPLE_HEAD)
    shown.add_column("step", no_wrap=True)
    shown.add_column("mode", no_wrap=True)
    for head in ("obeyed", "right", "reward", "tokens"):
        shown.add_column(head, justify="right", no_wrap=True)
    for step, artifact in measured.items():
        for number, mode in enumerate(MODES):
            row = artifact.manifest.summary[mode]
            shown.add_row(
                "" if number else step,
                mode,
                f"{row['obeyed']:.1%}",
                f"{row['accuracy']:.1%}",
                f"{row['reward']:+.2f}",
                f"{row['tokens']:.0f}",
            )
    return shown
