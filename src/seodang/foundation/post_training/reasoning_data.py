"""Generated arithmetic and logic with checkable answers, in Korean and English: synthetic data.

    problems = make_problems(range(1000), seed=0)

The generators and verifiers are reasoning-gym's (Stojanovski et al., arXiv 2505.24760); every
problem follows from the seed and its number. A problem is worded in one language, with an answer
for either mode: with thoughts before it, or at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

from seodang.artifact import Artifact, Source, begin, write_atomically
from seodang.errors import InputError
from seodang.foundation.post_training import arithmetic_tasks, logic_tasks
from seodang.foundation.post_training.config import PostTrainingConfig
from seodang.foundation.post_training.problem import LANGUAGES, VARIANTS, Mode
from seodang.progress import say
from seodang.recipe import Language

Split = Literal["train", "overlap", "held-out"]
KIND = "reasoning-data"
THINK, END_THINK = "<think>", "</think>"
TASKS = {**arithmetic_tasks.TASKS, **logic_tasks.TASKS}


@dataclass(frozen=True)
class Problem:
    """A problem in words; ``entry`` is what the verifier needs of the generator's own."""

    task: str
    language: Language
    question: str
    thoughts: str
    answer: str
    entry: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A line of a file of problems."""
        return asdict(self)

    def completion(self, mode: Mode) -> str:
        """What the assistant says after a prompt that ends in ``<think>`` or ``</think>``."""
        return f"{self.thoughts}{END_THINK}{self.answer}" if mode == "think" else self.answer

    def is_right(self, answer: str) -> bool:
        """Whether reasoning-gym's verifier gives full marks for ``answer``, without thoughts."""
        import reasoning_gym

        task = TASKS[self.task]
        read = task.read(answer.strip(), self.entry, self.language)
        return bool(reasoning_gym.get_score_answer_fn(task.generator)(read, self.entry) == 1.0)


def make_problems(numbers: Iterable[int], seed: int, without: Iterable[str] = ()) -> list[Problem]:
    """The problems of these numbers: tasks and languages take turns.

    No question comes twice, and none that is in ``without``: generators of small worlds repeat
    themselves, and what is held out must not have been seen. So there may be fewer than numbers.
    """
    seen = set(without)
    problems = []
    for number in numbers:
        problem = make_problem(number, seed)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def make_problem(number: int, seed: int) -> Problem:
    """The problem of a number, which decides task, language and wording as well."""
    number_of_task, task = divmod(number, len(TASKS))
    index, language = divmod(number_of_task, len(LANGUAGES))
    name = list(TASKS)[task]
    entry = _plain(_generator(name, seed)[index])
    worded = TASKS[name].word(entry, LANGUAGES[language], index % VARIANTS)
    kept = {"answer": entry["answer"], "metadata": _needed(entry["metadata"])}
    return Problem(name, LANGUAGES[language], worded.question, worded.thoughts, worded.answer, kept)


def _needed(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: metadata[key] for key in ("names", "knight_knave_terms") if key in metadata}


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry as JSON has it: no NumPy strings, no tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(entry))
    return plain


@cache
def _generator(name: str, seed: int) -> Any:
    import reasoning_gym

    task = TASKS[name]
    # The generators add the index to the seed: far apart, two seeds share no problem.
    return reasoning_gym.create_dataset(
        task.generator, **task.parameters, seed=seed * 1_000_000_007, size=1
    )


def read_problems(artifact: Artifact, split: Split) -> list[Problem]:
    """The problems of a part of the data's artifact, in their order."""
    lines = (artifact.path / f"{split}.jsonl").read_text("utf-8").splitlines()
    return [Problem(**json.loads(line)) for line in lines]


def build_reasoning_data(config: PostTrainingConfig, out: Path) -> Artifact:
    """Generate the problems to train on, the further ones and the held-out ones, into ``out``.

    A question of one part is in no other. Raises ``InputError`` if reasoning-gym is not installed.
    """
    counts: dict[Split, int] = {
        "held-out": config.held_out,
        "overlap": config.overlap_problems,
        "train": config.problems,
    }
    used: dict[str, Any] = {"seed": config.seed, "counts": counts}
    used["reasoning_gym"] = _installed_version()
    draft = begin(out, KIND, used, {})
    if isinstance(draft, Artifact):
        return draft
    say(f"Generating {sum(counts.values()):,} problems (synthetic)")
    seen: set[str] = set()
    numbers = count()
    for split, wanted in counts.items():
        problems: list[Problem] = []
        while len(problems) < wanted:
            some = islice(numbers, wanted - len(problems))
            found = make_problems(some, config.seed, without=seen)
            seen |= {problem.question for problem in found}
            problems += found
        lines = [json.dumps(problem.to_json(), ensure_ascii=False) + "\n" for problem in problems]
        write_atomically(draft.path / f"{split}.jsonl", "".join(lines).encode())
    source = Source(
        name="generated arithmetic and logic (synthetic)",
        license="Apache-2.0",
        version=f"reasoning-gym {_installed_version()}",
        documents=sum(counts.values()),
    )
    return draft.finish(sources=[source], summary={"synthetic": True} | used)


def _installed_version() -> str:
    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        raise InputError(
            "post_training needs reasoning-gym: pip install 'seodang[foundation]'"
        ) from None
