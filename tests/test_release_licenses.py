"""Which licences let documents be passed on: expressions, and whatever else stands in the field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from license_expression import get_spdx_licensing

from seodang.release.licenses import ALLOWED, CLASSES, REASONS, license_class, strictest

ONE_OF_EACH = {"permissive": "MIT", "attribution": "CC-BY-4.0", "share-alike": "CC-BY-SA-4.0"}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", "permissive"),
        ("cc-by-4.0", "attribution"),
        ("MPL-2.0", "share-alike"),
        ("GPL-3.0-or-later", "share-alike"),
        ("Apache-2.0 OR GPL-3.0-only", "permissive"),
        ("MIT AND CC-BY-4.0", "attribution"),
        ("(MIT OR CC-BY-4.0) AND MPL-2.0", "share-alike"),
        ("MIT OR LicenseRef-Proprietary", "permissive"),
        ("MIT AND LicenseRef-Proprietary", None),
        ("MIT AND CC-BY-NC-4.0", None),
        ("LicenseRef-KOGL-1", None),
        ("LicenseRef-scancode-public-domain", None),  # one that the library knows
        ("CC-BY-NC-4.0", None),
        ("CC-BY-ND-4.0", None),
        ("GPL-2.0-only WITH Classpath-exception-2.0", None),
        *((nothing, None) for nothing in ("", " ", "not stated", "see the package", "MIT AND")),
    ],
)
def test_licences(expression: str, expected: str | None) -> None:
    assert license_class(expression) == expected


def test_the_list_is_of_spdx_identifiers_each_in_one_class() -> None:
    assert set(ALLOWED) == set(REASONS) == set(CLASSES) == set(ONE_OF_EACH)
    listed = [name for names in ALLOWED.values() for name in names.split()]
    assert len(listed) == len(set(listed))
    for name in listed:
        assert get_spdx_licensing().parse(name, validate=True).key == name
        assert not name.startswith("LicenseRef-")
        assert "-NC" not in name
        assert "-ND" not in name


def expressions() -> st.SearchStrategy[tuple[str, int | None]]:
    """Expressions, and how demanding they are: None if they must be refused."""

    def joined(parts: st.SearchStrategy[tuple[str, int | None]]) -> st.SearchStrategy:
        def join(operator: str, left: tuple, right: tuple) -> tuple[str, int | None]:
            ranks = [rank for rank in (left[1], right[1]) if rank is not None]
            text = f"({left[0]}) {operator} ({right[0]})"
            if operator == "OR":
                return text, min(ranks, default=None)
            return text, max(ranks) if len(ranks) == 2 else None

        return st.builds(join, st.sampled_from(["AND", "OR"]), parts, parts)

    leaves = [(ONE_OF_EACH[name], CLASSES.index(name)) for name in CLASSES]
    return st.recursive(st.sampled_from([*leaves, ("LicenseRef-X", None)]), joined, max_leaves=6)


@given(expressions())
def test_the_strictest_of_all_and_the_least_demanding_of_a_choice(
    case: tuple[str, int | None],
) -> None:
    expression, rank = case
    assert license_class(expression) == (None if rank is None else CLASSES[rank])


@given(st.text(max_size=40))
def test_nothing_that_is_no_licence_gets_through(text: str) -> None:
    words = {word.strip("()").lower() for word in text.split()}
    allowed = {name.lower() for names in ALLOWED.values() for name in names.split()}
    assert license_class(text) is None or words & allowed


def test_strictest() -> None:
    assert strictest("permissive", "share-alike", "attribution") == "share-alike"
