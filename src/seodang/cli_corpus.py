"""``seodang corpus``: what a raw corpus was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seodang.cli_output import AsJson, print_json, reported

corpus_app = typer.Typer(no_args_is_help=True, help="Look at a raw corpus.")


@corpus_app.callback()
def corpus() -> None:
    """Look at a raw corpus."""


@corpus_app.command("report")
@reported
def corpus_report(
    directory: Annotated[Path, typer.Argument(help="Directory of the raw corpus.")],
    html: Annotated[
        Path | None, typer.Option(help="Write the whole report as one HTML file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What came in, what each step dropped, what is left, and under which licences."""
    from seodang import corpus_report as page

    artifact, report = page.load(directory)
    if html is not None:
        from seodang.artifact import write_atomically

        write_atomically(html, page.render(report, artifact.digest).encode())
    if as_json:
        extra = {"html": None if html is None else str(html)}
        print_json({"path": str(directory), "digest": artifact.digest, **extra, **report})
    else:
        print("\n".join(page.lines(report)))
        if html is not None:
            print(html)
