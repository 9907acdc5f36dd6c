"""The parity check: do two ways of computing the same log-probabilities agree?

Engines have been seen to shift log-probabilities silently by nats. A server in 16 bits is a mean
of about 0.05 nats from float32 weights (up to 0.9 for single tokens; SmolLM2-135M, 16 best), one
in float32 below 1e-4; vLLM's broken rotary kernel on CPU a mean of 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seodang.causal_lm import CausalLM, row_chunks
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError, WorkFailed
from seodang.machine import memory
from seodang.progress import say
from seodang.teacher.prompt_logprobs import FloatArray, IntArray

if TYPE_CHECKING:
    from seodang.teacher.served import ServedTeacher

SEQUENCES = 3  # that are compared
TOKENS = 256  # of each; enough for errors that grow with the position
DECODED_TOKENS = 16  # generated from each where there are no local weights

MEAN_TOLERANCE = 0.1  # nats, over all log-probabilities compared
MAX_TOLERANCE = 2.0  # nats, of any single one

ROTARY_WORKAROUND = """--compilation-config '{"custom_ops": ["all", "-rotary_embedding"]}'"""


@dataclass(frozen=True)
class Scores:
    """The k best ``ids`` (L, k) and ``log_probs`` (L, k) at a sequence's labelled positions."""

    ids: IntArray
    log_probs: FloatArray


@dataclass(frozen=True)
class Difference:
    """Two values in nats of one token after one position."""

    document_id: str
    position: int
    token: int
    server: float
    other: float

    @property
    def size(self) -> float:
        """How far apart they are."""
        return abs(self.server - self.other)


def check(teacher: ServedTeacher, sequences: Sequence[TokenSequence], k: int) -> dict[str, Any]:
    """Compare the server's k best with those of local weights, else with its own decoding.

    See :meth:`seodang.teacher.served.ServedTeacher.check_parity`.
    """
    model = _local_model(teacher.directory)
    if model is None:
        route, other = "decode", "its own decoding"
        found = _against_decoding(teacher, sequences, k)
    else:
        route, other = "local weights", f"the weights in {teacher.directory}"
        found = _against_weights(teacher, model, sequences, k)
    spell = lambda token: str(teacher.tokenizer.decode([token]))  # noqa: E731
    return {"route": route, **judge(found, other, spell)}


def differences(sequence: TokenSequence, server: Scores, other: Scores) -> list[Difference]:
    """One difference for every token that either side holds among its k best.

    Where one side lacks a token, its log-probability there is at most the least of that side's k
    best: the difference to that bound is taken, and 0 if the other value is below it too.
    """
    found = []
    for row, position in enumerate(sequence.labelled.tolist()):
        ours, theirs = (
            dict(zip(s.ids[row].tolist(), s.log_probs[row].tolist(), strict=True))
            for s in (server, other)
        )
        least, least_other = min(ours.values()), min(theirs.values())
        for token in ours | theirs:
            a = ours.get(token, min(least, theirs.get(token, least)))
            b = theirs.get(token, min(least_other, ours.get(token, least_other)))
            found.append(Difference(sequence.document_id, position, token, a, b))
    return found


def judge(
    found: Sequence[Difference], other: str, spell: Callable[[int], str]
) -> dict[str, int | float]:
    """Number of positions, mean and largest difference in nats.

    Raises ``WorkFailed`` with the worst position and token, both values, and what is known to
    help, if the differences are beyond the tolerances. ``other`` names what the server was
    compared with.
    """
    worst = max(found, key=lambda difference: difference.size)
    mean = sum(difference.size for difference in found) / len(found)
    if not (mean <= MEAN_TOLERANCE and worst.size <= MAX_TOLERANCE):
        raise WorkFailed(
            f"the served log-probabilities are not those of {other}: document "
            f"{worst.document_id}, position {worst.position}, token {worst.token} "
            f"({spell(worst.token)!r}) next: {worst.server:.3f} from the server, "
            f"{worst.other:.3f} from {other}. {worst.size:.3f} nats apart, {mean:.3f} in the mean; "
            f"tolerated are {MAX_TOLERANCE} and {MEAN_TOLERANCE}. Nothing was captured. Engines "
            "are known to shift log-probabilities silently; vLLM on CPU does with its own rotary "
            f"kernel: start it with {ROTARY_WORKAROUND}"
        )
    positions = {(difference.document_id, difference.position) for difference in found}
    return {
        "positions": len(positions),
        "mean_difference": mean,
        "max_difference": worst.size,
    }


def _local_model(directory: Path) -> CausalLM | None:
    """The local weights on the CPU (a GPU is the server's), if they can be used on this machine."""
    weights = list(directory.glob("*.safetensors"))
    if not weights:
        return None
    needed = 2 * sum(file.stat().st_size for file in weights)  # 16-bit files become float32
    free = memory()
    try:
        if free is not None and needed > free.available_bytes:
            raise InputError(f"{directory}: its weights need {needed / 2**30:.0f} GiB of memory")
        return CausalLM.load(directory, torch.device("cpu"))
    except InputError as error:
        say(f"{error}; the parity check compares two routes of the server instead")
        return None


def _served_scores(
    teacher: ServedTeacher, sequences: Sequence[TokenSequence], k: int
) -> list[Scores]:
    best = teacher.top_log_probs(sequences, k)
    found = {index: Scores(ids, log_probs) for index, ids, log_probs in best}
    return [found[index] for index in range(len(sequences))]


def _against_weights(
    teacher: ServedTeacher, model: CausalLM, sequences: Sequence[TokenSequence], k: int
) -> list[Difference]:
    """Every position of the sequences' first tokens, labelled or not."""
    sample = [
        TokenSequence(s.document_id, ids := s.token_ids[:TOKENS], np.arange(len(ids), dtype="i4"))
        for s in sequences
    ]
    return [
        difference
        for sequence, scores in zip(sample, _served_scores(teacher, sample, k), strict=True)
        for difference in differences(sequence, scores, _local_scores(model, sequence, k))
    ]


def _local_scores(model: CausalLM, sequence: TokenSequence, k: int) -> Scores:
    """The k best after every token of the sequence."""
    (hidden_TH,) = model.hidden_states([sequence.token_ids])
    with torch.inference_mode():
        best = [
            torch.topk(model.log_probs(hidden_TH[rows]), k)
            for rows in row_chunks(len(hidden_TH), model.vocab_size)
        ]
    log_probs, ids = (torch.cat(parts).numpy() for parts in zip(*best, strict=True))
    return Scores(ids.astype(np.int32), log_probs)


def _against_decoding(
    teacher: ServedTeacher, sequences: Sequence[TokenSequence], k: int
) -> list[Difference]:
    """Let the server continue a prefix, then let it score prefix and continuation as a prompt."""
    prefixes = [
        TokenSequence(
            s.document_id, s.token_ids[: (len(s.token_ids) + 1) // 2][:TOKENS], s.labelled
        )
        for s in sequences
    ]
    decoded = teacher.decode(prefixes, DECODED_TOKENS, k)
    whole = [
        TokenSequence(
            prefix.document_id,
            np.concatenate([prefix.token_ids, tokens]),
            np.arange(len(tokens), dtype=np.int32) + len(prefix.token_ids) - 1,
        )
        for prefix, (tokens, _, _) in zip(prefixes, decoded, strict=True)
    ]
    scored = zip(whole, _served_scores(teacher, whole, k), decoded, strict=True)
    return [
        difference
        for sequence, scores, (_, ids, log_probs) in scored
        for difference in differences(sequence, scores, Scores(ids, log_probs))
    ]
