"""The command line: exit codes, one JSON object where it is promised, and no traceback ever."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from seodang import __version__
from seodang.cli import main
from tiny import tiny_teacher
from tiny_run import command


@dataclass
class Outcome:
    """What one command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


Seodang = Callable[..., Outcome]


@pytest.fixture
def seodang(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Seodang:
    """Run the command in this process; whatever is not an exit is a traceback and fails."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["seodang", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        code = stopped.value.code or 0
        assert isinstance(code, int)
        return Outcome(code, *capsys.readouterr())

    return run


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


# Synthetic: written for these tests.
DOCUMENTS = [
    {"id": "card", "text": "To replace a lost debit card, sign in and choose replacement."},
    {
        "messages": [
            {"role": "user", "content": "카드를 잃어버렸어요."},
            {"role": "assistant", "content": "앱에서 바로 정지할 수 있습니다."},
        ]
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a corpus and the store that the command makes of them."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_teacher(folder / "teacher")
    write_lines(folder / "corpus.jsonl", *DOCUMENTS)
    arguments = ["--teacher", folder / "teacher", "--corpus", folder / "corpus.jsonl", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["seodang", "capture", *map(str, arguments), "--out", str(folder / "out")]
        )
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    return folder


@pytest.fixture
def capture(seodang: Seodang, folder: Path, tmp_path: Path) -> Seodang:
    """Capture a corpus of the test's own with the tiny teacher."""

    def run(corpus: Path, *options: str | Path) -> Outcome:
        teacher = folder / "teacher"
        arguments = ["--teacher", teacher, "--corpus", corpus, "--out", tmp_path / "out"]
        return seodang("capture", *arguments, *options)

    return run


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return Path(shutil.copytree(folder / "out", tmp_path / "store"))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["capture", "--help"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import atexit, sys; sys.argv = ['seodang', *sys.argv[1:]]\n"
        "atexit.register(lambda: print('loaded:', *sys.modules))\n"
        "from seodang.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "seodang.cli" in loaded
    heavy = {"torch", "transformers", "numpy", "pyarrow", "yaml", "matplotlib", "cryptography"}
    if arguments == ["--help"]:  # typer itself loads pydantic to show a command's own options
        heavy.add("pydantic")
    assert heavy & loaded == set()


def test_help_names_every_command(seodang: Seodang) -> None:
    done = seodang("--help")
    assert done.code == 0
    for name in ("run", "fetch", "capture", "serve", "doctor", "labels", "release", "keys"):
        assert f" {name} " in done.out
    assert seodang("--version") == Outcome(0, f"{__version__}\n", "")


def test_python_m_seodang_is_the_command() -> None:
    done = subprocess.run(command("--version"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


BAD_USAGE = {
    "unknown command": (["distil", "--json"], "No such command 'distil'"),
    "unknown option": (["doctor", "--json", "--loud"], "No such option: --loud"),
    "missing argument": (["run", "--json", "--out", "x"], "Missing argument"),
    "missing option": (["run", "x.yaml", "--json"], "Missing option '--out'"),
    "wrong type": (["labels", "show", "x", "--top=many", "--json"], "'--top'"),
    "out of range": (["labels", "show", "x", "--top=-1", "--json"], "'--top'"),
    "no such recipe": (["run", "x.yaml", "--out=x", "--json"], "x.yaml: no such recipe"),
    "no such recipe to fetch": (["fetch", "x.yaml", "--json"], "x.yaml: no such recipe"),
    "no package": (["fetch", "a b==1", "--json"], "write NAME==VERSION"),
    "no version": (["fetch", "a==", "--json"], "write NAME==VERSION"),
    "no store": (["labels", "inspect", "x", "--json"], "x: no such directory"),
    "no store to verify": (["labels", "verify", "x", "--json"], "x: no such directory"),
    "no store to show": (["labels", "show", "x", "--json"], "x: no such directory"),
    "no release": (["release", "verify", "x", "--public-key=y", "--json"], "x: no such directory"),
    "no release to serve": (["serve", "x", "--json"], "signing.pub: no such key"),
    "undecodable name": (["labels", "inspect", "\udcff", "--json"], "\udcff: no such directory"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_code_2_in_words_and_in_json(
    seodang: Seodang, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    arguments, message = BAD_USAGE[case]
    monkeypatch.chdir(tmp_path)
    done = seodang(*arguments)
    assert done.code == 2
    assert set(done.json) == {"error", "exit_code"}
    assert done.json["exit_code"] == 2
    assert message in done.json["error"]
    assert done.err.strip()
    silent = seodang(*(argument for argument in arguments if argument != "--json"))
    assert (silent.code, silent.out) == (2, "")
    assert not list(tmp_path.iterdir()), "something was begun"


CAPTURE_OPTIONS = {
    "--estimator=topk": "--estimator: Input should be 'top-k', 'residual', 'sampled' or",
    "--layout=tiny": "--layout: Input should be 'fast' or 'small'",
    "--seed=-1": "--seed: ",
    "--threshold=0.7": "--threshold: ",
    "--threshold=0": "--threshold: ",
    "--unusable=maybe": "--unusable: Input should be 'refuse' or 'skip'",
    "--draws=256": "--draws: ",
    "--k=4": "`k` has no meaning for the estimator head-tail",
    "--max-length=0": "'--max-length'",
}


@pytest.mark.parametrize("option", CAPTURE_OPTIONS)
def test_wrong_options_of_capture_name_themselves(
    capture: Seodang, folder: Path, tmp_path: Path, option: str
) -> None:
    done = capture(folder / "corpus.jsonl", option, "--json")
    assert done.code == 2
    assert CAPTURE_OPTIONS[option] in done.json["error"]
    assert not (tmp_path / "out").exists()


def test_a_wrong_recipe_is_refused_before_the_directory_is_made(
    seodang: Seodang, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text("name: demo\nstudent: {layer: 2}\n")
    done = seodang("run", tmp_path / "r.yaml", "--out", tmp_path / "out", "--json")
    assert done.code == 2
    assert "r.yaml:2: unknown key `student.layer`; nearest valid key: `layers`" in done.err
    assert done.json["error"] in done.err
    assert not (tmp_path / "out").exists()


BAD_CORPORA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "nothing to capture"),
    "blank lines": (b"\n  \n\n", "nothing to capture"),
    "empty texts": (b'{"text": ""}\n', "document c.jsonl#1: empty: there is no token to label"),
    "no answer": (
        b'{"messages": [{"role": "user", "content": "Hello?"}]}\n',
        "document c.jsonl#1: empty: there is no token to label",
    ),
    "not UTF-8": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "c.jsonl:2: not UTF-8"),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), "c.jsonl:1: not UTF-8"),
    "a line of 10 MB": (
        b'{"text": "a"}\n{"text": "' + b"a" * 10_000_000 + b'"}\n',
        "c.jsonl:2: a document of more than 1,000,000 bytes",
    ),
    "not JSON": (b'{"text": "a"}\ntext\n', "c.jsonl:2: not valid JSON"),
    "a list": (b'["a"]\n', "c.jsonl:1: a record must be an object"),
    "too deep": (b"[" * 100_000 + b"\n", "c.jsonl: nested too deeply"),
    "no text": (b'{"txt": "a"}\n', "c.jsonl:1: wants `text` (a string) or `messages`"),
    "text that is a number": (b'{"text": 1}\n', "c.jsonl:1: wants `text` (a string)"),
    "an unknown role": (
        b'{"messages": [{"role": "bot", "content": "Hello"}]}\n',
        "c.jsonl:1: message 0 has the role 'bot'; known roles: system, user, assistant",
    ),
    "half a surrogate pair": (b'{"text": "\\ud800"}\n', "c.jsonl:1: holds half a surrogate pair"),
    "the same id twice": (
        b'{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n',
        "c.jsonl:2: the id 1 stands on line 1 already",
    ),
    "longer than the teacher's context": (
        b'{"id": "long", "text": "' + b"a b " * 1000 + b'"}\n',
        "document long: 2000 tokens, the teacher's context holds 1024: cut the document",
    ),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_a_corpus_that_cannot_be_captured_is_refused(
    capture: Seodang, tmp_path: Path, case: str
) -> None:
    data, message = BAD_CORPORA[case]
    (tmp_path / "c.jsonl").write_bytes(data)
    done = capture(tmp_path / "c.jsonl", "--json")
    assert done.code == 2
    assert message in done.json["error"]
    assert not (tmp_path / "out").exists()


def test_other_corpora_that_are_refused(capture: Seodang, tmp_path: Path) -> None:
    (tmp_path / "c.txt").touch()
    (tmp_path / "d.jsonl").mkdir()
    for corpus in (tmp_path / "gone.jsonl", tmp_path / "c.txt", tmp_path / "d.jsonl"):
        done = capture(corpus, "--json")
        assert done.code == 2
        assert str(corpus) in done.json["error"]


def test_one_token_is_enough(capture: Seodang, seodang: Seodang, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", {"text": "a"})
    done = capture(corpus, "--json")
    assert done.code == 0
    assert (done.json["tokens"], done.json["sequences"]) == (1, 1)
    assert seodang("labels", "verify", tmp_path / "out").code == 0
    (row,) = seodang("labels", "show", tmp_path / "out", "--json").json["positions"]
    assert row["position"] == 0


def test_a_long_document_is_cut_when_asked(capture: Seodang, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", {"text": "a b " * 1000})
    done = capture(corpus, "--json", "--max-length", "512")
    assert (done.json["tokens"], done.json["sequences"]) == (2000, 4)


def test_capture_says_what_it_made_and_does_it_once(
    capture: Seodang, seodang: Seodang, folder: Path, tmp_path: Path
) -> None:
    made = capture(folder / "corpus.jsonl", "--json")
    assert made.code == 0
    found = made.json
    inspected = seodang("labels", "inspect", folder / "out", "--json").json
    assert {**found, "path": ""} == {**inspected, "path": ""}
    size = sum(file.stat().st_size for file in (folder / "out").rglob("*"))
    assert found["bytes_per_token"] == size / found["tokens"]
    assert (found["estimator"], found["layout"], found["vocab_size"]) == ("head-tail", "fast", 600)
    assert found["sequences"] == 2
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert capture(folder / "corpus.jsonl", "--json").json == found
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


def test_results_for_people_go_to_standard_output(
    seodang: Seodang, folder: Path, tmp_path: Path
) -> None:
    out, teacher = folder / "out", folder / "teacher"
    assert "head-tail" in seodang("labels", "inspect", out).out
    assert seodang("labels", "verify", out) == Outcome(0, f"{out}: verified\n", "")
    shown = seodang("labels", "show", out, "--positions", "3", "--tokenizer", teacher).out
    assert shown.startswith("document card, ")
    assert len(shown.splitlines()) == 4
    assert "signing.pub" in seodang("keys", "new", tmp_path / "keys").out


def test_show_spells_tokens_and_orders_entries(seodang: Seodang, folder: Path) -> None:
    out, teacher = folder / "out", folder / "teacher"
    done = seodang("labels", "show", out, "--tokenizer", teacher, "--top=3", "--json")
    assert done.json["document"] == "card"
    rows = done.json["positions"]
    text = "".join(row["token"] for row in rows)
    assert DOCUMENTS[0]["text"].startswith(text)
    for row in rows:
        weights = [entry["weight"] for entry in row["entries"]]
        assert len(weights) == 3
        assert weights == sorted(weights, reverse=True)
    last = seodang("labels", "show", out, "--sequence=-1", "--positions=0", "--json").json
    assert last["document"] == "corpus.jsonl#2"
    assert last["positions"] == []
    beyond = seodang("labels", "show", out, "--sequence=2", "--json")
    assert beyond.code == 2
    assert "has sequences 0 to 1, not 2" in beyond.json["error"]


def test_another_tokenizer_does_not_spell(seodang: Seodang, folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder / "teacher", tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    done = seodang("labels", "show", folder / "out", "--tokenizer", other, "--json")
    assert done.code == 2
    assert "made with another tokenizer" in done.json["error"]


def test_a_damaged_store_fails_its_verification(seodang: Seodang, store: Path) -> None:
    shard = store / "labels-00000.parquet"
    whole = shard.read_bytes()
    generator = random.Random(0)
    places = [*generator.sample(range(len(whole)), 12), *range(len(whole) - 12, len(whole))]
    for place in places:  # the last bytes say how the file is to be read
        data = bytearray(whole)
        data[place] ^= 1 << generator.randrange(8)
        shard.write_bytes(data)
        done = seodang("labels", "verify", store, "--json")
        assert done.code == 1, place
        assert done.json["verified"] is False
        assert done.json["problems"][0].startswith(f"{shard.name}: content differs")
    for size in (0, 4, len(whole) // 2):
        shard.write_bytes(whole[:size])
        done = seodang("labels", "verify", store)
        assert (done.code, done.out) == (1, "")
        assert f"{shard.name}: {size} bytes, manifest says {len(whole)}" in done.err
    shard.unlink()
    assert seodang("labels", "verify", store, "--json").json["problems"] == [
        f"{shard.name}: missing"
    ]
    shard.write_bytes(whole)
    assert seodang("labels", "verify", store, "--json").json["verified"] is True
    (store / "notes.txt").touch()
    assert seodang("labels", "verify", store).code == 1


def test_an_unfinished_store_is_no_store(seodang: Seodang, store: Path) -> None:
    (store / "manifest.json").unlink()
    for verb in ("inspect", "verify", "show"):
        done = seodang("labels", verb, store, "--json")
        assert done.code == 2
        assert "not a finished artifact" in done.json["error"]


def test_other_artifacts_and_foreign_directories_are_left_alone(
    capture: Seodang, seodang: Seodang, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("kept")
    done = capture(folder / "corpus.jsonl", "--json")
    assert done.code == 2
    assert "not made by Seodang" in done.json["error"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    done = seodang("labels", "inspect", folder / "teacher", "--json")
    assert done.code == 2
    assert "no manifest.json" in done.json["error"]


def test_what_the_machine_forbids_is_said_without_a_traceback(
    seodang: Seodang, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = seodang("keys", "new", tmp_path / "file" / "keys", "--json")
    assert done.code == 1
    assert "Not a directory" in done.json["error"]
    arguments = ["--teacher", folder / "teacher", "--corpus", folder / "corpus.jsonl", "--json"]
    done = seodang("capture", *arguments, "--out", tmp_path / "file" / "out")
    assert done.code == 1
    assert str(tmp_path / "file") in done.json["error"]


def test_keys_are_made_once(seodang: Seodang, tmp_path: Path) -> None:
    done = seodang("keys", "new", tmp_path / "k", "--json")
    assert done.code == 0
    assert done.json == {
        "private": str(tmp_path / "k" / "signing.key"),
        "public": str(tmp_path / "k" / "signing.pub"),
    }
    again = seodang("keys", "new", tmp_path / "k", "--json")
    assert again.code == 2
    assert "never overwritten" in again.json["error"]


def test_a_release_that_is_none_fails_its_verification(seodang: Seodang, tmp_path: Path) -> None:
    public = seodang("keys", "new", tmp_path / "k", "--json").json["public"]
    (tmp_path / "release").mkdir()
    done = seodang("release", "verify", tmp_path / "release", "--public-key", public, "--json")
    assert done.code == 1
    assert done.json["verified"] is False
    assert "manifest.json: missing" in done.json["problems"]
    people = seodang("release", "verify", tmp_path / "release", "--public-key", public)
    assert (people.code, people.out) == (1, "")
    assert "manifest.json: missing" in people.err


def test_doctor_answers_in_json_and_for_people(seodang: Seodang) -> None:
    done = seodang("doctor", "--json")
    assert done.code == 0
    assert {"cpu", "memory", "libraries", "ready", "missing"} <= set(done.json)
    people = seodang("doctor")
    assert (people.code, people.err) == (0, "")
    assert done.json["cpu"]["model"].split()[0] in people.out


def test_a_precision_that_is_none_is_refused(capture: Seodang, folder: Path) -> None:
    done = capture(folder / "corpus.jsonl", "--precision", "float16")
    assert done.code == 2
    assert "--precision float16: choose one of float32, bfloat16" in done.err


def test_ctrl_c_says_how_to_go_on_and_the_capture_does(
    seodang: Seodang, folder: Path, tmp_path: Path
) -> None:
    lines = [{"text": f"Notice {i}. " + f"payment {i} card statement " * 40} for i in range(80)]
    corpus, out = write_lines(tmp_path / "c.jsonl", *lines), tmp_path / "out"
    arguments = ["capture", "--teacher", folder / "teacher", "--corpus", corpus, "--json"]
    with subprocess.Popen(
        command(*arguments, "--out", out),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        while process.poll() is None and not (out / "labels-00000.parquet").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, messages = process.communicate()
    assert process.returncode == 130, messages
    assert json.loads(printed)["exit_code"] == 130
    assert "run the same command again and it continues" in messages
    assert "Traceback" not in messages
    assert not (out / "manifest.json").exists()
    first = (out / "labels-00000.parquet").stat().st_mtime_ns
    resumed = seodang(*arguments, "--out", out).json
    assert (out / "labels-00000.parquet").stat().st_mtime_ns == first
    assert resumed["digest"] == seodang(*arguments, "--out", tmp_path / "again").json["digest"]


FINALISER = """
import signal, time
from seodang.cli import keep_ctrl_c
keep_ctrl_c()
class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)
try:
    Dropped()
    for _ in range(500):
        time.sleep(0.01)
    print("lost")
except KeyboardInterrupt:
    print("kept")
"""


def test_ctrl_c_in_a_finaliser_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FINALISER], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("kept\n", "")


@pytest.mark.parametrize("code", [0, 2, 130])
def test_only_what_is_interrupted_leaves_at_once(code: int) -> None:
    """Without tearing down, in which threads that were at work can turn it into a crash."""
    script = (
        "import atexit, sys, seodang.cli as cli\n"
        "atexit.register(print, 'torn down')\n"
        f"cli.app = lambda: sys.exit({code})\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == code
    assert ("torn down" in done.stdout) == (code != 130)
