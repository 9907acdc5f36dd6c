"""One student trained by several processes: torchrun, FSDP2 over gloo, on the command line."""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest

from seodang.artifact import Artifact
from seodang.softlabels import open as open_store
from seodang.training.log import LOG, read_rows
from tiny_run import seodang, tiny_recipe

STEPS = 50
TELL_TEARING_DOWN = """
import atexit, os, sys
rank = os.environ.get("RANK")
if rank:
    atexit.register(lambda: print("tearing down process", rank, file=sys.stderr))
"""

POISON = """
import dataclasses
from seodang.softlabels.store import SoftLabelStore

get = SoftLabelStore.__getitem__

def poisoned(self, index):
    sequence = get(self, index)
    if sequence.document_id != "{bad}":
        return sequence
    return dataclasses.replace(sequence, weights=sequence.weights * float("nan"))

SoftLabelStore.__getitem__ = poisoned
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe of 50 steps with its soft labels, and the student that one process trains."""
    folder = tmp_path_factory.mktemp("distributed")
    student = {"epochs": 2, "batch_tokens": 320, "checkpoint_steps": 10, "keep_checkpoints": 9}
    recipe = tiny_recipe(folder, 60, student=student)
    impossible = {"max_kl": 1e-9}  # the run ends at its gate: no release is needed here
    done = seodang(
        "run", recipe, "--out", folder / "run", "--set", f"gate={json.dumps(impossible)}"
    )
    assert done.returncode == 1, done.stderr
    return folder


def labels(folder, out):
    """A run directory that has soft labels and nothing after them."""
    out.mkdir()
    for name in ("corpus", "soft-labels"):
        (out / name).symlink_to(folder / "run" / name)
    (out / "recipe.json").write_bytes((folder / "run" / "recipe.json").read_bytes())
    return out


def torchrun(folder, out, processes, *options):
    """Start ``seodang distill`` on several processes; standard error is the job's."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "-m", "seodang", "distill"),
            *(folder / "recipe.yaml", "--out", out, *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def losses(path):
    return [row["loss"] for row in read_rows(path / "student" / LOG)]


def same(found, expected):
    """Within 1e-4 of each other at every step."""
    assert len(found) == len(expected) >= STEPS
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-4


def test_two_processes_give_the_losses_of_one(folder, tmp_path, monkeypatch):
    out = labels(folder, tmp_path / "two")
    # Gloo's threads abort an interpreter that is torn down under them: now and then, on one side.
    (tmp_path / "sitecustomize.py").write_text(TELL_TEARING_DOWN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = torchrun(folder, out, 2, "--json")
    printed, messages = job.communicate(timeout=300)
    assert job.returncode == 0, messages
    assert "tearing down process" not in messages
    assert same(losses(out), losses(folder / "run"))
    assert json.loads(printed)["digest"] == Artifact.open(out / "student").digest
    assert Artifact.open(out / "student").verify() == []


@pytest.mark.parametrize("processes", [1, 4])
def test_a_killed_process_ends_the_job_which_goes_on_with_another_number(
    folder, tmp_path, processes
):
    out = labels(folder, tmp_path / "killed")
    job = torchrun(folder, out, 2)
    checkpoint = out / "student" / "checkpoints" / "step-00000010"
    while job.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    assert job.poll() is None, job.communicate()[1]
    psutil.Process(job.pid).children()[-1].kill()
    _, messages = job.communicate(timeout=120)
    assert job.returncode == 1, messages
    assert "continues from the last checkpoint" in messages
    assert not (out / "student" / "manifest.json").exists()
    again = torchrun(folder, out, processes)
    _, messages = again.communicate(timeout=300)
    assert again.returncode == 0, messages
    assert re.search(r"Continuing from step \d0 of ", messages)
    assert same(losses(out), losses(folder / "run"))


def test_the_one_document_with_a_loss_that_is_not_finite_is_named_by_all(
    folder, tmp_path, monkeypatch
):
    bad = open_store(folder / "run" / "soft-labels")[5].document_id
    out = labels(folder, tmp_path / "poisoned")
    (tmp_path / "sitecustomize.py").write_text(POISON.format(bad=bad))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = torchrun(folder, out, 2, "--set", "student.batch_tokens=100000")
    _, messages = job.communicate(timeout=300)
    assert job.returncode == 1
    assert f"the loss is not finite; documents: {bad}." in messages
    assert not (out / "student" / "manifest.json").exists()


def test_distill_needs_soft_labels(folder, tmp_path):
    done = seodang("distill", folder / "recipe.yaml", "--out", tmp_path / "none", "--json")
    assert done.returncode == 2
    assert "no finished soft labels" in json.loads(done.stdout)["error"]
    assert not (tmp_path / "none").exists()


def test_distill_alone_makes_the_student_of_the_run(folder, tmp_path):
    out = labels(folder, tmp_path / "one")
    done = seodang("distill", folder / "recipe.yaml", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    expected = Artifact.open(folder / "run" / "student").digest
    assert json.loads(done.stdout)["digest"] == expected
