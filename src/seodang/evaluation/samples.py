"""Answers of several models to the same prompts, side by side. An illustration, not a measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from seodang.causal_lm import CausalLM
from seodang.progress import track


def samples(
    models: dict[str, CausalLM], prompts: Sequence[str], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers: [{"prompt", "answers": {model: text}}]."""
    rows: list[dict[str, Any]] = [{"prompt": prompt, "answers": {}} for prompt in prompts]
    with track("Sample answers", len(models) * len(prompts), "answers") as advance:
        for name, model in models.items():
            for row in rows:
                row["answers"][name] = answer(model, row["prompt"], max_new_tokens)
                advance(1)
    return rows


def answer(model: CausalLM, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer to ``prompt``, asked through its chat template if it has one."""
    tokenizer = model.tokenizer
    text: Any = prompt
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = torch.tensor(tokenizer(text)["input_ids"], device=model.device)[None]
    with torch.inference_mode():
        out = model.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text).strip()
