"""Our tasks as tasks of the lm-evaluation-harness, for every model that it can ask.

The harness (Gao et al., `lm_eval`) asks local models in this process and servers over the API of
OpenAI. Choices and rankings are its ``multiple_choice``, JSON and answers its ``generate_until``,
both through the model's chat template. It gives the responses, which are judged like any others
(:mod:`seodang.evaluation.task_metrics`).

- A local directory is asked through :class:`LocalModel`, which answers the harness's requests by
  :mod:`seodang.evaluation.responding`. The harness's own ``hf`` model ranks choices alike, but
  reads a request again for each of its choices and holds logits of (batch, length, vocabulary).
- A server with a tokenizer directory is asked for the log-probabilities of prompts
  (``local-completions``: vLLM gives them), one without for its answers
  (``local-chat-completions``): then a choice is what it says, and a ranking one by yes or no.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.api_key import authorization
from seodang.errors import InputError, WorkFailed
from seodang.evaluation.task_metrics import Response
from seodang.evaluation.tasks import SPARE_TOKENS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seodang.causal_lm import CausalLM

INSTALL = "comparing models needs the lm-evaluation-harness: pip install 'seodang[evaluation]'"
CONCURRENT_REQUESTS = 4  # of a server
ATTEMPTS = 3  # at one request
LONGEST_REQUEST = 1_000_000  # tokens: a server knows its own limit and says so


class HarnessModel:
    """A model that the harness asks; without its ``tokenizer``, only for what it says."""

    def __init__(self, lm: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.lm = lm
        self.tokenizer = tokenizer

    @classmethod
    def local(cls, model: CausalLM) -> HarnessModel:
        """A model in this process."""
        return cls(_local_model(model), model.tokenizer)

    @classmethod
    def served(cls, address: str, name: str, tokenizer: Path | None) -> HarnessModel:
        """The model ``name`` of the server at ``address`` (http://host:port/v1)."""
        openai = _harness().models.openai_completions
        common = {
            "model": name,
            "num_concurrent": CONCURRENT_REQUESTS,
            "max_retries": ATTEMPTS,
            "max_length": LONGEST_REQUEST,
            # Without a header the harness would send the key that is meant for OpenAI.
            "header": authorization() or {"Content-Type": "application/json"},
        }
        address = address.rstrip("/")
        if tokenizer is None:
            url = f"{address}/chat/completions"
            return cls(openai.LocalChatCompletion(base_url=url, **common), None)
        from seodang.causal_lm import load_tokenizer

        lm = openai.LocalCompletionsAPI(
            base_url=f"{address}/completions",
            tokenizer_backend="huggingface",
            tokenizer=str(tokenizer),
            **common,
        )
        return cls(lm, load_tokenizer(tokenizer))

    def respond(self, task: Task) -> list[Response]:
        """The response to each example, in order.

        Raises ``WorkFailed`` if a server does not answer, or not as it was asked.
        """
        harness = _harness()
        asked = harness_task(task, self.tokenizer)
        with _quiet(), _as_work_failed(task.name):
            # What stands above this, simple_evaluate, lists all installed packages each time.
            found = harness.evaluator.evaluate(
                self.lm,
                {"tasks": {task.name: asked}, "groups": {}},
                apply_chat_template=True,
                bootstrap_iters=0,
            )
        samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
        by_likelihood = task.has_choices and self.tokenizer is not None
        return [_response(sample["resps"], by_likelihood=by_likelihood) for sample in samples]

    def seconds(self, task: Task) -> float:
        """How long the model takes for the task's examples, without what the harness does."""
        asked = harness_task(task, self.tokenizer)
        with _quiet(), _as_work_failed(task.name):
            asked.build_all_requests(
                apply_chat_template=True, chat_template=self.lm.apply_chat_template
            )
            ask = getattr(self.lm, asked.instances[0].request_type)
            started = time.perf_counter()
            ask(asked.instances)
            return time.perf_counter() - started


def _response(responses: Sequence[Any], *, by_likelihood: bool) -> Response:
    if by_likelihood:
        return Response(log_likelihoods=tuple(float(r[0][0]) for r in responses))
    return Response(said=str(responses[0][0]).strip())


def harness_task(task: Task, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The task as the harness's: its examples in memory, the request through the chat template.

    A choice ends as an answer ends in the template of the ``tokenizer``. Without one the model is
    asked to say its choice.
    """
    base = _harness().api.task.ConfigurableTask
    from datasets import Dataset

    from seodang.evaluation.responding import turn_end

    by_likelihood = task.has_choices and tokenizer is not None
    end = turn_end(tokenizer) if tokenizer is not None else ""

    class OurTask(base):  # type: ignore[misc, valid-type]
        def fewshot_context(self, doc: dict[str, Any], *_: Any, **options: Any) -> Any:
            """The request: any messages, of which the harness itself takes one of the user."""
            return options["chat_template"](doc["messages"])

        def process_results(self, doc: dict[str, Any], results: Any) -> dict[str, Any]:
            """Nothing: the responses are judged by us."""
            return {"bypass": 0}

    rows = [
        {
            "id": example.id,
            "messages": example.request,
            "choices": [choice + end for choice in example.choices or []],
            "answer": example.answer,
        }
        for example in task.examples
    ]
    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "{{messages[-1].content}}",
        "doc_to_target": "{{answer}}",
        "output_type": "generate_until",
        "metadata": {},
        "num_fewshot": 0,
    }
    if by_likelihood:
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda doc: doc["choices"],
            "doc_to_target": lambda doc: 0,  # judged by us
            "target_delimiter": "",
        }
    else:
        config["generation_kwargs"] = _generation(task, tokenizer)
    with _quiet():
        made = OurTask(config=config)
        made.override_metric("bypass")
    return made


def _generation(task: Task, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """How an answer is generated: greedily, and under the task's schema."""
    from seodang.evaluation.responding import max_new_tokens

    if tokenizer is not None:
        limit = max_new_tokens(task, tokenizer)
    else:  # a token is a byte at least
        longest = max(len(example.answer.encode()) for example in task.examples)
        limit = task.max_new_tokens or longest + SPARE_TOKENS
    kwargs: dict[str, Any] = {"until": [], "do_sample": False, "max_gen_toks": limit}
    if task.schema is not None:
        named = {"name": task.name, "schema": task.schema, "strict": True}
        kwargs["response_format"] = {"type": "json_schema", "json_schema": named}
    return kwargs


def _local_model(model: CausalLM) -> Any:
    """The harness's face of a loaded model, for requests of our tasks."""
    from seodang.evaluation.responding import (
        choice_log_likelihoods,
        greedy_answers,
        prompt_text,
    )

    base = _harness().api.model.LM

    class LocalModel(base):  # type: ignore[misc, valid-type]
        tokenizer_name = ""

        def chat_template(self, chat_template: bool | str = False) -> str:
            return str(model.tokenizer.chat_template or "")

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return prompt_text(model.tokenizer, chat_history)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """Choices of one context together; whether a choice is the greedy one is not asked."""
            contexts: dict[tuple[int, str], list[str]] = {}
            for request in requests:
                context, choice = request.args
                contexts.setdefault((request.doc_id, context), []).append(choice)
            prompts = [context for _, context in contexts]
            scored = choice_log_likelihoods(
                model, prompts, list(contexts.values()), _shown(requests)
            )
            return [(score, False) for scores in scored for score in scores]

        def generate_until(self, requests: list[Any]) -> list[str]:
            prompts = [request.args[0] for request in requests]
            options = requests[0].args[1]
            form = options.get("response_format")
            return greedy_answers(
                model,
                prompts,
                options["max_gen_toks"],
                _shown(requests),
                schema=form and form["json_schema"]["schema"],
            )

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError("our tasks ask for no perplexity of whole texts")

    return LocalModel()


def _shown(requests: list[Any]) -> str | None:
    """Under which name progress is shown: the task's; none of a single example."""
    several = len({request.doc_id for request in requests}) > 1
    return requests[0].task_name if several else None


def _harness() -> Any:
    """The library, told to use no network; raises ``InputError`` if it is not installed."""
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(switch, "1")
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.evaluator
        import lm_eval.models.openai_completions
    except ImportError as error:
        raise InputError(f"{INSTALL} ({error})") from None
    return lm_eval


def check_harness() -> None:
    """Raise ``InputError`` if the harness is not installed."""
    _harness()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from writing its log, and asyncio from repeating its errors."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _as_work_failed(task: str) -> Iterator[None]:
    """Turn what the harness raises about a server into an error for people."""
    import requests
    from aiohttp import ClientError

    try:
        yield
    except (ClientError, requests.RequestException, TimeoutError, KeyError, TypeError) as error:
        raise WorkFailed(f"{task}: the model could not be asked: {error!r}") from None
