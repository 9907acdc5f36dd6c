"""Is a release what its publisher signed? Answered offline, with the publisher's public key.

seodang release verify DIR --public-key signing.pub
"""

from __future__ import annotations

from pathlib import Path

from seodang.artifact import MANIFEST, SIGNATURE, Artifact
from seodang.errors import InputError
from seodang.release import signature
from seodang.release.keys import check_public_key


def verify(release: Path, public_key: Path) -> list[str]:
    """Everything that is wrong with a release, as readable lines; none if it is as published.

    Reports altered, added and missing files, links, an edited manifest, and a signature by another
    key. Raises ``InputError`` if there is no such directory or no usable public key.
    """
    if not release.is_dir():
        raise InputError(f"{release}: no such directory")
    check_public_key(public_key)
    problems = []
    if not (release / MANIFEST).is_file() or (release / MANIFEST).is_symlink():
        problems.append(f"{MANIFEST}: missing")
    else:
        try:
            problems += Artifact.open(release).verify(ignore=[SIGNATURE])
        except InputError as error:
            problems.append(f"{MANIFEST}: unreadable: {error}")
    if reason := signature.check(release, public_key):
        problems.append(f"{SIGNATURE}: {reason}")
    return problems
