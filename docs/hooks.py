"""Build hooks of the documentation: what code already says is rendered from it, not copied.

``<!-- fields: StudentConfig -->`` becomes the table of a recipe section's keys, and
``<!-- commands -->`` the reference of the command line.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any, Literal

FIELDS = re.compile(r"<!-- fields: (\w+) -->")
COMMANDS = "<!-- commands -->"
RECIPE_PAGE = "reference/recipe.md"
LIMITS = {
    "exclusiveMinimum": "> {}",
    "minimum": "≥ {}",
    "exclusiveMaximum": "< {}",
    "maximum": "≤ {}",
    "minItems": "at least {}",
}
SPHINX_ROLE = re.compile(r":(?:func|class|meth|mod):(?=<code>)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the markers of a page."""
    if page.file.src_uri == RECIPE_PAGE:
        markdown = recipe_tables(markdown)
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(command_reference()))
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Drop the Sphinx roles of docstrings, which Markdown does not know."""
    return SPHINX_ROLE.sub("", html)


def recipe_tables(markdown: str) -> str:
    """Replace every marker by its table; a section without a marker is an error."""
    from seodang.recipe import Recipe

    schema = Recipe.model_json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    asked_for = set(FIELDS.findall(markdown))
    if asked_for != set(sections):
        raise ValueError(f"{RECIPE_PAGE}: markers and sections differ: {asked_for ^ set(sections)}")
    return FIELDS.sub(lambda match: "\n".join(table(sections[match[1]], sections)), markdown)


def table(section: dict[str, Any], sections: dict[str, Any]) -> Iterator[str]:
    """The keys of one section as a Markdown table."""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key, schema in section["properties"].items():
        default = shown_default(schema, required=key in section.get("required", []))
        meaning = schema.get("description", "") or summary_of(schema, sections)
        yield f"| `{key}` | {shown_type(schema)} | {default} | {cell(meaning)} |"


def summary_of(schema: dict[str, Any], sections: dict[str, Any]) -> str:
    """The first line of the section that a key holds, if it holds one."""
    reference = schema.get("$ref") or schema.get("items", {}).get("$ref")
    text: str = sections[reference.rpartition("/")[2]]["description"] if reference else ""
    return text.splitlines()[0] if text else ""


def shown_type(schema: dict[str, Any] | Literal[True]) -> str:
    """A JSON schema's type as people write it, with its limits."""
    if not schema or schema is True:
        return "any"
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(shown_type(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema["type"]
    if kind == "array":
        shown = f"list of {shown_type(schema['items'])}"
    elif kind == "object":
        names = schema.get("propertyNames", {}).get("enum", ["key"])
        keys = " or ".join(f"`{name}`" for name in names)
        by_pattern = schema.get("patternProperties") or {"": schema["additionalProperties"]}
        shown = f"mapping of {keys} to {shown_type(next(iter(by_pattern.values())))}"
    else:
        shown = kind
    limits = [form.format(schema[key]) for key, form in LIMITS.items() if key in schema]
    return cell(f"{shown}, {', '.join(limits)}" if limits else shown)


def shown_default(schema: dict[str, Any], *, required: bool) -> str:
    """The default in YAML's words; a section whose every key has one needs no more than a dash."""
    if required:
        return "**required**"
    value = schema.get("default")
    if value is None or isinstance(value, dict):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else "empty"


def cell(text: str) -> str:
    """Text that may stand in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def command_reference() -> Iterator[str]:
    """Every command of the command line, in the order of ``seodang --help``."""
    import typer

    from seodang.cli import app

    yield from commands(typer.main.get_command(app), "seodang")


def commands(command: Any, name: str) -> Iterator[str]:
    """One command, and those below it."""
    children = getattr(command, "commands", {})
    if not children:
        yield f"\n## {name} {{ #{name.replace(' ', '-')} }}\n"
        yield f"{html.escape(command.help)}\n"
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = [name, *(argument.name.upper() for argument in arguments)]
        usage += [f"{option.opts[0]} …" for option in options if option.required]
        yield f"```console\n$ {' '.join(usage)}\n```\n"
        yield "| argument or option | default | meaning |"
        yield "|---|---|---|"
        for parameter in [*arguments, *options]:
            is_option = parameter.param_type_name == "option"
            shown = ", ".join(parameter.opts) if is_option else parameter.name.upper()
            default = "–" if parameter.default in (None, False) else f"`{parameter.default}`"
            default = "**required**" if parameter.required else default
            yield f"| `{shown}` | {default} | {cell(html.escape(parameter.help or ''))} |"
    for child_name, child in children.items():
        yield from commands(child, f"{name} {child_name}")
