"""Whether a model speaks the teacher's tokens, and what to do if it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.causal_lm import load_tokenizer
from seodang.errors import InputError
from seodang.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer.json"
# Parts of tokenizer.json that decide which ids a text becomes, besides the vocabulary.
_PARTS = {
    "merges": "merges",
    "vocab": "token scores",
    "normalizer": "normalizer",
    "pre_tokenizer": "pre-tokenizer",
    "post_processor": "post-processor",
    "added_tokens": "added tokens",
    "decoder": "decoder",
    "model": "model",
}


def check_same_tokenizer(teacher: Path, start: Path) -> None:
    """Raise ``InputError`` if the model in ``start`` has another tokenizer than the teacher.

    A soft label is a distribution over token ids: where an id stands for another piece of text,
    the labels would teach nonsense without any error. Another way of cutting text into the same
    tokens is refused too, for the student works with the teacher's tokenizer and its weights never
    saw text cut like that; who knows better can copy the teacher's files over.

    Another chat template alone is only said aloud: the ids mean the same, the labels hold the
    teacher's prompts, and the student is trained, evaluated and released with that template.
    """
    ours, theirs = load_tokenizer(teacher), load_tokenizer(start)
    if difference := _vocabulary_difference(ours, theirs):
        raise InputError(
            f"student.path {start}: its tokenizer is not the teacher's: {difference}. Soft labels "
            "are distributions over the teacher's token ids: capture them from a teacher with "
            "this model's tokenizer, or leave student.path out and start from the teacher "
            "(pruned, or from scratch)"
        )
    if difference := _segmentation_difference(ours, theirs):
        if (teacher / TOKENIZER).read_bytes() == (start / TOKENIZER).read_bytes():
            raise InputError(
                f"student.path {start}: {TOKENIZER} is the teacher's, but beside this model's "
                f"config.json transformers reads it in another way: {difference}. Leave "
                "student.path out and start from the teacher, or name a model of its architecture"
            )
        raise InputError(
            f"student.path {start}: its tokenizer has the teacher's ids but cuts text in another "
            f"way: {difference}. Save the teacher's tokenizer in this directory if the student "
            "may learn that way of cutting, or leave student.path out and start from the teacher"
        )
    if ours.chat_template != theirs.chat_template:
        say(
            f"{start}: its chat template is not the teacher's; the student learns the teacher's, "
            "in which the soft labels were made"
        )


def _vocabulary_difference(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> str | None:
    by_id = [{index: token for token, index in t.get_vocab().items()} for t in (ours, theirs)]
    if by_id[0] == by_id[1]:
        return None
    sizes = [len(tokens) for tokens in by_id]
    first = next(
        index
        for index in sorted(by_id[0].keys() | by_id[1].keys())
        if by_id[0].get(index) != by_id[1].get(index)
    )
    mine, other = (repr(tokens[first]) if first in tokens else "nothing" for tokens in by_id)
    size = (
        f"it has {sizes[1]:,} tokens, the teacher's {sizes[0]:,}; " if sizes[0] != sizes[1] else ""
    )
    return f"{size}id {first} is {other}, the teacher's is {mine}"


def _segmentation_difference(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> str | None:
    parts = [_parts(ours), _parts(theirs)]
    names = [words for part, words in _PARTS.items() if parts[0][part] != parts[1][part]]
    return f"other {' and '.join(names)}" if names else None


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = dict(backend["model"])
    apart = {part: model.pop(part, None) for part in ("vocab", "merges")}
    return {**{part: backend.get(part) for part in _PARTS}, "model": model, **apart}
