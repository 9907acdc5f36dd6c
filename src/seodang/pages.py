"""What the HTML pages and the Markdown cards that Seodang writes have in common."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined


def page_environment(folder: Path) -> Environment:
    """Templates of HTML pages in ``folder``: values are escaped, names without a value refused."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def card_environment(folder: Path) -> Environment:
    """Templates of Markdown cards in ``folder``; names without a value are refused.

    The filter ``cell`` makes of any value the text of one cell of a table, ``number`` formats a
    number, or gives a dash if there is none.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    environment.filters["number"] = number
    return environment


def cell(value: object) -> str:
    """Text for one cell of a Markdown table."""
    if value is None or value == "":
        return "–"
    text = " ".join(str(value).split())
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text)


def number(value: float | None, form: str = ",.3f") -> str:
    """A number; a dash if it was not measured."""
    return "–" if value is None else format(value, form)


def yaml_fences(metadata: dict[str, Any]) -> str:
    """A card's YAML front matter, with its fences."""
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"
