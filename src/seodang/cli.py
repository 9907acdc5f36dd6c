"""The command line: arguments in, results out. One command per verb, ``--json`` on each.

Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 the work
failed, 2 bad usage or input, 130 interrupted.
"""

from __future__ import annotations

import _thread
import io
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from seodang.cli_corpus import corpus_app
from seodang.cli_evaluation import evaluate, gate
from seodang.cli_foundation import foundation_app
from seodang.cli_labels import labels_app, show_store
from seodang.cli_output import INTERRUPTED, AsJson, print_json, reported
from seodang.cli_release import release_app
from seodang.errors import InputError

if TYPE_CHECKING:
    from seodang.packages import PackagePin


class Commands(TyperGroup):
    """The root command: what typer says about bad usage is also said in JSON if that is wanted."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            explain = getattr(error, "format_message", None)  # typer's own errors have it
            if explain and "--json" in sys.argv:
                print_json({"error": explain(), "exit_code": 2})
            raise


app = typer.Typer(
    name="seodang",
    cls=Commands,
    help="Soft labels in, proven and released students out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
keys_app = typer.Typer(no_args_is_help=True, help="Signing keys.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(foundation_app, name="foundation")
app.add_typer(labels_app, name="labels")
app.add_typer(release_app, name="release")
app.add_typer(keys_app, name="keys")
app.command()(evaluate)
app.command()(gate)


def main() -> None:
    """Entry point of the ``seodang`` command."""
    for stream in (sys.stdout, sys.stderr):  # any file name and token can be printed
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Threads that wait for each other spin for a few microseconds, then sleep: spinning for long
    # stalls a run on a machine that does other work as well, sleeping at once makes small models
    # wait for every product (`benchmarks/threads.py`). GNU OpenMP reads this as torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TQDM_DISABLE", "1")  # of transformers; we show our own progress
    keep_ctrl_c()
    try:
        app()
    except SystemExit as leaving:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or leaving.code == INTERRUPTED:
            leave(leaving.code)
        raise
    finally:  # what is left is leaving; one that is delivered again must not change the exit code
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave(code: str | int | None) -> NoReturn:
    """End this process without tearing the interpreter down.

    Gloo's threads outlive ``destroy_process_group`` as long as a mesh refers to the group. One
    that lets go of a tensor while the interpreter is torn down aborts the process, and with it
    the torchrun job, after all its work was done (pytorch/pytorch#179291). Threads of libraries
    that a Ctrl-C found at work do the same: the exit code would be that of a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def keep_ctrl_c() -> None:
    """See to it that Ctrl-C is never lost.

    Python prints and drops an exception that is raised inside a finaliser, KeyboardInterrupt
    among them: the work would go on. Such a one is delivered again a moment later.
    """

    def deliver_again(dropped: sys.UnraisableHookArgs) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            sys.__unraisablehook__(dropped)

    sys.unraisablehook = deliver_again


def show_version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        from seodang import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show version.")
    ] = False,
) -> None:
    """Soft labels in, proven and released students out."""


@app.command()
@reported
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override: section.key=value.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Replace the keys of the recipe's section `quick`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: documents to a proven, signed and released student."""
    from seodang.recipe_file import load_recipe

    loaded = load_recipe(recipe, settings, quick=quick)
    from seodang import pipeline

    result = pipeline.run(loaded, out)
    if as_json:
        print_json(result.to_json())
    else:
        print_result(result)
    if result.release is None:
        failure = pipeline.gate_failure(result.metrics)
        print(f"seodang: {failure}", file=sys.stderr)
        raise typer.Exit(failure.exit_code)


