"""Keys: who may read them, and that none is ever lost."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from seodang.errors import InputError
from seodang.release.keys import check_public_key, find_or_make_keys, new_keys, public_key_pem


def test_private_key_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private, public = new_keys(tmp_path / "new" / "folder")
    finally:
        os.umask(before)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    key = serialization.load_pem_private_key(private.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    assert public.read_bytes() == public_key_pem(private)
    assert {file.name for file in private.parent.iterdir()} == {"signing.key", "signing.pub"}


@pytest.mark.parametrize("name", ["signing.key", "signing.pub"])
def test_an_existing_key_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=name):
        new_keys(tmp_path)
    assert (tmp_path / name).read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_finds_its_keys_again(tmp_path: Path) -> None:
    private, public = find_or_make_keys(tmp_path)
    key = private.read_bytes()
    public.unlink()  # a run killed between the two files
    assert find_or_make_keys(tmp_path) == (private, public)
    assert private.read_bytes() == key
    assert public.read_bytes() == public_key_pem(private)


def test_a_public_key_of_another_pair_is_refused(tmp_path: Path) -> None:
    _, other = new_keys(tmp_path / "other")
    _, public = new_keys(tmp_path / "own")
    public.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match="not the public half"):
        find_or_make_keys(tmp_path / "own")


def test_other_kinds_of_key_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    key = rsa.generate_private_key(65537, 2048)
    pem, encrypted = serialization.Encoding.PEM, serialization.BestAvailableEncryption(b"secret")
    pkcs8 = serialization.PrivateFormat.PKCS8
    for content in (
        b"nonsense",
        key.private_bytes(pem, pkcs8, serialization.NoEncryption()),
        ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, pkcs8, encrypted),
        ec.generate_private_key(ec.SECP384R1()).private_bytes(
            pem, pkcs8, serialization.NoEncryption()
        ),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match="key"):
            public_key_pem(file)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    for content in (b"nonsense", key.public_key().public_bytes(pem, spki)):
        file.write_bytes(content)
        with pytest.raises(InputError, match="key"):
            check_public_key(file)
    with pytest.raises(InputError, match="No such file"):
        check_public_key(tmp_path / "absent")
    with pytest.raises(InputError, match="seodang keys new"):
        public_key_pem(tmp_path / "absent")
