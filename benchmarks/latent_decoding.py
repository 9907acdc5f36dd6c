"""Generation of a model with latent attention: `transformers` as it is, and with ours.

    python benchmarks/latent_decoding.py runs/nano/teacher

Both generate greedy answers to the same prompts, in turns; prints the ratio of their times.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from seodang.causal_lm import CausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    ours = CausalLM.load(options.model)
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    models = {"transformers": CausalLM(plain.to(ours.device), ours.tokenizer), "seodang": ours}
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 48, (options.prompts,), generator=draw).tolist()
    prompts = [
        torch.randint(ours.vocab_size, (length,), generator=draw).numpy() for length in lengths
    ]
    ratios = []
    for _ in range(options.rounds):
        seconds, said = {}, {}
        for name, model in models.items():
            started = time.perf_counter()
            said[name] = model.generate(
                prompts, max_new_tokens=options.max_new_tokens, do_sample=False, pad_token_id=0
            )
            seconds[name] = time.perf_counter() - started
        same = (said["seodang"] == said["transformers"]).double().mean()
        ratios.append(seconds["seodang"] / seconds["transformers"])
        print(f"{ratios[-1]:.2f} of the time; {same:.1%} of the tokens are the same", flush=True)


if __name__ == "__main__":
    main()
