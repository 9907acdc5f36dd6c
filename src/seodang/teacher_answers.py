"""Answers that the teacher writes to requests which nobody has answered: sequence-level data.

    tasks:
      - {name: routing, kind: choice, train: ..., requests: new.jsonl, held_out: ...}

Labelled examples are few, requests are many. What the teacher answers to them is distilled like
any document (sequence-level distillation: Kim and Rush, arXiv 1606.07947), with its distributions
as soft labels. A local teacher answers here, in batches; a served one is asked to chat, several
requests at a time, and says its choice where there are choices.

Answers are greedy, so that the same teacher gives the same ones. A local teacher's choice is the
likeliest; JSON is written under the task's schema. What then fails a check is left out, and
counted: JSON that is cut off or breaks its schema, an empty answer, and, where a task knows a
refusal, an answer that is neither that nor the request's own words.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from seodang.artifact import Artifact, Source, begin, sha256_file, write_atomically, write_json
from seodang.causal_lm import CausalLM, model_fingerprint
from seodang.corpus.build import extend
from seodang.corpus.documents import Document
from seodang.corpus.tasks import Example, Request, answered, read_examples, unseen_requests
from seodang.evaluation.responding import respond
from seodang.evaluation.structured import parsed, problem
from seodang.evaluation.task_metrics import Response
from seodang.evaluation.tasks import Task, load_task
from seodang.progress import say, track
from seodang.recipe import CorpusConfig, TaskConfig, TeacherConfig

Respond = Callable[[Task], list[Response]]
KIND = "teacher-answers"
ANSWERS = "answers.jsonl"
BLOCKS = "blocks"  # folder of what is answered so far
BLOCK_REQUESTS = 64  # answered together, and not asked again once they are


@dataclass(frozen=True)
class Answer:
    """What the teacher said to a request, and why it is left out, if it is."""

    request: Request
    said: str
    dropped: str | None

    def to_json(self, task: str) -> dict[str, Any]:
        """A line of the file of answers: the whole request, the answer, and what became of it."""
        asked = self.request.model_dump(exclude_none=True)
        return {"task": task, **asked, "answer": self.said, "dropped": self.dropped}


def answer_requests(
    teacher: TeacherConfig,
    directory: Path,
    tasks: Sequence[TaskConfig],
    near_duplicate: float,
    out: Path,
    *,
    sources: Sequence[Source] = (),
) -> Artifact:
    """Let ``teacher`` answer the requests of ``tasks``; every answer is in ``out``.

    ``directory`` holds the teacher, or at least the tokenizer of a served one. Resumes what ``out``
    holds.

    Raises ``InputError`` for files of tasks that cannot be read, and what asking a teacher raises.
    """
    inputs = {"teacher": model_fingerprint(directory)}
    for task in tasks:
        files = (task.requests, task.train, task.held_out, task.json_schema)
        for key, file in zip(("requests", "train", "held_out", "schema"), files, strict=True):
            if file is not None:
                inputs[f"{task.name}:{key}"] = sha256_file(Path(file))
    used = {
        "decoding": "greedy",
        "near_duplicate": near_duplicate,
        "served": teacher.server is not None,
        "precision": teacher.precision,
        "tasks": [task.model_dump(include={"name", "kind", "languages"}) for task in tasks],
    }
    draft = begin(out, KIND, used, inputs)
    if isinstance(draft, Artifact):
        return draft
    model = _asked(teacher, directory)
    lines, counts = [], Counter[str]()
    for config in tasks:
        requests = unseen_requests(config, near_duplicate)
        longest = _longest_answer(config)
        found = _answers(model, load_task(config), requests, longest, draft.path / BLOCKS)
        lines += [json.dumps(a.to_json(config.name), ensure_ascii=False) + "\n" for a in found]
        counts.update(answer.dropped or "kept" for answer in found)
    write_atomically(draft.path / ANSWERS, "".join(lines).encode())
    say("answers: " + ", ".join(f"{count:,} {reason}" for reason, count in counts.items()))
    summary = {"answers": dict(counts)}
    return draft.finish(sources=sources, summary=summary, temporary=[BLOCKS])


def with_answers(
    corpus: Artifact,
    answers: Artifact,
    tasks: Sequence[TaskConfig],
    config: CorpusConfig,
    tokenizer: Any,
    out: Path,
) -> Artifact:
    """``corpus`` and, among its training documents, the answers that were kept; into ``out``."""
    documents = partial(_documents, answers, tasks)
    return extend(corpus, documents, answers.digest, config, tokenizer, out)


def _documents(answers: Artifact, tasks: Sequence[TaskConfig]) -> list[Document]:
    named = {task.name: task for task in tasks}
    found = []
    with (answers.path / ANSWERS).open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            task, said, dropped = (line.pop(key) for key in ("task", "answer", "dropped"))
            if dropped is None:
                found.append(answered(named[task], Request.model_validate(line), said))
    return found


def _asked(teacher: TeacherConfig, directory: Path) -> Respond:
    """What gives the responses to a task."""
    if teacher.server is None:
        return partial(respond, CausalLM.load(directory, precision=teacher.precision))
    from seodang.evaluation.harness import HarnessModel

    assert teacher.model is not None
    return HarnessModel.served(teacher.server, teacher.model, None).respond


def _answers(
    model: Respond, task: Task, requests: Sequence[Request], longest: str, blocks: Path
) -> list[Answer]:
    """One answer to each request, judged by what can be judged without knowing the right one."""
    # Models are asked examples. What stands for the answer only says how long one may become.
    asked = [
        Example(answer=request.choices[0] if request.choices else longest, **dict(request))
        for request in requests
    ]
    said: list[str] = []
    with track(f"Answering ({task.name})", len(requests), "requests") as advance:
        for start in range(0, len(asked), BLOCK_REQUESTS):
            block, file = (
                asked[start : start + BLOCK_REQUESTS],
                blocks / f"{task.name}-{start}.json",
            )
            if not file.exists():
                responses = model(replace(task, examples=block))
                texts = [r.answer_to(asked) for asked, r in zip(block, responses, strict=True)]
                blocks.mkdir(exist_ok=True)
                write_json(file, texts)
            said += json.loads(file.read_bytes())
            advance(len(block))
    return [
        Answer(request, text, _fault(task, request, text))
        for request, text in zip(requests, said, strict=True)
    ]


def _fault(task: Task, request: Request, said: str) -> str | None:
    """Why an answer cannot be right; None if it may be."""
    if not said:
        return "empty"
    if request.choices is not None:
        return None if said in request.choices else "not a choice"
    if task.schema is not None:
        value = parsed(said)
        if value is None:
            return "not JSON"
        return None if problem(value, task.schema) is None else "breaks the schema"
    if task.refusal is not None and said != task.refusal:
        words = " ".join(request.words.split())
        return None if " ".join(said.split()) in words else "not in the request"
    return None


def _longest_answer(config: TaskConfig) -> str:
    file = Path(config.train or config.held_out)
    return max((e.answer for e in read_examples(file, config.kind, config.languages)), key=len)
