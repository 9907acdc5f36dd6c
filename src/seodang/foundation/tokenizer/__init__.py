"""The tokenizer: byte-level BPE, and its chat template."""
