"""Reading a recipe file: YAML with the line of every key, ``--set`` overrides, clear refusals."""

from __future__ import annotations

import difflib
import glob
import re
import reprlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from seodang.errors import InputError
from seodang.recipe import Recipe, TaskConfig, TaskList

MAX_BYTES = 256 * 1024  # of a recipe file
MAX_VALUES = 100_000  # in it, aliases followed
MAX_ERRORS = 20  # shown at once

Schema = TypeVar("Schema", bound=BaseModel)
_Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """With YAML 1.2's floats: PyYAML alone reads 1e-3, which has no dot, as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class RecipeReader:
    """YAML to plain values, remembering the line of every key and what ``--set`` has changed.

    Refuses cycles, repeated keys and aliases that multiply each other.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: dict[_Path, int] = {}
        self.overrides: dict[_Path, str] = {}
        self._scalars = _Loader("")
        self._open: set[int] = set()
        self._values = 0

    def where(self, path: _Path) -> str:
        """``file:line`` of the nearest key at or above ``path``, or the ``--set`` that wrote it."""
        given = [s for key, s in self.overrides.items() if path[: len(key)] == key]
        if not given and path not in self.lines:
            given = [s for key, s in self.overrides.items() if key[: len(path)] == path]
        if given and path:
            return given[-1]
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.file}:{self.lines.get(path, 1)}"

    def read(self) -> Any:
        """The value that the file holds; raises ``InputError`` with file and line."""
        return self.parse(_read_text(self.file))

    def parse(self, text: str) -> Any:
        """The value that a YAML text holds; raises ``InputError`` with file and line."""
        try:
            node = yaml.compose(text, Loader=_Loader)
            return None if node is None else self._read(node, ())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise InputError(f"{self.file}:{line}: not valid YAML: {error.problem}") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            code = f"U+{ord(text[error.position]):04X}"
            raise InputError(f"{self.file}:{line}: holds the control character {code}") from None
        except RecursionError:
            raise InputError(f"{self.file}: nested too deeply") from None

    def _read(self, node: yaml.Node, path: _Path) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self._values += 1
        if id(node) in self._open:
            raise InputError(f"{self.file}:{line}: an anchor contains itself (a cycle)")
        if self._values > MAX_VALUES:
            raise InputError(f"{self.file}:{line}: too many values: aliases multiply each other")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, line)
        self._open.add(id(node))
        value: Any
        if isinstance(node, yaml.SequenceNode):
            value = [self._read(child, (*path, i)) for i, child in enumerate(node.value)]
        else:
            assert isinstance(node, yaml.MappingNode)
            value = {}
            for key_node, child in node.value:
                key_line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise InputError(f"{self.file}:{key_line}: a key must be a plain word")
                key = str(key_node.value)
                if key in value:
                    raise InputError(f"{self.file}:{key_line}: the key `{key}` stands here twice")
                self.lines[(*path, key)] = key_line
                value[key] = self._read(child, (*path, key))
        self._open.discard(id(node))
        return value

    def _scalar(self, node: yaml.ScalarNode, line: int) -> Any:
        try:
            return self._scalars.construct_object(node)
        except (ValueError, LookupError, AttributeError):  # such as 2026-13-01, or !!int x
            kind = node.tag.rpartition(":")[2]
            shown = reprlib.repr(node.value)
            raise InputError(f"{self.file}:{line}: {shown} is not a valid {kind}") from None


def _keys_at(path: _Path, schema: type[BaseModel]) -> list[str]:
    """The keys that ``schema`` has at ``path``."""
    model: Any = schema
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel) and isinstance(part, str):
            field = model.model_fields.get(part)
            model = field.annotation if field else None
        else:  # an index into a list, or a key into a mapping of baselines
            model = get_args(model)[-1] if get_args(model) else None
        while get_args(model) and type(None) in get_args(model):
            model = next(arg for arg in get_args(model) if arg is not type(None))
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []


