"""Task files: what is read and refused, and what of them the corpus takes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from seodang.artifact import Artifact
from seodang.causal_lm import tokenizer_fingerprint
from seodang.corpus.build import build, read_documents
from seodang.corpus.tasks import distinctive, read_examples
from seodang.errors import InputError
from seodang.evaluation.tasks import load_task, read_tasks
from seodang.recipe import CorpusConfig, SourceConfig, TaskConfig
from seodang.recipe_file import load_recipe
from seodang.release.provenance import training_data
from tiny import tiny_tokenizer
from tiny_run import tiny_recipe
from tiny_tasks import INSTRUCTION, example, examples, task_lines, tiny_tasks, write_lines

DROP = object()


def _line(kind: str, **changes: Any) -> dict[str, Any]:
    line = example(kind, 1, "card", "en") | changes
    return {key: value for key, value in line.items() if value is not DROP}


@pytest.mark.parametrize("kind", ["choice", "ranking", "json", "answer"])
def test_every_kind_is_read_as_it_was_written(kind: Any, tmp_path: Path) -> None:
    lines = task_lines(kind, range(3))
    found = read_examples(write_lines(tmp_path / "t.jsonl", lines), kind)
    assert [e.model_dump(exclude_none=True) for e in found] == lines


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("choice", {"answer": DROP}, "`answer`: the key is missing"),
        ("choice", {"aswer": "x"}, "unknown key `aswer`"),
        ("choice", {"language": "fr"}, "`language`"),
        ("choice", {"synthetic": "yes"}, "`synthetic`"),
        ("choice", {"id": 3}, "`id`"),
        ("choice", {"messages": []}, "`messages`"),
        ("choice", {"messages": [{"role": "tool", "content": "x"}]}, "`messages.0.role`"),
        ("choice", {"messages": [{"role": "system", "content": "x"}]}, "last must be the user's"),
        ("choice", {"choices": DROP}, "`choices`: a choice task needs them"),
        ("choice", {"choices": ["card"]}, "at least two"),
        ("choice", {"choices": ["card", "card"]}, "at least two"),
        ("choice", {"choices": ["phone", "mail"]}, "'card' is not one of `choices`"),
        ("ranking", {"group": DROP}, "`group`: a ranking task needs it"),
        ("ranking", {"relevance": 4}, "`relevance`"),
        ("ranking", {"choices": ["yes", "no", "perhaps"]}, "has two"),
        ("json", {"answer": "{"}, "`answer`: is not JSON"),
        ("json", {"choices": ["a", "b"]}, "have no place in a json task"),
        ("answer", {"choices": ["a", "b"]}, "is not one of `choices`"),
        ("answer", {"choices": ["a", "b"], "answer": "a"}, "every line of a file has them, or"),
    ],
)
def test_a_wrong_line_is_named_with_its_key(
    kind: Any, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "t.jsonl", [_line(kind, id="first"), _line(kind, **changes)])
    with pytest.raises(InputError) as error:
        read_examples(file, kind)
    assert str(error.value).startswith(f"{file}:2: ")
    assert said in str(error.value)


def test_repeated_ids_and_empty_files_are_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "t.jsonl", [_line("choice"), _line("choice")])
    with pytest.raises(InputError, match=r":2: `id`: .* stands on an earlier line"):
        read_examples(file, "choice")
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no example"):
        read_examples(file, "choice")


def test_answers_must_keep_to_the_schema(tmp_path: Path) -> None:
    tiny_tasks(tmp_path)
    held_out, schema = str(tmp_path / "order.held_out.jsonl"), tmp_path / "schema.json"
    config = TaskConfig(name="order", kind="json", held_out=held_out, schema=str(schema))
    assert load_task(config).schema == json.loads(schema.read_text())
    schema.write_text('{"type": "object", "required": ["price"]}')
    with pytest.raises(InputError, match="'price' is a required property"):
        load_task(config)
    schema.write_text('{"type": "objekt"}')
    with pytest.raises(InputError, match=r"schema.json: \$.type"):
        load_task(config)
    schema.write_text('{"$ref": "https://example.com/schema.json"}')
    with pytest.raises(InputError, match="refers to what is not in it"):
        load_task(config)


def test_scores_of_the_first_stage_are_those_of_the_passages(tmp_path: Path) -> None:
    entry = next(entry for entry in tiny_tasks(tmp_path) if entry["kind"] == "ranking")
    files = {key: str(tmp_path / entry[key]) for key in ("held_out", "first_stage")}
    config = TaskConfig(name="search", kind="ranking", **files)
    task = load_task(config)
    assert task.first_stage is not None
    assert set(task.first_stage) == {example.id for example in task.examples}
    fused = load_task(TaskConfig(name="search", kind="ranking", **files, fusion=2.0))
    assert fused.fusion == 2.0
    alone = load_task(TaskConfig(name="search", kind="ranking", held_out=files["held_out"]))
    file = Path(files["first_stage"])
    first, *rest = [json.loads(line) for line in file.read_text().splitlines()]
    better = [line | {"search_scores": [2.0] * len(line["ids"])} for line in (first, *rest)]
    write_lines(file, better)
    two = load_task(config)
    assert two.first_stage == task.first_stage
    assert two.search == dict.fromkeys(task.first_stage, 2.0)
    assert len({task.digest, fused.digest, alone.digest, two.digest}) == 4
    for lines, said in (
        ([first, *better[1:]], f"has no `search_scores` of {first['ids'][0]}"),
        ([better[0] | {"search_scores": []}, *rest], "wants as many `search_scores` as `ids`"),
        (rest, f"has no score of {first['ids'][0]}"),
        ([first | {"scores": [1.0]}, *rest], ":1: wants as many `scores` as `ids`"),
        ([*rest, first | {"scores": ["1"] * len(first["ids"])}], "`scores`: are not all numbers"),
    ):
        write_lines(file, lines)
        with pytest.raises(InputError) as error:
            load_task(config)
        assert said in str(error.value)


def test_a_recipe_checks_its_tasks(tmp_path: Path) -> None:
    file = tiny_recipe(tmp_path)
    recipe = yaml.safe_load(file.read_text())
    recipe["tasks"] = tiny_tasks(tmp_path)
    recipe["gate"]["floors"] = {"routing.accuracy": 0.5}

    def load(**changes: Any) -> Any:
        file.write_text(yaml.safe_dump(recipe | changes))
        return load_recipe(file)

    loaded = load()
    assert loaded.tasks[2].json_schema == str(tmp_path / "schema.json")
    assert [task.kind for task in read_tasks(file)] == ["choice", "ranking", "json", "answer"]
    first, *others = recipe["tasks"]
    for changes, said in (
        ({"tasks": [first, first]}, "several have the name 'routing'"),
        ({"tasks": [first | {"schema": "schema.json"}]}, "has a `schema`"),
        ({"tasks": [first | {"refusal": "no"}]}, "`refusal` belongs to"),
        ({"tasks": [first | {"held_out": "gone.jsonl"}]}, "`tasks.0.held_out`: no file at gone"),
        ({"tasks": others}, "routing.accuracy is no figure of this recipe's tasks"),
        ({"gate": {"floors": {"routing.calibration_error": 1}}}, "is no figure"),
        ({"gate": {"within_teacher": {"routing": 0.1}}}, "gate.within_teacher.routing"),
        ({"tasks": [first | {"first_stage": "schema.json"}]}, "`first_stage` belongs to"),
        ({"tasks": [first | {"fusion": 1.0}]}, "`fusion` needs a `first_stage`"),
        (
            {"gate": {"beats": {"lexical": {"tasks": {"routing.accuracy": {}}}}}},
            "the task of routing.accuracy has no `first_stage`",
        ),
        ({"gate": {"previous": "gone"}}, "`gate.previous`: no file at gone"),
    ):
        with pytest.raises(InputError) as error:
            load(**changes)
        assert said in str(error.value)


def test_tasks_are_named_by_a_list_or_by_one_file(tmp_path: Path) -> None:
    entries = tiny_tasks(tmp_path)
    listed = tmp_path / "tasks.yaml"
    listed.write_text(yaml.safe_dump({"tasks": entries}))
    assert [task.name for task in read_tasks(listed)] == ["routing", "search", "order", "help"]
    kinds = {}
    for name in ("routing", "search", "help"):
        (task,) = read_tasks(tmp_path / f"{name}.held_out.jsonl")
        kinds[task.name] = task.kind
    assert kinds == {"routing": "choice", "search": "ranking", "help": "answer"}
    listed.write_text("tasks: []")
    with pytest.raises(InputError):
        read_tasks(listed)
    with pytest.raises(InputError, match="no such file"):
        read_tasks(tmp_path / "gone.jsonl")


def test_what_tells_examples_apart_is_not_their_instruction() -> None:
    found = distinctive(examples("choice", range(20)), grouped=False)
    assert not any("route the request" in text for text in found)
    assert "lost my card 7" in " ".join(found)
    queries = examples("ranking", range(8))
    by_group: dict[str | None, set[str]] = {}
    for item, text in zip(queries, distinctive(queries, grouped=True), strict=True):
        by_group.setdefault(item.group, set()).add(text)
    assert len(set.union(*by_group.values())) >= len(by_group)


def _corpus(tmp_path: Path, train: list[Any], held_out: list[Any]) -> Artifact:
    tokenizer = tiny_tokenizer()
    task = TaskConfig(
        name="routing",
        kind="choice",
        train=str(write_lines(tmp_path / "train.jsonl", train)),
        held_out=str(write_lines(tmp_path / "held-out.jsonl", held_out)),
    )
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": f"Notice {n}."}) + "\n" for n in range(9)))
    source = SourceConfig(name="notices", license="CC0-1.0", path=str(documents))
    config = CorpusConfig(sources=[source], held_out=0.2)
    return build(config, tokenizer, tokenizer_fingerprint(tokenizer), tmp_path / "corpus", [task])


def test_training_examples_become_documents_and_held_out_ones_never(tmp_path: Path) -> None:
    held_out = task_lines("choice", range(5))
    # Like a held-out one but for case and punctuation; the instruction is everyone's.
    near = _line("choice", id="near")
    near["messages"] = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": "Request -- I LOST my card 1!"},
    ]
    train = [*task_lines("choice", range(100, 112)), near]
    corpus = _corpus(tmp_path, train, held_out)
    documents = read_documents(corpus.path)
    taken = {d["origin"] for d in documents if d["origin"].startswith("routing#")}
    assert taken == {f"routing#{line['id']}" for line in train[:-1]}
    assert {d["split"] for d in documents if d["origin"] in taken} == {"train", "held_out"}
    one = next(d for d in documents if d["origin"] == f"routing#{train[0]['id']}")
    answer = {"role": "assistant", "content": train[0]["answer"]}
    assert one["messages"] == [*train[0]["messages"], answer]
    assert (one["source"], one["license"]) == ("synthetic requests", "CC0-1.0")
    assert {d["origin"] in taken for d in documents if d.get("synthetic")} == {True}
    assert {d.get("synthetic", False) for d in documents if d["origin"] in taken} == {True}
    made = [s for s in training_data(corpus) if s.category == "synthetic"]
    assert [s.source.name for s in made] == ["synthetic requests"]
    assert corpus.manifest.summary["dropped"] == {"near-duplicate of a held-out example": 1}
    source = next(s for s in corpus.manifest.sources if s.name == "synthetic requests")
    assert (source.license, source.documents) == ("CC0-1.0", len(train) - 1)


def test_a_held_out_example_in_another_source_is_not_trained_on(tmp_path: Path) -> None:
    held_out = task_lines("choice", range(5))
    train = [*task_lines("choice", range(100, 106)), held_out[3] | {"id": "copy"}]
    corpus = _corpus(tmp_path, train, held_out)
    assert corpus.manifest.summary["dropped"] == {"held out for a task": 1}
    again = _corpus(tmp_path, train, [*held_out, _line("choice", id="new", answer="phone")])
    assert again.digest != corpus.digest


def test_a_task_in_one_language_leaves_the_other_out(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", task_lines("choice", range(100, 104)))
    held_out = write_lines(tmp_path / "held-out.jsonl", task_lines("choice", range(4)))
    settings: Any = {"name": "routing", "kind": "choice", "train": str(train)}
    task = TaskConfig(**settings, held_out=str(held_out), languages=["ko"])
    assert load_task(task).languages == ["ko"]
    tokenizer = tiny_tokenizer()
    corpus = build(CorpusConfig(held_out=0.2), tokenizer, "f", tmp_path / "corpus", [task])
    korean = {f"routing#{line['id']}" for line in task_lines("choice", range(100, 104))[1::2]}
    assert {d["origin"] for d in read_documents(corpus.path)} <= korean
    everything = build(
        CorpusConfig(held_out=0.2),
        tokenizer,
        "f",
        tmp_path / "all",
        [task.model_copy(update={"languages": None})],
    )
    assert everything.manifest.inputs != corpus.manifest.inputs
    english = write_lines(tmp_path / "en.jsonl", task_lines("choice", range(4))[::2])
    with pytest.raises(InputError, match=r"en\.jsonl: holds no example in ko"):
        load_task(task.model_copy(update={"held_out": str(english)}))


def test_a_corpus_without_tasks_is_what_it_was(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": f"Notice {n}."}) + "\n" for n in range(9)))
    source = SourceConfig(name="notices", license="CC0-1.0", path=str(file))
    config = CorpusConfig(sources=[source], held_out=0.2)
    made = build(config, tokenizer, "f", tmp_path / "corpus")
    assert set(made.manifest.inputs) == {"source:notices", "tokenizer"}
