"""Models on tasks: responses against plain forward passes, the harness, the command itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from typer.testing import CliRunner

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM
from seodang.cli import app
from seodang.evaluation import responding
from seodang.evaluation.comparison import Named, compare_models
from seodang.evaluation.constrained import _grammar, answers_under_schema
from seodang.evaluation.gate import check_metrics
from seodang.evaluation.harness import HarnessModel
from seodang.evaluation.responding import LocalModel, prompt_text, turn_end
from seodang.evaluation.task_metrics import evaluate_responses
from seodang.evaluation.task_report import quality_cost
from seodang.evaluation.tasks import Task, load_task
from seodang.recipe import GateConfig, TaskConfig
from tiny import tiny_teacher
from tiny_families import FAMILIES, save, tiny_model
from tiny_run import seodang
from tiny_tasks import REFUSAL, SCHEMA, examples, tiny_tasks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return CausalLM.load(tiny_teacher(tmp_path_factory.mktemp("model") / "m", layers=2))


def _reference(model: CausalLM, prompt: str, choice: str) -> float:
    """The log-likelihood of a choice, from one forward pass over everything, in float64."""
    encode = lambda text: model.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start, ids = len(encode(prompt)), encode(prompt + choice)
    with torch.inference_mode():
        logits = model.model(torch.tensor([ids], device=model.device)).logits[0].double()
    log_probs = torch.log_softmax(logits, -1)
    return sum(float(log_probs[at - 1, ids[at]]) for at in range(start, len(ids)))


@pytest.mark.parametrize("cache_tokens", [40, 8192])
def test_likelihoods_are_those_of_a_plain_forward_pass(
    model: CausalLM, cache_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responding, "CACHE_TOKENS", cache_tokens)
    task = Task("routing", "choice", [*examples("choice", range(2)), *_of_one_token()])
    end = turn_end(model.tokenizer)
    assert end == "<|im_end|>"
    found = responding.respond(model, task)
    for example, response in zip(task.examples, found, strict=True):
        prompt = prompt_text(model.tokenizer, example.request)
        expected = [_reference(model, prompt, choice + end) for choice in example.choices or []]
        np.testing.assert_allclose(response.log_likelihoods, expected, atol=1e-4)


def _of_one_token() -> list[Any]:
    (first, *_) = examples("choice", range(1))
    choices = ["a", "b", "<|im_end|>"]
    return [first.model_copy(update={"id": "short", "choices": choices, "answer": "a"})]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_reads_choices_after_a_kept_request(family: str, tmp_path: Path) -> None:
    model = CausalLM.load(save(tiny_model(family), tmp_path / "m"))
    prompts = ["the card", "a payment that was taken twice, and the interest"]
    choices = [["is lost", "was frozen at once by the bank", "x"], ["rate", "is returned to me"]]
    found = responding.choice_log_likelihoods(model, prompts, choices)
    for prompt, options, scores in zip(prompts, choices, found, strict=True):
        expected = [_reference(model, prompt, choice) for choice in options]
        np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_answers_are_greedy_in_whatever_batch(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task("help", "answer", examples("answer", range(2)), max_new_tokens=5)
    found = [response.said for response in responding.respond(model, task)]
    monkeypatch.setattr(responding, "CACHE_TOKENS", 1)
    assert [response.said for response in responding.respond(model, task)] == found
    ids = model.tokenizer(prompt_text(model.tokenizer, task.examples[0].request))["input_ids"]
    for _ in range(5):
        with torch.inference_mode():
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = model.tokenizer.decode(ids[-5:], skip_special_tokens=True)
    assert found[0] == expected.strip()


def test_an_answer_with_choices_is_the_likeliest_of_its_own(model: CausalLM) -> None:
    spans = [["card", "the card desk", REFUSAL], ["phone", REFUSAL, "call"]]
    asked = [
        example.model_copy(update={"answer": REFUSAL, "choices": spans[number % 2]})
        for number, example in enumerate(examples("answer", range(2)))
    ]
    task = Task("help", "answer", asked, refusal=REFUSAL)
    prompts = [prompt_text(model.tokenizer, example.request) for example in asked]
    end = responding.turn_end(model.tokenizer)
    choices = [[choice + end for choice in example.choices or []] for example in asked]
    scores = responding.choice_log_likelihoods(model, prompts, choices)
    expected = [
        own[int(np.argmax(of))] for own, of in zip(spans * len(asked), scores, strict=False)
    ]
    found = evaluate_responses(task, responding.respond(model, task))
    assert [row["said"] for row in found.rows] == expected
    assert [row["refused"] for row in found.rows] == [int(said == REFUSAL) for said in expected]
    assert HarnessModel.local(model).respond(task) == responding.respond(model, task)


def test_json_is_generated_under_its_schema_whatever_the_model(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task("order", "json", examples("json", range(2)), schema=SCHEMA)
    responses = responding.respond(model, task)
    found = evaluate_responses(task, responses)
    assert [row["schema_valid"] for row in found.rows] == [1] * len(task.examples)
    said = [json.loads(row["said"]) for row in found.rows]
    assert [row["said"] for row in found.rows] == [json.dumps(value) for value in said]
    assert HarnessModel.local(model).respond(task) == responses
    monkeypatch.setattr(responding, "CACHE_TOKENS", 1)
    assert responding.respond(model, task) == responses
    korean = {
        "type": "object",
        "properties": {"원인": {"enum": ["끼임", "추락"]}},
        "required": ["원인"],
    }
    named = Task("cause", "json", task.examples, schema={**korean, "additionalProperties": False})
    for response in responding.respond(model, named):
        assert response.said in ('{"원인": "끼임"}', '{"원인": "추락"}')


@pytest.mark.parametrize("family", ["llama", "axk1"])
def test_what_a_schema_forces_is_read_at_once_with_the_same_answers(
    family: str, tmp_path: Path
) -> None:
    model = CausalLM.load(save(tiny_model(family), tmp_path / "m"))
    ids = model.tokenizer("the card was frozen at once by the bank, and the phone too")["input_ids"]
    prompts = [np.array(ids[:length], np.int32) for length in (1, 12, 5, 3)]
    passes = []
    model.body.register_forward_hook(lambda *_: passes.append(1))
    found = answers_under_schema(model, prompts, SCHEMA, 60)
    assert len(passes) < max(map(len, found)) / 2
    for prompt, said in zip(prompts, found, strict=True):
        assert said == _plain_answer(model, prompt.tolist(), SCHEMA)
        answer = json.loads(model.tokenizer.decode(said))
        assert set(answer) == set(SCHEMA["properties"])
    short = answers_under_schema(model, prompts, SCHEMA, 4)
    assert short == [said[:4] for said in found]
    only = {"const": "the card"}
    forced = answers_under_schema(model, prompts[:2], only, 60)
    assert [model.tokenizer.decode(said) for said in forced] == ['"the card"'] * 2
    assert answers_under_schema(model, [], SCHEMA, 60) == []


def _plain_answer(model: CausalLM, prompt: list[int], schema: dict[str, Any]) -> list[int]:
    """The same from passes over everything, by what the library says of each token alone."""
    known = from_tokenizer(model.tokenizer, n_vocab=model.vocab_size, eos_token=model.stop_ids)
    matcher, said = LLMatcher(known, _grammar(schema)), []
    while not matcher.is_stopped():
        if not (forced := matcher.compute_ff_tokens()):
            with torch.no_grad():
                scores = model.model(torch.tensor([prompt + said])).logits[0, -1].clone()
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            possible = np.unpackbits(bits, bitorder="little")[: len(scores)]
            scores[torch.from_numpy(possible == 0)] = -math.inf
            forced = [int(scores.argmax())]
            if forced[0] in model.stop_ids:
                break
        matcher.consume_tokens(forced)
        said += forced
    return said


def test_a_longer_request_than_the_model_reads_is_cut_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tiny_teacher(tmp_path / "m", layers=1)
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = 40
    (directory / "config.json").write_text(json.dumps(config))
    task = Task("routing", "choice", examples("choice", range(1)))
    LocalModel(CausalLM.load(directory)).respond(task, "routing, m")
    said = capsys.readouterr().err
    assert "routing, m: 8 of 8 requests are longer than the 40 tokens" in said


def test_the_harness_asks_for_the_same(model: CausalLM) -> None:
    from lm_eval.models.huggingface import HFLM

    ours = HarnessModel.local(model)
    theirs = HarnessModel(
        HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=4), model.tokenizer
    )
    for kind in ("choice", "ranking"):
        task = Task("routing", kind, examples(kind, range(2)))
        direct = [r.log_likelihoods for r in responding.respond(model, task)]
        assert [r.log_likelihoods for r in ours.respond(task)] == direct
        for one, other in zip(direct, theirs.respond(task), strict=True):
            # The harness's own model also scores the white space that ends a request.
            apart = np.array(one) - np.array(other.log_likelihoods)
            assert np.ptp(apart) < 1e-3
    task = Task("help", "answer", examples("answer", range(2)), max_new_tokens=5)
    said = [r.said for r in responding.respond(model, task)]
    assert [r.said for r in ours.respond(task)] == said
    assert [r.said for r in theirs.respond(task)] == said


def test_the_first_stage_of_a_ranking_is_measured_beside_the_models(tmp_path: Path) -> None:
    entry = next(entry for entry in tiny_tasks(tmp_path) if entry["kind"] == "ranking")
    files = {key: str(tmp_path / entry[key]) for key in ("held_out", "first_stage")}
    file = Path(files["first_stage"])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for place, line in enumerate(lines):  # another search: of one query it finds the first last
        turned = line["scores"][-1:] + line["scores"][:-1]
        line["search_scores"] = line["scores"] if place else turned
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = load_task(TaskConfig(name="search", kind="ranking", fusion=1.0, **files))
    model = Named(str(tiny_teacher(tmp_path / "m", layers=1)))
    found = compare_models(model, None, [task], tmp_path / "out")
    metrics = json.loads((found.path / "metrics.json").read_text())
    by_query: dict[str, list[int]] = {}
    for example in task.examples:  # the search finds them in this order
        assert example.group is not None
        by_query.setdefault(example.group, []).append(example.relevance or 0)
    expected = [ndcg(relevance) for relevance in by_query.values() if any(relevance)]
    lexical = metrics["tasks"]["search"]["lexical"]["ndcg@10"]
    assert lexical["value"] == pytest.approx(np.mean(expected))
    first, *others = by_query.values()
    expected = [ndcg(r) for r in ([*first[1:], first[0]], *others) if any(r)]
    better = metrics["tasks"]["search"]["search"]["ndcg@10"]
    assert better["value"] == pytest.approx(np.mean(expected))
    assert better["value"] != pytest.approx(lexical["value"])
    compared = metrics["task_comparisons"]["search"]["lexical"]["ndcg@10"]
    ours = metrics["tasks"]["search"]["model"]["ndcg@10"]["value"]
    assert compared["value"] == pytest.approx(ours - lexical["value"])
    assert "lexical" not in metrics["task_robustness"]["search"]
    for search in ("lexical", "search"):
        gate = GateConfig(beats={search: {"tasks": {"search.ndcg@10": {"margin": 0.05}}}})
        checks = check_metrics(metrics, gate)["checks"]
        expected = [f"beats.{search}.tasks.search.ndcg@10{end}" for end in ("", ".p")]
        assert [check["name"] for check in checks] == expected
        assert checks[1]["value"] is not None
    shown = metrics["tasks"]["search"]
    shown |= {"student": shown["model"], "teacher": shown["model"]}
    costs, sizes = ({name: {key: 0.1} for name in shown} for key in ("median", "bytes"))
    plot = quality_cost("search", "ndcg@10", shown, costs, sizes)
    assert plot is not None
    assert f"Lexical search {lexical['value']:.1%}" in plot.svg
    assert f"Search alone {better['value']:.1%}" in plot.svg


def ndcg(relevance: list[int]) -> float:
    gains = [gain / math.log2(place + 2) for place, gain in enumerate(relevance[:10])]
    best = sorted(relevance, reverse=True)[:10]
    return sum(gains) / sum(gain / math.log2(place + 2) for place, gain in enumerate(best))


def test_a_stopped_comparison_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tasks(tmp_path)
    held_out = str(tmp_path / "routing.held_out.jsonl")
    tasks = [load_task(TaskConfig(name=n, kind="choice", held_out=held_out)) for n in ("a", "b")]
    model = Named(str(tiny_teacher(tmp_path / "m", layers=1)))
    other = Named(str(tiny_teacher(tmp_path / "o", layers=1, seed=3)))
    whole = compare_models(model, other, tasks, tmp_path / "whole")

    asked: list[str] = []
    respond = HarnessModel.respond

    def stopping(self: HarnessModel, task: Task) -> Any:
        asked.append(task.name)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return respond(self, task)

    monkeypatch.setattr(HarnessModel, "respond", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare_models(model, other, tasks, tmp_path / "stopped")
    resumed = compare_models(model, other, tasks, tmp_path / "stopped")
    assert (
        len(asked)
        == 6
        + len(list((whole.path / "tasks").iterdir()))
        + len(list((whole.path / "robustness").iterdir()))
        - 5
    )
    assert resumed.digest == whole.digest
    monkeypatch.setattr(HarnessModel, "local", None)
    assert compare_models(model, other, tasks, tmp_path / "whole").digest == whole.digest
    assert whole.verify() == []
    metrics = json.loads((whole.path / "metrics.json").read_text())
    difference = metrics["task_comparisons"]["a"]["against"]["accuracy"]
    ours, theirs = (
        metrics["tasks"]["a"][name]["accuracy"]["value"] for name in ("model", "against")
    )
    assert difference["value"] == pytest.approx(ours - theirs)
    rows = [json.loads(line) for line in (whole.path / "tasks" / "a.model.jsonl").open()]
    assert ours == pytest.approx(np.mean([row["accuracy"] for row in rows]))


def test_the_command_compares_two_models(tmp_path: Path) -> None:
    entries = [entry for entry in tiny_tasks(tmp_path) if entry["name"] in ("routing", "order")]
    for name, number in (("routing", 8), ("order", 2)):
        file = tmp_path / f"{name}.held_out.jsonl"
        file.write_text("".join(file.open().readlines()[:number]))
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": entries}))
    one, other = (tiny_teacher(tmp_path / n, layers=1, seed=s) for n, s in (("one", 1), ("two", 2)))
    arguments = [one, "--against", other, "--tasks", tmp_path / "tasks.yaml"]
    arguments = ["evaluate", *arguments, "--out", tmp_path / "out"]
    done = seodang(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["tasks"]) == {"routing", "order"}
    assert found["models"]["against"]["name"] == "two"
    assert found["models"]["model"]["parameters"] == CausalLM.load(one).parameters
    assert found["measured"]["routing"]["model"]["median"] > 0
    accuracy = found["tasks"]["routing"]["model"]["accuracy"]
    assert accuracy["n"] == 8
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert set(found["tasks"]["routing"]["model"]["by_language"]) == {"en", "ko"}
    assert found["task_robustness"]["routing"]["model"]["spacing"]["language"] == "ko"
    manifest = Artifact.open(tmp_path / "out", "comparison").manifest
    assert [f.path for f in manifest.files if not f.reproducible] == ["measured.json"]
    shown = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.split()[:2] == ["accuracy", "all"] for line in lines)
    assert "8 of them synthetic" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone", "--tasks", "t.jsonl"], "gone: no config.json"),
        (["m", "--tasks", "gone.jsonl"], "no such file"),
        (["m", "--tasks", "t.jsonl", "--tasks", "t.jsonl"], "two tasks have the name 't'"),
        (["m", "--tasks", "t.jsonl", "--model-name", "x"], "is no server"),
        (["http://127.0.0.1:9/v1", "--tasks", "t.jsonl"], "--model-name"),
        (["m", "--tasks", "t.jsonl", "--against-name", "x"], "belong to --against"),
    ],
)
def test_bad_usage_says_what_to_do(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_tasks(tmp_path)
    (tmp_path / "routing.held_out.jsonl").rename(tmp_path / "t.jsonl")
    tiny_teacher(tmp_path / "m", layers=1)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr


def test_without_the_harness_the_command_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise ImportError('not here')")
    done = seodang("evaluate", "m", "--tasks", "t.jsonl", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert "pip install 'seodang[evaluation]'" in done.stderr
