"""The signature of a release: OpenSSF model signing with an elliptic-curve key, offline.

It covers every file, the manifest included, and is written for a manifest that does not exist yet.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from seodang.artifact import MANIFEST, SIGNATURE, Manifest, sha256_file

if TYPE_CHECKING:
    from model_signing.hashing import Config
    from sigstore_models.intoto import Envelope


def sign(directory: Path, manifest: bytes, key: Path, *, name: str, work: Path) -> None:
    """Sign the ``manifest`` to come and the files it lists; writes ``model.sig`` there.

    They are signed in a copy below ``work`` (links, where the file system has them), which is a
    directory of the same file system. ``name`` is what the signature calls the model.
    """
    from model_signing import signing

    staged = work / name
    shutil.rmtree(staged, ignore_errors=True)
    for file in [entry.path for entry in Manifest.model_validate_json(manifest).files]:
        target = staged / file
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(directory / file)
        except OSError:  # not every file system has hard links
            shutil.copyfile(directory / file, target)
    (staged / MANIFEST).write_bytes(manifest)
    signature = work / SIGNATURE
    signer = signing.Config()  # type: ignore[no-untyped-call]
    signer.use_elliptic_key_signer(private_key=key)
    signer.set_hashing_config(_everything_but_the_signature())
    signer.sign(staged, signature)
    signature.replace(directory / SIGNATURE)
    shutil.rmtree(staged)


def check(directory: Path, public_key: Path) -> str | None:
    """Why ``model.sig`` is not a signature of ``directory`` by this key; None if it is."""
    from model_signing import verifying
    from sigstore_models.bundle.v1 import Bundle

    # model_signing refuses a directory that is reached through a link.
    directory = directory.resolve()
    file = directory / SIGNATURE
    if file.is_symlink() or not file.is_file():
        return "missing"
    try:
        # Base64 and JSON can be written in several ways: only one of them was.
        text = file.read_bytes().decode()
        bundle = Bundle.from_json(text)
        if bundle.to_json() != text:
            return "altered: not as it was written"
        verifier = verifying.Config()  # type: ignore[no-untyped-call]
        verifier.use_elliptic_key_verifier(public_key=public_key)
        verifier.set_hashing_config(_everything_but_the_signature())
        verifier.verify(directory, file)
    except Exception as error:
        # Whatever the parser of a damaged file raises, the signature is not valid.
        reason = " ".join(str(error).split())
        if not reason.startswith("Signature mismatch"):
            return reason or "not made with this key"
        assert bundle.dsse_envelope is not None
        return f"made for other files than these: {_differences(directory, bundle.dsse_envelope)}"
    return None


def _differences(directory: Path, envelope: Envelope) -> str:
    """The files that are not the signed ones, of an envelope whose signature is valid."""
    resources = json.loads(envelope.payload)["predicate"]["resources"]
    signed = {resource["name"]: resource["digest"] for resource in resources}
    present = {
        file.relative_to(directory).as_posix(): sha256_file(file)
        for file in directory.rglob("*")
        if file.is_file() and file != directory / SIGNATURE
    }
    names = signed.keys() | present.keys()
    return ", ".join(sorted(name for name in names if signed.get(name) != present.get(name)))


def _everything_but_the_signature() -> Config:
    from model_signing import hashing

    config = hashing.Config()  # type: ignore[no-untyped-call]
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
