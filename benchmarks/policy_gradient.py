"""Is there anything for reinforcement learning to follow, and how far?

    python benchmarks/policy_gradient.py runs/nano/post-training

Asks `overlap`, the model that reinforcement learning starts from, training problems several times
in one mode, and takes the policy gradient of all answers: their log-probabilities times what they
earned beyond the others of their problem. Prints how well the gradients of two halves of the
problems agree (their cosine: 0 is noise), and the reward on held-out problems after steps of some
lengths along the gradient, and against it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from seodang.artifact import Artifact
from seodang.causal_lm import CausalLM, row_chunks
from seodang.foundation.post_training.fine_tuning import prompt
from seodang.foundation.post_training.policy_optimization import in_turns
from seodang.foundation.post_training.problem import MODES, Mode
from seodang.foundation.post_training.reasoning_data import Problem, read_problems
from seodang.foundation.post_training.rewards import reward
from seodang.foundation.pretraining.experts import use_grouped_experts

AT_ONCE = 64  # answers of one forward pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--mode", choices=MODES, default="think")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--answers", type=int, default=8, help="to each problem")
    parser.add_argument("--held-out-answers", type=int, default=2, help="to each problem")
    parser.add_argument("--steps", type=float, nargs="*", default=[-0.05, 0.05, 0.15])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parser.parse_args()

    model = CausalLM.load(options.run / "overlap")
    use_grouped_experts(model.model)
    data = Artifact.open(options.run / "data")
    problems = in_turns(read_problems(data, "train"), options.problems)
    held_out = read_problems(data, "held-out")

    said = Answers(model, problems, options.mode, options.answers, options.max_new_tokens)
    advantages = said.rewards - said.rewards.mean(axis=1, keepdims=True)
    differ = (advantages != 0).any(axis=1).mean()
    print(f"{options.mode}: {said}; they differ for {differ:.0%} of the problems")
    gradients = []
    for half in (0, 1):
        kept = advantages.copy()
        kept[1 - half :: 2] = 0.0
        gradients.append(gradient(model, said, kept))
    cosine = torch.cosine_similarity(gradients[0], gradients[1], dim=0)
    print(f"gradients of two halves of the problems: cosine {cosine:.3f}")

    direction = torch.nn.functional.normalize(gradients[0] + gradients[1], dim=0)
    parameters = list(model.model.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    for step in (0.0, *options.steps):
        torch.nn.utils.vector_to_parameters(start + step * direction, parameters)
        count, tokens = options.held_out_answers, options.max_new_tokens
        found = Answers(model, held_out, options.mode, count, tokens)
        print(f"step {step:+g} (weights' norm {start.norm():.0f}): held out, {found}", flush=True)


class Answers:
    """What a model says to every problem at temperature 1, and what it earns, (problems, each)."""

    def __init__(
        self, model: CausalLM, problems: list[Problem], mode: Mode, each: int, tokens: int
    ) -> None:
        tokenizer = model.tokenizer
        eos = int(tokenizer.eos_token_id)
        texts = [prompt(problem, mode, tokenizer) for problem in problems]
        asked = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.prompts = [ids for ids in asked for _ in range(each)]
        torch.manual_seed(0)
        drawn_BT = model.generate(
            self.prompts,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=tokens,
            eos_token_id=eos,
            pad_token_id=int(tokenizer.pad_token_id),
        )
        self.said: list[list[int]] = []
        earned = []
        for number, ids in enumerate(drawn_BT.tolist()):
            ended = eos in ids
            words = ids[: ids.index(eos)] if ended else ids
            self.said.append(words + [eos] * ended)
            text = str(tokenizer.decode(words))
            earned.append(reward(problems[number // each], mode, text, ended).total)
        self.rewards = np.array(earned, np.float64).reshape(-1, each)

    def __str__(self) -> str:
        """Mean reward with its standard error."""
        error = self.rewards.std() / np.sqrt(self.rewards.size)
        return f"reward {self.rewards.mean():+.3f} +- {error:.3f} of {self.rewards.size} answers"


def gradient(model: CausalLM, said: Answers, advantages: np.ndarray) -> torch.Tensor:
    """Of the mean over answers of advantage times log-probability, by all weights."""
    weights = advantages.reshape(-1)
    parameters = list(model.model.parameters())
    model.model.zero_grad()
    used = np.flatnonzero(weights)
    for start in range(0, len(used), AT_ONCE):
        numbers = used[start : start + AT_ONCE]
        whole = [[*said.prompts[n], *said.said[n]] for n in numbers]
        ids_BT = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.int64)
        weight_BT = torch.zeros(ids_BT.shape)
        for row, (n, ids) in enumerate(zip(numbers, whole, strict=True)):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            weight_BT[row, len(said.prompts[n]) : len(ids)] = weights[n] / len(weights)
        state_BTH = model.body(ids_BT, use_cache=False).last_hidden_state
        place = weight_BT[:, 1:] != 0
        state_NH, target_N = state_BTH[:, :-1][place], ids_BT[:, 1:][place]
        total = state_NH.new_zeros(())
        for rows in row_chunks(len(state_NH), model.vocab_size):
            log_NV = model.log_probs(state_NH[rows])
            log_N = log_NV.gather(1, target_N[rows, None])[:, 0]
            total = total + (log_N * weight_BT[:, 1:][place][rows]).sum()
        total.backward()
    none = torch.zeros(())
    parts = [(none.expand_as(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
    return torch.cat(parts).clone()


if __name__ == "__main__":
    main()
