"""A local model's responses to tasks: likelihoods of choices, and greedy answers.

Choices of an example share its request, which is read once: its keys and values are kept, and
every choice is read after them. No tensor of (batch, length, vocabulary) is ever made. A choice
is scored together with the token that ends the turn, so that its likelihood is that of saying
exactly this and a choice that begins like a longer one has no advantage.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from seodang.causal_lm import CausalLM, TokenIds, left_padded, length_batches, pad, row_chunks
from seodang.errors import WorkFailed
from seodang.evaluation.constrained import answers_under_schema
from seodang.evaluation.task_metrics import Response
from seodang.evaluation.tasks import SPARE_TOKENS, Task
from seodang.progress import say, track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_TOKENS = 8192  # whose keys and values are held at a time


@dataclass(frozen=True)
class LocalModel:
    """A model in this process as one that tasks are put to."""

    model: CausalLM

    def respond(self, task: Task, description: str | None) -> list[Response]:
        """Its response to each example."""
        return respond(self.model, task, description)

    def seconds(self, task: Task) -> float:
        """How long its responses take."""
        started = time.perf_counter()
        respond(self.model, task)
        return time.perf_counter() - started


def respond(model: CausalLM, task: Task, description: str | None = None) -> list[Response]:
    """The model's response to each example, the same for the same model and task.

    Likelihoods for tasks with choices, greedy answers for the others, JSON under its schema as
    serving engines write it. Progress is shown under ``description``, if there is one.
    A request that is longer than the model reads is cut at its beginning, which is said. Raises
    ``WorkFailed`` if the model gives likelihoods that are not numbers.
    """
    prompts = [prompt_text(model.tokenizer, example.request) for example in task.examples]
    if task.has_choices:
        end = turn_end(model.tokenizer)
        choices = [[choice + end for choice in example.choices or []] for example in task.examples]
        scored = choice_log_likelihoods(model, prompts, choices, description)
        return [Response(log_likelihoods=tuple(scores)) for scores in scored]
    limit = max_new_tokens(task, model.tokenizer)
    said = greedy_answers(model, prompts, limit, description, schema=task.schema)
    return [Response(said=text) for text in said]


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The request as the model's chat template puts it, without thoughts; else its plain words."""
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + "\n\n"
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    )


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an assistant's words, without white space; or nothing."""
    if tokenizer.chat_template is None:
        return ""
    words = "Seodang"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False))
    return text.rpartition(words)[2].strip()


