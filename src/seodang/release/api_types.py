"""What goes in and out of the served model: the OpenAI API as llama.cpp's server speaks it.

These are the types behind the API's description (:mod:`seodang.release.openapi`), not a client.
Fields that are not described are allowed on both sides: the server takes its own sampling
settings, and answers with timings.

Learned from: https://platform.openai.com/docs/api-reference and llama.cpp's tools/server/README.md.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "tool_calls"]


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Message(_Open):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class NamedSchema(_Open):
    """A JSON schema and its name."""

    name: str = Field("answer", description="what the answer is called")
    json_schema: dict[str, Any] = Field(alias="schema", description="JSON Schema of the answer")


class PlainText(_Open):
    """Any text."""

    type: Literal["text"]


class AnyJson(_Open):
    """One JSON object."""

    type: Literal["json_object"]


class JsonBySchema(_Open):
    """JSON that a schema describes; the answer is written under it and cannot break it."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(_Open):
    """What a streamed answer tells beside its text."""

    include_usage: bool = Field(False, description="end with the numbers of tokens")


class Sampling(_Open):
    """How tokens are chosen, and how many; the defaults are the server's."""

    model: str | None = Field(None, description="the name in /v1/models; another one is ignored")
    max_tokens: int = Field(-1, ge=-1, description="of the answer; -1: until it ends")
    temperature: float = Field(0.8, ge=0, description="0 always takes the likeliest token")
    top_p: float = Field(0.95, ge=0, le=1)
    top_k: int = Field(40, ge=0, description="0: all")
    min_p: float = Field(0.05, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, description="the same seed and settings give the same answer")
    stop: str | list[str] | None = Field(None, description="text at which the answer ends")
    n: int = Field(1, ge=1, description="answers")
    stream: bool = Field(False, description="send the answer in parts, as it is written")
    stream_options: StreamOptions | None = None


class ChatCompletionRequest(Sampling):
    """A conversation to be continued."""

    messages: list[Message]
    response_format: PlainText | AnyJson | JsonBySchema | None = Field(
        None, description="what the answer must look like"
    )
    logprobs: bool = Field(False, description="tell the log-probability of each token, in nats")
    top_logprobs: int | None = Field(None, ge=0, description="and of the likeliest others")


class CompletionRequest(Sampling):
    """A text to be continued."""

    prompt: str | list[int] = Field(description="text, or token ids")
    logprobs: int | None = Field(None, ge=0, description="log-probabilities of so many tokens")


class Usage(_Open):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogProb(_Open):
    """A token that was written, and what else was likely."""

    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[dict[str, Any]]


class LogProbs(_Open):
    """One entry for each token of the answer."""

    content: list[TokenLogProb]


class AssistantMessage(_Open):
    """The answer."""

    role: Literal["assistant"]
    content: str | None


class ChatChoice(_Open):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: LogProbs | None = None


class _Answer(_Open):
    id: str
    created: int = Field(description="seconds since 1970")
    model: str


class ChatCompletion(_Answer):
    """The answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Delta(_Open):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Open):
    """The next part of an answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Answer):
    """One event of a streamed answer to a conversation."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextChoice(_Open):
    """One continuation, or the next part of it."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: LogProbs | None


class Completion(_Answer):
    """The continuation of a text, or one event of a streamed one."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class ServedModel(_Open):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Open):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[ServedModel]


class Health(_Open):
    """The server answers."""

    status: Literal["ok"]


class ErrorDetail(_Open):
    """What went wrong."""

    code: int
    message: str
    type: str


class Error(_Open):
    """A request that was refused."""

    error: ErrorDetail
