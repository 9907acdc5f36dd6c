"""llama.cpp on one GGUF file, asked for full next-token distributions.

The server of xllamacpp runs in a child process and listens on a socket in a private directory: no
port is opened, it works without a network, and it ends when its standard input is closed, that is
whenever this process ends.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from seodang.errors import InputError, WorkFailed

SLOTS = 2  # sequences evaluated side by side: one is computed while another is being printed
_ERRORS_ONLY = 1
_READY = "ready"


def check_engine() -> None:
    """Raise ``InputError`` unless llama.cpp (the package xllamacpp) is installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise InputError(
            "comparing GGUF with PyTorch needs llama.cpp: pip install 'seodang[serve]' "
            "(or release without GGUF: `release.quantizations: []`)"
        )


class Engine:
    """A running llama.cpp; a context manager. ``context`` is in tokens, for each slot."""

    def __init__(self, gguf: Path, context: int) -> None:
        self.gguf = gguf
        self.context = context

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="seodang-")
        self._socket = str(Path(self._folder.name) / "engine.sock")
        self._log: IO[bytes] = (Path(self._folder.name) / "log").open("w+b")
        command = [sys.executable, "-P", "-m", "seodang.release.engine"]
        command += [str(self.gguf.resolve()), self._socket, str(self.context * SLOTS)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != _READY.encode():
            error = self._failed("could not load it")
            self.__exit__(None, None, None)
            raise error
        self._letter = self.tokenize("a", add_special=False)[-1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def log_probs(
        self, token_ids: list[int], slot: int, vocab_size: int
    ) -> npt.NDArray[np.float64]:
        """Log-probabilities in nats of the token after ``token_ids``, (vocabulary,).

        They are the softmax of the logits, before any sampling. What ``slot`` has in common with
        the request before is not computed again.
        """
        answer = self._request(
            "/completion",
            {
                "prompt": token_ids,
                "id_slot": slot,
                "cache_prompt": True,
                "n_predict": 1,
                "n_probs": vocab_size,
                "post_sampling_probs": False,
                # The probabilities are those before sampling, but are left out of the answer if
                # the sampled token ends inside a UTF-8 character: sample a letter.
                "logit_bias": [[self._letter, 1e4]],
            },
        )
        # The list of all tokens stands last. Parsing megabytes of it as JSON would take longer
        # than computing it; inside a JSON string no quotation mark stands without a backslash.
        entries = answer[answer.rindex(b'"top_logprobs":') :]
        ids = np.array(re.findall(rb'"id":(\d+)', entries), dtype=np.int64)
        values = np.array(re.findall(rb'"logprob":([^,}]+)', entries), dtype=np.float64)
        if len(ids) != len(values) or not np.array_equal(np.sort(ids), np.arange(vocab_size)):
            raise WorkFailed(
                f"{self.gguf}: llama.cpp gives {len(ids)} probabilities for a vocabulary of "
                f"{vocab_size}"
            )
        found: npt.NDArray[np.float64] = np.empty(vocab_size)
        found[ids] = values
        # llama.cpp adds the probabilities up in float32, which is off by up to 1e-4.
        found -= np.logaddexp.reduce(found)
        return found

    def tokens_per_second(self, token_ids: list[int], tokens: int) -> float:
        """How fast ``tokens`` tokens are written after ``token_ids``, one after the other."""
        answer = self._post(
            "/completion",
            {"prompt": token_ids, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False},
        )
        return float(answer["timings"]["predicted_per_second"])

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """The token ids of ``text``, in which special tokens may be written out."""
        request = {"content": text, "add_special": add_special, "parse_special": True}
        return [int(token) for token in self._post("/tokenize", request)["tokens"]]

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        """The prompt that the chat API makes of ``messages``."""
        asked = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}}
        return str(self._post("/apply-template", asked)["prompt"])

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._request(path, body))
        return answer

    def _request(self, path: str, body: dict[str, Any]) -> bytes:
        """The server's answer; raises ``WorkFailed`` if it gives none or refuses."""
        connection = _SocketConnection(self._socket)
        try:
            connection.request("POST", path, json.dumps(body))
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            raise self._failed("stopped answering") from None
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            reason = answer[:400].decode(errors="replace")
            raise WorkFailed(f"{self.gguf}: llama.cpp refused {path}: {reason}")
        return answer

    def _failed(self, what: str) -> WorkFailed:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()[-4:]
        return WorkFailed("\n  ".join([f"{self.gguf}: llama.cpp {what}", *lines]))


class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def _serve(gguf: str, address: str, context: str) -> None:
    """Answer at ``address`` until standard input ends."""
    from xllamacpp import CommonParams, Server

    parameters = CommonParams()
    parameters.model.path = gguf
    parameters.hostnames = [address]
    parameters.n_ctx = int(context)
    parameters.n_parallel = SLOTS
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.cache_ram_mib = 0
    parameters.warmup = False
    parameters.verbosity = _ERRORS_ONLY
    server = Server(parameters)
    sys.stdout.write(_READY + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    del server
    os._exit(0)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
