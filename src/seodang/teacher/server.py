"""JSON over HTTP with a server that may be busy, restarting or gone for a while."""

from __future__ import annotations

import time
from typing import Any, Self

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from seodang.api_key import authorization, hint
from seodang.errors import InputError, WorkFailed
from seodang.progress import say

PATIENCE = 900.0  # seconds until a request is given up: a large model takes long to load again
ANSWER_SECONDS = 600.0  # for one answer: vLLM compiles something for its first one, and queues
CONNECT_SECONDS = 10.0
LONGEST_WAIT = 30.0  # between two attempts
QUIET_SECONDS = 30.0  # between two lines about a server that does not answer


class NoAnswer(WorkFailed):
    """The server could not be reached, or was overloaded or broken, for the whole patience."""


class Refused(InputError):
    """The server answered that it will not do what was asked (HTTP 4xx, and 501)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _TryAgain(Exception):
    """A connection error, 429 or 5xx: may pass."""


class Server:
    """An OpenAI-compatible server by its address, ``http://host:port/v1``, as a context manager.

    ``patience`` is the time in seconds that one request is tried again, with exponential backoff,
    while the server cannot be reached, is overloaded (429) or fails (5xx).
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.url = check_address(url)
        self.patience = patience
        self._spoken = -QUIET_SECONDS

    async def __aenter__(self) -> Self:
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, pool=None)
        self._client = httpx.AsyncClient(timeout=timeout, headers=authorization())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> Any:
        """The JSON at ``path`` below the address."""
        return await self._persistently("GET", f"{self.url}{path}", None)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to ``body``.

        Raises ``Refused`` with the server's own message, ``NoAnswer`` when patience ends, and
        ``WorkFailed`` if the answer is not JSON.
        """
        return await self._persistently("POST", f"{self.url}{path}", body)

    async def post_beside(self, path: str, body: dict[str, Any]) -> Any:
        """Like :meth:`post`, for what vLLM offers beside ``/v1`` and not below it."""
        return await self._persistently("POST", f"{self.url.removesuffix('/v1')}{path}", body)

    async def _persistently(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        again = AsyncRetrying(
            retry=retry_if_exception_type(_TryAgain),
            wait=wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT),
            stop=stop_after_delay(self.patience),
            before_sleep=self._announce,
            reraise=True,
        )
        try:
            return await again(self._once, method, url, body)
        except _TryAgain as error:
            raise NoAnswer(
                f"{self.url}: no usable answer for {self.patience:.0f} seconds ({error}). "
                "Finished shards are kept: when the server runs again, the same command continues"
            ) from None

    async def _once(self, method: str, url: str, body: dict[str, Any] | None) -> Any:
        try:
            answer = await self._client.request(method, url, json=body)
        except httpx.TransportError as error:
            raise _TryAgain(str(error) or type(error).__name__) from None
        if _may_pass(answer.status_code):
            raise _TryAgain(f"{answer.status_code}: {_message(answer)}")
        if answer.status_code != 200:
            raise Refused(
                f"{url} answers {answer.status_code}: {_message(answer)}{hint(answer.status_code)}",
                answer.status_code,
            )
        try:
            return answer.json()
        except ValueError:
            raise WorkFailed(f"{url} answers with something that is not JSON") from None

    def _announce(self, attempt: RetryCallState) -> None:
        if time.monotonic() - self._spoken >= QUIET_SECONDS:
            self._spoken = time.monotonic()
            error = attempt.outcome and attempt.outcome.exception()
            say(
                f"{self.url}: {error}; trying again, for {self.patience:.0f} seconds before "
                "giving up"
            )


def _may_pass(status: int) -> bool:
    return status == 429 or (status >= 500 and status != 501)  # 501: it will never be there


def check_address(url: str) -> str:
    """The address without a trailing slash; raises ``InputError`` if it is not one of HTTP."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InputError(f"{url}: not an address ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"{url}: not the address of a server, like http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def _message(answer: httpx.Response) -> str:
    """What the server says is wrong: vLLM's, FastAPI's or a proxy's wording."""
    try:
        said = answer.json()
        said = said.get("error", said.get("detail", said))
        return str(said["message"] if isinstance(said, dict) and "message" in said else said)[:500]
    except (ValueError, AttributeError):
        return answer.text[:200].strip() or answer.reason_phrase
