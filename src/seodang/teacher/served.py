"""The teacher behind vLLM's OpenAI-compatible server, read through ``prompt_logprobs``.

    python -m vllm.entrypoints.openai.api_server --model DIR --max-logprobs 64

Texts are sent as token ids. Everything that a server can get wrong is an error that names the
document (:mod:`seodang.teacher.prompt_logprobs`); a capture begins with a parity check
(:mod:`seodang.teacher.parity`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seodang.artifact import canonical_json, sha256_bytes
from seodang.causal_lm import load_tokenizer, model_fingerprint
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError, WorkFailed
from seodang.progress import say
from seodang.teacher import parity
from seodang.teacher.prompt_logprobs import (
    FloatArray,
    IntArray,
    Unusable,
    read_decoded,
    read_prompt_logprobs,
)
from seodang.teacher.server import PATIENCE, NoAnswer, Refused, Server

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_FLIGHT = 32  # requests that the server holds at a time
START_PATIENCE = 10.0  # seconds, when nothing was captured yet and the address may be wrong
# A prompt holds one token after the last label's, and vLLM insists on generating another one.
TOKENS_BEYOND = 2

TOKENIZED_SEQUENCES = 4
NOT_OFFERED = (403, 404, 405, 501)  # how servers say that they have no such page
# Synthetic: what tokenizers treat differently (digits, combining marks, emoji, white space).
PROBE = "서당 ①②③ 2026년 cafe\u0301 “1,234.5” 🙂\n\t  두 칸  <|im_end|> don't"


@dataclass
class ServedTeacher:
    """A model behind vLLM's OpenAI-compatible server.

    ``max_length`` is the longest sequence that can be labelled: the server's context less 2, for
    the token after the last labelled one and the one that vLLM must generate.

    ``fingerprint`` is that of the local weights where there are any. Without, it is the SHA-256 of
    the model's name on the server and config.json, and therefore weaker: other weights served
    under the same name have the same fingerprint.
    """

    server: str
    model: str
    directory: Path
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    max_length: int
    fingerprint: str
    patience: float = PATIENCE

    @classmethod
    def connect(cls, server: str, model: str, directory: Path | None) -> ServedTeacher:
        """Find ``model`` on ``server`` (``http://host:port/v1``) and its tokenizer on this machine.

        The tokenizer, and the weights for the parity check if there are any, are those of
        ``directory``; of the model's name or the server's own path if they are directories here.

        Raises ``WorkFailed`` if no server answers, ``InputError`` if it does not serve the model
        or no local directory has its tokenizer.json and config.json.
        """
        try:
            models = asyncio.run(_models(server))
        except NoAnswer as error:
            raise WorkFailed(
                f"{error}. Is this the server's OpenAI-compatible address (vLLM's ends in /v1)?"
            ) from None
        if model not in models:
            raise InputError(f"{server} serves {', '.join(models) or 'nothing'}, not {model}")
        card = models[model]
        found = _local_directory(directory, model, card.get("root"))
        config, tokenizer = _read_config(found), load_tokenizer(found)
        vocab_size = (config.get("text_config") or config).get("vocab_size")
        if not isinstance(vocab_size, int):
            raise InputError(f"{found / 'config.json'}: no vocab_size")
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= vocab_size:
            raise InputError(
                f"{found}: the tokenizer has ids up to {largest}, the model only {vocab_size} "
                "outputs: they do not belong together"
            )
        return cls(
            server=server,
            model=model,
            directory=found,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            max_length=(card.get("max_model_len") or 2**31) - TOKENS_BEYOND,
            fingerprint=model_fingerprint(found)
            if _has_weights(found)
            else sha256_bytes(canonical_json({"model": model, "config": config})),
        )

    def top_log_probs(
        self, sequences: Sequence[TokenSequence], k: int
    ) -> Iterator[tuple[int, IntArray, FloatArray]]:
        """The k most probable tokens after each labelled position, sequence by sequence.

        Yields (index of the sequence, ids (L, k) int32 by falling log-probability, their
        log-probabilities (L, k) float32 in nats) as the server finishes, many being in flight.

        Raises ``InputError`` if a sequence does not fit into the server's context or the server
        refuses a request, and ``WorkFailed`` for an answer that cannot be a label or if the server
        stays away; both name the document.
        """
        if not 1 <= k <= self.vocab_size:
            raise InputError(f"k = {k}: the teacher's vocabulary has {self.vocab_size} ids")
        for sequence in sequences:
            self._check_fits(sequence)
        with asyncio.Runner() as runner:
            results = self._as_they_finish(sequences, k)

            async def following() -> tuple[int, IntArray, FloatArray] | None:
                return await anext(results, None)

            while (result := runner.run(following())) is not None:
                yield result

    async def _as_they_finish(
        self, sequences: Sequence[TokenSequence], k: int
    ) -> AsyncIterator[tuple[int, IntArray, FloatArray]]:
        waiting = iter(enumerate(sequences))
        done: set[asyncio.Task[tuple[int, IntArray, FloatArray]]] = set()
        running: set[asyncio.Task[tuple[int, IntArray, FloatArray]]] = set()
        async with Server(self.server, self.patience) as server:
            try:
                while True:
                    for index, sequence in islice(waiting, IN_FLIGHT - len(running)):
                        running.add(asyncio.create_task(self._score(server, index, sequence, k)))
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()
                # Their errors are looked at, or asyncio would print each.
                await asyncio.gather(*done, *running, return_exceptions=True)

    async def _score(
        self, server: Server, index: int, sequence: TokenSequence, k: int
    ) -> tuple[int, IntArray, FloatArray]:
        # The label of the last token stands at the token after it: any token will do there.
        sent = [*sequence.token_ids.tolist(), 0][: int(sequence.labelled[-1]) + 2]
        request = {"prompt": sent, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
        choice = await self._complete(server, sequence, request, k)
        with _naming(sequence):
            return index, *read_prompt_logprobs(choice, sent, sequence.labelled, k, self.vocab_size)

    async def _complete(
        self, server: Server, sequence: TokenSequence, request: dict[str, Any], k: int
    ) -> dict[str, Any]:
        """The first choice of a completion; errors name the document."""
        where = f"document {sequence.document_id}"
        body = {"model": self.model, "return_token_ids": True, **request}
        try:
            answer = await server.post("/completions", body)
        except Refused as error:
            hint = f": start the server with --max-logprobs {k} or more, or ask for fewer"
            raise InputError(
                f"{where}: {error}{hint if 'logprobs' in str(error) else ''}"
            ) from None
        except NoAnswer as error:
            raise WorkFailed(f"{where}: {error}") from None
        match answer:
            case {"choices": [dict() as choice, *_]}:
                return choice
        raise WorkFailed(f"{where}: {self.server} answers without a completion")

    def _check_fits(self, sequence: TokenSequence) -> None:
        length = len(sequence.token_ids)
        if not len(sequence.labelled):
            raise InputError(f"document {sequence.document_id}: no position to label")
        if length > self.max_length:
            raise InputError(
                f"document {sequence.document_id}: {length} tokens and {TOKENS_BEYOND} more do not "
                f"fit into the server's context of {self.max_length + TOKENS_BEYOND}: start it "
                f"with --max-model-len {length + TOKENS_BEYOND}, or cut the document"
            )

    def unload(self) -> None:
        """Nothing is held here: the weights are the server's."""

    def check_parity(self, sequences: Sequence[TokenSequence], k: int) -> dict[str, Any]:
        """Check tokenizer and log-probabilities of the server before anything is captured.

        The k best tokens at some positions of ``sequences`` must agree with those of the local
        weights where there are any that this machine's memory holds, else with the server's own
        decoding, token by token: a weaker check, that misses what is wrong in both.

        Returns ``{"route": "local weights" or "decode", "positions", "mean_difference",
        "max_difference"}``, differences in nats. Raises ``InputError`` if the server tokenizes
        differently, ``WorkFailed`` if the log-probabilities differ, and what
        :meth:`top_log_probs` raises.
        """
        self.check_tokenizer(sequences)
        return parity.check(self, _spread(sequences, parity.SEQUENCES), min(k, self.vocab_size))

    def decode(
        self, prefixes: Sequence[TokenSequence], tokens: int, k: int
    ) -> list[tuple[IntArray, IntArray, FloatArray]]:
        """Let the server continue each prefix by the most probable tokens, fewer at its limit.

        For each the generated tokens (n,), and the k best ids (n, k) and log-probabilities (n, k)
        at each of them. Raises what :meth:`top_log_probs` raises.
        """
        return asyncio.run(self._decode(prefixes, tokens, k))

    async def _decode(
        self, prefixes: Sequence[TokenSequence], tokens: int, k: int
    ) -> list[tuple[IntArray, IntArray, FloatArray]]:
        found = []
        async with Server(self.server, self.patience) as server:
            for prefix in prefixes:
                request = {
                    "prompt": prefix.token_ids.tolist(),
                    "max_tokens": min(tokens, self.max_length - len(prefix.token_ids)),
                    "temperature": 0,
                    "ignore_eos": True,
                    "logprobs": k,
                    "return_tokens_as_token_ids": True,
                }
                choice = await self._complete(server, prefix, request, k)
                with _naming(prefix):
                    found.append(read_decoded(choice, k))
        return found

    def check_tokenizer(self, sequences: Sequence[TokenSequence]) -> None:
        """Compare the ids that the server and the local tokenizer give to text of the corpus.

        Raises ``InputError`` with the first difference. A server without ``/tokenize`` cannot be
        checked, which is said.
        """
        texts = [
            (f"document {s.document_id}", str(self.tokenizer.decode(s.token_ids)))
            for s in _spread(sequences, 16 * TOKENIZED_SEQUENCES)
        ]
        texts.sort(key=lambda named: named[1].isascii())  # those with other scripts first
        asyncio.run(self._compare_ids([("a probe", PROBE), *texts[:TOKENIZED_SEQUENCES]]))

    async def _compare_ids(self, texts: Sequence[tuple[str, str]]) -> None:
        async with Server(self.server, self.patience) as server:
            for name, text in texts:
                body = {"model": self.model, "prompt": text, "add_special_tokens": False}
                try:
                    answer = await server.post_beside("/tokenize", body)
                except Refused as error:
                    if error.status not in NOT_OFFERED:
                        raise
                    say(f"{error}; whether the server tokenizes like {self.directory} is unknown")
                    return
                theirs = answer.get("tokens") if isinstance(answer, dict) else None
                if not isinstance(theirs, list):
                    raise WorkFailed(f"{self.server}: /tokenize answers without tokens")
                ours = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if ours != theirs:
                    pairs = zip(ours, theirs, strict=False)
                    at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours))
                    raise InputError(
                        f"{name}: the server tokenizes differently from {self.directory}: from "
                        f"token {at} on {theirs[at : at + 4]}, and {ours[at : at + 4]} here; name "
                        "the tokenizer that the server uses with --tokenizer"
                    )


