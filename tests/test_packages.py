"""Packages of the registry: pinned, fetched once by a real pip, and never run.

The registry is a folder of wheels that are made here (synthetic); pip is told to look nowhere else.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from seodang.artifact import sha256_bytes, sha256_file
from seodang.errors import InputError, WorkFailed
from seodang.packages import PackagePin, fetch, find_fetched, open_package

METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"


def wheel(folder: Path, name: str = "help_texts", version: str = "1.0", text: str = "A") -> Path:
    """A wheel that pip accepts, with two data files and code that must not run."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    members = {
        f"{name}/__init__.py": f"open({str(folder / 'ran')!r}, 'w')",
        f"{name}/data/a.txt": text,
        f"{name}/data/b.txt": "B",
        f"{info}/METADATA": METADATA.format(name=name, version=version),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in members)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data/", "")
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows, and an empty cache of ours."""
    monkeypatch.setenv("SEODANG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    (tmp_path / "registry").mkdir()
    return tmp_path / "registry"


def cached(registry: Path) -> list[str]:
    """What the cache of packages holds, half-fetched things included."""
    folder = registry.parent / "cache" / "packages"
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def kept(path: Path, pin: PackagePin, registry: Path) -> Path:
    """Put an archive into the cache as ``fetch`` does, without pip."""
    folder = registry.parent / "cache" / "packages"
    folder /= f"{pin.package.replace('_', '-')}-{pin.version}-{pin.sha256[:16]}"
    folder.mkdir(parents=True)
    return path.rename(folder / path.name)


def test_what_was_fetched_is_read_member_by_member(registry: Path, tmp_path: Path) -> None:
    archive = wheel(registry)
    sha256 = sha256_file(archive)
    pin = fetch("help_texts", "1.0", sha256)
    assert pin == PackagePin(package="help_texts", version="1.0", sha256=sha256)
    assert cached(registry) == [f"help-texts-1.0-{sha256[:16]}/{archive.name}"]
    with open_package(pin) as package:
        assert package.matching("help_texts/data/*") == [
            "help_texts/data/a.txt",
            "help_texts/data/b.txt",
        ]
        assert package.read("help_texts/data/a.txt") == b"A"
        package.extract("help_texts/data/b.txt", tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_bytes() == b"B"
    # With no pin given, what was served becomes the pin; the name's spelling does not matter.
    assert fetch("Help.Texts", "1.0", None).sha256 == sha256
    assert len(cached(registry)) == 1
    archive.unlink()
    assert fetch("help_texts", "1.0", sha256) == pin  # it is here: pip is not asked
    assert not (registry / "ran").exists()


def test_another_hash_keeps_nothing(registry: Path) -> None:
    found = sha256_file(wheel(registry))
    with pytest.raises(WorkFailed, match=f"serves sha256 {found}, pinned is {'0' * 64}"):
        fetch("help-texts", "1.0", "0" * 64)
    assert cached(registry) == []
    assert list((registry.parent / "cache" / "packages").iterdir()) == []


def test_what_pip_cannot_get_is_said(registry: Path) -> None:
    wheel(registry, version="2.0")
    with pytest.raises(WorkFailed, match=r"cannot fetch help-texts==1\.0: ERROR: .*help-texts"):
        fetch("help-texts", "1.0", None)
    assert cached(registry) == []


def test_a_source_distribution_is_not_built(registry: Path) -> None:
    """To read a source distribution's metadata pip would run its setup.py."""
    setup = f"open({str(registry / 'ran')!r}, 'w')".encode()
    with tarfile.open(registry / "help_texts-1.0.tar.gz", "w:gz") as archive:
        for name, data in (("setup.py", setup), ("PKG-INFO", METADATA.encode())):
            member = tarfile.TarInfo(f"help_texts-1.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(WorkFailed, match="cannot fetch"):
        fetch("help_texts", "1.0", None)
    assert not (registry / "ran").exists()
    assert cached(registry) == []


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("--index-url=http://a", "1"),
        ("-r", "/etc/passwd"),
        ("../../a", "1"),
        ("a[extra]", "1"),
        ("a b", "1"),
        ("a", ""),
        ("", "1"),
        ("a", "1,!=1"),
        ("a", "1 --pre"),
    ],
)
def test_what_is_no_package_is_refused_before_pip_runs(
    registry: Path, monkeypatch: pytest.MonkeyPatch, package: str, version: str
) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(InputError, match="write NAME==VERSION"):
        fetch(package, version, None)


def test_a_changed_archive_is_refused_and_can_be_fetched_again(registry: Path) -> None:
    original = wheel(registry)
    pin = fetch("help-texts", "1.0", sha256_file(original))
    archive = registry.parent / "cache" / "packages" / cached(registry)[0]
    wheel(registry.parent / "other", text="changed").replace(archive)
    for call in (
        lambda: open_package(pin),
        lambda: find_fetched("help-texts"),
        lambda: fetch(pin.package, pin.version, pin.sha256),
    ):
        with pytest.raises(InputError, match=r"delete (it|the file) and fetch") as caught:
            call()
        assert str(archive) in str(caught.value)
    archive.unlink()  # as the message says
    assert fetch(pin.package, pin.version, pin.sha256) == pin
    open_package(pin).close()


def test_what_is_not_here_names_the_command_that_fetches_it(registry: Path) -> None:
    pin = PackagePin(package="help-texts", version="1.0", sha256="0" * 64)
    with pytest.raises(InputError, match=r"help-texts==1\.0 is not on .*`seodang fetch`"):
        open_package(pin)
    with pytest.raises(InputError, match=r"not on this machine.*`seodang fetch help-texts==VER`"):
        find_fetched("help-texts")


def test_fetched_packages_are_found_by_their_whole_name(registry: Path) -> None:
    pins = {}
    for name, version in (("help_texts", "1.0"), ("help_texts", "1.1"), ("help_texts_more", "2.0")):
        archive = wheel(registry, name, version)
        pin = PackagePin(
            package=name.replace("_", "-"), version=version, sha256=sha256_file(archive)
        )
        kept(archive, pin, registry)
        pins[name, version] = pin
    (registry.parent / "cache" / "packages" / ".fetch-x" / "archive").mkdir(parents=True)
    (registry.parent / "cache" / "packages" / "notes").mkdir()
    (registry.parent / "cache" / "packages" / "notes" / "of mine").touch()
    assert find_fetched("help_texts_more") == pins["help_texts_more", "2.0"]
    assert find_fetched("Help.Texts==1.1") == pins["help_texts", "1.1"]
    with pytest.raises(InputError, match=r"several versions: name one \(1\.0, 1\.1\)"):
        find_fetched("help-texts")
    for name in ("help", "help-texts==1", "*", "help-texts==*", "/etc", "..", "", "=="):
        with pytest.raises(InputError, match="not on this machine"):
            find_fetched(name)


def test_a_source_archive_that_is_here_is_read_too(registry: Path) -> None:
    path = registry / "help_texts-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("help_texts-1.0/data/a.txt")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"A"))
        link = tarfile.TarInfo("help_texts-1.0/data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    pin = PackagePin(package="help-texts", version="1.0", sha256=sha256_file(path))
    kept(path, pin, registry)
    with open_package(pin) as package:
        assert package.matching("*") == ["help_texts-1.0/data/a.txt"]
        assert package.read("help_texts-1.0/data/a.txt") == b"A"


@pytest.mark.parametrize("name", ["a-1.0-py3-none-any.whl", "a-1.0.tar.gz"])
def test_a_pinned_file_that_is_no_archive_is_refused(registry: Path, name: str) -> None:
    (registry / name).write_bytes(b"text")
    pin = PackagePin(package="a", version="1.0", sha256=sha256_bytes(b"text"))
    kept(registry / name, pin, registry)
    with pytest.raises(InputError, match=r"not a wheel, a tar archive or a \.deb"):
        open_package(pin)
