"""The teacher as a local Hugging Face directory, whether it was one or came inside a package.

A package that holds a GGUF file is read through transformers once and kept in the cache as
safetensors, an artifact like every other.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from seodang.artifact import MANIFEST, WORK, Artifact, Source, begin
from seodang.causal_lm import CausalLM, load_tokenizer, model_fingerprint, quiet_transformers
from seodang.errors import InputError
from seodang.packages import PackagePin, cache_directory, open_package
from seodang.progress import say
from seodang.recipe import Precision, TeacherConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTRACTED = "gguf"  # where the package's file lies while it is read

CONVERSION = 2  # raised when the same archive would give other files than before


class LocalTeacher:
    """A Hugging Face directory as a teacher; its weights are loaded when they are first needed."""

    def __init__(self, directory: Path, precision: Precision = "float32") -> None:
        self.directory = directory
        self.precision: Precision = precision

    @cached_property
    def model(self) -> CausalLM:
        """The loaded model; raises ``InputError`` as :meth:`CausalLM.load` does."""
        return CausalLM.load(self.directory, precision=self.precision)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The directory's own tokenizer."""
        return load_tokenizer(self.directory)

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the weights."""
        return model_fingerprint(self.directory)

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        return read_config(self.directory)

    @property
    def vocab_size(self) -> int:
        """Number of outputs."""
        return int(self.config.vocab_size)

    @property
    def max_length(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return int(getattr(self.config, "max_position_embeddings", 2**31))

    def unload(self) -> None:
        """Let the weights go; they are loaded again when they are needed."""
        self.__dict__.pop("model", None)


def read_config(directory: Path) -> Any:
    """The configuration of the language model in a directory; ``InputError`` if there is none."""
    from transformers import AutoConfig

    quiet_transformers()
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json; name a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a broken file raises nearly anything
        reason = str(error).partition("\n")[0]
        raise InputError(f"{directory}: config.json cannot be read: {reason}") from None
    return config.get_text_config()


def teacher_source(config: TeacherConfig) -> Source:
    """The teacher as it appears among the sources of what is made from it."""
    pin = config.pin()
    if pin is not None:
        return Source(
            name=pin.package,
            version=pin.version,
            sha256=pin.sha256,
            license=config.license or "see the package",
        )
    assert config.path is not None
    return Source(name=Path(config.path).name, license=config.license or "not stated")


def teacher_directory(config: TeacherConfig) -> Path:
    """The teacher's Hugging Face directory; a packaged one is converted on first use.

    Raises ``InputError`` if the package was not fetched or holds no single GGUF file, and if the
    directory is of a training that has not ended.
    """
    pin = config.pin()
    if pin is None:
        assert config.path is not None
        directory = Path(config.path)
        if (directory / WORK).exists() and not (directory / MANIFEST).exists():
            raise InputError(
                f"{directory}: holds a training that has not ended; "
                "run it to its end, then name it as a teacher"
            )
        return directory
    name = f"{pin.package}-{pin.version}-{pin.sha256[:16]}-{CONVERSION}"
    folder = cache_directory() / "teachers" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        draft = begin(
            folder,
            "teacher",
            {"package": str(pin), "conversion": CONVERSION},
            {"archive": pin.sha256},
        )
        if isinstance(draft, Artifact):
            return folder
        say(f"Reading the teacher {pin} (once; kept in {folder.parent})")
        _convert(pin, draft.path)
        source = teacher_source(config)
        draft.finish(sources=[source], temporary=[EXTRACTED])
    return folder


def _convert(pin: PackagePin, target: Path) -> None:
    """Read the package's GGUF through transformers and save it as safetensors in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    folder, name = target / EXTRACTED, "teacher.gguf"
    folder.mkdir(exist_ok=True)
    with open_package(pin) as package:
        members = package.matching("*.gguf")
        if len(members) != 1:
            raise InputError(f"package {pin}: {len(members)} GGUF files; a teacher needs one")
        package.extract(members[0], folder / name)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        _repair_pre_tokenizer(tokenizer, folder / name)
    except Exception as error:  # a broken file raises nearly anything
        reason = str(error).partition("\n")[0]
        raise InputError(f"package {pin}: {members[0]} cannot be read: {reason}") from None
    # A model read from GGUF refuses to be saved while its config says it is quantized.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    for name in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(target)


def _repair_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Restore what the conversion to a tokenizer loses: SmolLM splits digits one by one.

    llama.cpp's `smollm` pre-tokenizer isolates every digit before the byte-level split; without
    it some numbers would get other ids than the teacher was trained on.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )
