"""A vocabulary trimmed to what the student's domain needs.

    student: {vocabulary: {trim: 8192}}      # entries, all told
    student: {vocabulary: {keep: 0.999}}     # share of the corpus' tokens that stay single tokens

Of a small student with a large teacher's vocabulary most weights are embedding and head. Kept are
the bytes, the added and special tokens, and then what the corpus and the teacher's soft labels use
most, each entry with the ones that its merges go through, as in "vocabulary trimming" (Ushio et
al., arXiv 2305.15020), but closed under merges.

**Claim.** Keep the merges whose two parts and result are all kept, in their old order. A text
that the old tokenizer writes whole, with tokens that are all kept, has the same tokens under the
new one.

*Proof.* Tokens never shrink, so every token that BPE makes on the way to a final token t lies
inside t's span, and no merge crosses the edges of t. Of the candidates inside that span BPE always
takes the lowest rank, leftmost first: inside it, it does what it does when run on the text of t
alone. So the tokens on the way to t, its *derivation*, depend on t only. By choice t's derivation
is kept, thus every merge that the old process makes is among the new ones. Both processes begin
with the same bytes; while their states are equal the new candidates are some of the old ones and
contain the old choice, which therefore is the new choice too. When the old process ends it has no
candidate, and the new one none either. Where a tokenizer looks whole words up before it merges
(``ignore_merges``: Llama 3), a word that is an old entry is its own token, kept by assumption and
found again; a word that is not is no new entry either, and the argument above holds for it. ∎

A derivation needs only the last merge of each token: its parts are again tokens that BPE makes of
their own text (:meth:`ByteLevelBPE.parts`), by the same argument.

Any other text is spelled with shorter tokens, at worst with bytes. Bytes that the teacher's
tokenizer lacks (SmolLM2 has 235 of 256, and drops text that needs others) get entries of their
own, whose rows begin as the mean of all rows: then each has at most the average probability
(Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from seodang.errors import InputError
from seodang.recipe import VocabularyConfig
from seodang.softlabels.store import SoftLabelStore
from seodang.student.byte_level_bpe import ByteLevelBPE, spell
from seodang.student.trim_labels import trim_sequence, trimmed_lengths, trimming_report, usage
from seodang.student.trim_tokenizer import trim_tokenizer
from seodang.student.trimmed import VOCABULARY, TrimmedVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "VOCABULARY",
    "TrimmedVocabulary",
    "check_vocabulary",
    "choose_vocabulary",
    "trim_model",
    "trim_sequence",
    "trim_tokenizer",
    "trimmed_lengths",
    "trimming_report",
]

_CONFIGS = ("config.json", "generation_config.json")


def check_vocabulary(directory: Path, config: VocabularyConfig) -> None:
    """Refuse a vocabulary that cannot be had, without looking at any text.

    Raises ``InputError`` if the tokenizer of the model ``directory`` is not byte-level BPE, or if
    ``trim`` is smaller than what must stay or larger than what there is.
    """
    bpe = ByteLevelBPE(directory)
    _check_size(bpe, _required(bpe, directory), config)


def choose_vocabulary(
    directory: Path, store: SoftLabelStore, config: VocabularyConfig
) -> TrimmedVocabulary:
    """The entries that a student of the model in ``directory`` keeps, for the text of ``store``.

    An entry's use is the number of times that it stands in the text plus the sum of its weights in
    the soft labels, which is how often the teacher would have put it there. Entries are taken by
    falling use, those used equally by rising id, each with its derivation, until there are
    ``trim`` of them or they make up the share ``keep`` of the text's tokens. One that no longer
    fits with its derivation is passed over.

    Raises ``InputError`` as :func:`check_vocabulary` does.
    """
    bpe = ByteLevelBPE(directory)
    required = _required(bpe, directory)
    _check_size(bpe, required, config)
    if bpe.size > store.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has ids up to {bpe.size - 1}, the soft labels "
            f"{store.path} only {store.vocab_size}: they do not belong together"
        )
    counts, mass = usage(store)
    kept = _closed_by_use(bpe, required, counts, counts + mass, config)
    if len(kept) + len(bpe.missing_bytes) >= store.vocab_size:
        raise InputError(
            f"student.vocabulary.keep is {config.keep}: this text uses nearly all of the teacher's "
            f"{store.vocab_size} entries; ask for less, or leave out student.vocabulary"
        )
    return _with_spellings(bpe, sorted(kept), store.vocab_size)


def _required(bpe: ByteLevelBPE, directory: Path) -> set[int]:
    """What must stay: the tokenizer's own, and the ids that the model's configs name."""
    named: set[int] = set()
    for name in _CONFIGS:
        file = directory / name
        if file.is_file():
            named.update(_named_ids(json.loads(file.read_bytes())))
    return {*bpe.required, *(named & set(bpe.vocab.values()))}


def _named_ids(config: dict[str, Any]) -> Iterable[int]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _named_ids(value)
        elif _holds_ids(key):
            yield from (i for i in _flat(value) if i >= 0)


def _holds_ids(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids", "_tokens_ids", "suppress_tokens"))


def _flat(value: Any) -> Iterable[int]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _check_size(bpe: ByteLevelBPE, required: set[int], config: VocabularyConfig) -> None:
    if config.trim is None:
        return
    missing = len(bpe.missing_bytes)
    least, most = len(required) + missing, len(set(bpe.vocab.values()))
    if config.trim < least:
        raise InputError(
            f"student.vocabulary.trim is {config.trim}, but the 256 bytes, the special and the "
            f"added tokens alone are {least}: ask for at least {least}"
        )
    if config.trim >= most:
        raise InputError(
            f"student.vocabulary.trim is {config.trim}, but the teacher's tokenizer has only "
            f"{most} entries: ask for fewer, or leave out student.vocabulary"
        )


def _closed_by_use(
    bpe: ByteLevelBPE,
    required: set[int],
    counts: npt.NDArray[np.int64],
    use: npt.NDArray[np.float64],
    config: VocabularyConfig,
) -> set[int]:
    kept = set(required)
    room = (1 << 60) if config.trim is None else config.trim - len(bpe.missing_bytes)
    wanted = np.inf if config.keep is None else config.keep * float(counts.sum())
    covered = float(counts[list(kept)].sum())
    candidates = np.array(sorted(set(bpe.vocab.values()) - kept), np.int64)
    for token in candidates[np.argsort(-use[candidates], kind="stable")].tolist():
        if len(kept) >= room or covered >= wanted:
            break
        needed = _missing_derivation(bpe, token, kept)
        if len(kept) + len(needed) <= room:
            kept |= needed
            covered += float(counts[list(needed)].sum())
    return kept


def _missing_derivation(bpe: ByteLevelBPE, token: int, kept: set[int]) -> set[int]:
    """``token`` and every token that BPE makes on the way to it, without what is kept."""
    needed: set[int] = set()
    waiting = [token]
    while waiting:
        found = waiting.pop()
        if found not in kept and found not in needed:
            needed.add(found)
            waiting += bpe.parts(found) or ()
    return needed


def _with_spellings(bpe: ByteLevelBPE, kept: list[int], old_size: int) -> TrimmedVocabulary:
    missing = bpe.missing_bytes
    new_ids = np.full(old_size, -1, np.int32)
    new_ids[kept] = np.arange(len(kept))
    vocab = {bpe.text[old]: new for new, old in enumerate(kept)}
    vocab |= {character: len(kept) + i for i, character in enumerate(missing)}
    merges = new_ids[bpe.merges]
    removed = sorted(set(bpe.vocab.values()).difference(kept))
    spelled = spell([bpe.text[i] for i in removed], vocab, merges[(merges >= 0).all(1)])
    lengths = np.zeros(old_size, np.int64)
    lengths[kept] = 1
    lengths[removed] = [len(pieces) for pieces in spelled]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    pieces = np.empty(offsets[-1], np.int32)
    pieces[offsets[:-1][kept]] = np.arange(len(kept))
    of_removed = np.repeat(new_ids < 0, lengths)
    pieces[of_removed] = [piece for row in spelled for piece in row]
    return TrimmedVocabulary(
        kept=np.array([*kept, *[-1] * len(missing)], np.int32),
        piece_offsets=offsets,
        pieces=pieces,
    )


def trim_model(model: PreTrainedModel, vocabulary: TrimmedVocabulary) -> None:
    """Cut embedding, output head and its bias down to the kept entries, in place.

    Rows of entries that the teacher lacks become the mean of all old rows. The vocabulary's size
    and the token ids in the model's configs follow; an id that is not kept becomes None, or leaves
    the list that it stood in. The model's embedding may be padded to another size than the
    teacher's; raises ``ValueError`` if it is too small for what is kept.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    old_size = int(embedding.weight.shape[0])
    if old_size <= vocabulary.kept.max():
        raise ValueError(
            f"the model has {old_size} entries, but {vocabulary.kept.max()} is the id of one that "
            "is kept"
        )
    tied = head.weight is embedding.weight
    embedding.weight = _rows(embedding.weight, vocabulary)
    embedding.num_embeddings = vocabulary.size
    if embedding.padding_idx is not None:
        embedding.padding_idx = _new_id(embedding.padding_idx, vocabulary)
    head.weight = embedding.weight if tied else _rows(head.weight, vocabulary)
    head.out_features = vocabulary.size
    if getattr(head, "bias", None) is not None:
        head.bias = _rows(head.bias, vocabulary)
    modules: Iterable[Any] = model.modules()
    for module in modules:  # what Llama and its kin note down beside their embedding
        if getattr(module, "vocab_size", None) == old_size:
            module.vocab_size = vocabulary.size
        if isinstance(getattr(module, "padding_idx", None), int) and module is not embedding:
            module.padding_idx = _new_id(module.padding_idx, vocabulary)
    text_config = model.config.get_text_config()
    _map_ids(text_config, vocabulary)
    text_config.vocab_size = vocabulary.size
    if text_config is not model.config:
        _map_ids(model.config, vocabulary)
    if model.generation_config is not None:
        _map_ids(model.generation_config, vocabulary)


def _rows(weight: torch.nn.Parameter, vocabulary: TrimmedVocabulary) -> torch.nn.Parameter:
    with torch.no_grad():
        kept = torch.from_numpy(vocabulary.kept).to(weight.device).long()
        rows = weight[kept.clamp(min=0)].clone()
        rows[kept < 0] = weight.mean(0)
    return torch.nn.Parameter(rows, weight.requires_grad)


def _new_id(old: int, vocabulary: TrimmedVocabulary) -> int | None:
    new = int(vocabulary.new_ids[old]) if 0 <= old < vocabulary.old_size else -1
    return new if new >= 0 else None


def _map_ids(config: Any, vocabulary: TrimmedVocabulary) -> None:
    """Map every token id of a transformers config, in place."""
    for key, value in list(vars(config).items()):
        if _holds_ids(key):
            setattr(config, key, _mapped(value, vocabulary))


def _mapped(value: Any, vocabulary: TrimmedVocabulary) -> Any:
    if isinstance(value, list):
        found = [_mapped(item, vocabulary) for item in value]
        return [item for item in found if item is not None]
    return _new_id(value, vocabulary) if isinstance(value, int) else value
