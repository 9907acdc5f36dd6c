"""Structured answers: whether they are JSON, keep to their schema, and say the right things."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from seodang.artifact import canonical_json


def parsed(said: str) -> Any | None:
    """The value that a model's answer is, all of it; None if it is no JSON."""
    try:
        return json.loads(said)
    except (ValueError, RecursionError):
        return None


def problem(value: Any, schema: dict[str, Any]) -> str | None:
    """The first thing at which a value breaks a schema, None if it keeps to it.

    References to other documents are never fetched: they make every value break the schema.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        found = best_match(kind(schema, registry=Registry()).iter_errors(value))
    except Unresolvable as error:
        return f"the schema refers to what is not in it: {error}"
    return None if found is None else f"{found.json_path}: {found.message}"


def field_f1(said: Any, right: Any) -> float:
    """F1 over the leaves of two JSON values, each leaf with its path; the order in lists is free.

    1 if both have no leaf.
    """
    ours, theirs = Counter(_leaves(said)), Counter(_leaves(right))
    shared = (ours & theirs).total()
    total = ours.total() + theirs.total()
    return 2 * shared / total if total else 1.0


def same(said: Any, right: Any) -> bool:
    """Whether two JSON values are equal; the order of keys is free, that in lists is not."""
    return canonical_json(said) == canonical_json(right)


def _leaves(value: Any, path: str = "$") -> list[tuple[str, bytes]]:
    if isinstance(value, dict) and value:
        return [leaf for key, part in value.items() for leaf in _leaves(part, f"{path}.{key}")]
    if isinstance(value, list) and value:
        return [leaf for part in value for leaf in _leaves(part, f"{path}[]")]
    return [(path, canonical_json(value))]
