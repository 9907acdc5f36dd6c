"""Sweeps on the tiny recipe: one capture for all students, resumed, and what may be varied."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seodang import sweep as sweep_module
from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM
from seodang.corpus.build import read_sequences
from seodang.errors import InputError
from seodang.softlabels.capture import capture
from seodang.softlabels.store import open as open_store
from seodang.sweep import sweep, sweep_failure
from seodang.sweep_grid import AS_IN_THE_RECIPE, grid
from seodang.sweep_report import break_even, economics, mark_fronts, quality, render
from seodang.teacher.local import LocalTeacher
from tiny_run import seodang, tiny_recipe

VARY = ["student.layers=1,2", "soft_labels.estimator=top-k,head-tail"]
STORES = ("estimator-top-k", "estimator-head-tail")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("recipe"), documents=24)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A sweep, and the sequences that went through the teacher, in their order."""
    out, seen = tmp_path_factory.mktemp("sweep") / "out", []
    forward = CausalLM.hidden_states
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLM, "hidden_states", lambda self, s: seen.extend(s) or forward(self, s))
        result = sweep(recipe, [], VARY, out)
    return result, [tuple(sequence.tolist()) for sequence in seen]


def identities(out: Path) -> dict[str, str]:
    """The identity of every artifact of a sweep."""
    found = sorted(out.rglob("manifest.json"))
    return {str(f.parent.relative_to(out)): Artifact.open(f.parent).digest for f in found}


def test_every_combination_is_a_student_and_a_row(finished):
    result, _ = finished
    names = [
        f"layers-{layers},estimator-{estimator}"
        for layers in (1, 2)
        for estimator in ("top-k", "head-tail")
    ]
    assert [row["name"] for row in result.rows] == names
    assert not result.failed
    for row in result.rows:
        student = Artifact.open(result.out / "students" / row["name"], "student")
        assert student.verify() == []
        assert row["digest"] == student.digest
        assert row["bytes"] == 4 * row["parameters"]
        assert row["training_seconds"] > 0
    sizes = [row["parameters"] for row in result.rows]
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]
    assert len({row["kl"] for row in result.rows}) == len(names)
    written = json.loads((result.out / "sweep" / "sweep.json").read_text())
    assert written == {"students": result.rows, "economics": result.economics}
    assert Artifact.open(result.out / "sweep", "sweep").verify() == []


def test_the_teacher_sees_each_sequence_once_for_all_stores(finished):
    result, seen = finished
    train = read_sequences(result.out / "corpus", "train")
    for sequence in train:
        assert seen.count(tuple(sequence.token_ids.tolist())) == 1
    spent = json.loads((result.out / "soft-labels" / "speed.json").read_text())
    assert spent["tokens"] == sum(len(sequence.labelled) for sequence in train)


def test_each_store_is_that_of_a_capture_of_its_own(finished, recipe, tmp_path):
    result, _ = finished
    teacher = LocalTeacher(recipe.parent / "teacher")
    train = read_sequences(result.out / "corpus", "train")
    for name, variant in zip(STORES, grid(recipe, [], VARY)[:2], strict=True):
        store = open_store(result.out / "soft-labels" / name).artifact
        alone = capture(
            teacher,
            train,
            variant.recipe.soft_labels,
            tmp_path / name,
            sources=store.manifest.sources,
        )
        for file in alone.path.iterdir():
            assert file.read_bytes() == (store.path / file.name).read_bytes()


def test_no_artifact_names_a_path_of_the_machine(finished, recipe):
    result, _ = finished
    for folder in ("corpus", "soft-labels", "students", "sweep"):
        for file in (result.out / folder).rglob("*"):
            if file.is_file():
                assert str(recipe.parent).encode() not in file.read_bytes(), file
                assert str(result.out).encode() not in file.read_bytes(), file


def test_a_finished_sweep_does_no_work(finished, recipe, monkeypatch):
    result, _ = finished
    before = {f: f.stat().st_mtime_ns for f in result.out.rglob("*") if f.parent != result.out}
    monkeypatch.setattr(CausalLM, "hidden_states", None)
    again = sweep(recipe, [], VARY, result.out)
    assert not again.ran
    assert (again.rows, again.economics) == (result.rows, result.economics)
    assert before == {f: f.stat().st_mtime_ns for f in before}


