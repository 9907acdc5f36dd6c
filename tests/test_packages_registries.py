"""Packages of npm's and Debian's registries: fetched by their real clients, read as files.

Both registries are made here (synthetic): npm is told of a server on this machine that has one
package, apt-get of a folder that is a repository.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from seodang.artifact import sha256_bytes, sha256_file
from seodang.errors import InputError, WorkFailed
from seodang.packages import PackagePin, Registry, fetch, open_package


def tarball(members: dict[str, str], form: str = "gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{form}") as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            archive.addfile(info, io.BytesIO(content.encode()))
    return buffer.getvalue()


def debian_archive(data: bytes, form: str = "xz") -> bytes:
    """A .deb with its two tar archives in an ``ar`` archive (deb(5), ar(5))."""
    control = "Package: old-tales\nVersion: 1:2.0~rc1-3\nArchitecture: all\n"
    control += "Maintainer: Nobody <nobody@example.org>\nDescription: made for a test\n"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": tarball({"./control": control}),
        f"data.tar.{form}": data,
    }
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def kept(pin: PackagePin) -> list[str]:
    with open_package(pin) as package:
        return package.names


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEODANG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


SCRIPT = "node -e \"require('fs').writeFileSync('ran', '')\""


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """A registry with @old/tales 1.0.0, whose scripts must not run; gives the tarball."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    scripts = {"preinstall": SCRIPT, "prepare": SCRIPT, "prepack": SCRIPT}
    about = {"name": "@old/tales", "version": "1.0.0", "scripts": scripts}
    archive = tarball(
        {
            "package/package.json": json.dumps(about),
            "package/ko/a.md": "옛날 이야기",
            "package/b": "B",
        }
    )

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".tgz"):
                body = archive
            elif self.path.lower() == "/@old%2ftales":
                digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
                where = f"http://{self.headers['Host']}/tales-1.0.0.tgz"
                dist = {"tarball": where, "integrity": f"sha512-{digest}"}
                version = {**about, "dist": dist}
                latest = {"latest": "1.0.0"}
                body = json.dumps(
                    {"name": "@old/tales", "dist-tags": latest, "versions": {"1.0.0": version}}
                ).encode()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    monkeypatch.setenv("npm_config_registry", address)
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    yield archive
    server.shutdown()
    server.server_close()


def test_an_npm_package_is_fetched_and_none_of_it_is_run(
    npm: bytes, cache: Path, tmp_path: Path
) -> None:
    pin = fetch("@old/tales", "1.0.0", sha256_bytes(npm), "npm")
    assert str(pin) == "@old/tales@1.0.0"
    assert kept(pin) == ["package/b", "package/ko/a.md", "package/package.json"]
    with open_package(pin) as package:
        assert package.sizes["package/b"] == 1
        assert package.read("package/ko/a.md").decode() == "옛날 이야기"
    assert not list(tmp_path.rglob("ran"))
    (archive,) = (cache / "npm").glob("*/*")
    assert archive.parent.name == f"@old+tales-1.0.0-{pin.sha256[:16]}"
    with pytest.raises(WorkFailed, match=f"serves sha256 {pin.sha256}, pinned is 00.*nothing was"):
        fetch("@old/tales", "1.0.0", "0" * 64, "npm")
    with pytest.raises(WorkFailed, match=r"cannot fetch @old/tales@2\.0\.0: .*npm error"):
        fetch("@old/tales", "2.0.0", None, "npm")


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one package, and apt-get that knows of no other; gives the archive."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-scanpackages") is None:
        pytest.skip("needs apt-get and dpkg-scanpackages")
    folder = tmp_path / "repository"
    folder.mkdir()
    archive = folder / "old-tales_2.0~rc1-3_all.deb"
    data = tarball({"./usr/share/doc/old-tales/ko.txt": "옛날 이야기", "./usr/share/x": "X"}, "xz")
    archive.write_bytes(debian_archive(data))
    listing = subprocess.run(
        ["dpkg-scanpackages", "."], cwd=folder, check=True, capture_output=True
    ).stdout
    (folder / "Packages.gz").write_bytes(gzip.compress(listing))
    (tmp_path / "sources.list").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    return archive


def test_a_debian_package_is_fetched_with_lists_of_our_own(debian: Path, cache: Path) -> None:
    pin = fetch("old-tales", "1:2.0~rc1-3", None, "debian")
    assert (str(pin), pin.sha256) == ("old-tales=1:2.0~rc1-3", sha256_file(debian))
    assert kept(pin) == ["usr/share/doc/old-tales/ko.txt", "usr/share/x"]
    with open_package(pin) as package:
        assert package.matching("usr/share/doc/*") == ["usr/share/doc/old-tales/ko.txt"]
        assert package.read("usr/share/doc/old-tales/ko.txt").decode() == "옛날 이야기"
    debian.unlink()
    assert fetch("old-tales", "1:2.0~rc1-3", pin.sha256, "debian") == pin  # apt-get is not asked
    with pytest.raises(WorkFailed, match=r"cannot fetch old-tales=3\.0: E: "):
        fetch("old-tales", "3.0", None, "debian")


def put(name: str, data: bytes, registry: Registry, version: str, cache: Path) -> PackagePin:
    """Keep an archive as ``fetch`` does."""
    pin = PackagePin(registry=registry, package="a", version=version, sha256=sha256_bytes(data))
    folder = cache / registry / f"a-{version}-{pin.sha256[:16]}"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    return pin


@pytest.mark.parametrize("form", ["xz", "gz", "bz2"])
def test_a_debian_archive_of_every_compression_is_read(form: str, cache: Path) -> None:
    data = tarball({"./a": "가", "./b/c": "나"}, form)
    pin = put("a.deb", debian_archive(data, form), "debian", "1", cache)
    with open_package(pin) as package:
        assert [package.read(name).decode() for name in package.names] == ["가", "나"]


@pytest.mark.parametrize(
    "data", [b"text", b"!<arch>\n", debian_archive(b"no archive"), debian_archive(b"", "lz4")]
)
def test_what_is_no_debian_archive_is_refused(data: bytes, cache: Path) -> None:
    pin = put("a.deb", data, "debian", "1", cache)
    with pytest.raises(InputError, match=r"not a wheel, a tar archive or a \.deb"):
        open_package(pin)


def test_a_registry_without_its_client_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        InputError, match=r"this machine has no npm, the client of the npm registry"
    ):
        fetch("tales", "1.0.0", "0" * 64, "npm")


@pytest.mark.parametrize(
    ("registry", "name", "version"),
    [
        ("npm", "--ignore-scripts=false", "1.0.0"),
        ("npm", "../escape", "1.0.0"),
        ("npm", "git+ssh://host/x", "1.0.0"),
        ("npm", "tales", "latest"),
        ("npm", "tales", "file:/etc/passwd"),
        ("debian", "-o", "1.0"),
        ("debian", "tales", "1.0 /etc"),
        ("pypi", "@old/tales", "1.0"),
    ],
)
def test_what_cannot_be_a_package_never_reaches_the_client(
    registry: Registry, name: str, version: str
) -> None:
    with pytest.raises(InputError, match="not a package of the"):
        fetch(name, version, "0" * 64, registry)
    with pytest.raises(ValidationError):
        PackagePin(registry=registry, package=name, version=version, sha256="0" * 64)
