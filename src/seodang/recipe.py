"""The typed recipe: one YAML file that says everything a run does.

Whatever is wrong in it is reported before any work starts, with file, line and key.
"""

from __future__ import annotations

import difflib
import glob
import re
import reprlib
import string
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from seodang.errors import InputError
from seodang.packages import PackageName, PackagePin, PackageVersion, Sha256

MAX_BYTES = 256 * 1024  # of a recipe file
MAX_VALUES = 100_000  # in it, aliases followed
MAX_ERRORS = 20  # shown at once

EstimatorName = Literal["top-k", "residual", "sampled", "head-tail"]
Layout = Literal["fast", "small"]
Quantization = Literal["f32", "f16", "bf16", "q8_0"]
BaselineName = Literal["untrained", "cross_entropy"]


def _check_template(template: str) -> str:
    """Refuse what is not text with ``{field}`` in it (``{{`` and ``}}`` stand for braces)."""
    for _, field, form, conversion in string.Formatter().parse(template):
        if field == "":
            raise ValueError("{} names no field: write {field}, or {{}} for the braces themselves")
        if conversion not in (None, "a", "r", "s"):
            raise ValueError(f"unknown conversion !{conversion} in a template")
        if form:
            _check_template(form)
    return template


Template = Annotated[str, AfterValidator(_check_template)]


class Section(BaseModel):
    """A part of the recipe: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Message(Section):
    """One turn of a chat; ``content`` may name fields of the record in braces."""

    role: Literal["system", "user", "assistant"]
    content: Template


class SourceConfig(Section):
    """Where documents come from: files of this machine (``path``) or of a pinned ``package``."""

    name: str
    license: str
    attribution: str | None = None
    path: str | None = Field(None, description="file or pattern, relative to the recipe")
    package: PackageName | None = None
    version: PackageVersion | None = None
    sha256: Sha256 | None = None
    files: list[str] = Field([], description="patterns of members of the package")
    records: str | None = Field(None, description="dotted path to the list of records")
    text: Template | None = Field(None, description="template of a text, {field} in braces")
    messages: list[Message] | None = Field(None, description="template of a chat document")
    turns: bool = Field(False, description="a record is a list of turns, user first")
    max_tokens: int | None = Field(None, gt=0, description="take about this many tokens at most")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.package is None):
            raise ValueError("name exactly one of `path` and `package`")
        if self.package is not None and not (self.version and self.sha256 and self.files):
            raise ValueError("a package needs `version`, `sha256` and `files`")
        if self.path is not None and (self.version or self.sha256 or self.files):
            raise ValueError("`version`, `sha256` and `files` belong to a `package`")
        if sum((self.text is not None, self.messages is not None, self.turns)) > 1:
            raise ValueError("name at most one of `text`, `messages` and `turns`")
        return self

    def pin(self) -> PackagePin | None:
        """The package, pinned; None for local files."""
        if self.package is None:
            return None
        assert self.version is not None
        assert self.sha256 is not None
        return PackagePin(package=self.package, version=self.version, sha256=self.sha256)


class CorpusConfig(Section):
    """Documents, their split by document, and the sequences made of them."""

    sources: list[SourceConfig] = Field(min_length=1)
    held_out: float = Field(0.1, gt=0, lt=1, description="share of documents held out")
    near_duplicate: float = Field(
        0.7, gt=0, le=1, description="Jaccard similarity from which documents share a side"
    )
    max_length: int = Field(512, ge=2, description="tokens of a sequence, at most")
    max_document_bytes: int = Field(1_000_000, gt=0, description="longer documents are refused")
    train_tokens: int | None = Field(None, gt=0)
    held_out_tokens: int | None = Field(None, gt=0)


class TeacherConfig(Section):
    """A local Hugging Face directory (``path``), or a pinned ``package`` that holds a model."""

    path: str | None = None
    package: PackageName | None = None
    version: PackageVersion | None = None
    sha256: Sha256 | None = None
    license: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.package is None):
            raise ValueError("name exactly one of `path` and `package`")
        if self.package is not None and not (self.version and self.sha256):
            raise ValueError("a package needs `version` and `sha256`")
        return self

    def pin(self) -> PackagePin | None:
        """The package, pinned; None for a local directory."""
        if self.package is None:
            return None
        assert self.version is not None
        assert self.sha256 is not None
        return PackagePin(package=self.package, version=self.version, sha256=self.sha256)


class SoftLabelsConfig(Section):
    """Which estimator of the teacher's distribution is stored, and how."""

    estimator: EstimatorName = "head-tail"
    k: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="entries of top-k and residual (default 16)"
    )
    head: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="exact entries of head-tail (default 8)"
    )
    draws: Annotated[int, Field(ge=1, le=255)] | None = Field(
        None, description="draws of sampled (default 50) and of head-tail's tail (default 8)"
    )
    layout: Layout = "fast"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _only_what_is_used(self) -> Self:
        used = {"top-k": {"k"}, "residual": {"k"}, "sampled": {"draws"}}.get(
            self.estimator, {"head", "draws"}
        )
        for key in ("k", "head", "draws"):
            if getattr(self, key) is not None and key not in used:
                raise ValueError(f"`{key}` has no meaning for the estimator {self.estimator}")
        return self

    def parameters(self) -> dict[str, int]:
        """The estimator's own parameters, defaults filled in."""
        if self.estimator in ("top-k", "residual"):
            return {"k": 16 if self.k is None else self.k}
        if self.estimator == "sampled":
            return {"draws": 50 if self.draws is None else self.draws}
        return {
            "head": 8 if self.head is None else self.head,
            "draws": 8 if self.draws is None else self.draws,
        }


