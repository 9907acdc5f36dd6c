"""What there is for reinforcement learning to follow, and in which of the weights.

    python benchmarks/policy_gradient.py runs/nano/post-training

Asks `overlap`, the model that reinforcement learning starts from, held-out problems at three
temperatures, and compares the slope of the reward with what the policy gradient of the answers at
temperature 1 says of it: they must agree, or something is wrong. Then it asks training problems,
a batch after the other, and prints how well the gradients of two batches agree (their cosine, a
mean over all pairs: 0 is noise) in all weights, and in the gains of the norms alone.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM
from seodang.foundation.post_training.fine_tuning import prompt
from seodang.foundation.post_training.policy_optimization import in_turns
from seodang.foundation.post_training.policy_trainer import BATCH_TOKENS, token_log_probs
from seodang.foundation.post_training.problem import MODES, Mode
from seodang.foundation.post_training.reasoning_data import Problem, read_problems
from seodang.foundation.post_training.rewards import reward
from seodang.student.generate import sample

AT_ONCE = 128  # answers of one backward pass
SCALE = 1.25  # by which the logits are multiplied, or divided


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--mode", choices=MODES, default="think")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--problems", type=int, default=64, help="of a batch")
    parser.add_argument("--answers", type=int, default=8, help="to each problem")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()

    model = CausalLM.load(options.run / "overlap")
    data = Artifact.open(options.run / "data")
    held_out = read_problems(data, "held-out")
    asked = (options.mode, options.answers, options.max_new_tokens)
    at_one = Answers(model, held_out, *asked)
    for factor in (1 / SCALE, SCALE):
        found = Answers(model, held_out, *asked, temperature=1 / factor)
        slope = (found.rewards.mean() - at_one.rewards.mean()) / (factor - 1)
        print(f"logits times {factor:.2f}: {found}; {slope:+.2f} a unit from where they are")
    print(f"logits as they are: {at_one}")
    by_answer = at_one.advantages.reshape(-1) * logit_scores(model, at_one)
    by_answer *= options.answers / (options.answers - 1)  # an answer is part of its own baseline
    error = by_answer.std() / np.sqrt(len(by_answer))
    print(f"slope by the policy gradient: {by_answer.mean():+.2f} +- {error:.2f}", flush=True)

    problems = in_turns(read_problems(data, "train"), options.batches * options.problems)
    norms = torch.cat(
        [
            torch.full((weight.numel(),), name.endswith("norm.weight"))
            for name, weight in model.model.named_parameters()
        ]
    )
    gradients = []
    for start in range(0, len(problems), options.problems):
        said = Answers(model, problems[start : start + options.problems], *asked, seed=1 + start)
        gradients.append(gradient(model, said))
    for what, kept in (("all weights", torch.ones_like(norms)), ("the norms' gains", norms)):
        pairs = [
            torch.cosine_similarity(a[kept], b[kept], dim=0).item()
            for a, b in combinations(gradients, 2)
        ]
        print(
            f"{what} ({int(kept.sum()):,}): cosine of two batches {np.mean(pairs):+.3f} "
            f"+- {np.std(pairs) / np.sqrt(len(pairs)):.3f}"
        )


class Answers:
    """What a model says to every problem, and what it earns, (problems, each)."""

    def __init__(
        self,
        model: CausalLM,
        problems: list[Problem],
        mode: Mode,
        each: int,
        tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        tokenizer = model.tokenizer
        eos = int(tokenizer.eos_token_id)
        texts = [prompt(problem, mode, tokenizer) for problem in problems]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.prompts = [np.array(one, np.int32) for one in ids for _ in range(each)]
        uniforms = [*np.random.default_rng(seed).random((len(self.prompts), tokens))]
        answers = sample(model, self.prompts, uniforms, temperature, batch_tokens=BATCH_TOKENS)
        self.said: list[list[int]] = [drawn.tolist() for drawn in answers]
        earned = []
        for number, drawn in enumerate(self.said):
            ended = drawn[-1:] == [eos]
            text = str(tokenizer.decode(drawn[:-1] if ended else drawn))
            earned.append(reward(problems[number // each], mode, text, ended).total)
        self.rewards = np.array(earned, np.float64).reshape(-1, each)
        self.advantages = self.rewards - self.rewards.mean(axis=1, keepdims=True)

    def __str__(self) -> str:
        """Mean reward with its standard error."""
        error = self.rewards.std() / np.sqrt(self.rewards.size)
        return f"reward {self.rewards.mean():+.3f} +- {error:.3f} of {self.rewards.size} answers"

    def padded(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Token ids and mask of some answers as ``token_log_probs`` takes them."""
        asked, said = self.prompts[rows], self.said[rows]
        longest, last = max(map(len, asked)), max(map(len, said))
        ids = torch.zeros(len(said), longest + last, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (before, after) in enumerate(zip(asked, said, strict=True)):
            start, end = longest - len(before), longest + len(after)
            ids[row, start:end] = torch.tensor([*before, *after])
            mask[row, start:end] = 1
        return ids, mask, last


def logit_scores(model: CausalLM, said: Answers) -> np.ndarray:
    """The derivative of each answer's log-probability by a factor on the logits, (answers,).

    It is the sum over tokens of the log-probability and the entropy: d/ds (s z - log sum exp(s z))
    at s = 1 is the logit less its mean.
    """
    found = []
    for start in range(0, len(said.said), AT_ONCE):
        with torch.no_grad():
            padded = said.padded(slice(start, start + AT_ONCE))
            log_p_BT, entropy_BT = token_log_probs(model.model, *padded, 1.0)
        found.append((log_p_BT + entropy_BT).double().sum(1).numpy())
    return np.concatenate(found)


def gradient(model: CausalLM, said: Answers) -> torch.Tensor:
    """Of the mean over answers of advantage times log-probability, by all weights."""
    weights = torch.from_numpy(said.advantages.reshape(-1) / said.advantages.size).float()
    model.model.zero_grad()
    for start in range(0, len(said.said), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        log_p_BT, _ = token_log_probs(model.model, *said.padded(rows), 1.0)
        (log_p_BT.sum(1) * weights[rows]).sum().backward()
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
        for p in model.model.parameters()
    ]
    return torch.cat(parts).clone()


if __name__ == "__main__":
    main()
