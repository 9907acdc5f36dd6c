"""The trades' task files, made of the real packages by the scripts that make them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from seodang.corpus.documents import Document
from seodang.corpus.split import clusters
from seodang.corpus.task_writing import apart, example, read_pins, user_text, write_task
from seodang.corpus.tasks import Example, read_examples
from seodang.errors import InputError
from seodang.evaluation.structured import problem
from seodang.lexical_search import LexicalIndex, best_window
from seodang.packages import open_package

RECIPES = Path(__file__).parents[1] / "recipes"
TASKS = {
    "customer_service": {"routing": "choice", "policy": "answer"},
    "manufacturing": {"work_order": "json", "accident_type": "choice"},
    "mobility": {"trip_query": "json", "tool": "choice"},
    "enterprise_search": {"relevance": "ranking", "bank_relevance": "ranking"},
}
LICENSES = {
    "Apache-2.0",
    "CC-BY-4.0",
    "LicenseRef-data.go.kr",
    "LicenseRef-data.go.kr AND CC-BY-4.0",
    "MIT",
    "MPL-2.0",
}


def made(trade: str, out: Path) -> Path:
    """The tasks of a trade; skips where its packages are not on this machine."""
    folder = RECIPES / trade
    try:
        for pin in read_pins(folder / "packages.yaml"):
            open_package(pin).close()
    except InputError as error:
        pytest.skip(f"needs the fetched packages of {folder.name}/packages.yaml ({error})")
    if trade == "enterprise_search":
        pytest.importorskip("kiwipiepy", reason="Korean search needs the `search` extra")
    command = [sys.executable, str(folder / "make_tasks.py"), "--out", str(out)]
    if trade == "enterprise_search":  # the morphemes of a thousand Korean pages take a minute
        command.append("--quick")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module", params=TASKS)
def trade(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return request.param, made(request.param, tmp_path_factory.mktemp(request.param) / "tasks")


def sides(out: Path, task: str, kind: str) -> tuple[list[Example], list[Example]]:
    train = out / f"{task}.train.jsonl"
    held_out = read_examples(out / f"{task}.held-out.jsonl", kind)
    return read_examples(train, kind) if train.exists() else [], held_out


def test_both_sides_are_tasks_of_their_kind_with_sources(trade):
    name, out = trade
    for task, kind in TASKS[name].items():
        train, held_out = sides(out, task, kind)
        assert len(held_out) > 50
        assert len(train) > 100 or task == "bank_relevance"
        for asked in (*train, *held_out):
            assert asked.license in LICENSES
            assert asked.source
        answers = Counter(asked.answer for asked in held_out)
        assert len(answers) > 1
        assert answers.most_common(1)[0][1] < 0.5 * len(held_out) or kind == "ranking"


def test_no_question_to_train_on_resembles_a_held_out_one(trade):
    name, out = trade
    for task, kind in TASKS[name].items():
        train, held_out = sides(out, task, kind)
        if kind == "ranking":
            assert {e.group for e in train}.isdisjoint(e.group for e in held_out)
            continue
        if task == "policy":  # of one document there are many questions
            assert {passage(e) for e in train}.isdisjoint(map(passage, held_out))
            continue
        documents = [
            Document(id=f"{side}{i}", source="", license="", origin="", text=user_text(asked))
            for side, examples in (("train", train), ("held-out", held_out))
            for i, asked in enumerate(examples)
        ]
        for cluster in clusters(documents, 0.9):
            assert len({document.id.rstrip("0123456789") for document in cluster.documents}) == 1


def passage(asked: Example) -> str:
    return user_text(asked).rsplit("\n", 1)[0]


def test_structured_answers_keep_to_their_schema(trade):
    name, out = trade
    for task in (task for task, kind in TASKS[name].items() if kind == "json"):
        schema = json.loads((out / f"{task}.schema.json").read_text("utf-8"))
        for side in sides(out, task, "json"):
            for asked in side:
                answer = json.loads(asked.answer)
                assert problem(answer, schema) is None
                assert list(answer) == list(schema["properties"])
                assert asked.answer == json.dumps(answer, ensure_ascii=False)
        assert problem({**answer, next(iter(answer)): "?"}, schema)


def test_the_same_bytes_every_time(trade, tmp_path):
    name, first = trade
    second = made(name, tmp_path / "again")
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in second.iterdir())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_one_of_several_keeps_its_answer_and_the_others_wait(tmp_path):
    asked = [ask(f"{number} days?") for number in range(10)]
    write_task(tmp_path, "t", asked, [ask("what?")], labelled=4)
    train, requests, held_out = (
        [json.loads(line) for line in (tmp_path / f"t.{side}.jsonl").open(encoding="utf-8")]
        for side in ("train", "requests", "held-out")
    )
    assert [line["messages"][-1]["content"] for line in train] == ["0 days?", "4 days?", "8 days?"]
    assert all("answer" in line for line in [*train, *held_out])
    assert len(requests) == 7
    assert not any("answer" in line for line in requests)
    assert {line["id"] for line in requests} == {e.id for e in asked} - {t["id"] for t in train}


def test_what_is_made_is_labelled_so_and_what_is_real_is_verbatim(trade):
    name, out = trade
    if name == "mobility":
        assert all(e.synthetic for side in sides(out, "trip_query", "json") for e in side)
        train, held_out = sides(out, "tool", "choice")
        assert all(e.synthetic for e in train)
        assert not any(e.synthetic for e in held_out)
    if name == "customer_service":
        _, held_out = sides(out, "policy", "answer")
        answered = [asked for asked in held_out if asked.answer != "NO_ANSWER"]
        assert 0.5 < len(answered) / len(held_out) < 0.8
        assert all(asked.answer in passage(asked) for asked in answered)
        for asked in held_out:
            assert len(asked.choices) > 2
            assert all(
                choice in passage(asked) or choice == "NO_ANSWER" for choice in asked.choices
            )
        known, requests = sides(out, "routing", "choice")
        assert sum(asked.group == "shop" for asked in requests) > 50
        assert not any(e.synthetic for e in requests if e.group in ("shop", "airline", "telecom"))
        learned, measured = (
            [asked for asked in side if asked.group == "bank"] for side in (known, requests)
        )
        package = open_package(read_pins(RECIPES / name / "packages.yaml")[1])
        packed = package.read("inspect_evals/tau2/data/domains/banking_knowledge/documents.json.gz")
        titles = {record["title"] for record in json.loads(gzip.decompress(packed))}
        assert len(measured) > 150
        assert {user_text(e) for e in measured if not e.synthetic} <= titles
        assert not {user_text(e) for e in learned if not e.synthetic} <= titles
    if name == "manufacturing":
        archive = open_package(read_pins(RECIPES / name / "packages.yaml")[2])
        alerts = archive.read("safety_law_mapper/data/incidents/kosha-alerts.jsonl").decode()
        titles = {" ".join(json.loads(line)["title"].split()) for line in alerts.splitlines()}
        real = {user_text(e) for e in sides(out, "work_order", "json")[1] if not e.synthetic}
        assert len(real) > 100
        assert real <= titles
        for asked in sides(out, "accident_type", "choice")[1]:
            assert not user_text(asked).endswith(asked.answer)
    if name == "enterprise_search":
        assert not any(e.synthetic for e in sides(out, "relevance", "ranking")[1])


def test_policy_is_also_asked_in_words_that_nobody_trained_on(trade):
    name, out = trade
    if name != "customer_service":
        return
    wording = yaml.safe_load((RECIPES / name / "wording.yaml").read_text("utf-8"))
    other = wording["other_words"]
    assert other["train"].keys() == other["held_out"].keys()
    for term, words in other["train"].items():
        assert not {term, *words} & set(other["held_out"][term])
    train, held_out = sides(out, "policy", "answer")
    groups = Counter(asked.group for asked in held_out if asked.language == "en")
    assert groups["by its name"] > 50
    assert groups["in other words"] > 40
    # What no term has for its own word on the training side is in no question there.
    known = [word for words in other["train"].values() for word in words]
    terms = "\n".join([*other["train"], *known])
    new = [
        w for words in other["held_out"].values() for w in words if len(w) > 8 and w not in terms
    ]
    assert len(new) > 30
    asked_to_train = [user_text(a).splitlines()[-1] for a in train if a.group == "in other words"]
    asked_held_out = [user_text(a).splitlines()[-1] for a in held_out]
    assert asked_to_train
    assert sum(word in question for question in asked_to_train for word in new) == 0
    assert sum(word in question for question in asked_held_out for word in new) > 20


def test_named_parts_and_places_stand_in_the_request(trade):
    name, out = trade
    fields = {"manufacturing": ("work_order", ["part"])}
    fields["mobility"] = ("trip_query", ["origin", "destination"])
    task, keys = fields.get(name, ("", []))
    wording = yaml.safe_load((RECIPES / name / "wording.yaml").read_text("utf-8")) if task else {}
    things = wording.get("things", {})
    for asked in sides(out, task, "json")[1] if task else []:
        answer = json.loads(asked.answer)
        for key in keys:
            names = [answer[key], *things.get(answer[key], [])]
            assert answer[key] is None or any(named in user_text(asked) for named in names)


def test_every_term_that_is_asked_for_was_seen(trade):
    name, out = trade
    if name != "manufacturing":
        return
    train, held_out = sides(out, "work_order", "json")
    for group in {asked.group for asked in held_out if asked.synthetic}:
        asked_for = [json.loads(e.answer) for e in held_out if e.group == group]
        for key in asked_for[0]:
            known = {json.loads(e.answer)[key] for e in train}
            assert known.issuperset(answer[key] for answer in asked_for), (group, key)


def test_the_first_stage_ranks_exactly_what_is_asked(trade):
    _, out = trade
    for file in out.glob("*.first-stage.jsonl"):
        rankings = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        name = file.name.removesuffix(".first-stage.jsonl")
        side = name if name.endswith(".validation") else f"{name}.held-out"
        measured = read_examples(out / f"{side}.jsonl", "ranking")
        found = [id_ for r in rankings if any(r["relevance"]) for id_ in r["ids"]]
        assert found == [asked.id for asked in measured]
        assert all(len(r["search_scores"]) == len(r["ids"]) for r in rankings)
        assert all(s >= r["scores"][i] for r in rankings for i, s in enumerate(r["search_scores"]))
        assert any(r["search_scores"] != r["scores"] for r in rankings)
        assert all(r["scores"] == sorted(r["scores"], reverse=True) for r in rankings)


def test_the_fusion_is_chosen_by_queries_of_no_other_side(trade):
    name, out = trade
    if name != "enterprise_search":
        return
    validation = {e.group for e in read_examples(out / "relevance.validation.jsonl", "ranking")}
    assert len(validation) > 20
    for side in sides(out, "relevance", "ranking"):
        assert validation.isdisjoint(e.group for e in side)
    right = [
        {user_text(e).splitlines()[1][:60] for e in asked if e.relevance}
        for asked in (
            read_examples(out / "relevance.validation.jsonl", "ranking"),
            *sides(out, "relevance", "ranking"),
        )
    ]
    assert not right[0] & right[1]
    assert not right[0] & right[2]


def test_every_package_is_pinned_as_the_other_recipes_pin_it():
    pinned = {
        (pin.package.replace("_", "-"), pin.version): pin.sha256
        for trade in TASKS
        for pin in read_pins(RECIPES / trade / "packages.yaml")
    }
    for file in RECIPES.glob("*.yaml"):
        for source in yaml.safe_load(file.read_text("utf-8"))["corpus"].get("sources", []):
            key = (str(source.get("package")).replace("_", "-"), source.get("version"))
            assert pinned.get(key, source.get("sha256")) == source.get("sha256")


def ask(user: str, answer: str = "a") -> Example:
    credit = {"source": "here", "license": "MIT", "synthetic": True}
    return example(user, answer, language="en", choices=["a", "b"], **credit)


def test_near_duplicates_of_held_out_questions_leave_the_training_side():
    held_out = [ask("one two three four five six seven eight"), ask("Twice"), ask("twice")]
    train = [ask("one two three four five six seven nine"), ask("TWICE "), ask("quite another")]
    kept, measured = apart(train, held_out, threshold=0.7)
    assert [user_text(e) for e in kept] == ["quite another"]
    assert [user_text(e) for e in measured] == [user_text(e) for e in held_out[:2]]


def test_wrong_examples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="none of"):
        ask("what?", "c")
    with pytest.raises(ValueError, match="empty"):
        ask(" \n")
    with pytest.raises(ValueError, match="twice"):
        write_task(tmp_path, "t", [ask("what?")], [ask("what?")])


def test_pins_must_be_pins(tmp_path):
    file = tmp_path / "packages.yaml"
    file.write_text("- {package: x}\n")
    with pytest.raises(InputError, match=r"packages\.yaml"):
        read_pins(file)


def test_english_search_finds_stems_and_nothing_where_nothing_is():
    index = LexicalIndex({"a": "printing of pages", "b": "saving a file", "c": ""}, "en")
    assert [page for page, _ in index.search("print a page", 5)] == ["a", "b"]
    assert index.search("zebra", 5) == []
    assert index.search('"; DROP * (', 5) == []
    assert index.search("  ", 5) == []


def test_korean_search_finds_words_behind_particles():
    pytest.importorskip("kiwipiepy")
    index = LexicalIndex({"a": "인쇄를 시작합니다", "b": "파일이 저장되었다"}, "ko")
    assert [page for page, _ in index.search("파일 저장", 5)] == ["b"]


def test_the_best_window_holds_most_of_the_query():
    text = "nothing here at all. " * 10 + "the margin of a page is set here. " + "more of it. " * 10
    assert "margin of a page" in best_window(text, "page margins", 60)
    assert len(best_window(text, "page margins", 60)) <= 60
    assert best_window("", "page", 60) == ""