def test_another_value_costs_what_is_new_only(finished, recipe, tmp_path):
    result, _ = finished
    out = tmp_path / "out"
    shutil.copytree(result.out, out)
    more = sweep(recipe, [], ["student.layers=1,2,3", VARY[1]], out)
    assert len(more.rows) == 6
    old, new = identities(result.out), identities(out)
    assert {k: v for k, v in old.items() if k != "sweep"}.items() <= new.items()
    assert new.keys() - old.keys() == {f"students/layers-3,{name}" for name in STORES}


def test_killed_at_any_point_it_goes_on_to_the_same_artifacts(finished, recipe, tmp_path):
    result, _ = finished
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from seodang.sweep import sweep; "
        "sweep(Path(sys.argv[1]), [], sys.argv[3:], Path(sys.argv[2]))"
    )
    for landmark in ("soft-labels/*/.work.json", "students/layers-2,*/checkpoints/step-*"):
        child = subprocess.Popen(
            [sys.executable, "-c", code, recipe, out, *VARY],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stderr=subprocess.DEVNULL,
        )
        while not list(out.glob(landmark)) and child.poll() is None:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, landmark
        assert not (out / "sweep" / "manifest.json").exists()
    done = {f: f.stat().st_mtime_ns for f in out.glob("students/layers-1,*/manifest.json")}
    assert len(done) == 2
    resumed = sweep(recipe, [], VARY, out)
    assert done == {f: f.stat().st_mtime_ns for f in done}
    assert resumed.economics is not None  # the capture's time was kept
    assert identities(out) == identities(result.out)


FAILING = "student.learning_rate=1e+30,1e-3"


@pytest.fixture(scope="module")
def failed(recipe, tmp_path_factory):
    return sweep(recipe, [], [FAILING], tmp_path_factory.mktemp("failed") / "out")


def test_a_student_that_fails_is_a_row_and_the_others_go_on(failed):
    bad, good = failed.rows
    assert bad["varied"] == {"student.learning_rate": 1e30}
    assert "loss is not finite" in bad["error"]
    assert "kl" not in bad
    assert good["error"] is None
    assert good["fronts"] == ["size", "time"]
    assert failed.failed == [bad]
    assert bad["name"] in str(sweep_failure(failed))
    assert "loss is not finite" in (failed.out / "sweep" / "sweep.html").read_text()


def test_a_broken_student_does_not_hide_the_others(recipe, tmp_path):
    """A single step, after which nothing is trained that could tell that the weights are gone."""
    settings = ["student.epochs=1", "student.batch_tokens=100000"]
    vary = ["student.learning_rate=1e+300,1e-3"]
    bad, good = sweep(recipe, settings, vary, tmp_path / "out").rows
    assert "cannot be measured" in bad["error"]
    assert good["error"] is None
    assert good["kl"] > 0


def test_students_that_are_too_many_for_memory_are_measured_in_turn(
    finished, recipe, tmp_path, monkeypatch
):
    result, _ = finished
    out = tmp_path / "out"
    shutil.copytree(result.out, out)
    shutil.rmtree(out / "sweep")
    monkeypatch.setattr(sweep_module, "EVALUATED_BYTES", 1)
    again = sweep(recipe, [], VARY, out)
    for row, before in zip(again.rows, result.rows, strict=True):
        assert row["kl"] == pytest.approx(before["kl"])
        assert row["digest"] == before["digest"]


