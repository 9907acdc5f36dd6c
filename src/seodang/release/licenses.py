"""Which licences let documents be passed on: an allow-list, by what it asks of whoever does.

What is not listed is refused: every ``LicenseRef-``, licences that forbid commercial use (NC) or
changes (ND; cutting into sequences is one), and whatever cannot be read as an SPDX expression.
The list says what an open release of Seodang takes in. It is not legal advice.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from license_expression import (  # type: ignore[import-untyped]
    ExpressionError,
    get_spdx_licensing,
)

_SPDX = get_spdx_licensing()

LicenseClass = Literal["permissive", "attribution", "share-alike"]
CLASSES: tuple[LicenseClass, ...] = get_args(LicenseClass)  # from the least demanding on

REASONS: dict[LicenseClass, str] = {
    "permissive": "May be passed on for any purpose, changed or not; at most the licence and "
    "copyright notices must stay with it.",
    "attribution": "May be passed on for any purpose if its authors are named, the licence is "
    "linked and changes are indicated.",
    "share-alike": "May be passed on for any purpose, but what is made of it only under the same "
    "licence: kept apart, so that nothing else falls under it.",
}
ALLOWED: dict[LicenseClass, str] = {
    "permissive": "0BSD AFL-3.0 Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0 CC-PDDC "
    "CC0-1.0 CDLA-Permissive-1.0 CDLA-Permissive-2.0 ISC MIT MIT-0 NCSA PDDL-1.0 PostgreSQL "
    "PSF-2.0 Python-2.0 Unicode-3.0 Unicode-DFS-2016 Unlicense UPL-1.0 Zlib",
    "attribution": "CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 ODC-By-1.0 OGL-UK-3.0 etalab-2.0",
    "share-alike": "AGPL-3.0-only AGPL-3.0-or-later CC-BY-SA-2.0 CC-BY-SA-2.5 CC-BY-SA-3.0 "
    "CC-BY-SA-4.0 CDLA-Sharing-1.0 EPL-2.0 EUPL-1.2 GFDL-1.2-no-invariants-only "
    "GFDL-1.2-no-invariants-or-later GFDL-1.3-no-invariants-only GFDL-1.3-no-invariants-or-later "
    "GPL-2.0-only GPL-2.0-or-later GPL-3.0-only GPL-3.0-or-later LGPL-2.1-only LGPL-2.1-or-later "
    "LGPL-3.0-only LGPL-3.0-or-later MPL-2.0 ODbL-1.0",
}


def license_class(expression: str) -> LicenseClass | None:
    """The class of an SPDX expression; None if it must not be passed on.

    All licences joined by AND must be allowed, and the most demanding one counts; of those joined
    by OR the least demanding one may be chosen. A licence WITH an exception is not its licence.
    """
    try:
        parsed = _SPDX.parse(expression)
    except ExpressionError:
        return None
    return None if parsed is None else _class_of(parsed)


def strictest(*classes: LicenseClass) -> LicenseClass:
    """The most demanding of these classes."""
    return max(classes, key=CLASSES.index)


def _class_of(expression: Any) -> LicenseClass | None:
    if isinstance(expression, (_SPDX.AND, _SPDX.OR)):
        parts = [_class_of(part) for part in expression.args]
        allowed = [part for part in parts if part is not None]
        if isinstance(expression, _SPDX.OR):
            return min(allowed, key=CLASSES.index, default=None)
        return strictest(*allowed) if len(allowed) == len(parts) else None
    name = expression.render("{symbol.key}")
    return next((found for found in CLASSES if name in ALLOWED[found].split()), None)
