"""The shape of a student: which ones an architecture can have, and their configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from seodang.errors import InputError
from seodang.progress import say
from seodang.recipe import StudentConfig
from seodang.student import depth, experts, width

if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig

# Keys of the recipe and of the model's configuration.
SIZES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "heads": "num_attention_heads",
    "experts": "n_routed_experts",
}
LLAMA = {key: name for key, name in SIZES.items() if key != "experts"}
WIDTH_KEYS = ("hidden_size", "intermediate_size", "heads")


def width_of(config: StudentConfig) -> dict[str, int | None]:
    """What the recipe says of the width, as :mod:`seodang.student.width` calls it."""
    return {
        "heads": config.heads,
        "neurons": config.intermediate_size,
        "hidden": config.hidden_size,
    }


def dense_llama(source: PretrainedConfig, config: StudentConfig) -> LlamaConfig:
    """A dense Llama with the source's tokenizer and, where the recipe says nothing, its sizes.

    Raises ``InputError`` for a shape that it cannot have.
    """
    from transformers import LlamaConfig

    sizes = {name: getattr(config, key) or getattr(source, name) for key, name in LLAMA.items()}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % (2 * heads):
        possible = [count for count in range(1, hidden + 1) if hidden % (2 * count) == 0]
        raise InputError(
            f"student.heads is {heads}: a Llama's heads share its {hidden} dimensions evenly, an "
            f"even number each: {nearest(possible, heads)}"
        )
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    return LlamaConfig(
        **sizes,
        **{name: getattr(source, name) for name in kept},
        vocab_size=source.vocab_size,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
        dtype="float32",
    )


def student_config(
    source: PretrainedConfig, config: StudentConfig, kept_layers: Sequence[int]
) -> PretrainedConfig:
    """The source's configuration in the student's shape; raises what transformers raises."""
    settings = {**source.to_dict(), "_name_or_path": "", "dtype": "float32"}
    if config.layers:
        settings |= depth.layer_settings(settings, kept_layers)
    if any(width_of(config).values()):
        settings |= width.width_settings(settings, **width_of(config))
    settings |= experts.expert_settings(config.experts)
    return type(source).from_dict(settings)


def check_shape(source: PretrainedConfig, config: StudentConfig) -> None:
    """Raise ``InputError`` if a model of this architecture cannot have the recipe's shape."""
    settings = source.to_dict()
    kind = source.model_type
    if config.reduce_experts == "merge" and (config.experts is None or config.start != "pruned"):
        raise InputError(
            "student.reduce_experts: merge needs student.experts, the number to keep, and weights "
            "to average: student.start: pruned"
        )
    for key in WIDTH_KEYS:
        if getattr(config, key) is not None and kind not in width.FAMILIES:
            raise InputError(
                f"student.{key}: the width of a {kind} model cannot be changed, only that of "
                f"{', '.join(width.FAMILIES)}; leave it out (student.layers works for any model)"
            )
    if config.experts is not None and kind not in experts.FAMILIES:
        raise InputError(
            f"student.experts: the experts of a {kind} model, if it has any, cannot be reduced, "
            f"only those of {', '.join(experts.FAMILIES)}; leave it out"
        )
    for key, name in SIZES.items():
        wanted = getattr(config, key)
        if wanted is not None and wanted > getattr(source, name):
            raise InputError(
                f"student.{key} is {wanted}, the model it starts from has only "
                f"{getattr(source, name)}"
            )
    if config.layers is not None and kind not in width.FAMILIES:
        _check_layers_stand_in_a_list(source)
    if kind in width.FAMILIES:
        _check_heads(settings, config)
    if kind == "qwen2":
        _warn_of_llama_cpp(settings, config)
    if config.experts is not None:
        possible = experts.possible_experts(settings)
        if config.experts not in possible:
            raise InputError(
                f"student.experts is {config.experts}: every one of {settings['n_group']} groups "
                "keeps the same number, at least 2, and the "
                f"{settings['topk_group']} that a token chooses must hold its "
                f"{settings['num_experts_per_tok']} experts: {nearest(possible, config.experts)}"
            )


def _check_heads(settings: Mapping[str, Any], config: StudentConfig) -> None:
    hidden = config.hidden_size or settings["hidden_size"]
    heads = config.heads or settings["num_attention_heads"]
    # transformers' LlamaConfig asks for it, though the size of a head is written down.
    divides = settings["model_type"] == "llama"
    if config.heads is not None:
        possible = list(width.head_splits(settings))
        if heads not in possible:
            groups = settings["num_key_value_heads"]
            raise InputError(
                f"student.heads is {heads}: of {settings['num_attention_heads']} heads in {groups} "
                "groups that share keys and values, as many must stay in every group that stays: "
                f"{nearest(possible, heads)}"
            )
        if divides and hidden % heads and config.hidden_size is None:
            raise InputError(
                f"student.heads is {heads}: the width of a Llama ({hidden}) must be a multiple of "
                f"its heads: {nearest([n for n in possible if hidden % n == 0], heads)}; "
                "or change student.hidden_size too"
            )
    if divides and hidden % heads and config.hidden_size is not None:
        possible = list(range(heads, settings["hidden_size"] + 1, heads))
        raise InputError(
            f"student.hidden_size is {hidden}: the width of a Llama must be a multiple of its "
            f"{heads} heads: {nearest(possible, hidden)}"
        )


def _warn_of_llama_cpp(settings: Mapping[str, Any], config: StudentConfig) -> None:
    """Say it if llama.cpp, whose Qwen2 has no size of a head apart, could not load the student."""
    changes = width.width_settings(settings, **width_of(config))
    hidden, heads = (
        changes.get(name, settings[name]) for name in ("hidden_size", "num_attention_heads")
    )
    size = changes.get("head_dim", hidden // heads)
    if heads * size != hidden:
        say(
            f"llama.cpp cannot load a Qwen2 of width {hidden} with {heads} heads of size {size}: "
            f"for a GGUF file set student.hidden_size to {heads * size}"
        )


def _check_layers_stand_in_a_list(source: PretrainedConfig) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source)
    listed = isinstance(getattr(model.base_model, "layers", None), torch.nn.ModuleList)
    if not listed or "num_hidden_layers" not in source.to_dict():
        raise InputError(
            f"student.layers: the layers of a {source.model_type} model do not stand in `layers`, "
            "so none can be left out; leave student.layers out, or start from another model"
        )


def nearest(possible: Iterable[int], wanted: int) -> str:
    """The numbers next to ``wanted`` on both sides, in words."""
    numbers = sorted(possible)
    near = [n for n in numbers if n < wanted][-1:] + [n for n in numbers if n > wanted][:1]
    return f"the nearest possible: {' or '.join(map(str, near))}" if near else "none is possible"