def test_the_command_says_what_failed_and_its_exit_code_too(failed, recipe):
    done = seodang("sweep", recipe, "--out", failed.out, "--vary", FAILING, "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout) == {**failed.to_json(), "ran": False}
    assert "1 of 2 students could not be trained" in done.stderr
    wrong = seodang("sweep", recipe, "--out", failed.out, "--vary", "corpus.held_out=0.1,0.2")
    assert wrong.returncode == 2
    assert "share one corpus" in wrong.stderr


def test_the_command_prints_the_table(finished, recipe):
    result, _ = finished
    options = [word for item in VARY for word in ("--vary", item)]
    done = seodang("sweep", recipe, "--out", result.out, *options)
    assert done.returncode == 0, done.stderr
    assert "Nothing to do" in done.stderr
    assert "paid back from" in done.stdout
    assert all(name in done.stdout for name in ("KL", "top-k", "head-tail", "sweep.html"))


def test_students_with_several_vocabularies_are_compared_by_perplexity(recipe, tmp_path):
    settings = ["student.epochs=1"]
    one = sweep(recipe, settings, ["student.vocabulary={trim: 320},null"], tmp_path / "one")
    assert len({row["partition"] for row in one.rows}) == 1
    assert quality(one.rows) == "kl"
    assert one.rows[0]["bytes"] < one.rows[1]["bytes"]
    out = tmp_path / "several"
    several = sweep(recipe, settings, ["student.vocabulary={trim: 320},{trim: 400},null"], out)
    assert len({row["partition"] for row in several.rows}) == 3
    assert quality(several.rows) == "perplexity"
    assert [several.rows[i]["perplexity"] for i in (0, 2)] == pytest.approx(
        [row["perplexity"] for row in one.rows]
    )
    assert "cannot be compared" in (out / "sweep" / "sweep.html").read_text()


def test_students_that_share_all_labels_share_one_store(recipe):
    variants = grid(recipe, [], ["student.layers=1,2", "student.cross_entropy_weight=0,0.1"])
    assert len(variants) == 4
    assert {variant.labels for variant in variants} == {AS_IN_THE_RECIPE}
    assert variants[0].name == "layers-1,cross_entropy_weight-0.0"


def test_values_are_yaml_and_split_outside_brackets(recipe):
    variants = grid(recipe, [], ["student.vocabulary={trim: 300},{keep: 0.9},null"])
    assert [v.varied["student.vocabulary"] for v in variants] == [
        {"trim": 300},
        {"keep": 0.9},
        None,
    ]
    assert [v.name for v in variants] == [
        "vocabulary-trim-300",
        "vocabulary-keep-0.9",
        "vocabulary-none",
    ]
    sections = grid(recipe, [], ["soft_labels={estimator: top-k, k: 4},{estimator: sampled}"])
    assert [v.recipe.soft_labels.estimator for v in sections] == ["top-k", "sampled"]
    assert sections[0].labels == "estimator-top-k-k-4"
    rates = grid(recipe, [], ["student.learning_rate=1e-3,2e-3"])
    assert [v.varied["student.learning_rate"] for v in rates] == [1e-3, 2e-3]


def test_the_recipes_own_parameters_do_not_follow_to_another_estimator(recipe):
    variants = grid(recipe, [], ["soft_labels.estimator=head-tail,residual"])
    assert variants[1].recipe.soft_labels.parameters() == {"k": 16}
    kept = grid(recipe, ["soft_labels.k=7"], ["soft_labels.estimator=top-k,residual"])
    assert [v.recipe.soft_labels.k for v in kept] == [7, 7]


def test_a_start_is_named_without_its_folder(recipe):
    teacher = recipe.parent / "teacher"
    with_path, without = grid(recipe, [], [f"student.path={teacher},null"])
    assert with_path.varied == {"student.path": "teacher"}
    assert with_path.recipe.student.path == str(teacher)
    assert (with_path.name, without.name) == ("path-teacher", "path-none")


def test_seeds_of_both_sections_have_names_of_their_own(recipe):
    names = {v.name for v in grid(recipe, [], ["student.seed=0,1", "soft_labels.seed=0,1"])}
    assert len(names) == 4
    assert "student.seed-0,soft_labels.seed-1" in names


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["student.layers"], "write it as section.key=value,value"),
        (["=1,2"], "write it as section.key=value,value"),
        (["student.layers="], "no value"),
        (["student.layers=2"], "at least two students"),
        ([], "at least two students"),
        (["student.layers=2,2"], "2 stands here twice"),
        (["student.layers=2,[3"], "not a list of YAML values"),
        (["student.layers=2]\n[3"], "not a list of YAML values"),
        (["student.learning_rate=1e-3,0.001"], "cannot be told apart"),
        (["student.layer=1,2"], "--vary student.layer=1: unknown key"),
        (["student.layers=1,many"], "--vary student.layers=many: `student.layers`"),
        (["corpus.max_length=32,64"], "only keys of student and soft_labels"),
        (["teacher.path=a,b"], "share one corpus and one pass"),
        (["student.on_policy={rounds: 1},null"], "use seodang run"),
        (["student.layers=1,2", "student.layers=3,4"], "is varied already"),
        (["student.vocabulary={trim: 300},null", "student.vocabulary.trim=300,400"], "already"),
        (["soft_labels.estimator=top-k,head-tail", "soft_labels.k=4,8"], "section as a whole"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_any_work(recipe, tmp_path, vary, message):
    with pytest.raises(InputError) as error:
        sweep(recipe, [], vary, tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_impossible_start_is_refused_before_any_work(recipe, tmp_path):
    with pytest.raises(InputError, match="layers"):
        sweep(recipe, [], ["student.layers=2,40"], tmp_path / "out")
    assert not (tmp_path / "out" / "corpus").exists()


def test_a_directory_of_something_else_is_refused(finished, recipe, tmp_path):
    result, _ = finished
    with pytest.raises(InputError, match="belongs to the recipe"):
        sweep(recipe, ["name=other"], VARY, result.out)
    (tmp_path / "recipe.json").write_text('{"name": "tiny"}')  # as of `seodang run`
    with pytest.raises(InputError, match="belongs to the recipe 'tiny'"):
        sweep(recipe, [], VARY, tmp_path)


def student(name, size, seconds, kl, error=None):
    row = {"name": name, "varied": {}, "error": error, "epochs": 3}
    if error:
        return row
    return row | {"bytes": size, "training_seconds": seconds, "kl": kl, "partition": "full"}


def test_the_fronts_hold_whom_nobody_beats_in_both():
    rows = [
        student("small", 1, 9.0, 0.9),
        student("worse", 2, 9.0, 0.95),
        student("large", 3, 5.0, 0.2),
        student("slow", 3, 6.0, 0.2),
        student("broken", 0, 0.0, 0.0, "the loss is not finite"),
    ]
    mark_fronts(rows)
    assert [row["fronts"] for row in rows] == [["size"], [], ["size", "time"], ["size"], []]


@pytest.mark.parametrize(
    ("capture_seconds", "forward_seconds", "epochs", "passes", "students"),
    [(10.0, 10.0, 1, 2, 2), (10.0, 8.0, 1, 2, 2), (25.0, 10.0, 2, 3, 2), (9.0, 10.0, 1, 1, 1)],
)
def test_break_even_is_the_first_number_of_passes_that_costs_more(
    capture_seconds, forward_seconds, epochs, passes, students
):
    found = break_even(capture_seconds, forward_seconds, epochs)
    assert found == {"passes": passes, "students": students}
    assert found["passes"] * forward_seconds > capture_seconds
    assert (found["passes"] - 1) * forward_seconds <= capture_seconds


@pytest.mark.parametrize(("evaluated", "forward"), [(100.0, 10.0), (40.0, 20.0)])
def test_the_economics_add_up(evaluated, forward):
    """Also when the evaluation was slower than the capture, which holds a forward pass itself."""
    found = economics(
        capture={"tokens": 1000, "seconds": 20.0},
        corpus={"labelled_tokens": {"train": 1000}, "tokens": {"train": 1500}},
        teacher={"tokens_per_second": evaluated, "parameters": 7},
        label_bytes=36_000,
        rows=[student("a", 1, 5.0, 0.1), student("b", 1, 6.0, 0.2), student("c", 0, 0, 0, "no")],
    )
    assert found["passes"] == 6  # three epochs of the two that were trained
    assert found["teacher_forward"]["seconds_per_epoch"] == forward
    assert found["seconds"] == {"captured_once": 31.0, "teacher_in_the_loop": 11.0 + 6 * forward}
    assert found["break_even"] == {"passes": int(20 / forward) + 1, "students": 1}
    assert found["capture"]["estimated_teacher_flops"] == 2 * 7 * 1500


def test_the_page_shows_names_as_text_and_loads_nothing(finished):
    result, _ = finished
    rows = [{**row, "name": f"<b>{row['name']}</b>"} for row in result.rows]
    page = render("<i>tiny</i>", rows, result.economics)
    assert page == render("<i>tiny</i>", rows, result.economics)
    assert "<b>" not in page
    assert "<i>tiny" not in page
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "paid back from" in page