@contextmanager
def _naming(sequence: TokenSequence) -> Iterator[None]:
    """Turn an unusable answer into an error that names the document."""
    try:
        yield
    except Unusable as error:
        raise WorkFailed(
            f"document {sequence.document_id}: {error}; nothing of it was labelled"
        ) from None


async def _models(address: str) -> dict[str, dict[str, Any]]:
    """What the server says about each model it serves, by name."""
    async with Server(address, START_PATIENCE) as server:
        answer = await server.get("/models")
    try:
        return {str(card["id"]): dict(card) for card in answer["data"]}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{address}: not an OpenAI-compatible server (/models)") from None


def _local_directory(named: Path | None, model: str, root: str | None) -> Path:
    if named is not None:
        return named
    for path in (Path(model), Path(root or "")):
        if (path / "tokenizer.json").is_file():
            return path
    raise InputError(
        f"the tokenizer of {model} is not on this machine: name a directory that holds its "
        "tokenizer.json and config.json with --tokenizer"
    )


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{file}: missing, or not the config.json of a model")
    return config


def _has_weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors"))


def _spread(sequences: Sequence[TokenSequence], number: int) -> list[TokenSequence]:
    """At most ``number`` of the sequences, evenly spread."""
    chosen = np.linspace(0, len(sequences) - 1, min(number, len(sequences))).astype(int)
    return [sequences[index] for index in chosen.tolist()]
