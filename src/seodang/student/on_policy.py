"""The on-policy stage: the student answers, the teacher scores, the student learns from that.

    student: {on_policy: {rounds: 1, prompts: 64, divergence: reverse-kl}}

Trained on other people's text, a student never sees where its own words lead. Here it does
(generalized knowledge distillation, GKD: Agarwal et al., arXiv 2306.13649; MiniLLM: Gu et al.,
arXiv 2306.08543). In each round it answers prompts of the training documents, the teacher's best
ids at every token of these answers are captured like any soft labels, and the student is trained
on them by reverse KL or JSD on the k+1 partition. Answers, soft labels and student of a round are
artifacts, so that the stage resumes like a run does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seodang.artifact import Artifact, Source, begin, sha256_bytes, write_atomically
from seodang.causal_lm import CausalLM
from seodang.corpus.build import read_documents
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError
from seodang.progress import track
from seodang.recipe import OnPolicyConfig, SoftLabelsConfig, StudentConfig
from seodang.softlabels.capture import capture
from seodang.softlabels.store import SoftLabelStore
from seodang.student.generate import sample
from seodang.student.train import train, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seodang.softlabels.labelling import Teacher

ANSWERS = "answers.jsonl"
PROMPT_TOKENS = 32  # of a plain text, that the student goes on from: half of it at most
PROMPT_CHARACTERS = 2048  # of it that are looked at


def improve(
    student: Artifact,
    teacher: Teacher,
    teacher_directory: Path,
    corpus: Artifact,
    config: StudentConfig,
    out: Path,
    *,
    sources: Sequence[Source] = (),
) -> Artifact:
    """Train ``student`` on its own answers; the student after the last round is in ``out``.

    ``teacher`` scores, and may be a served one; ``config.on_policy`` says how often. Rounds are
    kept beside ``out``, in ``OUT-rounds/round-N/{answers,soft-labels,student}``. Resumes what is
    there; nothing is loaded if nothing is left to do.

    Raises ``InputError`` if no training document gives a prompt, and what
    :func:`seodang.softlabels.capture.capture` and :func:`seodang.student.train.train` raise.
    """
    stage = config.on_policy
    if stage is None:
        raise ValueError("config.on_policy is None: there is no on-policy stage to run")
    tuning = config.model_copy(
        update={
            "divergence": stage.divergence,
            "learning_rate": stage.learning_rate,
            "epochs": 1,
            "cross_entropy_weight": 0.0,  # its own words are nothing to imitate
            "on_policy": None,
        }
    )
    for number in range(1, stage.rounds + 1):
        folder = out.with_name(f"{out.name}-rounds") / f"round-{number}"
        answers = answer(student, teacher, corpus, config, number, folder / "answers")
        labels = capture(
            teacher, read_answers(answers), scoring(stage), folder / "soft-labels", sources=sources
        )
        teacher.unload()  # it takes no memory while the student trains
        student = train(
            SoftLabelStore(labels),
            teacher_directory,
            tuning,
            out if number == stage.rounds else folder / "student",
            continue_from=student,
            sources=sources,
        )
    return student


def scoring(config: OnPolicyConfig) -> SoftLabelsConfig:
    """The soft labels that answers are given: the best k ids, and a bucket for the rest."""
    return SoftLabelsConfig(estimator="residual", k=config.k)


def answer(
    student: Artifact,
    teacher: Teacher,
    corpus: Artifact,
    config: StudentConfig,
    number: int,
    out: Path,
) -> Artifact:
    """The student's answers of round ``number``, to prompts of the training documents."""
    stage = config.on_policy
    assert stage is not None
    used = stage.model_dump(include={"prompts", "max_new_tokens", "temperature"})
    used |= {"seed": config.seed, "round": number}
    draft = begin(out, "answers", used, {"student": student.digest, "corpus": corpus.digest})
    if isinstance(draft, Artifact):
        return draft
    documents = read_documents(corpus.path, "train")
    found = answers(student.path, teacher, documents, stage, [config.seed, number])
    lines = [json.dumps(item.to_json(), ensure_ascii=False) + "\n" for item in found]
    write_atomically(draft.path / ANSWERS, "".join(lines).encode())
    return draft.finish(sources=corpus.manifest.sources, summary=summary(found))


