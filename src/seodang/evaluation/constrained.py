"""Answers under a JSON schema: only tokens that can still become a valid one are possible.

Serving engines do the same where a request asks for it (``response_format``): llama.cpp by
grammars, vLLM by llguidance, the library that finds the possible tokens here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


class SchemaConstraint(LogitsProcessor):
    """Leaves those tokens possible after which every row can still become a value of the schema.

    Made for one batch: prompts of ``prompt_length`` tokens, as many as ``rows``. ``vocab_size``
    is the number of logits, ``stop`` the tokens that end an answer. Raises ``ValueError`` for a
    schema that cannot be made a grammar.
    """

    def __init__(
        self,
        schema: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        stop: list[int],
        prompt_length: int,
        rows: int,
    ) -> None:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        known: Any = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=stop or None)  # type: ignore[arg-type]
        self.matchers = [LLMatcher(known, _grammar(schema)) for _ in range(rows)]
        if problem := self.matchers[0].get_error():
            raise ValueError(problem)
        self.prompt_length = prompt_length
        self.vocab_size = vocab_size
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) with minus infinity for what is not possible."""
        from llguidance.torch import allocate_token_bitmask, fill_next_token_bitmask

        possible_BW = allocate_token_bitmask(len(self.matchers), self.vocab_size)
        for row, matcher in enumerate(self.matchers):
            if input_ids.shape[1] > self.prompt_length and not matcher.is_stopped():
                matcher.consume_token(int(input_ids[row, -1]))
            if not matcher.is_stopped():
                fill_next_token_bitmask(matcher, possible_BW, row)
        bits = torch.arange(32, dtype=torch.int32)
        possible_BV = ((possible_BW[:, :, None] >> bits) & 1).flatten(1)[:, : scores.shape[1]]
        possible_BV = possible_BV == 1
        for row, matcher in enumerate(self.matchers):
            if matcher.is_stopped():  # the value is complete
                possible_BV[row] = not self.stop
                possible_BV[row, self.stop] = True
        return scores.masked_fill(~possible_BV.to(scores.device), -torch.inf)
