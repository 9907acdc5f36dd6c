"""Which estimator makes the better student? The same corpus, start, batches and steps for each.

    python benchmarks/training.py runs/cs --layers 16 --tokens 8000

`runs/cs` is a finished run: its corpus is captured anew with each estimator (`small` layout) and a
student is trained on it by the soft labels alone. Prints bytes per token of the store and the
student's KL to the teacher's full distributions on held-out text, in nats per token, and the ratio
to `sampled` with 50 draws. --seeds repeats draws and order of the batches.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM
from seodang.corpus.build import read_sequences
from seodang.evaluation.fidelity import measure
from seodang.recipe import SoftLabelsConfig, StudentConfig, TeacherConfig
from seodang.softlabels.capture import capture
from seodang.softlabels.store import SoftLabelStore
from seodang.student.train import train
from seodang.teacher.local import LocalTeacher, teacher_directory

ESTIMATORS = {
    "sampled 50": {"estimator": "sampled", "draws": 50},
    "head-tail 0.06": {"estimator": "head-tail", "threshold": 0.06},
    "head-tail 0.12": {"estimator": "head-tail", "threshold": 0.12},
    "sampled 16": {"estimator": "sampled", "draws": 16},
    "residual 16": {"estimator": "residual", "k": 16},
    "top-k 16": {"estimator": "top-k", "k": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()

    def take(split: str, tokens: int) -> list:
        kept, total = [], 0
        every = read_sequences(corpus.path, split)
        for index in np.random.default_rng(0).permutation(len(every)):
            if total < tokens:
                kept.append(every[index])
                total += len(every[index].labelled)
        return kept

    recipe = json.loads((options.run / "recipe.json").read_bytes())
    corpus = Artifact.open(options.run / "corpus")
    directory = teacher_directory(TeacherConfig(**recipe["teacher"]))
    teacher = LocalTeacher(directory)
    text, held_out = take("train", options.tokens), take("held_out", options.held_out)
    folder = Path(tempfile.mkdtemp())
    kept = None
    print(f"{sum(len(s.labelled) for s in text):,} tokens, {options.layers} layers")
    print(f"{'estimator':<16} {'B/token':>8} {'KL':>8} {'top-1':>7}  ratio of KL", flush=True)
    reference = None
    try:
        for name, settings in ESTIMATORS.items():
            found = []
            for seed in range(options.seeds):
                config = SoftLabelsConfig(layout="small", seed=seed, **settings)
                labels = capture(teacher, text, config, folder / "labels")
                store = SoftLabelStore(labels)
                student = train(
                    store,
                    directory,
                    StudentConfig(
                        layers=options.layers, batch_tokens=512, cross_entropy_weight=0.0, seed=seed
                    ),
                    folder / "student",
                    layers=kept,
                )
                kept = student.manifest.summary["kept_layers"]  # the same start for all
                models = {"student": CausalLM.load(student.path)}
                figures = measure(teacher.model, models, held_out, 15)[0]["student"]
                found.append((figures["kl"], figures["top1_agreement"]))
            kl, agreement = np.mean(found, 0)
            reference = reference or kl
            size = store.bytes_per_token
            row = f"{name:<16} {size:>8.1f} {kl:>8.4f} {agreement:>7.1%}  {kl / reference:.3f}"
            print(row + "   " + " ".join(f"{k:.4f}" for k, _ in found), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
