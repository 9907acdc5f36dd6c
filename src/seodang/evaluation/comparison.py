"""Compare any two models on tasks: an artifact that a stopped comparison goes on from.

    found = compare_models(Named("model", Path("runs/demo/release")), None, tasks, Path("out"))

A model is a directory (a release is one) or a server. Each is asked through the
lm-evaluation-harness (:mod:`seodang.evaluation.harness`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seodang.api_key import authorization, hint
from seodang.artifact import Artifact, begin, canonical_json, sha256_bytes, write_json
from seodang.errors import InputError
from seodang.evaluation.harness import HarnessModel, check_harness
from seodang.evaluation.task_evaluation import ROBUSTNESS, TASKS, measure_tasks
from seodang.evaluation.task_metrics import Response
from seodang.evaluation.tasks import Task

METRICS = "metrics.json"
MEASURED = "measured.json"
MODEL, AGAINST = "model", "against"


@dataclass(frozen=True)
class Named:
    """A model as the command line names it: a directory, or a server's address and its model.

    Without the ``tokenizer`` of its model a server is asked only for what it says.
    """

    place: str
    model: str | None = None
    tokenizer: Path | None = None

    @property
    def is_server(self) -> bool:
        """Whether it is the address of a server."""
        return self.place.startswith(("http://", "https://"))

    def check(self) -> None:
        """Raise ``InputError`` for a directory without a model, or options that do not fit."""
        if self.is_server:
            if self.model is None:
                raise InputError(
                    f"{self.place}: name the model that this server runs (--model-name, "
                    "--against-name)"
                )
            _check_server(self.place, self.model)
            return
        if self.model is not None or self.tokenizer is not None:
            raise InputError(f"{self.place} is no server: leave its name and its tokenizer out")
        if not (Path(self.place) / "config.json").is_file():
            raise InputError(
                f"{self.place}: no config.json; name a model directory, a release, or a server "
                "(http://host:port/v1)"
            )

    @property
    def shown(self) -> str:
        """A short name for tables."""
        return self.model or Path(self.place).resolve().name

    @property
    def identity(self) -> str:
        """What decides its results, as far as it can be seen from here."""
        if self.is_server:
            return sha256_bytes(canonical_json([self.place, self.model, self.tokenizer is None]))
        from seodang.causal_lm import model_fingerprint

        return model_fingerprint(Path(self.place))


def _check_server(address: str, model: str) -> None:
    """Raise ``InputError`` for a server that is not there or does not run the model."""
    import httpx

    url = f"{address.rstrip('/')}/models"
    try:
        answer = httpx.get(url, headers=authorization())
        if wants_key := hint(answer.status_code):
            raise InputError(f"{url} answers {answer.status_code}{wants_key}")
        names = [str(card["id"]) for card in answer.raise_for_status().json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{url}: no OpenAI-compatible server answers here: {error!r}") from None
    if model not in names:
        raise InputError(f"{address}: does not run {model}, but {', '.join(names) or 'nothing'}")


class _Lazy:
    """A model that is loaded when it is first asked: finished results need none."""

    def __init__(self, named: Named) -> None:
        self.named = named
        self._model: HarnessModel | None = None
        self.size: dict[str, int] = {}

    def respond(self, task: Task, description: str | None) -> list[Response]:
        return self.model.respond(task)

    def seconds(self, task: Task) -> float:
        return self.model.seconds(task)

    @property
    def model(self) -> HarnessModel:
        named = self.named
        if self._model is None and named.is_server:
            assert named.model is not None
            self._model = HarnessModel.served(named.place, named.model, named.tokenizer)
        elif self._model is None:
            from seodang.causal_lm import CausalLM

            loaded = CausalLM.load(named.place)
            self.size = {"parameters": loaded.parameters, "bytes": loaded.weight_bytes}
            self._model = HarnessModel.local(loaded)
        assert self._model is not None
        return self._model


def compare_models(
    model: Named, against: Named | None, tasks: Sequence[Task], out: Path
) -> Artifact:
    """Measure one model, or two, on tasks; ``metrics.json`` of the artifact holds the figures.

    It has ``tasks``, ``task_comparisons`` (the model minus the other) and ``task_robustness`` as
    the metrics of a run, with the models ``model`` and ``against``, whose names and sizes are in
    ``models``. ``measured.json`` has latencies and memory, ``tasks/`` the results of every
    example. Raises ``InputError`` if a model or the harness is missing, ``WorkFailed`` if a server
    does not answer.
    """
    check_harness()
    named = {MODEL: model, **({AGAINST: against} if against is not None else {})}
    for one in named.values():
        one.check()
    inputs = {name: one.identity for name, one in named.items()}
    inputs |= {f"task:{task.name}": task.digest for task in tasks}
    draft = begin(out, "comparison", {"tasks": [task.name for task in tasks]}, inputs)
    if isinstance(draft, Artifact):
        return draft
    lazy = {name: _Lazy(one) for name, one in named.items()}
    found = measure_tasks(
        lazy, tasks, draft.path, compared=MODEL, robust=list(named), timed=list(named)
    )
    costs = found.pop("task_costs")
    models: dict[str, Any] = {
        name: {"name": one.named.shown, **one.size} for name, one in lazy.items()
    }
    write_json(draft.path / METRICS, {"models": models, **found})
    write_json(draft.path / MEASURED, costs)
    # What a server says may change from one time to the next.
    served = [MODEL, AGAINST] if any(one.is_server for one in named.values()) else []
    varying = [
        file.relative_to(draft.path).as_posix()
        for folder in ([TASKS, ROBUSTNESS] if served else [])
        for file in sorted((draft.path / folder).glob("*.jsonl"))
    ]
    return draft.finish(measured=[MEASURED, *([METRICS] if served else []), *varying])
