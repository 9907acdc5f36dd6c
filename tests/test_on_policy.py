"""The on-policy stage on tiny models: what is generated, scored, learnt and kept."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from seodang import pipeline
from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM, load_tokenizer, tokenizer_fingerprint
from seodang.corpus.build import build, read_documents, read_sequences
from seodang.corpus.sequences import observed_tokens
from seodang.errors import InputError
from seodang.evaluation import on_policy as evaluation
from seodang.evaluation.on_policy import helps, judge, measure_on_policy
from seodang.recipe import GateConfig, OnPolicyConfig, StudentConfig, VocabularyConfig
from seodang.recipe_file import load_recipe
from seodang.softlabels.capture import capture
from seodang.softlabels.estimators import draw
from seodang.softlabels.store import SoftLabelStore
from seodang.student import on_policy
from seodang.student.generate import sample
from seodang.student.on_policy import answer, answers, choose_prompts, improve, read_answers
from seodang.student.train import train
from seodang.teacher import served
from seodang.teacher.local import LocalTeacher
from seodang.teacher.served import ServedTeacher
from test_served import Vllm
from tiny_run import tiny_recipe

STAGE = OnPolicyConfig(rounds=2, prompts=28, max_new_tokens=32, k=64, learning_rate=2e-3)


class World:
    """A teacher, a corpus and students, as a run makes them."""

    def __init__(self, folder):
        self.recipe = load_recipe(tiny_recipe(folder))
        self.directory = folder / "teacher"
        self.teacher = LocalTeacher(self.directory)
        tokenizer = load_tokenizer(self.directory)
        fingerprint = tokenizer_fingerprint(tokenizer)
        self.corpus = build(self.recipe.corpus, tokenizer, fingerprint, folder / "corpus")
        sequences = read_sequences(self.corpus.path, "train")
        labels = capture(self.teacher, sequences, self.recipe.soft_labels, folder / "labels")
        self.store = SoftLabelStore(labels)
        self.config = self.recipe.student.model_copy(
            update={"on_policy": STAGE, "batch_tokens": 64}
        )
        self.student = train(self.store, self.directory, self.config, folder / "student")
        self.documents = read_documents(self.corpus.path, "train")

    def improve(self, out, student=None, config=None):
        return improve(
            student or self.student,
            self.teacher,
            self.directory,
            self.corpus,
            config or self.config,
            out,
        )

    def measure(self, student, config=None):
        return measure_on_policy(
            student.path, self.teacher, self.corpus.path, config or self.config
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def improved(world, tmp_path_factory):
    return world.improve(tmp_path_factory.mktemp("improved") / "on-policy")


def random_prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 500, length).astype(np.int32) for length in lengths]


def uniforms_of(count, steps, seed=1):
    return list(np.random.default_rng(seed).random((count, steps)))


@torch.inference_mode()
def drawn_one_by_one(model, prompt, uniforms, temperature):
    """The same draws without cache, padding or batch, and numbers that surely give them.

    A number that falls between two tokens may draw either, by the rounding of the logits: each is
    moved to the middle of what its token has of the distribution.
    """
    ids, sure = torch.from_numpy(prompt.astype(np.int64)), uniforms.copy()
    for step, uniform in enumerate(uniforms):
        p = torch.softmax(model.model(ids[None]).logits[0, -1].float() / temperature, -1)
        token = int(draw(p[None], np.array([[uniform]]))[0, 0])
        below = float(p[:token].double().sum())
        sure[step] = (below + float(p[token]) / 2) / float(p.double().sum())
        ids = torch.cat([ids, torch.tensor([token])])
        if token in model.stop_ids:
            break
    return ids[len(prompt) :].numpy(), sure


def test_answers_are_the_models_own_draws_whatever_stands_beside_them(world):
    model = CausalLM.load(world.student.path)
    model.model.generation_config.repetition_penalty = 5.0  # must not be heeded
    prompts, uniforms = random_prompts([3, 17, 1, 9]), uniforms_of(4, 10)
    expected, sure = zip(
        *(drawn_one_by_one(model, *given, 0.7) for given in zip(prompts, uniforms, strict=True)),
        strict=True,
    )
    together = sample(model, prompts, sure, 0.7)
    assert model.model.generation_config.repetition_penalty == 5.0
    for prompt, numbers, wanted, found in zip(prompts, sure, expected, together, strict=True):
        np.testing.assert_array_equal(found, wanted)
        (alone,) = sample(model, [prompt], [numbers], 0.7)
        np.testing.assert_array_equal(found, alone)


def test_tokens_are_drawn_as_often_as_they_are_likely(world):
    model = CausalLM.load(world.student.path)
    (prompt,) = random_prompts([5])
    count, temperature = 500, 1.3
    strata = [np.array([(i + 0.5) / count]) for i in range(count)]
    found = np.concatenate(sample(model, [prompt] * count, strata, temperature))
    with torch.inference_mode():
        logits = model.model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
    expected = count * torch.softmax(logits / temperature, -1).numpy()
    assert np.abs(np.bincount(found, minlength=len(expected)) - expected).max() <= 1.0 + 1e-3


def test_an_answer_ends_with_the_token_that_stops_it(world):
    model = CausalLM.load(world.student.path)
    (stop,) = model.stop_ids
    assert stop == model.tokenizer.eos_token_id
    with torch.no_grad():  # a bias of the head cannot be set in a Llama: make every logit alike
        model.head_VH.zero_()
    uniform = (stop + 0.5) / model.vocab_size
    other = (stop + 7.5) / model.vocab_size
    numbers = [np.array([other, uniform, other]), np.array([other, other, other])]
    ended, cut = sample(model, random_prompts([4, 6]), numbers, 1.0)
    assert ended.tolist() == [stop + 7, stop]
    assert cut.tolist() == [stop + 7] * 3


def test_prompts_are_what_stands_before_an_answer(world):
    tokenizer = world.teacher.tokenizer
    by_id = {document["id"]: document for document in world.documents}
    prompts = list(choose_prompts(world.documents, tokenizer, [0, 1]))
    assert {prompt.document for prompt in prompts} == set(by_id)
    for prompt in prompts:
        document = by_id[prompt.document]
        if prompt.rendered:
            assert prompt.text.endswith("<|im_start|>assistant\n")
            assert document["messages"][0]["content"] in prompt.text
            assert document["messages"][1]["content"] not in prompt.text
        else:
            assert document["text"].startswith(prompt.text)
            assert len(prompt.tokens(tokenizer)) == on_policy.PROMPT_TOKENS
    orders = [
        [p.document for p in choose_prompts(world.documents, tokenizer, [0, n])] for n in (1, 2)
    ]
    assert orders[0] == [prompt.document for prompt in prompts] != orders[1]


def test_short_texts_are_continued_from_their_half(world):
    documents = [{"id": "a", "text": "card payment refund order account balance"}]
    (prompt,) = choose_prompts(documents, world.teacher.tokenizer, [0])
    half = len(world.teacher.tokenizer(documents[0]["text"])["input_ids"]) // 2
    assert len(prompt.tokens(world.teacher.tokenizer)) == half
    assert not list(choose_prompts([{"id": "a", "text": "a"}], world.teacher.tokenizer, [0]))


def test_the_labelled_positions_are_those_before_the_students_tokens(world):
    found = answers(world.student.path, world.teacher, world.documents, STAGE, [0, 1])
    assert len(found) == STAGE.prompts
    for item in found:
        said = observed_tokens(item.sequence)
        assert 0 < len(said) <= STAGE.max_new_tokens
        assert world.teacher.tokenizer.decode(said) == item.text
        assert item.stopped == (said[-1] == world.teacher.tokenizer.eos_token_id)
        prompt = item.sequence.token_ids[: item.sequence.labelled[0] + 1]
        assert world.teacher.tokenizer.decode(prompt) == item.prompt


def test_answers_are_the_same_again_and_others_in_another_round(world, tmp_path):
    def of_round(number, name):
        made = answer(
            world.student, world.teacher, world.corpus, world.config, number, tmp_path / name
        )
        return made, [tuple(s.token_ids.tolist()) for s in read_answers(made)]

    first, said = of_round(1, "a")
    again, same = of_round(1, "b")
    other, different = of_round(2, "c")
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert said == same
    assert not set(said) & set(different)
    assert first.verify() == []
    assert first.manifest.summary["answers"] == STAGE.prompts


def test_prompts_without_room_for_an_answer_are_refused(world):
    config = OnPolicyConfig(max_new_tokens=world.teacher.max_length - 1)
    with pytest.raises(InputError, match="no document gives a prompt"):
        answers(world.student.path, world.teacher, world.documents, config, [0])


def test_the_student_gets_closer_on_its_own_words(world, improved):
    before, after = world.measure(world.student), world.measure(improved)
    assert (
        before["answers"] == after["answers"] == len(read_documents(world.corpus.path, "held_out"))
    )
    assert after["divergence"] < 0.975 * before["divergence"]
    assert before == world.measure(world.student)
    assert improved.manifest.kind == "student"
    assert improved.verify() == []
    assert CausalLM.load(improved.path).vocab_size == world.teacher.vocab_size


@pytest.mark.parametrize("divergence", ["reverse-kl", "jsd"])
def test_the_measure_is_the_divergence_of_the_two_models(world, divergence):
    """With k of the whole vocabulary: against float64 softmaxes of both, token by token."""
    stage = STAGE.model_copy(
        update={"k": world.teacher.vocab_size, "divergence": divergence, "prompts": 3}
    )
    config = world.config.model_copy(update={"on_policy": stage})
    documents = read_documents(world.corpus.path, "held_out")
    student, total, count = CausalLM.load(world.student.path), 0.0, 0
    for item in answers(world.student.path, world.teacher, documents, stage, [config.seed, 0]):
        ids = torch.from_numpy(item.sequence.token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            log_p, log_q = (
                torch.log_softmax(m.model(ids).logits[0].double(), -1)[item.sequence.labelled]
                for m in (world.teacher.model, student)
            )
        if divergence == "jsd":
            log_m = torch.logaddexp(log_p, log_q) - np.log(2)
            both = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)) / 2
        else:
            both = log_q.exp() * (log_q - log_p)
        total += float(both.sum())
        count += len(item.sequence.labelled)
    found = world.measure(world.student, config)
    assert found["tokens"] == count
    # Stored probabilities are rounded at random (quantisation.dither).
    assert found["divergence"] == pytest.approx(total / count, rel=0.1)


def test_rounds_are_artifacts_beside_the_student(world, improved):
    rounds = improved.path.with_name("on-policy-rounds")
    assert sorted(str(f.parent.relative_to(rounds)) for f in rounds.rglob("manifest.json")) == [
        "round-1/answers",
        "round-1/soft-labels",
        "round-1/student",
        "round-2/answers",
        "round-2/soft-labels",
    ]
    for file in [*rounds.rglob("*"), *improved.path.rglob("*")]:
        if file.is_file():
            assert str(world.directory.parent).encode() not in file.read_bytes(), file
    log = [json.loads(line) for line in (improved.path / "training.jsonl").read_text().splitlines()]
    assert max(row["learning_rate"] for row in log) <= STAGE.learning_rate


def test_a_finished_stage_does_no_work(world, improved, monkeypatch):
    monkeypatch.setattr(CausalLM, "load", None)
    assert world.improve(improved.path).digest == improved.digest


def test_a_stopped_stage_goes_on_to_the_same_student(world, improved, tmp_path, monkeypatch):
    """Stopped before every piece of work in turn: answers, capture and training of each round."""
    out = tmp_path / "on-policy"
    calls = {"left": 0}

    def stopping(work):
        def wrapper(*arguments, **options):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise KeyboardInterrupt
            return work(*arguments, **options)

        return wrapper

    for name in ("answers", "capture", "train"):
        monkeypatch.setattr(on_policy, name, stopping(getattr(on_policy, name)))
    stopped = 0
    while stopped < 20:
        calls["left"] = stopped
        try:
            student = world.improve(out)
            break
        except KeyboardInterrupt:
            stopped += 1
    assert stopped == 4  # three pieces of work in the first round, then two: answers are kept
    assert student.digest == improved.digest


def test_a_student_with_a_trimmed_vocabulary(world, tmp_path):
    vocabulary = VocabularyConfig(trim=320)
    config = world.config.model_copy(update={"vocabulary": vocabulary})
    student = train(world.store, world.directory, config, tmp_path / "student")
    found = answers(student.path, world.teacher, world.documents, STAGE, [0, 1])
    tokenizer = world.teacher.tokenizer
    for item in found:
        assert tokenizer.decode(item.sequence.token_ids) == item.prompt + item.text
        said = tokenizer.decode(observed_tokens(item.sequence))
        assert said.endswith(item.text)
        assert len(said) <= len(item.text) + 16  # a token may reach over from the prompt
    after = world.improve(tmp_path / "on-policy", student, config)
    assert CausalLM.load(after.path).vocab_size == 320
    assert (after.path / "vocabulary.safetensors").read_bytes() == (
        student.path / "vocabulary.safetensors"
    ).read_bytes()
    assert world.measure(after, config)["divergence"] < world.measure(student, config)["divergence"]


def test_a_served_teacher_scores_as_a_local_one(world, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "START_PATIENCE", 5.0)
    server = Vllm(world.teacher.model, world.directory)
    try:
        teacher = ServedTeacher.connect(server.address, "tiny", world.directory)
        stage = STAGE.model_copy(update={"max_new_tokens": 4, "k": 8, "rounds": 1})
        config = world.config.model_copy(update={"on_policy": stage})
        found = measure_on_policy(world.student.path, teacher, world.corpus.path, config)
        local = world.measure(world.student, config)
        student = improve(
            world.student, teacher, world.directory, world.corpus, config, tmp_path / "out"
        )
    finally:
        server.down()
    assert found["tokens"] == local["tokens"]
    assert found["divergence"] == pytest.approx(local["divergence"], rel=0.01)
    assert student.manifest.summary["labelled"] == stage.prompts * stage.max_new_tokens


FIGURES = {"divergence": 1.0, "kl": 0.5, "gate_passed": True}


@pytest.mark.parametrize(
    ("change", "kept", "said"),
    [
        ({"divergence": 0.9}, True, "kept: the divergence on its own words went from 1.0000"),
        ({"divergence": 1.0}, False, "the first must fall"),
        ({"divergence": 1.1}, False, "the first must fall"),
        ({"divergence": float("nan")}, False, "the first must fall"),
        ({"divergence": 0.9, "kl": 0.509}, True, "kept"),
        ({"divergence": 0.9, "kl": 0.52}, False, "may rise by 2% at most"),
        ({"divergence": 0.9, "kl": 0.4}, True, "kept"),
        ({"divergence": 0.9, "gate_passed": False}, False, "the gate fails"),
    ],
)
def test_it_is_kept_only_if_it_helps(change, kept, said):
    found, reason = helps(FIGURES, {**FIGURES, **change})
    assert found is kept
    assert said in reason


def test_the_judgement_is_of_both_students_under_one_gate(world, improved, monkeypatch):
    figures = {"student": {"kl": 0.5}, "after_on_policy": {"kl": 0.4}}
    gate = GateConfig(max_kl=0.45)
    found = judge(world.student, improved, world.teacher, world.corpus, world.config, figures, gate)
    assert found["kept"]
    assert (found["before"]["gate_passed"], found["after"]["gate_passed"]) == (False, True)
    assert found["after"]["divergence"] < found["before"]["divergence"]
    monkeypatch.setattr(
        evaluation, "measure_on_policy", lambda student, *_: {"divergence": len(student.parts)}
    )
    assert not judge(improved, improved, world.teacher, world.corpus, world.config, figures, gate)[
        "kept"
    ]


def test_a_run_releases_the_better_of_the_two(world, tmp_path, monkeypatch):
    recipe = load_recipe(
        world.directory.parent / "recipe.yaml",
        [
            f"student.on_policy={json.dumps(STAGE.model_dump())}",
            "student.batch_tokens=64",
            "release.quantizations=[]",
            "evaluation.prompts=[]",
        ],
    )
    out, weights = tmp_path / "out", "model.safetensors"
    for tolerance, kept, released, other, name in (
        (-1.0, "before", "student", "after", "after_on_policy"),
        (1e9, "after", "on-policy", "before", "before_on_policy"),
    ):
        monkeypatch.setattr(evaluation, "KL_TOLERANCE", tolerance)
        result = pipeline.run(recipe, out)
        verdict, models = result.metrics["on_policy"], result.metrics["models"]
        assert verdict["kept"] is (kept == "after"), verdict
        assert models["student"]["kl"] == verdict[kept]["kl"]
        assert models[name]["kl"] == verdict[other]["kl"]
        assert (result.release / weights).read_bytes() == (out / released / weights).read_bytes()
        again = pipeline.run(recipe, out)
        assert not any(stage["ran"] for stage in again.stages.values())
        shutil.rmtree(out / "evaluation")


def test_a_config_without_the_stage_is_a_mistake_of_the_caller(world, tmp_path):
    with pytest.raises(ValueError, match="on_policy is None"):
        world.improve(tmp_path / "out", config=StudentConfig())
    assert Artifact.open(world.student.path).digest == world.student.digest