@app.command()
@reported
def distill(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[Path, typer.Option(help="Directory of a run whose soft labels are finished.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override: section.key=value.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a run's student alone; with torchrun, on many devices.

    torchrun --nproc-per-node 8 -m seodang distill RECIPE --out DIR
    """
    from seodang.recipe_file import load_recipe

    loaded = load_recipe(recipe, settings)
    from seodang import pipeline
    from seodang.training.parallel import is_first_process

    student = pipeline.distill(loaded, out)
    if not is_first_process():
        return
    if as_json:
        print_json(
            {"path": str(student.path), "digest": student.digest, **student.manifest.summary}
        )
    else:
        print(f"{student.path}: {student.digest}")


@app.command()
@reported
def sweep(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    out: Annotated[Path, typer.Option(help="Directory of the sweep.")],
    vary: Annotated[
        list[str], typer.Option(help="Key and its values: student.layers=6,10,16. Repeatable.")
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override: section.key=value.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train several students from one capture, and compare them."""
    from seodang.sweep import sweep as run_sweep
    from seodang.sweep import sweep_failure

    result = run_sweep(recipe, settings or [], vary, out)
    if as_json:
        print_json(result.to_json())
    else:
        from seodang.sweep_report import print_sweep

        print_sweep(result)
    if result.failed:
        failure = sweep_failure(result)
        print(f"seodang: {failure}", file=sys.stderr)
        raise typer.Exit(failure.exit_code)


def print_result(result: Any) -> None:
    """The closing table of a run, and where its report and release are."""
    from rich.console import Console
    from rich.table import Table

    held_out = result.metrics["held_out"]
    table = Table(
        title=f"Against the teacher, on {held_out['positions']:,} positions of "
        f"{held_out['documents']} held-out documents (KL in nats per token, over the "
        f"{result.metrics['partition']})",
        title_justify="left",
    )
    table.add_column("model")
    for name in ("KL", "top-1", "perplexity", "parameters", "tokens/s"):
        table.add_column(name, justify="right")
    names = {
        "teacher": "teacher",
        "untrained": "untrained",
        "cross_entropy": "cross-entropy only",
        "before_on_policy": "before on-policy",
        "after_on_policy": "on-policy, not kept",
        "student": "student",
    }
    for key, name in names.items():
        row = result.metrics["models"].get(key)
        if row is None:
            continue
        table.add_row(
            name,
            f"{row['kl']:.3f}",
            f"{row['top1_agreement']:.1%}",
            f"{row['perplexity']:,.1f}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['tokens_per_second']:,.0f}",
            style="bold green" if key == "student" else None,
        )
    console = Console(soft_wrap=True)
    console.print(table)
    passed = result.metrics["gate"]["passed"]
    console.print(f"gate     {'[green]passed[/]' if passed else '[red]failed[/]'}")
    console.print(f"report   {result.out / 'evaluation' / 'report.html'}", highlight=False)
    if result.release is not None:
        console.print(f"release  {result.release}", highlight=False)
        console.print(f"try it   seodang serve {result.release}", highlight=False)


@app.command()
@reported
def fetch(
    what: Annotated[str, typer.Argument(help="A recipe, or NAME==VERSION.")],
    as_json: AsJson = False,
) -> None:
    """Fetch what a recipe names from the package registry: the only command that downloads."""
    from seodang.packages import fetch as fetch_package
    from seodang.progress import say

    name, equals, version = what.partition("==")
    fetched = []

    def keep(pin: PackagePin) -> None:
        say(f"fetched {pin}  sha256 {pin.sha256[:16]}")
        fetched.append(pin.model_dump())

    if equals:
        keep(fetch_package(name, version, None))
    else:
        for pin in named_packages(Path(what)):
            keep(fetch_package(pin.package, pin.version, pin.sha256, pin.registry))
    if as_json:
        print_json({"packages": fetched})


def named_packages(file: Path) -> list[PackagePin]:
    """What a recipe, of whatever kind, needs from registries; ``packages.yaml`` is a list."""
    from seodang.corpus.task_writing import read_pins
    from seodang.foundation.recipe import is_foundation_recipe, load_foundation_recipe
    from seodang.recipe_file import load_recipe
    from seodang.release.gguf import CONVERTER

    if file.name == "packages.yaml":
        return read_pins(file)
    if is_foundation_recipe(file):
        return load_foundation_recipe(file).packages()
    recipe = load_recipe(file)
    own = recipe.teacher.foundation
    return [*recipe.packages(), CONVERTER, *(named_packages(Path(own)) if own else [])]


@app.command()
@reported
def capture(
    teacher: Annotated[str, typer.Option(help="Model directory, package:NAME, or server URL.")],
    corpus: Annotated[Path, typer.Option(help='JSONL of {"text": ...} or {"messages": ...}.')],
    out: Annotated[Path, typer.Option(help="Directory of the store.")],
    model: Annotated[str | None, typer.Option(help="The model's name on the server.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of the served model's tokenizer.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="In which a local teacher computes: float32 or bfloat16.")
    ] = "float32",
    estimator: Annotated[
        str, typer.Option(help="head-tail, sampled, residual or top-k.")
    ] = "head-tail",
    threshold: Annotated[
        float | None, typer.Option(help="Probability from which head-tail keeps every id.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Entries of top-k and residual.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws of sampled.")] = None,
    layout: Annotated[str, typer.Option(help="fast, or small.")] = "fast",
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Cut documents into windows of so many tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Label what the assistant reads, too.")
    ] = False,
    unusable: Annotated[
        str, typer.Option(help="A sequence that cannot be labelled: refuse, or skip it.")
    ] = "refuse",
    ray: Annotated[
        str | None, typer.Option(help="Share the work on a Ray cluster: its address, or local.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a teacher over a corpus once and keep its soft labels."""
    from seodang.recipe import soft_labels_from_options

    config = soft_labels_from_options(
        estimator=estimator,
        threshold=threshold,
        k=k,
        draws=draws,
        layout=layout,
        seed=seed,
        inputs=inputs,
        unusable=unusable,
    )
    from seodang.corpus.readers import read_jsonl
    from seodang.corpus.sequences import tokenize_all
    from seodang.softlabels.capture import capture as capture_labels
    from seodang.teacher.named import named_teacher

    documents = list(read_jsonl(corpus))
    chosen, source = named_teacher(teacher, model, tokenizer, precision)
    sequences = tokenize_all(documents, chosen.tokenizer, max_length or sys.maxsize)
    artifact = capture_labels(chosen, sequences, config, out, sources=[source], ray=ray)
    show_store(artifact.path, as_json)


@keys_app.command("new")
@reported
def keys_new(
    directory: Annotated[Path, typer.Argument(help="Where the pair is written.")],
    as_json: AsJson = False,
) -> None:
    """Make a key pair: signing.key to keep secret, signing.pub to give away."""
    from seodang.release.keys import new_keys

    private, public = new_keys(directory)
    if as_json:
        print_json({"private": str(private), "public": str(public)})
    else:
        print(f"private  {private}\npublic   {public}")


@app.command()
@reported
def serve(
    release: Annotated[Path, typer.Argument(help="Directory of the release.")],
    public_key: Annotated[
        Path | None, typer.Option(help="signing.pub; the one beside the release if none is named.")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Which GGUF, e.g. q8_0.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, 0 for a free one.")] = 8080,
    as_json: AsJson = False,
) -> None:
    """Verify a release, then serve it: chat page and OpenAI-compatible API."""
    from dataclasses import asdict

    from seodang.serving import server

    key = public_key or release.resolve().parent / "signing.pub"
    if not key.is_file():
        raise InputError(f"{key}: no such key; name the releaser's with --public-key")

    def ready(service: server.Service) -> None:
        if as_json:
            print_json(asdict(service))
            sys.stdout.flush()
        else:
            server.announce(service)

    server.serve(
        release, public_key=key, quantization=quantization, host=host, port=port, ready=ready
    )


@app.command()
@reported
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has, what is missing for which command, and how to get it."""
    from seodang.doctor import diagnose, print_diagnosis

    found = diagnose()
    if as_json:
        print_json(found)
    else:
        print_diagnosis(found)


if __name__ == "__main__":
    main()
