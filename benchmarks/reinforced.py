"""Did reinforcement learning raise the reward, and where?

    python benchmarks/reinforced.py runs/nano/post-training

Asks the model before it (`overlap`) and after it (`policy`) all held-out problems several times in
both modes, at the temperature of the policy and at a lower one, and prints what both earn, and
the difference with its standard error, over problems.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from policy_gradient import Answers
from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM
from seodang.foundation.post_training.problem import MODES
from seodang.foundation.post_training.reasoning_data import read_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--after", type=Path, help="another model than the run's `policy`")
    parser.add_argument("--answers", type=int, default=8, help="to each problem")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperatures", type=float, nargs="*", default=[1.0, 0.6])
    options = parser.parse_args()

    problems = read_problems(Artifact.open(options.run / "data"), "held-out")
    models = [
        CausalLM.load(path)
        for path in (options.run / "overlap", options.after or options.run / "policy")
    ]
    for temperature in options.temperatures:
        for mode in MODES:
            before, after = (
                Answers(
                    model, problems, mode, options.answers, options.max_new_tokens, temperature
                ).rewards
                for model in models
            )
            change = (after - before).mean(axis=1)
            error = change.std(ddof=1) / np.sqrt(len(change))
            print(
                f"temperature {temperature}, {mode}: {before.mean():+.3f} -> {after.mean():+.3f}, "
                f"{change.mean():+.3f} +- {error:.3f}",
                flush=True,
            )
            by_task = defaultdict(list)
            for problem, one in zip(problems, change, strict=True):
                by_task[f"{problem.task} ({problem.language})"].append(one)
            print("  " + ", ".join(f"{k} {np.mean(v):+.2f}" for k, v in sorted(by_task.items())))


if __name__ == "__main__":
    main()