def _explain(error: ValidationError, reader: RecipeReader, schema: type[BaseModel]) -> str:
    lines = []
    for item in error.errors()[:MAX_ERRORS]:
        path: _Path = tuple(part for part in item["loc"] if part != "[key]")
        dotted = ".".join(str(part) for part in path)
        where = reader.where(path)
        if item["type"] == "extra_forbidden":
            known = _keys_at(path[:-1], schema)
            near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
            lines.append(f"{where}: unknown key `{dotted}`; nearest valid key: `{near[0]}`")
        elif item["type"] == "missing":
            lines.append(f"{where}: the key `{dotted}` is missing")
        elif item["type"] == "model_type":
            keys = ", ".join(_keys_at(path, schema))
            lines.append(f"{where}: `{dotted}` must be a section with the keys {keys}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item["input"]
            shown = "" if isinstance(given, dict | list) else f" (found {reprlib.repr(given)})"
            key = f"`{dotted}`: " if dotted else ""  # none if sections do not fit together
            lines.append(f"{where}: {key}{message}{shown}")
    if error.error_count() > MAX_ERRORS:
        lines.append(f"and {error.error_count() - MAX_ERRORS} more")
    return "\n".join(lines)


def _set(data: Any, text: str, reader: RecipeReader) -> None:
    """Apply a ``--set section.key=value``."""
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
        raise InputError(f"--set {text}: write it as section.key=value")
    try:
        value = RecipeReader(reader.file).parse(raw)
    except InputError:
        raise InputError(f"--set {text}: the value is not valid YAML") from None
    _override(data, dotted, value, f"--set {text}", reader)


def _override(data: Any, dotted: str, value: Any, said: str, reader: RecipeReader) -> None:
    """Put ``value`` where ``dotted`` points; ``said`` is what an error names."""
    path: list[str | int] = []
    target: Any = data
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if part not in [str(index) for index in range(len(target))]:
                raise InputError(f"{said}: `{part}` is not an index below {len(target)}")
            key: str | int = int(part)
        elif isinstance(target, dict):
            key = part
            if not last:
                target.setdefault(part, {})
        else:
            raise InputError(f"{said}: `{'.'.join(parts[:depth])}` has no keys")
        path.append(key)
        if last:
            target[key] = value
        else:
            target = target[key]
    reader.overrides[tuple(path)] = said


def _make_quick(data: Any, reader: RecipeReader) -> None:
    """Apply the recipe's own overrides of its ``quick`` section."""
    changes = data.get("quick")
    if not isinstance(changes, dict) or not changes:
        raise InputError(f"{reader.file}:1: --quick: the recipe has no section `quick`")
    for dotted, value in changes.items():
        _override(data, dotted, value, reader.where(("quick", dotted)), reader)


def load_recipe(
    file: Path | str, settings: list[str] | None = None, *, quick: bool = False
) -> Recipe:
    """Read, override and check a recipe.

    First by its own section ``quick``, if it shall be so, then by ``settings``
    (``section.key=value``). Relative paths in it are resolved against the recipe's folder. Raises
    ``InputError`` with file, line, key and the nearest valid key for whatever is wrong.
    """
    recipe, reader = read_as(Recipe, file, settings, quick=quick)
    _refuse_repeated_names(recipe, reader)
    return _resolve_paths(recipe, reader)


def read_as(
    schema: type[Schema],
    file: Path | str,
    settings: list[str] | None = None,
    *,
    quick: bool = False,
) -> tuple[Schema, RecipeReader]:
    """A YAML file as ``schema``, and the reader that knows the line of every key.

    Raises ``InputError`` as :func:`load_recipe` does.
    """
    file = Path(file)
    reader = RecipeReader(file)
    data = reader.read()
    if not isinstance(data, dict):
        raise InputError(f"{file}:1: a recipe is a mapping of sections; this is not one")
    if quick:
        _make_quick(data, reader)
    for setting in settings or []:
        _set(data, setting, reader)
    try:
        return schema.model_validate(data), reader
    except ValidationError as error:
        raise InputError(_explain(error, reader, schema)) from None


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{file}: no such recipe") from None
    except IsADirectoryError:
        raise InputError(f"{file}: is a directory; name the recipe file") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{file}: more than {MAX_BYTES:,} bytes; this is not a recipe")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}:{line}: not UTF-8: {error.reason}") from None


def _refuse_repeated_names(recipe: Recipe, reader: RecipeReader) -> None:
    first: dict[str, int] = {}
    for i, source in enumerate(recipe.corpus.sources):
        if first.setdefault(source.name, i) != i:
            where = reader.where(("corpus", "sources", i, "name"))
            raise InputError(f"{where}: the name {source.name!r} is another source's; rename one")


def load_task_list(file: Path) -> list[TaskConfig]:
    """The tasks of a YAML file that holds nothing but ``tasks``; none of any other."""
    data = RecipeReader(file).read()
    if not isinstance(data, dict) or set(data) != {"tasks"}:
        return []
    found, reader = read_as(TaskList, file)
    return _resolve_tasks(found.tasks, reader)


def _resolve(reader: RecipeReader, value: str, path: _Path) -> tuple[Path, str]:
    """A path of the file, absolute, and the pattern that finds what it names."""
    folder = reader.file.resolve().parent
    given = Path(value)
    with suppress(RuntimeError):  # a ~user that is not known here
        given = given.expanduser()
    literal = folder / given
    for pattern in (glob.escape(str(literal)), str(Path(glob.escape(str(folder))) / given)):
        if next(glob.iglob(pattern, recursive=True), None) is not None:
            return literal, pattern
    dotted = ".".join(str(part) for part in path)
    raise InputError(f"{reader.where(path)}: `{dotted}`: no file at {value} (looked for {literal})")


def _resolve_tasks(tasks: list[TaskConfig], reader: RecipeReader) -> list[TaskConfig]:
    resolved = []
    for i, task in enumerate(tasks):
        files = ("train", "requests", "held_out", "json_schema", "first_stage")
        given = {key: getattr(task, key) for key in files}
        targets = {
            key: str(_resolve(reader, value, ("tasks", i, key.removeprefix("json_")))[0])
            for key, value in given.items()
            if value is not None
        }
        resolved.append(task.model_copy(update=targets))
    return resolved


def _resolve_paths(recipe: Recipe, reader: RecipeReader) -> Recipe:
    """Make paths absolute and refuse those that lead nowhere."""
    resolve = partial(_resolve, reader)

    sources = [
        source
        if source.path is None
        else source.model_copy(
            update={"path": resolve(source.path, ("corpus", "sources", i, "path"))[1]}
        )
        for i, source in enumerate(recipe.corpus.sources)
    ]
    teacher = recipe.teacher
    for key in ("path", "foundation"):
        if (given := getattr(teacher, key)) is not None:
            target = str(resolve(given, ("teacher", key))[0])
            teacher = teacher.model_copy(update={key: target})
    student = recipe.student
    if student.path is not None:
        target = str(resolve(student.path, ("student", "path"))[0])
        student = student.model_copy(update={"path": target})
    gate = recipe.gate
    if gate.previous is not None:
        target = str(resolve(gate.previous, ("gate", "previous"))[0])
        gate = gate.model_copy(update={"previous": target})
    corpus = recipe.corpus.model_copy(update={"sources": sources})
    tasks = _resolve_tasks(recipe.tasks, reader)
    sections = {"corpus": corpus, "teacher": teacher, "student": student}
    return recipe.model_copy(update={**sections, "tasks": tasks, "gate": gate})