def soft_labels_from_options(**options: Any) -> SoftLabelsConfig:
    """The section as command-line options give it; raises ``InputError`` naming the option."""
    try:
        return SoftLabelsConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{first['loc'][0]}: " if first["loc"] else ""
        raise InputError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None


class StudentConfig(Section):
    """The student's shape and its training."""

    layers: int = Field(gt=0, description="teacher layers that are kept")
    epochs: int = Field(1, gt=0)
    batch_tokens: int = Field(1024, gt=0, description="tokens of one optimizer step, about")
    learning_rate: float = Field(1e-3, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    cross_entropy_weight: float = Field(0.1, ge=0, le=1)
    seed: int = Field(0, ge=0)
    checkpoint_steps: int = Field(25, gt=0)


class EvaluationConfig(Section):
    """What is measured on the held-out documents besides the distributions."""

    prompts: list[str] = []
    max_new_tokens: int = Field(48, gt=0)
    calibration_bins: int = Field(15, gt=1)


class Margins(Section):
    """By how much the student must be better than a baseline."""

    kl: float = Field(0.0, ge=0, description="nats per token below the baseline's KL")
    top1_agreement: float = Field(0.0, ge=0, description="above the baseline's agreement")


class GateConfig(Section):
    """What must hold before anything is released."""

    max_kl: float | None = Field(None, gt=0, description="nats per token")
    min_top1_agreement: float | None = Field(None, ge=0, le=1)
    beats: dict[BaselineName, Margins] = {}


class ReleaseConfig(Section):
    """The released model's name, licence and file formats."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    license: str
    description: str = ""
    languages: list[str] = Field([], description="ISO 639 codes, for the model card")
    quantizations: list[Quantization] = ["f16", "q8_0"]
    parity_positions: int = Field(
        48, gt=0, description="held-out positions at which GGUF and PyTorch are compared"
    )


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    corpus: CorpusConfig
    teacher: TeacherConfig
    soft_labels: SoftLabelsConfig = SoftLabelsConfig()
    student: StudentConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    release: ReleaseConfig

    def packages(self) -> list[PackagePin]:
        """Every package that the recipe names, once."""
        pins = [source.pin() for source in self.corpus.sources] + [self.teacher.pin()]
        return list(dict.fromkeys(pin for pin in pins if pin is not None))


_Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """With YAML 1.2's floats: PyYAML alone reads 1e-3, which has no dot, as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _Reader:
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


def _keys_at(path: _Path) -> list[str]:
    """The keys that the recipe's schema has at ``path``."""
    model: Any = Recipe
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


def _explain(error: ValidationError, reader: _Reader) -> str:
    lines = []
    for item in error.errors()[:MAX_ERRORS]:
        path: _Path = tuple(part for part in item["loc"] if part != "[key]")
        dotted = ".".join(str(part) for part in path)
        where = reader.where(path)
        if item["type"] == "extra_forbidden":
            known = _keys_at(path[:-1])
            near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
            lines.append(f"{where}: unknown key `{dotted}`; nearest valid key: `{near[0]}`")
        elif item["type"] == "missing":
            lines.append(f"{where}: the key `{dotted}` is missing")
        elif item["type"] == "model_type":
            keys = ", ".join(_keys_at(path))
            lines.append(f"{where}: `{dotted}` must be a section with the keys {keys}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item["input"]
            shown = "" if isinstance(given, dict | list) else f" (found {reprlib.repr(given)})"
            lines.append(f"{where}: `{dotted}`: {message}{shown}")
    if error.error_count() > MAX_ERRORS:
        lines.append(f"and {error.error_count() - MAX_ERRORS} more")
    return "\n".join(lines)


def _override(data: Any, text: str, reader: _Reader) -> None:
    dotted, equals, raw = text.partition("=")
    if not equals or not dotted:
        raise InputError(f"--set {text}: write it as section.key=value")
    path: list[str | int] = []
    target: Any = data
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if part not in [str(index) for index in range(len(target))]:
                raise InputError(f"--set {text}: `{part}` is not an index below {len(target)}")
            key: str | int = int(part)
        elif isinstance(target, dict):
            key = part
            if not last:
                target.setdefault(part, {})
        else:
            raise InputError(f"--set {text}: `{'.'.join(parts[:depth])}` has no keys")
        path.append(key)
        if last:
            try:
                target[key] = _Reader(reader.file).parse(raw)
            except InputError:
                raise InputError(f"--set {text}: the value is not valid YAML") from None
        else:
            target = target[key]
    reader.overrides[tuple(path)] = f"--set {text}"


def load_recipe(file: Path | str, settings: list[str] | None = None) -> Recipe:
    """Read, override (``settings``: ``section.key=value``) and check a recipe.

    Relative paths in it are resolved against the recipe's folder. Raises ``InputError`` with
    file, line, key and the nearest valid key for whatever is wrong.
    """
    file = Path(file)
    reader = _Reader(file)
    data = reader.parse(_read_text(file))
    if not isinstance(data, dict):
        raise InputError(f"{file}:1: a recipe is a mapping of sections; this is not one")
    for setting in settings or []:
        _override(data, setting, reader)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(_explain(error, reader)) from None
    _refuse_repeated_names(recipe, reader)
    return _resolve_paths(recipe, reader)


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


def _refuse_repeated_names(recipe: Recipe, reader: _Reader) -> None:
    first: dict[str, int] = {}
    for i, source in enumerate(recipe.corpus.sources):
        if first.setdefault(source.name, i) != i:
            where = reader.where(("corpus", "sources", i, "name"))
            raise InputError(f"{where}: the name {source.name!r} is another source's; rename one")


def _resolve_paths(recipe: Recipe, reader: _Reader) -> Recipe:
    """Make paths absolute and refuse those that lead nowhere."""
    folder = reader.file.resolve().parent

    def resolve(value: str, path: _Path) -> tuple[Path, str]:
        """The path itself, and the pattern that finds what it names."""
        given = Path(value)
        with suppress(RuntimeError):  # a ~user that is not known here
            given = given.expanduser()
        literal = folder / given
        for pattern in (glob.escape(str(literal)), str(Path(glob.escape(str(folder))) / given)):
            if next(glob.iglob(pattern, recursive=True), None) is not None:
                return literal, pattern
        dotted = ".".join(str(part) for part in path)
        raise InputError(
            f"{reader.where(path)}: `{dotted}`: no file at {value} (looked for {literal})"
        )

    sources = [
        source
        if source.path is None
        else source.model_copy(
            update={"path": resolve(source.path, ("corpus", "sources", i, "path"))[1]}
        )
        for i, source in enumerate(recipe.corpus.sources)
    ]
    teacher = recipe.teacher
    if teacher.path is not None:
        target = str(resolve(teacher.path, ("teacher", "path"))[0])
        teacher = teacher.model_copy(update={"path": target})
    corpus = recipe.corpus.model_copy(update={"sources": sources})
    return recipe.model_copy(update={"corpus": corpus, "teacher": teacher})
