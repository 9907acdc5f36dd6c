"""Does the GGUF compute what PyTorch computes? Measured on held-out text, never assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from seodang.errors import WorkFailed
from seodang.progress import track
from seodang.recipe import Quantization
from seodang.release.engine import SLOTS, Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seodang.causal_lm import CausalLM

# In nats. The other formats round the weights, so that their difference is a loss to be measured.
MAX_MEAN_KL: dict[Quantization, float] = {"f32": 1e-3, "f16": 1e-3}
POSITIONS_PER_SEQUENCE = 12
SHOWN_MISMATCHES = 3
SPEED_TOKENS = 32
_FLOOR = -100.0  # nats: float32 cannot tell smaller probabilities from zero

LogProbs = npt.NDArray[np.float64]
Conversation = list[dict[str, str]]


def agreement(expected_NV: LogProbs, found_NV: LogProbs) -> dict[str, float]:
    """How two sets of log-probabilities (positions, vocabulary) in nats differ.

    ``mean_kl`` and ``max_kl`` of KL(expected ‖ found) over the positions, ``max_abs_dlogp`` over
    positions and vocabulary (probabilities below e^-100 count as equal), ``top1_agreement`` in
    [0, 1].
    """
    expected_NV, found_NV = np.maximum(expected_NV, _FLOOR), np.maximum(found_NV, _FLOOR)
    difference_NV = expected_NV - found_NV
    kl_N = (np.exp(expected_NV) * difference_NV).sum(axis=1)
    agree_N = expected_NV.argmax(axis=1) == found_NV.argmax(axis=1)
    return {
        "mean_kl": float(kl_N.mean()),
        "max_kl": float(kl_N.max()),
        "max_abs_dlogp": float(np.abs(difference_NV).max()),
        "top1_agreement": float(agree_N.mean()),
    }


def choose_positions(lengths: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """(sequence, positions in it): ``count`` positions, spread evenly over few sequences.

    Few, because llama.cpp keeps what it computed for the prefix that two requests share. Short
    sequences give fewer.
    """
    wanted = min(len(lengths), -(-count // POSITIONS_PER_SEQUENCE))
    chosen = np.linspace(0, len(lengths) - 1, wanted).round().astype(int)
    shares = [len(share) for share in np.array_split(np.arange(count), wanted)]
    return [
        (int(i), sorted({round(x) for x in np.linspace(0, lengths[i] - 1, share + 1)[1:]}))
        for i, share in zip(chosen, shares, strict=True)
    ]


def measure(
    student: Path,
    ggufs: Mapping[Quantization, Path],
    sequences: Sequence[Sequence[int]],
    documents: Iterable[dict[str, Any]],
    *,
    positions: int,
) -> dict[str, Any]:
    """Compare each GGUF (by its quantization) with the Hugging Face directory it was made of.

    ``sequences`` are token ids of held-out text, in the teacher's vocabulary, compared by their
    full distributions at ``positions`` positions; a student with a trimmed vocabulary gets them
    spelled out. ``documents`` (``{"text": ...}`` or ``{"messages": [...]}``) are tokenized by
    both. The speed is that of writing ``SPEED_TOKENS`` tokens on one thread of this machine.

    Gives what gguf-parity.json holds. Raises ``WorkFailed`` if llama.cpp cannot load or run
    a file.
    """
    from seodang.causal_lm import CausalLM
    from seodang.student.trimmed import VOCABULARY, TrimmedVocabulary

    model = CausalLM.load(student)
    if (student / VOCABULARY).is_file():
        vocabulary = TrimmedVocabulary.load(student / VOCABULARY)
        sequences = [vocabulary.spell_out(np.asarray(s))[0].tolist() for s in sequences]
    chosen = choose_positions([len(sequence) for sequence in sequences], positions)
    prefixes = [
        [list(map(int, sequences[i][: position + 1])) for position in inside]
        for i, inside in chosen
    ]
    expected_NV = _pytorch_log_probs(model, prefixes)
    context = max(len(group[-1]) for group in prefixes) + SPEED_TOKENS
    report: dict[str, Any] = {
        "engine": f"llama.cpp (xllamacpp {_version('xllamacpp')})",
        "reference": (
            f"PyTorch {_version('torch')} float32 (transformers {_version('transformers')})"
        ),
        "positions": len(expected_NV),
        "sequences": len(prefixes),
        "quantizations": {},
    }
    for quantization, gguf in ggufs.items():
        with (
            Engine(gguf, context) as engine,
            track(f"GGUF parity, {quantization}", len(expected_NV), "positions") as advance,
        ):
            found_NV = _llama_cpp_log_probs(engine, prefixes, model.vocab_size, advance)
            if "tokenization" not in report:  # the same in every quantization
                report |= _compare_text(engine, model.tokenizer, documents)
            speed = engine.tokens_per_second(prefixes[0][-1], SPEED_TOKENS)
        report["quantizations"][quantization] = {
            "file": gguf.name,
            "bytes": gguf.stat().st_size,
            **agreement(expected_NV, found_NV),
            "tokens_per_second": speed,
        }
    return report


def require(report: dict[str, Any], max_kl: float | None = None) -> None:
    """Raise ``WorkFailed`` if an unquantised GGUF is not what PyTorch computes.

    ``max_kl`` is the mean KL in nats that any file may have at most.
    """
    for quantization, found in report["quantizations"].items():
        own = MAX_MEAN_KL.get(quantization)
        for limit, whose in ((own, quantization), (max_kl, "release.max_quantization_kl")):
            if limit is not None and not found["mean_kl"] < limit:
                raise WorkFailed(
                    f"{found['file']}: llama.cpp's distributions differ from PyTorch's by a mean "
                    f"KL of {found['mean_kl']:.2e} nats at {report['positions']} held-out "
                    f"positions; {whose} must stay below {limit:.1e}. Nothing was released"
                )


def _pytorch_log_probs(model: CausalLM, prefixes: list[list[list[int]]]) -> LogProbs:
    """Log-probabilities after each prefix, (positions, vocabulary); a group shares one pass."""
    import torch

    rows = []
    with torch.inference_mode():
        for group in prefixes:
            (hidden_TH,) = model.hidden_states([np.array(group[-1], dtype=np.int32)])
            last = torch.tensor([len(prefix) - 1 for prefix in group], device=model.device)
            rows.append(model.logits(hidden_TH[last]).double().log_softmax(dim=-1).cpu().numpy())
    return np.concatenate(rows)


def _llama_cpp_log_probs(
    engine: Engine,
    prefixes: list[list[list[int]]],
    vocab_size: int,
    advance: Callable[..., None],
) -> LogProbs:
    """As ``_pytorch_log_probs``; each slot walks through its share of the groups."""
    rows: list[list[LogProbs]] = [[] for _ in prefixes]

    def walk(slot: int) -> None:
        for group in range(slot, len(prefixes), SLOTS):
            for prefix in prefixes[group]:
                rows[group].append(engine.log_probs(prefix, slot, vocab_size))
                advance(1)

    with ThreadPoolExecutor(SLOTS) as pool:
        list(pool.map(walk, range(SLOTS)))
    return np.stack([row for group in rows for row in group])


def _compare_text(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, documents: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """Whether llama.cpp splits the same text into the same tokens, and writes the same prompts."""
    texts = chats = 0
    token_mismatches, prompt_mismatches = [], []
    for document in documents:
        texts += 1
        messages: Conversation | None = document.get("messages")
        if messages is None:
            text, add_special = str(document["text"]), True
        else:
            text, add_special = _render(tokenizer, messages), False
        expected = list(tokenizer(text, add_special_tokens=add_special)["input_ids"])
        found = engine.tokenize(text, add_special=add_special)
        if expected != found:
            token_mismatches.append(_difference(tokenizer, expected, found))
        if messages is None or not tokenizer.chat_template:
            continue
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if prompt and prompt[-1]["role"] == "user":
            chats += 1
            if engine.apply_chat_template(prompt) != _render(tokenizer, prompt, answer=True):
                prompt_mismatches.append({"message": prompt[-1]["content"][:80]})
    return {
        "tokenization": {
            "documents": texts,
            "mismatches": len(token_mismatches),
            "examples": token_mismatches[:SHOWN_MISMATCHES],
        },
        "chat_template": {
            "conversations": chats,
            "mismatches": len(prompt_mismatches),
            "examples": prompt_mismatches[:SHOWN_MISMATCHES],
        },
    }


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, *, answer: bool = False
) -> str:
    if not tokenizer.chat_template:
        return "\n".join(message["content"] for message in messages)
    return str(  # llama.cpp thinks unless it is told not to, other engines the other way round
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer, enable_thinking=False
        )
    )


def _difference(
    tokenizer: PreTrainedTokenizerBase, expected: list[int], found: list[int]
) -> dict[str, Any]:
    """Where two tokenizations of one text part, and what stands there."""
    same = 0
    while same < min(len(expected), len(found)) and expected[same] == found[same]:
        same += 1
    window = slice(max(0, same - 2), same + 4)
    return {
        "token": same,
        "pytorch": tokenizer.convert_ids_to_tokens(expected[window]),
        "llama_cpp": tokenizer.convert_ids_to_tokens(found[window]),
    }


def _version(distribution: str) -> str:
    from importlib.metadata import version

    return version(distribution)
