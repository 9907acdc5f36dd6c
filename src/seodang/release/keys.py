"""The key pair that signs releases: ECDSA on the curve P-256, as PEM files.

seodang keys new DIR
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from seodang.artifact import sha256_bytes, write_atomically
from seodang.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PRIVATE_KEY = "signing.key"
PUBLIC_KEY = "signing.pub"


def new_keys(directory: Path) -> tuple[Path, Path]:
    """Make ``signing.key`` (mode 0600, unencrypted PKCS #8) and ``signing.pub`` in ``directory``.

    Raises ``InputError`` if either exists: a key is never overwritten.
    """
    private, public = directory / PRIVATE_KEY, directory / PUBLIC_KEY
    for file in (private, public):
        if file.exists() or file.is_symlink():
            raise InputError(
                f"{file}: exists already, and a key is never overwritten; move it away"
            )
    _write_private_key(private)
    write_atomically(public, public_key_pem(private))
    return private, public


def find_or_make_keys(directory: Path) -> tuple[Path, Path]:
    """The key pair of ``directory``, made on first use; a lost ``signing.pub`` is made again.

    Raises ``InputError`` if ``signing.pub`` is there without its ``signing.key``, or is not its
    public half.
    """
    private, public = directory / PRIVATE_KEY, directory / PUBLIC_KEY
    if not private.exists():
        return new_keys(directory)
    expected = public_key_pem(private)
    if not public.exists():
        write_atomically(public, expected)
    elif public.read_bytes() != expected:
        raise InputError(f"{public}: is not the public half of {private}; move it away")
    return private, public


def public_key_pem(private: Path) -> bytes:
    """The public half of a private key file, as PEM.

    Raises ``InputError`` if the file is not an unencrypted P-256 private key.
    """
    from cryptography.hazmat.primitives import serialization

    return (
        _load_private_key(private)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def fingerprint(public_pem: bytes) -> str:
    """How a public key is named: SHA-256 of its PEM, in hexadecimal."""
    return sha256_bytes(public_pem)


def check_public_key(public: Path) -> None:
    """Raise ``InputError`` unless the file is a P-256 public key in PEM."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(public.read_bytes())
    except OSError as error:
        raise InputError(f"{public}: {error.strerror}; name the publisher's signing.pub") from None
    except ValueError:
        raise InputError(f"{public}: not a public key in PEM; name a signing.pub") from None
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
        raise InputError(f"{public}: not an ECDSA P-256 key, which is what signs a release")


def _load_private_key(private: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(private.read_bytes(), password=None)
    except OSError as error:
        raise InputError(
            f"{private}: {error.strerror}; make a key pair with `seodang keys new`"
        ) from None
    except (ValueError, TypeError):  # TypeError: the key is encrypted
        raise InputError(f"{private}: not an unencrypted private key in PEM") from None
    if not (isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)):
        raise InputError(f"{private}: not an ECDSA P-256 key; make one with `seodang keys new`")
    return key


def _write_private_key(target: Path) -> None:
    """Write a new key so that ``target`` is either absent or whole, and no one else may read it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, target)  # unlike a rename, refuses to replace another key
    except FileExistsError:
        raise InputError(f"{target}: exists already, and a key is never overwritten") from None
    finally:
        temporary.unlink(missing_ok=True)
