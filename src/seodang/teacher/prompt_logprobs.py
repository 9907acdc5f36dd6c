"""Reading vLLM's ``prompt_logprobs``, and refusing every answer that cannot become a label.

``prompt_logprobs[i]`` belongs to token i: the k largest log-probabilities after the tokens before
it, by id, with rank 1 for the largest; the token itself is added if it is not among them. The
first token has none. The label of position t is therefore ``prompt_logprobs[t + 1]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

SUM_TOLERANCE = 1e-3  # of the k probabilities above 1; float32 sums are right to about 1e-6


class Unusable(ValueError):
    """The answer is not what was asked for; says what is wrong."""


def read_prompt_logprobs(
    choice: dict[str, Any], sent: Sequence[int], positions: IntArray, k: int, vocab_size: int
) -> tuple[IntArray, FloatArray]:
    """The k best tokens after each of ``positions`` (L,) of the ``sent`` tokens.

    Returns ids (L, k) by falling log-probability and the log-probabilities (L, k) in nats.

    Raises ``Unusable`` if the server scored other or fewer tokens than were sent, returned nothing
    or fewer than k entries, shifted or reordered them, or gave values that are no
    log-probabilities.
    """
    scored = choice.get("prompt_token_ids")
    if scored is not None and scored != list(sent):
        raise Unusable("the server scored other tokens than it was sent: it truncates or edits")
    rows = choice.get("prompt_logprobs")
    if not rows:
        raise Unusable("the answer has no prompt_logprobs: is the server vLLM?")
    if len(rows) != len(sent):
        raise Unusable(f"{len(rows)} tokens were scored of {len(sent)}: the server truncates")
    if rows[0]:
        raise Unusable("the first token has log-probabilities: the server shifts positions")
    ids = np.empty((len(positions), k), np.int32)
    log_probs = np.empty((len(positions), k), np.float32)
    for row, position in enumerate(positions.tolist()):
        try:
            best = _k_best(rows[position + 1], sent[position + 1], k)
            ids[row], log_probs[row] = zip(*best, strict=True)
        except Unusable as error:
            raise Unusable(f"position {position}: {error}") from None
    _check_values(ids, log_probs, positions, vocab_size)
    return ids, log_probs


def _k_best(entries: dict[str, Any] | None, observed: int, k: int) -> list[tuple[int, float]]:
    """(id, log-probability) of ranks 1 to k in the entries of one position."""
    if not entries:
        raise Unusable("no log-probabilities were returned")
    if str(observed) not in entries:
        raise Unusable(
            f"the observed token {observed} is not among those scored: the server shifts positions"
        )
    try:
        ranked = sorted(
            (int(entry["rank"]), int(token), float("nan" if (p := entry["logprob"]) is None else p))
            for token, entry in entries.items()
        )
    except (KeyError, TypeError, ValueError):
        raise Unusable("the entries are not in vLLM's format (rank, logprob)") from None
    best = [entry for entry in ranked if entry[0] <= k]
    if len(best) == k + 1:  # the observed token shares its rank with the last of equals
        best = [entry for entry in best if entry[1] != observed]
    if len(best) < k:
        raise Unusable(
            f"{len(best)} of the {k} best tokens were returned: the server caps them; "
            f"start it with --max-logprobs {k} or more, or ask for fewer"
        )
    ranks = [rank for rank, _, _ in best]
    if ranks != list(range(1, k + 1)) or any(p > best[-1][2] for r, _, p in ranked if r > k):
        raise Unusable("ranks do not follow falling log-probability: the server reorders")
    return [(token, p) for _, token, p in best]


def _check_values(
    ids: IntArray, log_probs: FloatArray, positions: IntArray, vocab_size: int
) -> None:
    """Raise ``Unusable`` for the first position whose values cannot be a distribution's."""
    with np.errstate(over="ignore"):
        total = np.exp(log_probs.astype(np.float64)).sum(1)
    for wrong, problem in (
        (~np.isfinite(log_probs).all(1), "a log-probability is not finite"),
        (
            (np.diff(log_probs, axis=1) > 0).any(1),
            "ranks do not follow falling log-probability: the server reorders",
        ),
        (total > 1 + SUM_TOLERANCE, "the probabilities sum to more than 1"),
        (
            ((ids < 0) | (ids >= vocab_size)).any(1),
            f"an id outside the vocabulary of {vocab_size}: the local directory is another model's",
        ),
    ):
        if wrong.any():
            raise Unusable(f"position {positions[int(np.argmax(wrong))]}: {problem}")


def read_decoded(choice: dict[str, Any], k: int) -> tuple[IntArray, IntArray, FloatArray]:
    """Generated tokens (n,), and the k best (n, k) in ids and log-probabilities at each of them.

    For requests with ``logprobs`` and ``return_tokens_as_token_ids``. Raises ``Unusable`` if an
    entry is missing or malformed.
    """
    try:
        found = choice["logprobs"]
        tokens = np.array([_token_id(name) for name in found["tokens"]], np.int32)
        best = [
            sorted(((-float(p), _token_id(name)) for name, p in entries.items()))[:k]
            for entries in found["top_logprobs"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Unusable("the generated tokens have no log-probabilities by token id") from None
    if not len(tokens) == len(best) > 0 or any(len(entries) < k for entries in best):
        raise Unusable(f"not every generated token has its {k} log-probabilities")
    ids = np.array([[token for _, token in entries] for entries in best], np.int32)
    return tokens, ids, np.array([[-p for p, _ in entries] for entries in best], np.float32)


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
