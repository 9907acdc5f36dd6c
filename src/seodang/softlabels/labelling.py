"""Sequences to entries: what a teacher says at their labelled positions, by an estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from seodang.artifact import sha256_bytes
from seodang.causal_lm import CausalLM, length_batches, row_chunks
from seodang.corpus.sequences import TokenSequence
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels.estimators import Entries, Estimation
from seodang.softlabels.quantisation import dither, levels
from seodang.teacher.local import LocalTeacher

if TYPE_CHECKING:
    from seodang.teacher.served import ServedTeacher

    Teacher = LocalTeacher | ServedTeacher

Advance = Callable[[int], None]

BLOCK_ROWS = 16  # of the vocabulary's size that are estimated at once: they stay in a CPU's cache


def why_unusable(sequence: TokenSequence, max_length: int) -> str | None:
    """Why a sequence cannot be shown to a teacher at all; None if it can."""
    if not len(sequence.labelled):
        return "empty: there is no token to label"
    if len(sequence.token_ids) > max_length:
        return (
            f"{len(sequence.token_ids)} tokens, the teacher's context holds {max_length}: "
            "cut the document (corpus.max_length, or --max-length)"
        )
    return None


def label(
    teacher: Teacher,
    sequences: Sequence[TokenSequence],
    configs: Sequence[SoftLabelsConfig],
    advance: Advance,
) -> list[list[Entries | str]]:
    """For each of ``configs`` the soft labels of each sequence, or why it has none.

    The teacher sees every sequence once, however many configs there are, and the labels of each
    are those that it would have alone.
    """
    results: list[list[Entries | str]] = [[""] * len(sequences) for _ in configs]
    usable = []
    for index, sequence in enumerate(sequences):
        reason = why_unusable(sequence, teacher.max_length)
        if reason is None:
            usable.append(index)
            continue
        for result in results:
            result[index] = reason
        advance(len(sequence.labelled))
    chosen = [sequences[index] for index in usable]
    if isinstance(teacher, LocalTeacher):
        answers = _ask_model(teacher, chosen, configs)
    else:
        answers = _ask_server(teacher, chosen, configs)
    for found, labels in answers:
        for result, entries in zip(results, labels, strict=True):
            finite = np.isfinite(entries.entropy).all()
            result[usable[found]] = (
                entries if finite else "the teacher's probabilities are not finite"
            )
        advance(len(chosen[found].labelled))
    return results


def _ask_model(
    teacher: LocalTeacher, sequences: Sequence[TokenSequence], configs: Sequence[SoftLabelsConfig]
) -> Iterator[tuple[int, list[Entries]]]:
    for batch in length_batches([len(s.token_ids) for s in sequences]):
        hidden = teacher.model.hidden_states([sequences[i].token_ids for i in batch])
        for index, hidden_TH in zip(batch, hidden, strict=True):
            wanted = torch.from_numpy(sequences[index].labelled.astype(np.int64))
            generators = [generator(config.seed, sequences[index]) for config in configs]
            yield (
                index,
                label_rows(
                    teacher.model, hidden_TH[wanted.to(hidden_TH.device)], configs, generators
                ),
            )


@torch.inference_mode()
def label_rows(
    model: CausalLM,
    hidden_NH: torch.Tensor,
    configs: Sequence[SoftLabelsConfig],
    generators: Sequence[np.random.Generator],
) -> list[Entries]:
    """The soft labels of each config at the hidden states (positions, hidden) of one sequence.

    Each config draws from its own one of ``generators``. The output head is applied to chunks of
    rows, once for all configs, so that no tensor of the size of (length, vocabulary) exists.
    """
    estimations = [
        Estimation(config.estimator, config.parameters(), model.vocab_size, own)
        for config, own in zip(configs, generators, strict=True)
    ]
    parts: list[list[Entries]] = [[] for _ in configs]
    for rows in row_chunks(len(hidden_NH), model.vocab_size):
        logits_NV = model.logits(hidden_NH[rows])
        for block in logits_NV.split(BLOCK_ROWS):
            for part, estimate in zip(parts, estimations, strict=True):
                part.append(estimate(block))
    return [
        _quantised(Entries.concatenate(part), config, own)
        for part, config, own in zip(parts, configs, generators, strict=True)
    ]


def _ask_server(
    teacher: ServedTeacher, sequences: Sequence[TokenSequence], configs: Sequence[SoftLabelsConfig]
) -> Iterator[tuple[int, list[Entries]]]:
    wanted = [min(int(config.parameters()["k"]), teacher.vocab_size) for config in configs]
    for index, ids_NK, log_probs_NK in teacher.top_log_probs(sequences, max(wanted)):
        yield (
            index,
            [
                _quantised(
                    from_top_log_probs(ids_NK[:, :k], log_probs_NK[:, :k]),
                    config,
                    generator(config.seed, sequences[index]),
                )
                for k, config in zip(wanted, configs, strict=True)
            ],
        )


def from_top_log_probs(
    ids_NK: npt.NDArray[np.int32], log_probs_NK: npt.NDArray[np.float32]
) -> Entries:
    """Entries of ``top-k`` and ``residual`` from the k best ids and their log-probabilities.

    The entropy is that of k+1 categories, the last being all other ids: a lower bound, in nats.
    """
    p_NK = np.exp(log_probs_NK.astype(np.float64))
    mass_N = p_NK.sum(1)
    rest_N = np.maximum(0.0, 1.0 - mass_N)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p_NK > 0, p_NK * log_probs_NK, 0.0).sum(1)
        entropy -= np.where(rest_N > 0, rest_N * np.log(rest_N), 0.0)
    n, k = ids_NK.shape
    return Entries(
        counts=np.full(n, k, np.int64),
        ids=ids_NK.reshape(-1).astype(np.int32),
        weights=p_NK.reshape(-1),
        head_mass=mass_N.astype(np.float32),
        entropy=np.where(np.isfinite(mass_N), np.maximum(entropy, 0.0), np.nan).astype(np.float32),
    )


def _quantised(
    entries: Entries, config: SoftLabelsConfig, generator: np.random.Generator
) -> Entries:
    steps = levels(config.estimator, config.parameters())
    uniforms = generator.random(len(entries.weights))
    if config.estimator == "sampled" or not np.isfinite(entries.weights).all():
        return entries
    return replace(entries, weights=dither(entries.weights, steps, uniforms))


def generator(seed: int, sequence: TokenSequence) -> np.random.Generator:
    """The random numbers of one sequence: they follow from its content and ``seed`` alone."""
    return np.random.Generator(
        np.random.Philox(int(sha256_bytes(f"{seed}:{sequence.digest}".encode())[:32], 16))
    )
