"""What the tests of all served models share: text, windows of it, and the local model's word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile

import numpy as np
import torch

from seodang.causal_lm import CausalLM
from seodang.corpus.sequences import TokenSequence
from seodang.teacher.served import ServedTeacher
from tiny import TEXT

K = 16


def windows(teacher: ServedTeacher, number: int) -> list[TokenSequence]:
    """English and Korean; among the windows one as long as fits, labelled to its last token."""
    ids = np.array(teacher.tokenizer(TEXT)["input_ids"], np.int32)
    longest = np.resize(ids, teacher.max_length)
    first = TokenSequence("longest", longest, np.arange(3, len(longest), dtype=np.int32))
    starts = np.linspace(0, len(ids) - 60, number - 1).astype(int)
    return [first] + [
        TokenSequence(f"at-{start}", ids[start : start + 50 + i], np.arange(i, 50, dtype=np.int32))
        for i, start in enumerate(starts.tolist())
    ]


def assert_labels_are_local(
    teacher: ServedTeacher, model: CausalLM, asked: Sequence[TokenSequence], tolerance: float = 1e-3
) -> None:
    """The k best of every labelled position are those of the local weights, within float32."""
    found = {index: (ids, p) for index, ids, p in teacher.top_log_probs(asked, K)}
    assert sorted(found) == list(range(len(asked)))
    for index, (ids, log_probs) in found.items():
        (hidden,) = model.hidden_states([asked[index].token_ids])
        with torch.inference_mode():
            rows = model.log_probs(hidden)[asked[index].labelled]
        # Sorted values, and the values of the ids: equal neighbours may stand in either order.
        np.testing.assert_allclose(log_probs, torch.topk(rows, K).values, atol=tolerance)
        of_ids = rows.gather(1, torch.from_numpy(ids).long())
        np.testing.assert_allclose(log_probs, of_ids, atol=tolerance)


def without_weights(directory: Path, target: Path) -> Path:
    """Tokenizer and configuration only."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        copyfile(directory / name, target / name)
    return target
