"""Which labels make the better student? The same corpus, start, batches and steps for each.

    python benchmarks/training.py runs/cs --layers 16 --tokens 8000

`runs/cs` is a finished run: its corpus is captured anew with each estimator (`small` layout) and a
student is trained on it by the soft labels alone. `full` is what all of them stand for: the
teacher in memory, and its full distribution at every position of every step. Prints bytes per
token of the store and the student's KL to the teacher's full distributions on held-out text, in
nats per token, and the ratio to `full`. --seeds repeats draws and order of the batches.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM, row_chunks
from seodang.corpus.build import read_sequences
from seodang.evaluation.fidelity import measure
from seodang.recipe import SoftLabelsConfig, StudentConfig, TeacherConfig
from seodang.softlabels.capture import capture
from seodang.softlabels.store import SoftLabelStore
from seodang.student import train as training
from seodang.student.losses import LossTerms
from seodang.student.packing import Pack, hidden_states, pack
from seodang.student.start import build_start, choose_start
from seodang.teacher.local import LocalTeacher, teacher_directory
from seodang.training.attention import use_packed_attention
from seodang.training.loop import Plan, run
from seodang.training.parallel import Processes
from seodang.training.plan import plan_steps

ESTIMATORS = {
    "full": {"estimator": "top-k", "k": 1},  # only the tokens are used
    "head-tail 0.06": {"estimator": "head-tail", "threshold": 0.06},
    "head-tail 0.12": {"estimator": "head-tail", "threshold": 0.12},
    "sampled 50": {"estimator": "sampled", "draws": 50},
    "residual 16": {"estimator": "residual", "k": 16},
    "top-k 16": {"estimator": "top-k", "k": 16},
    "top-k 9": {"estimator": "top-k", "k": 9},
    "top-k 7": {"estimator": "top-k", "k": 7},
}


class FullDistillation(torch.nn.Module):
    """The cross-entropy to the teacher's full distribution, chunk by chunk."""

    def __init__(self, model: Any, teacher: Any) -> None:
        super().__init__()
        self.model = model
        self.teacher = [teacher]  # in a list, so that it is not trained

    def forward(self, batch: Pack, scale: float = 1.0) -> LossTerms:
        (teacher,) = self.teacher
        hidden_NH = hidden_states(self.model, batch)
        with torch.no_grad():
            reference_NH = hidden_states(teacher, batch)
        head, reference_head = (m.get_output_embeddings().weight for m in (self.model, teacher))

        def loss(rows: torch.Tensor, head: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            p = torch.softmax(reference @ reference_head.T, -1)
            return -(p * torch.log_softmax(rows @ head.T, -1)).sum()

        total = scale * sum(
            checkpoint(loss, hidden_NH[part], head, reference_NH[part], use_reentrant=False)
            for part in row_chunks(len(batch.rows), head.shape[0])
        )
        return LossTerms(total, total.detach(), torch.zeros(()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(ESTIMATORS), help="names of the rows")
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
    packed = CausalLM.load(directory).model
    use_packed_attention(packed)
    text, held_out = take("train", options.tokens), take("held_out", options.held_out)
    folder = Path(tempfile.mkdtemp())
    choice = None
    print(f"{sum(len(s.labelled) for s in text):,} tokens, {options.layers} layers")
    print(f"{'labels':<16} {'B/token':>8} {'KL':>8} {'top-1':>7}  ratio of KL", flush=True)
    reference = None

    def student(name: str, store: SoftLabelStore, config: StudentConfig) -> CausalLM:
        model = build_start(directory, config, choice).train()
        use_packed_attention(model)
        module: torch.nn.Module
        if name == "full":
            module = FullDistillation(model, packed)
        else:
            residual = store.estimator == "residual"
            module = training.Distillation(model, config, "soft-labels", residual)
        lengths = store.lengths.tolist()
        steps = plan_steps(lengths, config.batch_tokens, config.epochs, config.seed)
        plan = Plan(
            tokens=[sum(lengths[i] for i in step) for step in steps],
            labelled=[int(store.labelled_counts[step].sum()) for step in steps],
            packs=lambda step: [pack([training.checked(store, i) for i in steps[step]])],
        )
        here = Processes(0, 1, torch.device("cpu"))
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        run(f"Training on {name}", module, plan, config, [optimizer], folder / "student", here)
        shutil.rmtree(folder / "student")
        model.set_attn_implementation("sdpa")
        return CausalLM(model.eval(), teacher.tokenizer)

    try:
        for name in options.only:
            found = []
            for seed in range(options.seeds):
                config = SoftLabelsConfig(layout="small", seed=seed, **ESTIMATORS[name])
                store = SoftLabelStore(capture(teacher, text, config, folder / "labels"))
                shape = StudentConfig(
                    layers=options.layers,
                    batch_tokens=512,
                    cross_entropy_weight=0.0,
                    seed=seed,
                    checkpoint_steps=10**6,
                )
                choice = choice or choose_start(directory, store, shape)  # the same for all
                (folder / "student").mkdir(exist_ok=True)
                models = {"student": student(name, store, shape)}
                figures = measure(teacher.model, models, held_out, 15)[0]["student"]
                found.append((figures["kl"], figures["top1_agreement"]))
            kl, agreement = np.mean(found, 0)
            reference = reference or kl
            size = float("nan") if name == "full" else store.bytes_per_token
            row = f"{name:<16} {size:>8.1f} {kl:>8.4f} {agreement:>7.1%}  {kl / reference:.3f}"
            print(row + "   " + " ".join(f"{k:.4f}" for k, _ in found), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
