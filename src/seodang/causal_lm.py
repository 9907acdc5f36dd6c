"""A causal language model from a local directory, seen as a body and an output head.

Teachers, students and baselines all pass through here, so that no part of Seodang ever builds a
(batch, length, vocabulary) tensor: the body gives hidden states, the head is applied by the
caller to as many rows as it can hold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from seodang.artifact import canonical_json, sha256_bytes, sha256_file
from seodang.errors import InputError
from seodang.training.experts import use_grouped_experts
from seodang.training.latent_decoding import use_latent_decoding
from seodang.training.products import product, use_fast_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from seodang.recipe import Precision

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TokenIds = npt.NDArray[np.int32]

LOGITS_BYTES = 64 * 2**20  # of one chunk of logits: large enough for the product, small for memory
FORWARD_TOKENS = 2048  # of one padded forward pass


def quiet_transformers() -> None:
    """Keep transformers from printing progress bars and advice between our own lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory; raises ``InputError`` if there is none."""
    from transformers import AutoTokenizer

    quiet_transformers()
    if not (directory / "tokenizer.json").is_file():
        raise InputError(
            f"{directory}: no tokenizer.json; a teacher needs its own tokenizer "
            "(save it there with `tokenizer.save_pretrained`)"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exception on a broken file
        raise InputError(f"{directory}: the tokenizer cannot be read: {error}") from None
    return tokenizer


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files from one model directory to another, byte by byte."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides how text becomes ids: the tokenizer's JSON and chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("padding", None)
    backend.pop("truncation", None)
    return sha256_bytes(canonical_json([backend, tokenizer.chat_template]))


def model_fingerprint(directory: Path) -> str:
    """The identity of a model: SHA-256 over config.json and the weight files."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return _fingerprint(tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@lru_cache
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash weights once in a process, unless they change meanwhile."""
    return sha256_bytes(canonical_json([[file.name, sha256_file(file)] for file, _, _ in files]))


class CausalLM:
    """A loaded model with its tokenizer, in evaluation mode.

    ``body`` maps ids to last hidden states, ``head_VH`` and ``bias_V`` map those to logits. The
    head is in float32; so is the body, unless it was loaded in bfloat16.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.body: Any = model.base_model
        self.device = model.device

    @classmethod
    def load(
        cls,
        directory: Path | str,
        device: torch.device | None = None,
        precision: Precision = "float32",
    ) -> CausalLM:
        """Load a Hugging Face directory: safetensors only, no code from it, no network.

        ``precision`` is the body's: in bfloat16 it takes half of the memory and, on processors that
        multiply in it, of the time. Such a model is to be asked, not trained.

        Raises ``InputError`` if the directory is not a causal language model with weights and
        tokenizer, if the tokenizer knows ids that the model does not, or if the logits are not a
        linear function of the last hidden states.
        """
        from transformers import AutoModelForCausalLM

        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory}: no config.json; name a Hugging Face model directory")
        tokenizer = load_tokenizer(directory)
        loaded: Any
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=getattr(torch, precision),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in words
            )
        except Exception as error:  # broken files raise nearly anything
            if _was_ctrl_c(error):
                raise KeyboardInterrupt from None
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{directory}: the model cannot be loaded: {reason}") from None
        model, report = loaded
        # What is missing or does not fit was drawn at random by transformers.
        if unfit := sorted(report["mismatched_keys"]):
            name, stored, wanted = unfit[0]
            raise InputError(
                f"{directory}: the weights do not fit config.json: {name} has the shape "
                f"{tuple(stored)}, not {tuple(wanted)}"
            )
        if missing := sorted(report["missing_keys"]):
            raise InputError(
                f"{directory}: {len(missing)} weights are missing from the files, "
                f"the first is {missing[0]}"
            )
        model = model.to(device or default_device()).eval()
        if precision != "float32":
            _keep_head_in_float32(model)
        use_latent_decoding(model)
        use_fast_products(model)
        use_grouped_experts(model)
        found = cls(model, tokenizer)
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= found.vocab_size:
            raise InputError(
                f"{directory}: the tokenizer has ids up to {largest}, the model only "
                f"{found.vocab_size} outputs: they do not belong together"
            )
        found.check_head_is_linear(directory)
        return found

    @property
    def head_VH(self) -> torch.Tensor:  # noqa: N802
        """The output embedding, (vocabulary, hidden)."""
        weight = self.model.get_output_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias_V(self) -> torch.Tensor | None:  # noqa: N802
        """The output bias, (vocabulary,), or None."""
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        assert bias is None or isinstance(bias, torch.Tensor)
        return bias

    @property
    def vocab_size(self) -> int:
        """Number of outputs of the head (the tokenizer may know fewer)."""
        return int(self.head_VH.shape[0])

    @property
    def max_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31))

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters as they are held, tied ones counted once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: those of the generation config and of the tokenizer."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        found = set(named if isinstance(named, list) else [named]) | {self.tokenizer.eos_token_id}
        return sorted(int(token) for token in found if token is not None)

    def generate(
        self, prompts: Sequence[TokenIds], processors: Sequence[Any] = (), **options: Any
    ) -> torch.Tensor:
        """What the model says after each prompt, (prompts, longest answer) int64 on the CPU.

        ``processors`` are logits processors and ``options`` those of a ``GenerationConfig`` of
        ``transformers``: what the model's own asks for (penalties, sampling) is another model.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        ids_BT, mask_BT = left_padded(prompts)
        network: Any = self.model
        own, network.generation_config = network.generation_config, GenerationConfig()
        try:
            out_BT = network.generate(
                ids_BT.to(self.device),
                attention_mask=mask_BT.to(self.device),
                generation_config=GenerationConfig(**options),
                logits_processor=LogitsProcessorList(processors),
            )
        finally:
            network.generation_config = own
        answers_BT: torch.Tensor = out_BT[:, ids_BT.shape[1] :].cpu()
        return answers_BT

    def read(
        self, ids_BT: torch.Tensor, mask_BL: torch.Tensor, cache: Any = None
    ) -> tuple[torch.Tensor, Any]:
        """Logits (rows, vocabulary) after the last of ``ids_BT``, and a cache that holds them too.

        ``mask_BL`` is 0 in the padding, of what ``cache`` holds and of the ids after it.
        """
        places_BT = (mask_BL.cumsum(1) - 1)[:, -ids_BT.shape[1] :].clamp(min=0)
        with torch.no_grad():
            found = self.body(
                ids_BT.to(self.device),
                attention_mask=mask_BL.to(self.device),
                position_ids=places_BT.to(self.device),
                past_key_values=cache,
                use_cache=True,
            )
            return self.logits(found.last_hidden_state[:, -1]), found.past_key_values

    def check_head_is_linear(self, directory: Path) -> None:
        """Raise ``InputError`` if the logits are not a linear function of the hidden states."""
        ids = torch.arange(min(8, self.vocab_size), device=self.device)[None]
        with torch.inference_mode():
            expected = self.model(ids).logits[0].float()
            found = self.logits(self.body(ids, use_cache=False).last_hidden_state[0])
        if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
            raise InputError(
                f"{directory}: this architecture transforms its logits after the output head "
                "(soft-capping or scaling), which is not supported"
            )

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Logits (rows, vocabulary) of hidden states (rows, hidden)."""
        return product(hidden_NH.to(self.head_VH.dtype), self.head_VH, self.bias_V).float()

    def log_probs(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Log-probabilities in nats, (rows, vocabulary) float32."""
        return torch.log_softmax(self.logits(hidden_NH), dim=-1)

    def hidden_states(self, sequences: Sequence[TokenIds]) -> list[torch.Tensor]:
        """Last hidden states of each sequence, (length, hidden), from one padded forward pass.

        Padding stands on the right, where a causal model cannot see it.
        """
        ids = pad(sequences).to(self.device)
        with torch.inference_mode():
            hidden_BTH = self.body(ids, use_cache=False).last_hidden_state
        return [hidden_BTH[i, : len(s)] for i, s in enumerate(sequences)]


def _keep_head_in_float32(model: Any) -> None:
    """Give the model a head of its own, in float32, that takes hidden states of any precision.

    Logits in bfloat16 are steps of an eighth where they are 16 to 32: too coarse for probabilities.
    """
    head = model.get_output_embeddings()
    for name, weight in list(head.named_parameters(recurse=False)):
        setattr(head, name, torch.nn.Parameter(weight.detach().float(), requires_grad=False))
    head.register_forward_pre_hook(lambda _, given: tuple(x.float() for x in given))


def _was_ctrl_c(error: BaseException | None) -> bool:
    """Whether Ctrl-C stands behind an error, as when it hits an extension being imported."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def left_padded(
    prompts: Sequence[TokenIds | list[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as int64 (number, longest), and where they are not padding."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def pad(sequences: Sequence[TokenIds]) -> torch.Tensor:
    """Sequences as one int64 tensor (number, longest), zeros on the right."""
    longest = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return ids


def row_chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of ``rows`` so that one chunk of float32 logits stays below ``LOGITS_BYTES``."""
    step = max(1, LOGITS_BYTES // (4 * vocab_size))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def length_batches(lengths: Sequence[int], max_tokens: int = FORWARD_TOKENS) -> list[list[int]]:
    """Indices grouped into batches of similar length, each at most ``max_tokens`` when padded.

    A sequence longer than ``max_tokens`` stands alone. The grouping depends on nothing else.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
