"""Packages of a registry as sources of data and weights: fetched when asked, read as files.

A package is pinned by version and SHA-256. It is fetched by ``seodang fetch`` and by nothing
else, kept as the archive it came in, checked against its pin each time it is opened, and read
member by member: nothing of it is installed, and none of its code is run. The one exception is
llama.cpp's converter, a tool that comes the same way (`seodang.release.gguf`).
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seodang.artifact import sha256_file
from seodang.errors import InputError, WorkFailed


def cache_directory() -> Path:
    """Where fetched packages and converted teachers are kept.

    ``$SEODANG_CACHE``, else ``seodang`` below ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if chosen := os.environ.get("SEODANG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seodang"


PackageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
PackageVersion = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+!_]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PackagePin(BaseModel):
    """A package of the Python registry, exactly: name, version and SHA-256 of its archive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: PackageName
    version: PackageVersion
    sha256: Sha256

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


class Package:
    """An open archive (wheel or source distribution): member names and their bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        if path.suffix in {".whl", ".zip"}:
            self._zip = zipfile.ZipFile(path)
            self.names = sorted(n for n in self._zip.namelist() if not n.endswith("/"))
        else:
            self._tar = tarfile.open(path)  # noqa: SIM115 (closed in __exit__)
            self.names = sorted(m.name for m in self._tar.getmembers() if m.isfile())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the archive."""
        for archive in (self._zip, self._tar):
            if archive is not None:
                archive.close()

    def matching(self, pattern: str) -> list[str]:
        """The members whose path matches a shell pattern, sorted."""
        return fnmatch.filter(self.names, pattern)

    def open(self, name: str) -> IO[bytes]:
        """Open one member for reading."""
        if self._zip is not None:
            return self._zip.open(name)
        assert self._tar is not None
        file = self._tar.extractfile(name)
        assert file is not None
        return file

    def read(self, name: str) -> bytes:
        """The bytes of one member."""
        with self.open(name) as file:
            return file.read()

    def extract(self, name: str, target: Path) -> None:
        """Copy one member to the file ``target``."""
        with self.open(name) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _folder(pin: PackagePin) -> Path:
    """``NAME-VERSION-HASH``, of which only the name may hold a dash."""
    name = f"{_normalised(pin.package)}-{pin.version}-{pin.sha256[:16]}"
    return cache_directory() / "packages" / name


def _archives(pin: PackagePin) -> list[Path]:
    return sorted(_folder(pin).glob("*"))


def open_package(pin: PackagePin) -> Package:
    """Open a fetched package after checking its hash.

    Raises ``InputError`` if it was not fetched or if the archive is not the pinned one.
    """
    archives = _archives(pin)
    if not archives:
        raise InputError(
            f"package {pin} is not on this machine; fetch it once with `seodang fetch` "
            "(it takes a recipe, or NAME==VERSION)"
        )
    found = sha256_file(archives[0])
    if found != pin.sha256:
        raise InputError(
            f"{archives[0]}: sha256 is {found}, pinned is {pin.sha256}; "
            "delete the file and fetch the package again"
        )
    try:
        return Package(archives[0])
    except (zipfile.BadZipFile, tarfile.TarError):
        raise InputError(f"{archives[0]}: neither a wheel nor a source archive") from None


def find_fetched(name: str) -> PackagePin:
    """The pin of the one fetched package of this name (``NAME`` or ``NAME==VERSION``).

    Raises ``InputError`` if none or several were fetched.
    """
    name, _, version = name.partition("==")
    found = []
    for archive in (cache_directory() / "packages").glob("*/*"):
        parts = re.fullmatch("(.+)-([^-]+)-([0-9a-f]{16})", archive.parent.name)
        if parts and parts[1] == _normalised(name) and version in ("", parts[2]):
            found.append((parts, archive))
    if not found:
        raise InputError(f"package {name} is not on this machine; run `seodang fetch {name}==VER`")
    if len(found) > 1:
        versions = ", ".join(sorted(parts[2] for parts, _ in found))
        raise InputError(f"package {name} was fetched in several versions: name one ({versions})")
    ((parts, archive),) = found
    sha256 = sha256_file(archive)
    if not sha256.startswith(parts[3]):
        raise InputError(
            f"{archive}: has changed since it was fetched; delete it and fetch the package again"
        )
    return PackagePin(package=parts[1], version=parts[2], sha256=sha256)


def fetch(package: str, version: str, sha256: str | None) -> PackagePin:
    """Download a package's archive with pip, without its dependencies, and keep it.

    With ``sha256`` None the hash of what the registry served is recorded as the pin. Raises
    ``InputError`` if this cannot be a package or if the archive that is here is not the pinned
    one, ``WorkFailed`` if pip cannot get it or if its hash is another one.
    """
    try:
        pin = PackagePin(package=package, version=version, sha256=sha256 or "0" * 64)
    except ValidationError:
        raise InputError(
            f"{package}=={version}: not a package of the registry; write NAME==VERSION"
        ) from None
    if _archives(pin):
        open_package(pin).close()
        return pin
    (cache_directory() / "packages").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_directory() / "packages", prefix=".fetch-") as name:
        folder = Path(name) / "archive"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--ignore-requires-python", "--disable-pip-version-check"]
        command += ["--only-binary", ":all:", "--dest", str(folder), f"{package}=={version}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        archives = sorted(folder.glob("*")) if folder.is_dir() else []
        if done.returncode or len(archives) != 1:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
            reason = lines[-1] if lines else done.stderr.strip() or "pip saved no archive"
            raise WorkFailed(f"cannot fetch {package}=={version}: {reason}")
        found = sha256_file(archives[0])
        if sha256 is not None and found != sha256:
            raise WorkFailed(
                f"{package}=={version}: the registry serves sha256 {found}, pinned is {sha256}; "
                "nothing was kept"
            )
        pin = PackagePin(package=package, version=version, sha256=found)
        if not _archives(pin):
            folder.rename(_folder(pin))
    return pin