def read_answers(artifact: Artifact) -> list[TokenSequence]:
    """The answers behind their prompts, in the teacher's tokens, the answers' labelled."""
    rows = [json.loads(line) for line in (artifact.path / ANSWERS).read_text("utf-8").splitlines()]
    return [
        TokenSequence(
            row["document"],
            np.array(row["token_ids"], np.int32),
            np.array(row["labelled"], np.int32),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Answer:
    """What the student said to a prompt, and the teacher's view of it.

    ``sequence`` holds prompt and answer in the teacher's tokens; labelled are the positions whose
    next token is the answer's. ``stopped`` says whether the student ended it.
    """

    prompt: str
    text: str
    stopped: bool
    sequence: TokenSequence

    def to_json(self) -> dict[str, Any]:
        """A line of ``answers.jsonl``."""
        return {
            "document": self.sequence.document_id,
            "prompt": self.prompt,
            "answer": self.text,
            "stopped": self.stopped,
            "token_ids": self.sequence.token_ids.tolist(),
            "labelled": self.sequence.labelled.tolist(),
        }


def summary(found: Sequence[Answer]) -> dict[str, Any]:
    """How many answers there are, how long, and how many the student ended itself."""
    return {
        "answers": len(found),
        "tokens": sum(len(item.sequence.labelled) for item in found),
        "stopped": sum(item.stopped for item in found),
    }


@dataclass(frozen=True)
class Prompt:
    """A prompt as text; ``rendered`` if a chat template wrote it, special tokens and all."""

    document: str
    text: str
    rendered: bool

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """The token ids as the corpus has them, int32 (length,)."""
        encoded = tokenizer(self.text, add_special_tokens=not self.rendered, verbose=False)
        return np.array(encoded["input_ids"], np.int32)


def answers(
    student: Path,
    teacher: Teacher,
    documents: Sequence[dict[str, Any]],
    config: OnPolicyConfig,
    seed: list[int],
) -> list[Answer]:
    """Answers of the student in ``student`` to prompts of ``documents``.

    Which documents, and every random number, follow from ``seed`` and the documents. Prompts that
    leave no room for an answer in the student's or the teacher's context are passed over.

    Raises ``InputError`` if no document gives a prompt.
    """
    model = CausalLM.load(student)
    room = min(teacher.max_length, model.max_length) - config.max_new_tokens
    chosen: list[Prompt] = []
    prompts: list[Any] = []
    for prompt in choose_prompts(documents, teacher.tokenizer, seed):
        if len(chosen) == config.prompts:
            break
        longest = max(len(prompt.tokens(t)) for t in (teacher.tokenizer, model.tokenizer))
        if 0 < longest <= room:
            chosen.append(prompt)
            prompts.append(prompt.tokens(model.tokenizer))
    if not chosen:
        raise InputError(
            "student.on_policy: no document gives a prompt that leaves room for an answer of "
            f"{config.max_new_tokens} tokens"
        )
    uniforms = [_uniforms(prompt, seed, config.max_new_tokens) for prompt in chosen]
    with track("Generating answers", len(prompts), "answers") as advance:
        said = sample(model, prompts, uniforms, config.temperature, advance=advance)
    stop = set(model.stop_ids)
    same_tokens = vocabulary_of(student) is None
    found = []
    for prompt, prompt_ids, answer_ids in zip(chosen, prompts, said, strict=True):
        text = str(model.tokenizer.decode(answer_ids))
        sequence = (
            _behind(prompt, prompt_ids, answer_ids)
            if same_tokens
            else _retokenized(prompt, text, teacher.tokenizer)
        )
        if len(sequence.labelled):
            found.append(Answer(prompt.text, text, int(answer_ids[-1]) in stop, sequence))
    return found


def choose_prompts(
    documents: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, seed: list[int]
) -> Iterator[Prompt]:
    """A prompt of every document, in a random order.

    Of a conversation, what stands before one of the assistant's turns; of a plain text its first
    tokens.
    """
    generator = np.random.default_rng(seed)
    for index in generator.permutation(len(documents)):
        document = documents[index]
        if messages := document.get("messages"):
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            before = messages[: generator.choice(turns)]
            text = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
            yield Prompt(document["id"], str(text), rendered=True)
        else:
            beginning = document["text"][:PROMPT_CHARACTERS]
            offsets = tokenizer(
                beginning,
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )["offset_mapping"]
            if kept := min(PROMPT_TOKENS, len(offsets) // 2):
                yield Prompt(document["id"], beginning[: offsets[kept - 1][1]], rendered=False)


def _uniforms(prompt: Prompt, seed: list[int], count: int) -> Any:
    """An answer's random numbers: they follow from its prompt and ``seed`` alone."""
    key = int(sha256_bytes(json.dumps([seed, prompt.document, prompt.text]).encode())[:32], 16)
    return np.random.Generator(np.random.Philox(key)).random(count)


def _behind(prompt: Prompt, prompt_ids: Any, answer_ids: Any) -> TokenSequence:
    """The very tokens that the student saw and drew."""
    token_ids = np.concatenate([prompt_ids, answer_ids])
    labelled = np.arange(len(prompt_ids) - 1, len(token_ids) - 1, dtype=np.int32)
    return TokenSequence(prompt.document, token_ids, labelled)


def _retokenized(
    prompt: Prompt, answer_text: str, tokenizer: PreTrainedTokenizerBase
) -> TokenSequence:
    """The text in the teacher's tokens, of a student whose own tokens are others."""
    encoded = tokenizer(
        prompt.text + answer_text,
        add_special_tokens=not prompt.rendered,
        return_offsets_mapping=True,
        verbose=False,
    )
    begin, end = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
    of_answer = (end > max(len(prompt.text), 1)) & (end > begin)
    labelled = np.flatnonzero(of_answer[1:]).astype(np.int32)
    return TokenSequence(prompt.document, np.array(encoded["input_ids"], np.int32), labelled)
