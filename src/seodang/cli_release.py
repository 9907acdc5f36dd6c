"""``seodang release``: check a release, and say what changed between two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seodang.cli_output import AsJson, print_json, report_problems, reported

release_app = typer.Typer(no_args_is_help=True, help="Check a release, or compare two.")


@release_app.command("verify")
@reported
def release_verify(
    release: Annotated[Path, typer.Argument(help="Directory of the release.")],
    public_key: Annotated[Path, typer.Option(help="signing.pub of who released it.")],
    as_json: AsJson = False,
) -> None:
    """Check a release's signature and every file of it; exit 1 if something is wrong."""
    from seodang.release.verify import verify

    report_problems(release, verify(release, public_key), as_json)


@release_app.command("diff")
@reported
def release_diff(
    a: Annotated[Path, typer.Argument(help="Directory of a release.")],
    b: Annotated[Path, typer.Argument(help="Directory of another one.")],
    public_key: Annotated[
        list[Path] | None,
        typer.Option(
            help="signing.pub of who released them; may be repeated. Default: beside each."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what changed from release A to release B; exit 1 if one is not as it was signed."""
    from seodang.release.diff import compare, table

    changes = compare(a, b, public_key or [])
    if as_json:
        rows = {
            section: {row.name: {"a": row.a, "b": row.b} for row in found}
            for section, found in changes.items()
        }
        print_json({"a": str(a), "b": str(b), "same": not changes, "changes": rows})
    elif changes:
        from rich.console import Console

        Console(emoji=False).print(table(changes, "A", "B"))
    else:
        print(f"{a} and {b}: no difference")
