"""``seodang labels``: look at a store of soft labels, check it, bring labels in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seodang.cli_output import AsJson, print_json, report_problems, reported
from seodang.errors import InputError

labels_app = typer.Typer(no_args_is_help=True, help="Look at soft labels, bring them in and out.")

Store = Annotated[Path, typer.Argument(help="Directory of the store.")]


def show_store(path: Path, as_json: bool) -> None:
    """Print what a store is."""
    from seodang.softlabels.show import describe

    found = describe(path)
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        shown = f"{value:,.1f}" if isinstance(value, float) else value
        if name == "sources":
            shown = ", ".join(f"{s['name']} ({s['license']})" for s in value) or "none"
        print(f"{name:<16} {shown}")


@labels_app.command("inspect")
@reported
def labels_inspect(store: Store, as_json: AsJson = False) -> None:
    """Say what a store holds and what a token costs."""
    show_store(store, as_json)


@labels_app.command("verify")
@reported
def labels_verify(store: Store, as_json: AsJson = False) -> None:
    """Check every file, token and weight of a store; exit 1 if something is wrong."""
    from seodang.artifact import MANIFEST, Artifact
    from seodang.softlabels.store import open as open_store

    try:
        Artifact.open(store)
    except InputError as error:
        if not (store / MANIFEST).is_file():
            raise
        report_problems(store, [str(error)], as_json)
    artifact = Artifact.open(store, "soft-labels")
    try:
        problems = open_store(store).verify()
    except InputError:  # a damaged file may not even open
        problems = artifact.verify()
        if not problems:
            raise
    report_problems(store, problems, as_json)


@labels_app.command("show")
@reported
def labels_show(
    store: Store,
    sequence: Annotated[
        list[int] | None, typer.Option(help="Which sequence; may be repeated. Default: 0.")
    ] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="The first so many.")] = None,
    document: Annotated[str | None, typer.Option(help="All sequences of a document.")] = None,
    positions: Annotated[int, typer.Option(min=0, help="How many positions.")] = 20,
    top: Annotated[int, typer.Option(min=0, help="Entries of a position that are shown.")] = 4,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model directory whose tokenizer spells the ids.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one page for a browser, with all positions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show sequences: each token, how much it surprised the teacher, and what was expected."""
    if sum(option is not None for option in (sequence, sequences, document)) > 1:
        raise InputError("--sequence, --sequences and --document: name one of them")
    from seodang.softlabels import show
    from seodang.softlabels.store import open as open_store

    opened = open_store(store)
    chosen = show.choose(opened, sequence or [], sequences or 1, document)
    spelling = show.spelling_of(opened, tokenizer)
    if html is not None:
        from seodang.artifact import write_atomically
        from seodang.softlabels.show_page import render

        write_atomically(html, render(opened, chosen, spelling, top).encode())
        if as_json:
            print_json({"path": str(html), "sequences": chosen})
        else:
            print(html)
    elif as_json:
        found = [show.as_json(opened, number, spelling, positions, top) for number in chosen]
        print_json(found[0] if len(found) == 1 else {"sequences": found})
    else:
        from rich.console import Console

        console = Console(emoji=False)
        if console.is_terminal:
            console.print(show.legend(opened))
        for number in chosen:
            if console.is_terminal:
                show.print_coloured(console, opened, number, spelling, positions, top)
            else:
                for line in show.plain_lines(opened, number, spelling, positions, top):
                    print(line)


@labels_app.command("stats")
@reported
def labels_stats(
    store: Store,
    plot: Annotated[
        Path | None, typer.Option(help="Write the distributions as a plot (.png, .svg or .pdf).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Distributions of entropy, head mass and entries, and the bytes of each column."""
    from seodang.softlabels import stats
    from seodang.softlabels.store import open as open_store

    opened = open_store(store)
    if plot is not None:
        from seodang.softlabels.stats_plot import check_suffix, write_plot

        check_suffix(plot)
    found = stats.statistics(opened)
    if plot is not None:
        write_plot(found, plot)
    if as_json:
        print_json(found)
    else:
        print("\n".join(stats.lines(found)))


@labels_app.command("export")
@reported
def labels_export(
    store: Store,
    out: Annotated[Path, typer.Option(help="The Parquet file.")],
    as_json: AsJson = False,
) -> None:
    """Write a store as plain Parquet of lists, for programs that do not know Seodang."""
    from seodang.softlabels.export import export
    from seodang.softlabels.store import open as open_store

    opened = open_store(store)
    export(opened, out)
    if as_json:
        print_json({"path": str(out), "sequences": len(opened), "tokens": opened.num_tokens})
    else:
        print(out)


@labels_app.command("import")
@reported
def labels_import(
    file: Annotated[Path, typer.Argument(help="A .parquet or .jsonl file.")],
    form: Annotated[str, typer.Option("--format", help="axolotl, or distilabel.")],
    tokenizer: Annotated[Path, typer.Option(help="Model directory of the teacher's tokenizer.")],
    teacher: Annotated[str, typer.Option(help="The teacher's name, for the cards.")],
    license_name: Annotated[
        str, typer.Option("--license", help="SPDX expression of the file: its text and labels.")
    ],
    out: Annotated[Path, typer.Option(help="Directory of the store.")],
    temperature: Annotated[
        float, typer.Option(help="Temperature that the probabilities were computed at.")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Make a store of the labels that axolotl's distillation or distilabel wrote."""
    from seodang.softlabels.exchange import import_labels

    artifact = import_labels(file, form, tokenizer, teacher, license_name, out, temperature)
    show_store(artifact.path, as_json)
