"""``seodang evaluate`` and ``seodang gate``: compare models on tasks, and judge what was measured.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from seodang.cli_output import AsJson, print_json, reported
from seodang.errors import InputError

WIDTH = 100


@reported
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Model directory, release, or server URL (ends in /v1).")
    ],
    tasks: Annotated[
        list[Path],
        typer.Option(
            help="Recipe, list of tasks (YAML), or task file (.jsonl); a foundation recipe gives "
            "its benchmarks. Repeatable."
        ),
    ],
    against: Annotated[str | None, typer.Option(help="The model to compare it with.")] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("comparison"),
    model_name: Annotated[str | None, typer.Option(help="The model's name on its server.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Directory of its tokenizer, for servers that score prompts (vLLM)."),
    ] = None,
    against_name: Annotated[
        str | None, typer.Option(help="The same of the other model: its name on its server.")
    ] = None,
    against_tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of the other model's tokenizer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on tasks, or compare two: intervals, tests, robustness, latency."""
    from seodang.evaluation.comparison import MEASURED, METRICS, Named, compare_models
    from seodang.evaluation.harness import check_harness
    from seodang.evaluation.tasks import read_tasks

    check_harness()
    asked = [task for file in tasks for task in read_tasks(file)]
    names = [task.name for task in asked]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--tasks: two tasks have the name {repeated[0]!r}; rename one")
    other = None if against is None else Named(against, against_name, against_tokenizer)
    if against is None and (against_name or against_tokenizer):
        raise InputError("--against-name and --against-tokenizer belong to --against")
    found = compare_models(Named(model, model_name, tokenizer), other, asked, out)
    metrics = json.loads((found.path / METRICS).read_bytes())
    costs = json.loads((found.path / MEASURED).read_bytes())
    if as_json:
        print_json({"out": str(out), **metrics, "measured": costs})
    else:
        print_comparison(metrics, costs, out)


@reported
def gate(
    metrics: Annotated[Path, typer.Argument(help="metrics.json, or the folder that holds it.")],
    recipe: Annotated[Path, typer.Option(help="Recipe whose gate must hold.")],
    previous: Annotated[
        Path | None,
        typer.Option(help="metrics.json or release that it must not fall behind."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override: section.key=value.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check measurements against a recipe's gate; exit 1 if a check fails."""
    from seodang.evaluation.gate import check_metrics, read_metrics
    from seodang.recipe import Recipe
    from seodang.recipe_file import read_as

    config = read_as(Recipe, recipe, settings)[0].gate
    if previous is None and config.previous is not None:
        previous = recipe.parent / config.previous
    before = None if previous is None else read_metrics(previous)
    result = check_metrics(read_metrics(metrics), config, before)
    if as_json:
        print_json({"metrics": str(metrics), **result})
    else:
        print_gate(result)
    if not result["passed"]:
        raise typer.Exit(1)


def print_gate(result: Any) -> None:
    """The checks as a table, and the verdict."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("check", overflow="fold")
    for name in ("measured", "needed", "result"):
        table.add_column(name, justify="right", no_wrap=True)
    for check in result["checks"]:
        value, threshold = (
            "not measured" if check[key] is None else f"{check[key]:.4g}"
            for key in ("value", "threshold")
        )
        verdict = "[green]passed[/]" if check["passed"] else "[red]failed[/]"
        table.add_row(check["name"], value, f"{check['comparison']} {threshold}", verdict)
    console = _console()
    console.print(table)
    failed = sum(not check["passed"] for check in result["checks"])
    console.print(
        f"gate [red]failed[/]: {failed} of {len(result['checks'])} checks"
        if failed
        else f"gate [green]passed[/]: {len(result['checks'])} checks"
    )


def print_comparison(metrics: dict[str, Any], costs: dict[str, Any], out: Path) -> None:
    """A table of figures for every task, one of robustness, and what a request takes."""
    console = _console()
    names = {key: model["name"] for key, model in metrics["models"].items()}
    for task, models in metrics["tasks"].items():
        about = metrics["task_examples"][task]
        made = f", {about['synthetic']} of them synthetic" if about["synthetic"] else ""
        console.print(
            f"\n[bold]{task}[/]  {about['kind']}, {about['examples']} held-out examples{made}"
        )
        console.print(_figures(models, metrics["task_comparisons"][task], names))
        if metrics["task_robustness"][task]:
            console.print(_robustness(metrics["task_robustness"][task], names, about["kind"]))
        for key, cost in costs[task].items():
            console.print(
                f"{names[key]}: a request takes {1000 * cost['median']:,.0f} ms (median), "
                f"{1000 * cost['p95']:,.0f} ms (95th percentile of {cost['requests']})"
            )
    where = costs["machine"]
    console.print(
        f"\nIntervals hold 95 %; p is two-sided, paired. Latency: {where['processor']}, "
        f"threads {where['threads']}, cores {where['cores']}; peak memory of this process "
        f"{costs['peak_memory_bytes'] / 1e9:.1f} GB."
    )
    console.print(f"results  {out}", highlight=False)


def _console() -> Any:
    from rich.console import Console

    return Console(width=WIDTH, highlight=False)


def _figures(models: Any, comparisons: Any, names: dict[str, str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in names.values():
        table.add_column(name, justify="right", max_width=18, overflow="ellipsis", no_wrap=True)
    if comparisons:
        table.add_column("difference", justify="right", no_wrap=True)
        table.add_column("p", justify="right", no_wrap=True)
    other: Any = next(iter(comparisons.values()), {})
    for metric in (key for key in models["model"] if key != "by_language"):
        languages = [key for key, part in models["model"]["by_language"].items() if metric in part]
        for language in [None, *(languages if len(languages) > 1 else [])]:
            cells = [_interval(_of(figures, language).get(metric)) for figures in models.values()]
            if comparisons:
                found = _of(other, language).get(metric)
                p = "" if found is None else f"{found['p']:.2g}"
                cells += [_interval(found, sign="+"), p]
            table.add_row("" if language else metric, language or "all", *cells)
    return table


def _of(figures: Any, language: str | None) -> Any:
    return figures if language is None else figures["by_language"].get(language, {})


def _interval(figure: Any, sign: str = "") -> str:
    """``81.2 [78.0, 84.1]``, in percent."""
    if figure is None:
        return "–"
    value = f"{100 * figure['value']:{sign}.1f}"
    if figure["low"] is None:
        return value
    return f"{value} \\[{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def _robustness(found: Any, names: dict[str, str], kind: Any) -> Any:
    """The change of the metric that stands for the kind of task; the files have the others."""
    from rich import box
    from rich.table import Table

    from seodang.evaluation.task_metrics import MAIN

    metric = MAIN[kind]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("perturbed (synthetic)", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("metric", no_wrap=True)
    for name in names.values():
        table.add_column(f"{name}: change", justify="right", overflow="fold")
    for perturbation in next(iter(found.values())):
        parts = [found.get(key, {}).get(perturbation, {}) for key in names]
        cells = [_interval(part.get(metric, {}).get("change"), sign="+") for part in parts]
        table.add_row(perturbation, str(parts[0].get("n", "")), metric, *cells)
    return table
