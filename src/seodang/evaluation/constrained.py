"""Answers under a JSON schema: only tokens that can still become a valid one are possible.

Serving engines do the same where a request asks for it (``response_format``): llama.cpp by
grammars, vLLM by llguidance, the library that finds the possible tokens here. Tokens that the
schema leaves no choice of, such as the names of keys and all of a term after its first letters,
are read with the next one that has to be chosen, in one pass: the jump-forward decoding of SGLang
(Zheng et al., arXiv 2312.07104). Of a form whose fields are terms that is most of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from seodang.causal_lm import CausalLM, TokenIds, left_padded

if TYPE_CHECKING:
    from llguidance import LLMatcher

# As json.dumps writes it: one spelling, so that no answer is lost in white space.
_SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _grammar(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    spelled = json.dumps({**schema, "x-guidance": _SPELLING}, ensure_ascii=False)
    return str(LLMatcher.grammar_from_json_schema(spelled))


def not_generable(schema: dict[str, Any]) -> str:
    """Why answers cannot be generated under a schema; nothing if they can."""
    from llguidance import LLMatcher

    return str(LLMatcher.validate_grammar(_grammar(schema)))


def answers_under_schema(
    model: CausalLM, prompts: Sequence[TokenIds], schema: dict[str, Any], limit: int
) -> list[list[int]]:
    """The likeliest possible token at a time after each prompt, at most ``limit`` of them.

    Possible are the tokens after which a value of ``schema`` can still be reached, and what ends
    an answer once it is one. Where a row has fewer tokens to read than another, padding stands
    between its own; a sliding window counts that too, and so holds a few tokens less.
    Raises ``ValueError`` for a schema that cannot be made a grammar.
    """
    matchers, stop = _matchers(model, schema, len(prompts)), model.stop_ids
    said = [_forced(matcher) for matcher in matchers]
    rows = [row for row, matcher in enumerate(matchers) if not matcher.is_stopped()]
    unread: list[list[int]] = [[*prompts[row], *said[row]] for row in rows]
    cache: Any = None
    mask_RL = torch.zeros(len(rows), 0, dtype=torch.int64)
    while rows:
        ids_RN, shown_RN = left_padded(unread)
        mask_RL = torch.cat([mask_RL, shown_RN], 1)
        scores_RV, cache = model.read(ids_RN, mask_RL, cache)
        possible_RV = _possible([matchers[row] for row in rows], scores_RV.shape[1])
        scores_RV.masked_fill_(~possible_RV.to(scores_RV.device), -torch.inf)
        going, unread = [], []
        for place, token in enumerate(scores_RV.argmax(1).tolist()):
            row = rows[place]
            if token in stop:
                continue
            new = [token, *_forced(matchers[row], token)]
            said[row] += new
            if len(said[row]) < limit and not matchers[row].is_stopped():
                going.append(place)
                unread.append(new)
        if len(going) < len(rows):
            cache.batch_select_indices(torch.tensor(going, dtype=torch.int64, device=model.device))
            rows, mask_RL = [rows[place] for place in going], mask_RL[going]
    return [tokens[:limit] for tokens in said]


def _matchers(model: CausalLM, schema: dict[str, Any], count: int) -> list[LLMatcher]:
    """``count`` of those that say what is possible, at the beginning of an answer."""
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    stop: Any = model.stop_ids or None
    known = from_tokenizer(model.tokenizer, n_vocab=model.vocab_size, eos_token=stop)  # type: ignore[arg-type]
    first = LLMatcher(known, _grammar(schema))
    if problem := first.get_error():
        raise ValueError(problem)
    return [first.deep_copy() for _ in range(count)]


def _forced(matcher: LLMatcher, token: int | None = None) -> list[int]:
    """The tokens that must follow, after ``token`` if one is given; the matcher moves past them."""
    if token is not None:
        matcher.consume_token(token)
    forced: list[int] = [] if matcher.is_stopped() else matcher.compute_ff_tokens()
    if forced:
        matcher.consume_tokens(forced)
    return forced


def _possible(matchers: Sequence[LLMatcher], vocab_size: int) -> torch.Tensor:
    """Which tokens may come next, (matchers, vocabulary) bool."""
    from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask

    bits_RW = allocate_token_bitmask(len(matchers), vocab_size)
    for row, matcher in enumerate(matchers):
        fill_next_token_bitmask(matcher, bits_RW, row)
    bits = torch.arange(32, dtype=torch.int32)
    possible_RV = ((bits_RW[:, :, None] >> bits) & 1).flatten(1)[:, :vocab_size]
    return possible_RV == 1