def max_new_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> int:
    """How long an answer may become: the task's limit, or half as much again as the longest."""
    if task.max_new_tokens is not None:
        return task.max_new_tokens
    answers = [example.answer for example in task.examples]
    longest = max(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"])
    return longest * 3 // 2 + SPARE_TOKENS


@dataclass(frozen=True)
class _Scored:
    """A request's ids, and those of each choice after it."""

    prompt: TokenIds
    choices: list[TokenIds]

    @property
    def rows(self) -> int:
        """How many choices have more than one token: these are read after the request."""
        return sum(len(choice) > 1 for choice in self.choices)

    @property
    def longest(self) -> int:
        return max(len(choice) for choice in self.choices)


def choice_log_likelihoods(
    model: CausalLM,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    description: str | None = None,
) -> list[list[float]]:
    """Log-likelihood (nats) of each choice's tokens after its prompt, summed."""
    items = [_tokenized(model, *pair) for pair in zip(prompts, choices, strict=True)]
    _say_if_cut(model, [len(item.prompt) + item.longest for item in items], description)
    items = [_cut(item, model.max_length) for item in items]
    found: list[list[float]] = [[] for _ in items]
    cost = [(len(item.prompt) + item.longest) * max(1, item.rows) for item in items]
    with _tracked(description, len(items)) as advance, torch.inference_mode():
        for batch in length_batches(cost, CACHE_TOKENS):
            for index, scores in zip(batch, _batch(model, [items[i] for i in batch]), strict=True):
                found[index] = scores
            advance(len(batch))
    return found


def _tokenized(model: CausalLM, prompt: str, choices: Sequence[str]) -> _Scored:
    """Tokens of the whole texts: where a choice joins the prompt, they may merge."""
    special = model.tokenizer.chat_template is None
    texts = [prompt, *(prompt + choice for choice in choices)]
    ids, *wholes = model.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    shared = min(len(ids), *(len(whole) - 1 for whole in wholes))
    while any(whole[:shared] != ids[:shared] for whole in wholes):
        shared -= 1
    if shared < 1:
        raise WorkFailed("a choice cannot be scored without a token before it")
    as_ids = [np.asarray(whole[shared:], np.int32) for whole in wholes]
    return _Scored(np.asarray(ids[:shared], np.int32), as_ids)


def _cut(item: _Scored, max_length: int) -> _Scored:
    room = max(1, max_length - item.longest)
    return item if len(item.prompt) <= room else _Scored(item.prompt[-room:], item.choices)


def _tracked(description: str | None, total: int) -> AbstractContextManager[Callable[..., None]]:
    if description is None:
        return nullcontext(lambda *_: None)
    return track(description, total, "examples")


def _say_if_cut(model: CausalLM, lengths: Sequence[int], description: str | None) -> None:
    longer = sum(length > model.max_length for length in lengths)
    if longer and description is not None:
        say(
            f"{description}: {longer} of {len(lengths)} requests are longer than the "
            f"{model.max_length} tokens that the model reads: cut at their beginning"
        )


def _batch(model: CausalLM, items: list[_Scored]) -> list[list[float]]:
    ids_BT, mask_BT = left_padded([item.prompt for item in items])
    several = any(item.rows for item in items)
    read = model.body(
        ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0).to(model.device),
        use_cache=several,
    )
    first_BV = model.log_probs(read.last_hidden_state[:, -1])
    scores = [
        [float(first_BV[b, choice[0]]) for choice in item.choices] for b, item in enumerate(items)
    ]
    rows = [
        (b, c)
        for b, item in enumerate(items)
        for c, choice in enumerate(item.choices)
        if len(choice) > 1
    ]
    width = ids_BT.shape[1] + max(item.longest for item in items)
    step = max(1, CACHE_TOKENS // width)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        whole = start + step >= len(rows)  # the last part may use the cache up
        cache = read.past_key_values if whole else copy.deepcopy(read.past_key_values)
        rest = [items[b].choices[c] for b, c in part]
        for (b, c), score in zip(part, _continue(model, cache, mask_BT, part, rest), strict=True):
            scores[b][c] += score
    if not np.isfinite([score for row in scores for score in row]).all():
        raise WorkFailed("the likelihoods of choices are not finite: the model is broken")
    return scores


def _continue(
    model: CausalLM,
    cache: Any,
    mask_BT: torch.Tensor,
    rows: list[tuple[int, int]],
    choices: list[TokenIds],
) -> list[float]:
    """Log-likelihoods of the choices' tokens after their first ones."""
    of_request = torch.tensor([b for b, _ in rows])
    cache.batch_select_indices(of_request.to(model.device))
    mask_RT = mask_BT[of_request]
    ids_RL = pad([choice[:-1] for choice in choices])
    hidden_RLH = model.body(
        ids_RL.to(model.device),
        attention_mask=torch.cat([mask_RT, torch.ones_like(ids_RL)], 1).to(model.device),
        position_ids=(mask_RT.sum(1, keepdim=True) + torch.arange(ids_RL.shape[1])).to(
            model.device
        ),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    lengths = [len(choice) - 1 for choice in choices]
    hidden_NH = torch.cat([hidden_RLH[r, :length] for r, length in enumerate(lengths)])
    targets_N = torch.from_numpy(np.concatenate([choice[1:] for choice in choices]).astype("i8"))
    targets_N = targets_N.to(model.device)
    terms = [
        model.log_probs(hidden_NH[chunk]).gather(1, targets_N[chunk, None])[:, 0]
        for chunk in row_chunks(len(targets_N), model.vocab_size)
    ]
    parts = torch.cat(terms).double().split(lengths)
    return [float(part.sum()) for part in parts]


def greedy_answers(
    model: CausalLM,
    prompts: Sequence[str],
    limit: int,
    description: str | None = None,
    *,
    schema: dict[str, Any] | None = None,
) -> list[str]:
    """The likeliest next token at a time, at most ``limit`` of them, without white space around.

    With a ``schema`` only tokens from which a value of that JSON schema can still be reached.
    """
    special = model.tokenizer.chat_template is None
    ids = model.tokenizer(list(prompts), add_special_tokens=special, verbose=False)["input_ids"]
    _say_if_cut(model, [len(prompt) + limit for prompt in ids], description)
    room = max(1, model.max_length - limit)
    prompt_ids = [np.asarray(prompt, np.int32)[-room:] for prompt in ids]
    answers = [""] * len(prompt_ids)
    lengths = [len(prompt) + limit for prompt in prompt_ids]
    with _tracked(description, len(prompts)) as advance, torch.inference_mode():
        for batch in length_batches(lengths, CACHE_TOKENS):
            texts = _generate(model, [prompt_ids[index] for index in batch], limit, schema)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
            advance(len(batch))
    return answers


def _generate(
    model: CausalLM, prompts: Sequence[TokenIds], limit: int, schema: dict[str, Any] | None
) -> list[str]:
    out: Any
    if schema is not None:
        out = answers_under_schema(model, prompts, schema, limit)
    else:
        stop = model.stop_ids
        out = model.generate(
            prompts,
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=stop or None,
            pad_token_id=stop[0] if stop else 0,
        )
    said = model.tokenizer.batch_decode(out, skip_special_tokens=True)
    return [str(text).strip() for text in said]
