"""Answers under a schema: one pass for each token that has to be chosen, or for every token?

    python benchmarks/jump_forward.py MODEL TASK.held-out.jsonl TASK.schema.json --threads 1

Seodang reads what the schema forces together with the next token to choose. The rival generates as
transformers does, with a logits processor that leaves the possible tokens (llguidance's, the same).
Prints how often both say the same, the passes of one batch, and the ratio of their processor times,
taken in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from seodang.causal_lm import CausalLM, TokenIds, left_padded
from seodang.corpus.tasks import read_examples
from seodang.evaluation.constrained import _matchers, _possible, answers_under_schema
from seodang.evaluation.responding import prompt_text


class Possible(LogitsProcessor):
    """Minus infinity for what the schema does not admit, for one batch."""

    def __init__(self, model: CausalLM, schema: dict[str, Any], prompts: int, length: int) -> None:
        self.matchers, self.length = _matchers(model, schema, prompts), length
        self.stop = model.stop_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, matcher in enumerate(self.matchers):
            if input_ids.shape[1] > self.length and not matcher.is_stopped():
                matcher.consume_token(int(input_ids[row, -1]))
        possible = _possible(self.matchers, scores.shape[1])
        for row, matcher in enumerate(self.matchers):
            if matcher.is_stopped():
                possible[row] = False
                possible[row, self.stop] = True
        return scores.masked_fill(~possible, -torch.inf)


def token_by_token(
    model: CausalLM, prompts: list[TokenIds], schema: dict[str, Any], limit: int
) -> list[list[int]]:
    ids, mask = left_padded(prompts)
    network: Any = model.model
    said = network.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=model.stop_ids,
            pad_token_id=model.stop_ids[0],
        ),
        logits_processor=LogitsProcessorList([Possible(model, schema, len(prompts), ids.shape[1])]),
    )
    found: list[list[int]] = said[:, ids.shape[1] :].tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("examples", type=Path)
    parser.add_argument("schema", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CausalLM.load(options.model)
    schema = json.loads(options.schema.read_text("utf-8"))
    examples = read_examples(options.examples, "json")
    texts = [prompt_text(model.tokenizer, example.request) for example in examples]
    ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    passes = []
    model.body.register_forward_hook(lambda *_: passes.append(1))
    ways = {"all forced tokens at once": answers_under_schema, "token by token": token_by_token}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    counts, same, asked = dict.fromkeys(ways, 0), 0, 0
    for number in range(options.batches):
        batch = ids[number * options.batch : (number + 1) * options.batch]
        prompts = [np.asarray(prompt, np.int32) for prompt in batch]
        said = {}
        for way, answer in ways.items():
            passes.clear()
            started = time.process_time()
            with torch.inference_mode():
                found = answer(model, prompts, schema, options.limit)
            seconds[way].append(time.process_time() - started)
            counts[way] += len(passes)
            said[way] = model.tokenizer.batch_decode(found, skip_special_tokens=True)
        one, other = said.values()
        same += sum(a == b for a, b in zip(one, other, strict=True))
        asked += len(batch)
    ours, theirs = (statistics.median(times) for times in seconds.values())
    print(f"{same} of {asked} answers are the same")
    for way, count in counts.items():
        print(f"{way}: {count / options.batches:.0f} passes a batch of {options.batch}")
    print(f"time of all forced tokens at once over token by token: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
