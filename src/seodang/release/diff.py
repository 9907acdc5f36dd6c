"""What changed between two releases: metrics, files, weights, settings, data, licences, software.

    seodang release diff A B

Both are verified first: a release that is not what its publisher signed is not compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seodang.artifact import MANIFEST, SIGNATURE, Artifact
from seodang.errors import InputError, WorkFailed
from seodang.release.bundle import BOM, EVALUATION, PARITY, SETTINGS
from seodang.release.facts import METRICS
from seodang.release.verify import verify

if TYPE_CHECKING:
    from rich.table import Table

Described = dict[str, dict[str, Any]]
"""What there is to say of a release: by section, plain values by dotted name."""

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocabulary.safetensors",
)
_OF_A_CHECK = ("passed", "value", "threshold")
_OF_A_SOURCE = ("name", "license", "attribution", "package", "version", "sha256")  # see `data`
_NOT_SETTINGS = ("public_key", "schemas")


@dataclass(frozen=True)
class Change:
    """A value that is not the same in both; None where a release does not have it."""

    name: str
    a: Any
    b: Any


def compare(a: Path, b: Path, public_keys: Sequence[Path] = ()) -> dict[str, list[Change]]:
    """The changes from release ``a`` to release ``b`` by section, sections without one left out.

    Each must be signed with one of ``public_keys``, or, if none is given, with the ``signing.pub``
    beside it. Raises ``InputError`` if one is not a release, ``WorkFailed`` if one does not verify.
    """
    described = [describe(open_verified(release, public_keys)) for release in (a, b)]
    return changes(*described)


def changes(a: Described, b: Described) -> dict[str, list[Change]]:
    """What differs between two descriptions; names in the order of ``a``, then what is new.

    A section that one of them does not have is not compared. A record that both have is compared
    key by key.
    """
    found = {}
    for section in [name for name in a if name in b]:
        rows = list(_changes(a[section], b[section]))
        if rows:
            found[section] = rows
    return found


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[Change]:
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name), after.get(name)
        if isinstance(a, dict) and isinstance(b, dict) and not a.keys() & {"bytes"}:
            yield from _changes(a, b, f"{prefix}{name}.")
        elif a != b:
            yield Change(prefix + name, a, b)


def open_verified(release: Path, public_keys: Sequence[Path]) -> Artifact:
    """The release, if it is one and is what was signed with one of the keys."""
    if not (release / MANIFEST).is_file():
        raise InputError(f"{release}: not a release, it has no {MANIFEST}")
    if not (release / SIGNATURE).is_file():
        Artifact.open(release, "release")
    keys = list(public_keys) or [release.resolve().parent / "signing.pub"]
    if not public_keys and not keys[0].is_file():
        raise InputError(f"{keys[0]}: no such key; name the releaser's with --public-key")
    problems: list[str] = []
    for key in keys:
        problems = verify(release, key)
        if not problems:
            return Artifact.open(release, "release")
    raise WorkFailed(
        f"{release}: not compared, it is not what was signed:\n  " + "\n  ".join(problems)
    )


def describe(release: Artifact) -> Described:
    """What a release says of itself in its own files.

    It has no section ``recipe`` if the release does not record the settings of its stages.
    """
    manifest, files = release.manifest, {entry.path: entry for entry in release.manifest.files}

    def read(name: str) -> dict[str, Any]:
        if name not in files:
            return {}
        found: dict[str, Any] = json.loads((release.path / name).read_bytes())
        return found

    metrics, losses = read(f"{EVALUATION}/{METRICS}"), read(PARITY).get("quantizations", {})
    gate = metrics.get("gate", {"checks": []})
    components = read(BOM).get("components", [])
    described = {
        "gate": {
            "passed": gate.get("passed"),
            **{f"{c['name']}.{key}": c[key] for c in gate["checks"] for key in _OF_A_CHECK},
        },
        "metrics": _numbers(metrics.get("models", {}))
        | {
            name.removesuffix(".value"): value
            for name, value in _numbers(metrics.get("tasks", {})).items()
            if name.endswith(".value")
        },
        "loss of GGUF": _numbers({q: _without(found, "bytes") for q, found in losses.items()}),
        "weights": {
            **{n: e.sha256 for n, e in files.items() if Path(n).match("model*.safetensors")},
            "parameters": metrics.get("models", {}).get("student", {}).get("parameters"),
        },
        "config.json": _flat(read("config.json")),
        "tokenizer": {name: files[name].sha256 for name in _TOKENIZER if name in files},
        "settings": _flat(_without(manifest.config, *_NOT_SETTINGS)),
        "recipe": _flat(read(SETTINGS)),
        "data": {s.name: s.model_dump(exclude={"name"}) for s in manifest.sources},
        "licences": {"release": manifest.config.get("license")}
        | dict.fromkeys(sorted({source.license for source in manifest.sources}), "used"),
        "files": {n: {"bytes": e.size, "sha256": e.sha256} for n, e in files.items()},
        "software": {c["name"]: c.get("version") for c in components if c.get("type") == "library"}
        | manifest.software,
        "signing key": {"sha256": manifest.config.get("public_key")},
    }
    if SETTINGS not in files:
        del described["recipe"]
    return described


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects by dotted names; a list of named objects as records."""
    if isinstance(value, list):
        named = [inner for inner in value if isinstance(inner, dict) and "name" in inner]
        if not named or named != value:
            return {prefix: value}
        return {f"{prefix}.{inner['name']}": _without(inner, *_OF_A_SOURCE) for inner in named}
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _numbers(value: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in _flat(value).items() if isinstance(found, int | float)}


def table(found: dict[str, list[Change]], a: str, b: str) -> Table:
    """The changes for a terminal, by section; sizes are in bytes.

    Numbers that are the same to four digits are left out.
    """
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("", overflow="fold")
    for name in (a, b):
        shown.add_column(Text(name), justify="right", overflow="fold", max_width=24)
    shown.add_column("change", justify="right", no_wrap=True)
    for section, rows in found.items():
        shown.add_row(Text(section, style="bold cyan"))
        for row in rows:
            cells = (f"  {row.name}", _shown(row.a), _shown(row.b), _change(row))
            if cells[1] != cells[2] or not isinstance(row.a, float):
                shown.add_row(*map(Text, cells))
    return shown


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, dict):
        if "bytes" in value:
            return f"{value['bytes']:,}"
        return ", ".join(f"{key} {_shown(v)}" for key, v in value.items() if v is not None)
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    return str(value)


def _change(row: Change) -> str:
    """What to say of a change beside its two values."""
    if row.a is None or row.b is None:
        return "added" if row.a is None else "removed"
    if isinstance(row.a, dict) and isinstance(row.b, dict) and "bytes" in row.a:
        size = row.b["bytes"] - row.a["bytes"]
        return f"{size:+,} bytes" if size else "content"
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (row.a, row.b))
    if not numbers:
        return "different"
    sign = "" if row.b < row.a else "+"
    return sign + _shown(row.b - row.a)
