"""Training from stored labels against a trainer that keeps the teacher in its process.

    python benchmarks/distillation.py TEACHER documents.jsonl [--layers 6] [--trim 8192] [--json]

TRL's GKDTrainer (`lmbda=0`, `beta=0`: forward KL on given text, teacher in memory) and
`seodang.student.train` train the same student, the teacher cut to its most important layers, on
the same tokens: sequences of 283, four to a step, each position with the teacher's distribution.
Each runs in a process of its own, in turn, `--rounds` times. Tokens per second are those of the
median step after the first two, reading and logging included, in the median round; memory is the
most that was resident, libraries included. What capture costs is shown beside it, with the number
of epochs, or of students trained for one epoch, after which it is paid back: there the sum of
capture and training is less than TRL's training.

Needs the `bench` extra: trl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH = 283, 4
SKIPPED = 2  # steps in which memory is first touched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("documents", type=Path, help='JSON lines with "text" or "messages"')
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--trim", type=int, default=8192, help="tokens of the trimmed vocabulary")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        figures = CHILDREN[options.child](options)
        figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(figures))
        return
    found = {name: median(rounds) for name, rounds in measure(options.rounds).items()}
    for name in ("seodang", "seodang trimmed"):
        rate, peak = found[name]["tokens_per_second"], found[name]["peak_bytes"]
        found[name]["times_trl"] = rate / found["TRL"]["tokens_per_second"]
        found[name]["memory_of_trl"] = peak / found["TRL"]["peak_bytes"]
        saved = 1 / found["TRL"]["tokens_per_second"] - 1 / rate
        found[name]["paid_back_after"] = 1 / found["capture"]["tokens_per_second"] / saved
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def measure(rounds: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CHILDREN}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, figures in found.items():
                figures.append(in_a_child(name, Path(folder)))
    return found


def median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def in_a_child(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--child", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def capture_labels(options: argparse.Namespace) -> dict[str, Any]:
    """Label the text once, and choose the start that all trainers share."""
    import numpy as np

    from seodang.causal_lm import load_tokenizer
    from seodang.corpus.sequences import TokenSequence
    from seodang.recipe import SoftLabelsConfig, StudentConfig
    from seodang.softlabels import SoftLabelStore
    from seodang.softlabels.capture import capture
    from seodang.student.start import build_start, choose_start
    from seodang.teacher.local import LocalTeacher

    tokenizer = load_tokenizer(options.teacher)
    wanted = LENGTH * BATCH * options.steps
    ids: list[int] = []
    for line in options.documents.read_text().splitlines():
        document = json.loads(line)
        texts = [m["content"] for m in document.get("messages", [])] or [document["text"]]
        ids += tokenizer("\n".join(texts), verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    else:
        raise SystemExit(f"{options.documents}: {len(ids)} tokens, {wanted} are needed")
    windows = np.asarray(ids[:wanted], dtype=np.int32).reshape(-1, LENGTH)
    every = np.arange(LENGTH, dtype=np.int32)
    text = [TokenSequence(str(i), window, every) for i, window in enumerate(windows)]
    np.save(options.folder / "text.npy", windows)
    teacher = LocalTeacher(options.teacher)
    started = time.perf_counter()
    store = SoftLabelStore(capture(teacher, text, SoftLabelsConfig(), options.folder / "labels"))
    seconds = time.perf_counter() - started
    config = StudentConfig(layers=options.layers)
    student = build_start(options.teacher, config, choose_start(options.teacher, store, config))
    student.save_pretrained(options.folder / "start")
    tokenizer.save_pretrained(options.folder / "start")
    return {"tokens_per_second": wanted / seconds, "bytes_per_token": store.bytes_per_token}


def train_seodang(options: argparse.Namespace, trim: int | None = None) -> dict[str, Any]:
    from seodang.recipe import StudentConfig, VocabularyConfig
    from seodang.softlabels import open as open_store
    from seodang.student.train import train
    from seodang.training.log import SPEED, read_rows

    config = StudentConfig(
        path=str(options.folder / "start"),
        batch_tokens=LENGTH * BATCH,
        cross_entropy_weight=0.0,
        checkpoint_steps=options.steps + 1,
        vocabulary=VocabularyConfig(trim=trim) if trim else None,
    )
    out = options.folder / f"student-{trim}"
    train(open_store(options.folder / "labels"), options.teacher, config, out)
    rows = read_rows(out / SPEED)[SKIPPED:]
    return {"tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows)}


def train_trl(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Steps(TrainerCallback):
        def __init__(self) -> None:
            self.started, self.seconds = 0.0, []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    steps = Steps()
    text = np.load(options.folder / "text.npy").tolist()
    trainer = GKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.folder / "start"),
        teacher_model=AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32),
        args=GKDConfig(
            output_dir=str(options.folder / "trl"),
            lmbda=0.0,
            beta=0.0,
            per_device_train_batch_size=BATCH,
            max_steps=min(options.steps, SKIPPED + 3),
            learning_rate=1e-3,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in text]),
        processing_class=AutoTokenizer.from_pretrained(options.teacher),
        callbacks=[steps],
    )
    trainer.train()
    return {"tokens_per_second": LENGTH * BATCH / statistics.median(steps.seconds[SKIPPED:])}


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Training a student on the same tokens")
    for column in ("", "tokens/s", "times TRL's", "peak MB", "of TRL's", "capture paid back after"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in found.items():
        cells = ["", "", ""]
        if "times_trl" in row:
            cells = [f"{row['times_trl']:.2f}", f"{row['memory_of_trl']:.0%}"]
            cells.append(f"{row['paid_back_after']:.1f} epochs or students")
        rate, peak = f"{row['tokens_per_second']:.0f}", f"{row['peak_bytes'] / 1e6:.0f}"
        table.add_row(name, rate, cells[0], peak, cells[1], cells[2])
    Console(width=100).print(table)


CHILDREN = {
    "capture": capture_labels,
    "seodang": train_seodang,
    "seodang trimmed": lambda options: train_seodang(options, options.trim),
    "TRL": train_trl,
}

if __name__ == "__main__":
    main()
