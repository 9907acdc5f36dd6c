"""`seodang serve` on a real signed release: a tiny random model, converted and run for real."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import seodang.foundation.tokenizer
from seodang.artifact import FileEntry
from seodang.errors import InputError
from seodang.release import keys
from seodang.release.gguf import convert
from seodang.serving import server
from served import NAME, PROMPTS, outcome, port_of, running, signed_release, tiny_release
from tiny import tiny_teacher

TEMPLATE = Path(seodang.foundation.tokenizer.__file__).parent / "chat_template.j2"


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_release(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def service(release: Path) -> Iterator[dict[str, Any]]:
    with running(release) as (_, found):
        yield found


def get(service: dict[str, Any], path: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(service), timeout=30)
    connection.request("GET", path, headers={"Origin": "http://elsewhere.example"})
    response = connection.getresponse()
    return response, response.read()


def test_what_is_announced(service: dict[str, Any]) -> None:
    port = port_of(service)
    assert service == {
        "model": NAME,
        "file": f"{NAME}-q8_0.gguf",
        "chat": f"http://127.0.0.1:{port}/",
        "api": f"http://127.0.0.1:{port}/v1",
    }


def test_every_interface_with_a_warning(release: Path) -> None:
    with running(release, "--host", "0.0.0.0") as (process, service):
        assert service["chat"] == f"http://127.0.0.1:{port_of(service)}/"
        response, _ = get(service, "/health")
        assert response.status == 200
        process.terminate()
        assert process.stderr is not None
        assert "without a password" in process.stderr.read()


def test_what_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    server.announce(server.Service("m[1]", "m.gguf", "http://[::1]:8080/", "http://[::1]:8080/v1"))
    printed = capsys.readouterr().err
    assert "Serving m[1] (m.gguf)" in printed
    assert "http://[::1]:8080/v1" in printed


def test_another_quantization(release: Path) -> None:
    with running(release, "--quantization", "F16") as (_, service):
        assert service["file"] == f"{NAME}-f16.gguf"


def test_openai_client_streams_a_chat_completion(service: dict[str, Any]) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=service["api"], api_key="none")
    assert [model.id for model in client.models.list()] == [NAME]
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": PROMPTS[0]}],
        stream=True,
        max_tokens=24,
        extra_body={"ignore_eos": True, "seed": 1},
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert sum(bool(chunk.delta.content) for chunk in chunks) > 5
    assert chunks[-1].finish_reason == "length"


def test_a_model_of_two_modes_thinks_when_asked(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher", layers=1)
    (teacher / "chat_template.jinja").write_text(TEMPLATE.read_text())
    convert(teacher, {"f16": tmp_path / "f16.gguf"}, name=NAME, card={})
    with running(signed_release(tmp_path, {"f16": tmp_path / "f16.gguf"})) as (_, found):
        for asked, end in (({}, "</think>"), ({"enable_thinking": True}, "assistant\n<think>")):
            body = {"messages": [{"role": "user", "content": "2 + 2"}]}
            connection = http.client.HTTPConnection("127.0.0.1", port_of(found), timeout=30)
            kwargs = {"chat_template_kwargs": asked} if asked else {}
            connection.request("POST", "/apply-template", json.dumps({**body, **kwargs}))
            assert json.loads(connection.getresponse().read())["prompt"].endswith(end)


def test_the_root_is_our_page(service: dict[str, Any]) -> None:
    page = Path(server.CHAT_PAGE)
    for path, file in [("/", "index.html"), ("/chat.js", "chat.js"), ("/chat.css", "chat.css")]:
        response, body = get(service, path)
        assert response.status == 200
        assert body == (page / file).read_bytes()


def test_the_page_is_told_about_the_release(service: dict[str, Any]) -> None:
    _, body = get(service, "/props")
    assert json.loads(body)["ui_settings"]["seodang"] == {
        "description": "Synthetic & random.",
        "license": "Apache-2.0",
        "prompts": PROMPTS,
    }


def test_other_sites_and_other_people_see_nothing(service: dict[str, Any]) -> None:
    response, _ = get(service, "/v1/models")
    assert not response.headers["Access-Control-Allow-Origin"]
    response, _ = get(service, "/slots")
    assert response.status == 501
    connection = http.client.HTTPConnection("127.0.0.1", port_of(service), timeout=30)
    connection.request("GET", "/../server.py")
    assert connection.getresponse().status == 404


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)]
)
def test_nothing_stays_behind(release: Path, number: signal.Signals, code: int) -> None:
    with running(release) as (process, service):
        # One client waits with its connection open, another one for a very long answer.
        waiting = http.client.HTTPConnection("127.0.0.1", port_of(service), timeout=30)
        waiting.request("GET", "/health")
        waiting.getresponse().read()
        answering = http.client.HTTPConnection("127.0.0.1", port_of(service), timeout=30)
        request = {"prompt": "a", "n_predict": -1, "ignore_eos": True, "stream": True}
        answering.request("POST", "/completion", json.dumps(request))
        assert answering.getresponse().readline().startswith(b"data:")
        process.send_signal(number)
        assert process.wait(timeout=60) == code
        left = [other for other in psutil.pids() if session_of(other) == process.pid]
        assert left == []
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port_of(service))) != 0


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def test_a_tampered_release_is_not_served(release: Path, tmp_path: Path) -> None:
    tampered = tmp_path / "release"
    shutil.copytree(release, tampered)
    shutil.copyfile(release.parent / "signing.pub", tmp_path / "signing.pub")
    gguf = tampered / f"{NAME}-f16.gguf"
    data = bytearray(gguf.read_bytes())
    data[-1] ^= 1
    gguf.write_bytes(data)
    code, printed, messages = outcome(tampered, "--port", "0")
    assert code == 1
    assert f"{gguf.name}: content differs" in printed["error"]
    assert "not served" in messages


def test_another_key_is_refused(release: Path, tmp_path: Path) -> None:
    _, public = keys.new_keys(tmp_path)
    code, printed, _ = outcome(release, "--port", "0", "--public-key", str(public))
    assert code == 1
    assert "model.sig" in printed["error"]


def test_a_signed_file_that_is_no_model(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"GGUF" + bytes(200))
    release = signed_release(tmp_path, {"f16": junk})
    code, printed, messages = outcome(release, "--port", "0")
    assert code == 1
    assert "llama.cpp could not serve this file" in printed["error"]
    assert "GGUF version" in messages


def test_a_port_in_use(release: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, printed, _ = outcome(release, "--port", str(port))
    assert code == 2
    assert f"another program listens on 127.0.0.1:{port}" in printed["error"]
    assert "--port 0" in printed["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "192.0.2.1"], "not an address of this machine"),
        (["--host", "no such host"], "not a name or an address of this machine"),
        (["--port", "65536"], "from 0 to 65535"),
        (
            ["--port", "0", "--quantization", "q2_k"],
            f"this release has {NAME}-f16.gguf, {NAME}-q8_0.gguf",
        ),
    ],
)
def test_bad_usage(release: Path, options: list[str], message: str) -> None:
    code, printed, _ = outcome(release, *options)
    assert code == 2
    assert message in printed["error"]


def files(**sizes: int) -> list[FileEntry]:
    return [
        FileEntry(path=f"a-model-{name}.gguf", size=size, sha256="0" * 64)
        for name, size in sizes.items()
    ]


@pytest.mark.parametrize(
    ("quantization", "chosen"), [(None, "q8_0"), ("q8_0", "q8_0"), ("F16", "f16"), ("f32", "f32")]
)
def test_which_gguf(quantization: str | None, chosen: str) -> None:
    entries = files(f32=40, f16=20, bf16=20, q8_0=10)
    found = server._choose_gguf(Path("release"), entries, quantization)
    assert found.path == f"a-model-{chosen}.gguf"


def test_a_release_without_gguf() -> None:
    with pytest.raises(InputError, match="holds no GGUF"):
        server._choose_gguf(Path("release"), [], None)
