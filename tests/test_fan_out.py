"""Capture on a Ray cluster: the bytes of one process, whoever dies on the way."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from seodang.corpus.readers import read_jsonl
from seodang.corpus.sequences import TokenSequence, tokenize_all
from seodang.errors import InputError, WorkFailed
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels import capture as capture_module
from seodang.softlabels import open as open_store
from seodang.softlabels.capture import capture
from seodang.teacher.local import LocalTeacher
from tiny import TEXT, tiny_teacher
from tiny_run import seodang
from tiny_store import sequences

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")

POISON = 77
MARK = "SEODANG_TEST_FAN_OUT"  # in the environment of every process of this module's clusters


def of_this_test(mark: str) -> list[psutil.Process]:
    """All processes that were started for a test, their children too."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def ray_folder() -> Iterator[str]:
    """Where Ray puts its sockets, whose paths must be short. Only who has a token may use it."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token_hex(16), "RAY_TMPDIR": folder}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(ray_folder: str) -> Iterator[str]:
    """A cluster of two workers; its address."""
    port, mark = free_port(), f"cluster-{os.getpid()}"
    options = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", "--block"]
    head = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *options),
            *("--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={ray_folder}"),
        ],
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert head.stdout is not None
        said = ""
        while "started" not in said:
            line = head.stdout.readline()
            said += line
            assert line, said
        yield f"127.0.0.1:{port}"
    finally:
        end(of_this_test(mark))
        head.communicate()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two workers share two CPUs only if each has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LocalTeacher:
    """A teacher that says NaN from where it has seen one token."""
    path = tiny_teacher(tmp_path_factory.mktemp("teacher"), tie_embeddings=False)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return LocalTeacher(path)


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.parquet"))}


def test_what_a_worker_refuses_arrives_as_it_is(
    cluster: str, teacher: LocalTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a cluster that runs already; shards that were finished by then are kept."""
    monkeypatch.setattr(capture_module, "SHARD_TOKENS", 60)
    ids = np.array([5, POISON, 6], np.int32)
    items = sequences(24)
    for item in items:
        item.token_ids[item.token_ids == POISON] = POISON + 1
    items.append(TokenSequence("poisoned", ids, np.arange(3, dtype=np.int32)))
    idle = LocalTeacher(teacher.directory)
    with pytest.raises(WorkFailed, match=r"^document poisoned: .*not finite.*shards are kept"):
        capture(idle, items, SoftLabelsConfig(), tmp_path / "many", ray=cluster)
    assert "model" not in vars(idle)  # the teacher was in the workers alone
    with pytest.raises(WorkFailed, match="document poisoned"):
        capture(teacher, items, SoftLabelsConfig(), tmp_path / "one")
    made, expected = shards(tmp_path / "many"), shards(tmp_path / "one")
    assert made
    assert made.items() <= expected.items()
    assert not (tmp_path / "many" / "manifest.json").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "nowhere.invalid:6379"])
def test_a_cluster_that_is_not_there(teacher: LocalTeacher, tmp_path: Path, address: str) -> None:
    with pytest.raises(InputError, match=f"Ray cluster {address}: "):
        capture(teacher, sequences(2), SoftLabelsConfig(), tmp_path / "s", ray=address)


class KillAWorker(threading.Thread):
    """Waits for a worker that is at work, and kills it with SIGKILL."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark = mark
        self.killed: int | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set() and self.killed is None:
            for process in psutil.process_iter(["cmdline"]):
                if not (process.info["cmdline"] or [""])[0].startswith("ray::_make"):
                    continue
                if process in of_this_test(self.mark):
                    process.kill()
                    self.killed = process.pid
                    break
            time.sleep(0.005)


def test_a_local_cluster_of_which_a_worker_is_killed_gives_the_bytes_of_one_process(
    teacher: LocalTeacher, tmp_path: Path
) -> None:
    """Through the command line, which leaves nothing running and keeps Ray quiet."""
    lines = TEXT.splitlines() * 60
    corpus, mark = tmp_path / "documents.jsonl", f"local-{os.getpid()}"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    killer = KillAWorker(mark)
    killer.start()
    done = seodang(
        *("capture", "--teacher", teacher.directory, "--corpus", corpus, "--json"),
        *("--out", tmp_path / "many", "--ray", "local", "--unusable", "skip"),
        *("--precision", "bfloat16"),
        env={MARK: mark},
    )
    killer.stopped.set()
    killer.join()
    left = of_this_test(mark)
    end(left)
    assert done.returncode == 0, done.stderr
    assert killer.killed is not None
    assert left == []
    ours = "left out: document ", "Capturing soft labels: "
    theirs = [line for line in done.stderr.splitlines() if not line.startswith(ours)]
    assert all("(raylet)" in line for line in theirs)  # the killed worker is reported
    sources = open_store(tmp_path / "many").artifact.manifest.sources
    items = tokenize_all(read_jsonl(corpus), teacher.tokenizer, sys.maxsize)
    skip = SoftLabelsConfig(unusable="skip")
    half = LocalTeacher(teacher.directory, "bfloat16")
    capture(half, items, skip, tmp_path / "one", sources=sources)
    assert len(shards(tmp_path / "one")) > 2
    assert shards(tmp_path / "many") == shards(tmp_path / "one")
    assert json.loads(done.stdout)["sequences"] == len(open_store(tmp_path / "one"))
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("many", "one")]
    assert manifests[0] == manifests[1]
