"""The description of the served model's API: OpenAPI 3.1, ``api/openapi.json`` of a release.

It describes what ``seodang serve`` and llama.cpp's own server offer for this model. Source:
https://spec.openapis.org/oas/v3.1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from seodang.release import api_types as api
from seodang.release.facts import Facts
from seodang.serving.server import CONTEXT, CONVERSATIONS

Schemas = Mapping[str, dict[str, Any]]
"""The JSON schemas of answers, by the name of the task that asks for them."""

_TYPES: tuple[type[BaseModel], ...] = (
    api.ChatCompletionRequest,
    api.ChatCompletion,
    api.ChatCompletionChunk,
    api.CompletionRequest,
    api.Completion,
    api.ModelList,
    api.Health,
    api.Error,
)


class _Untitled(GenerateJsonSchema):
    """Schemas whose fields are not given their own names as titles."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def describe(facts: Facts, schemas: Schemas) -> dict[str, Any]:
    """The OpenAPI document of a release; ``schemas`` are shown as examples of requests."""
    name = facts.config.name
    trained = facts.architecture.get("max_position_embeddings")
    context = min(CONTEXT, trained or CONTEXT)
    _, defined = models_json_schema(
        [(each, "validation") for each in _TYPES],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Untitled,
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": name,
            "version": facts.student.digest[:12],
            "summary": "OpenAI-compatible API of one small language model",
            "description": _description(facts, context),
            "license": {"name": facts.config.license, "identifier": facts.config.license},
        },
        "servers": [
            {"url": "http://127.0.0.1:8080", "description": "`seodang serve` on this machine"}
        ],
        "security": [],
        "paths": {
            "/v1/chat/completions": {"post": _chat(name, schemas)},
            "/v1/completions": {
                "post": _operation(
                    "complete",
                    "Continue a text",
                    api.Completion,
                    event=api.Completion,
                    body=api.CompletionRequest,
                    examples={"text": {"model": name, "prompt": "...", "max_tokens": 64}},
                )
            },
            "/v1/models": {"get": _operation("models", "The served model", api.ModelList)},
            "/health": {"get": _operation("health", "Does the server answer?", api.Health)},
        },
        "components": {"schemas": defined["$defs"]},
        "x-seodang": {
            "model": name,
            "student": facts.student.digest,
            "context_length": context,
            "context_length_of_the_model": trained,
            "concurrent_requests": CONVERSATIONS,
            "vocabulary": facts.architecture["vocab_size"],
            "response_schemas": dict(schemas),
        },
    }


def _description(facts: Facts, context: int) -> str:
    return (
        f"{facts.config.description or 'A small language model for one job.'}\n\n"
        f"Prompt and answer together hold at most {context:,} tokens; a longer prompt is refused "
        f"with status 400. {CONVERSATIONS} requests are answered at the same time, more wait. "
        "There is no authentication: whoever reaches the server can use it."
    )


def _chat(name: str, schemas: Schemas) -> dict[str, Any]:
    asked = {"model": name, "messages": [{"role": "user", "content": "..."}], "max_tokens": 128}
    examples = {"text": asked}
    for task, schema in schemas.items():
        form = {"type": "json_schema", "json_schema": {"name": task, "schema": schema}}
        examples[task] = {**asked, "response_format": form}
    return _operation(
        "chat",
        "Continue a conversation",
        api.ChatCompletion,
        event=api.ChatCompletionChunk,
        body=api.ChatCompletionRequest,
        examples=examples,
    )


def _operation(
    identity: str,
    summary: str,
    answer: type[BaseModel],
    *,
    event: type[BaseModel] | None = None,
    body: type[BaseModel] | None = None,
    examples: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One operation; ``event`` is the type of an event of a streamed answer."""
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
    described = answer.__doc__ or ""
    if event is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
        described += (
            f" With `stream`, lines of `data: ` and a {event.__name__} each, then `data: [DONE]`."
        )
    operation: dict[str, Any] = {
        "operationId": identity,
        "summary": summary,
        "responses": {"200": {"description": described, "content": content}},
    }
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {
                    "schema": _ref(body),
                    "examples": {key: {"value": value} for key, value in (examples or {}).items()},
                }
            },
        }
        refused = "400", "The request cannot be understood, or is too long."
    else:
        refused = "503", "The model is still being loaded."
    operation["responses"][refused[0]] = {
        "description": refused[1],
        "content": {"application/json": {"schema": _ref(api.Error)}},
    }
    return operation


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
