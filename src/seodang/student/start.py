"""Where a student starts: random weights, a model as it is, or one with parts left out.

Random layers may stand on that model's embeddings, in an architecture of their own.

    teacher = Path("models/teacher")
    check_start(teacher, config)                   # refuses what cannot be, before any work
    choice = choose_start(teacher, store, config)  # what to keep, measured on stored labels
    model = build_start(teacher, config, choice)   # float32, on the CPU

The model it starts from is the teacher, or any local Hugging Face model that shares the teacher's
tokenizer (``student.path``). Layers go first; what goes from every layer is measured on the model
that is left. The choice is plain JSON, so that the same start can be built again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seodang.artifact import MANIFEST, Artifact, Source
from seodang.causal_lm import CausalLM, load_tokenizer, quiet_transformers
from seodang.errors import InputError
from seodang.recipe import StudentConfig
from seodang.softlabels.store import SoftLabelStore
from seodang.student import depth, experts, width
from seodang.student.probe import probe_sequences
from seodang.student.same_tokenizer import check_same_tokenizer
from seodang.student.shape import check_shape, dense_llama, student_config, width_of
from seodang.student.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def start_directory(teacher: Path, config: StudentConfig) -> Path:
    """The directory of the model that the student starts from."""
    return Path(config.path) if config.path else teacher


def start_sources(config: StudentConfig) -> list[Source]:
    """What the model in ``student.path`` was made from, as its manifest says; [] for the teacher.

    Of a directory without a manifest nothing is known but its name.
    """
    if config.path is None:
        return []
    directory = Path(config.path)
    if (directory / MANIFEST).is_file():
        return Artifact.open(directory).manifest.sources
    return [Source(name=directory.name, license="not stated")]


def check_start(teacher: Path, config: StudentConfig) -> None:
    """Check that the start can be built, from configurations and tokenizers alone.

    Raises ``InputError`` naming the key of the recipe: no model or no weights in ``student.path``,
    another tokenizer than the teacher's, a part that the architecture does not have or that cannot
    be taken from it, a shape that it cannot have, with the nearest ones that it can, or a trimmed
    vocabulary that the teacher's tokenizer cannot give.
    """
    start = start_directory(teacher, config)
    source = _source(teacher, config)
    if config.path:
        check_same_tokenizer(teacher, start)
        if config.start != "scratch" and not any(start.glob("*.safetensors")):
            raise InputError(
                f"student.path {start}: no weights (*.safetensors); save them there, or start "
                "with random ones: student.start: scratch"
            )
    check_shape(source, config)
    if config.start == "embeddings":
        given = _config_of(start, "student.path" if config.path else "teacher").hidden_size
        if source.hidden_size != given:
            raise InputError(
                f"student.hidden_size is {source.hidden_size}: a student that starts with the "
                f"embeddings of a model has their width, {given}"
            )
    if config.vocabulary is not None:
        check_vocabulary(teacher, config.vocabulary)
    try:
        student_config(source, config, range(config.layers or source.num_hidden_layers))
    except Exception as error:  # what else an architecture asks of its shape
        raise InputError(f"student: {source.model_type} cannot have this shape: {error}") from None


def choose_start(teacher: Path, store: SoftLabelStore, config: StudentConfig) -> dict[str, Any]:
    """What of the model is kept, measured on a few sequences of ``store``.

    Returns plain JSON: ``start``, and if that is "pruned" ``kept_layers``, with what
    :func:`seodang.student.width.choose_width` and :func:`seodang.student.experts.choose_experts`
    say of the layers kept. Deterministic; loads the model in float32 on the CPU if there is
    anything to choose.
    """
    if config.start != "pruned":
        return {"start": config.start}
    source = _source(teacher, config)
    keep = config.layers or source.num_hidden_layers
    choice: dict[str, Any] = {"start": "pruned", "kept_layers": list(range(keep))}
    narrower = any(width_of(config).values())
    if not (narrower or config.layers or config.experts):
        return choice
    model = _load(teacher, config)
    probe = probe_sequences(store)
    if config.layers:
        residual = store.estimator == "residual"
        choice["kept_layers"] = depth.choose_layers(model, probe, keep, residual=residual)
    with depth.only_layers(model, choice["kept_layers"]):
        if narrower:
            choice |= width.choose_width(model, probe, **width_of(config))
        if config.experts:
            merge = config.reduce_experts == "merge"
            choice |= experts.choose_experts(model, probe, config.experts, merge=merge)
    return choice


def build_start(teacher: Path, config: StudentConfig, choice: Mapping[str, Any]) -> PreTrainedModel:
    """The student before its first step, in float32 on the CPU, with the teacher's vocabulary.

    The same for the same ``choice`` and, of random layers, the same ``config.seed``.
    """
    from transformers import AutoModelForCausalLM

    if choice["start"] != "pruned":
        random = _random(teacher, config)
        if choice["start"] == "embeddings":
            _copy_embeddings(_load(teacher, config), random)
        return random
    full: PreTrainedModel = _load(teacher, config)
    shape = student_config(full.config, config, choice["kept_layers"])
    if shape.to_dict() == full.config.to_dict():
        return full
    state = depth.keep_layers(full.state_dict(), choice["kept_layers"])
    if "kept_experts" in choice:
        state = experts.keep_experts(state, choice)
    if any(width_of(config).values()):
        state = width.keep_width(state, full.config.to_dict(), choice)
    student: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    student.load_state_dict(state)
    student.generation_config = full.generation_config
    return student.eval()  # type: ignore[no-any-return]


def _random(teacher: Path, config: StudentConfig) -> PreTrainedModel:
    """A model of the recipe's architecture with transformers' own random weights."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    quiet_transformers()
    start = start_directory(teacher, config)
    source = _source(teacher, config)
    shape = student_config(source, config, range(config.layers or source.num_hidden_layers))
    shape.vocab_size = _config_of(teacher, "teacher").vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    if (start / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(start, local_files_only=True)
    CausalLM(model.eval(), load_tokenizer(teacher)).check_head_is_linear(start)
    return model  # type: ignore[no-any-return]


def _copy_embeddings(source: Any, student: Any) -> None:
    """Give ``student`` the embeddings of ``source``, of the output too if it has them apart."""
    with torch.no_grad():
        student.get_output_embeddings().weight.copy_(source.get_output_embeddings().weight)
        student.get_input_embeddings().weight.copy_(source.get_input_embeddings().weight)


def _source(teacher: Path, config: StudentConfig) -> PretrainedConfig:
    """The configuration that the student's is made of."""
    start = start_directory(teacher, config)
    found = _config_of(start, "student.path" if config.path else "teacher")
    return dense_llama(found, config) if config.architecture else found


def _load(teacher: Path, config: StudentConfig) -> Any:
    """The model that the student starts from, with as many outputs as the teacher has."""
    model: Any = CausalLM.load(start_directory(teacher, config), torch.device("cpu")).model
    outputs = _config_of(teacher, "teacher").vocab_size
    known = model.config.vocab_size
    if known != outputs:  # padding beyond the tokenizer differs
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(outputs, mean_resizing=False)
        with torch.no_grad():
            for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                part.weight[known:] = part.weight[:known].mean(0)
    model.config._name_or_path = ""
    return model


def _config_of(directory: Path, key: str) -> PretrainedConfig:
    from transformers import AutoConfig

    quiet_transformers()
    if not (directory / "config.json").is_file():
        raise InputError(f"{key} {directory}: no config.json; name a Hugging Face model directory")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # an unknown architecture, or values that it refuses
        reason = str(error).splitlines()[0]
        raise InputError(f"{key} {directory}: config.json cannot be used: {reason}") from None
    return config
