"""Signatures of bundles: Ed25519 (RFC 8032) over the manifest, which holds the sha256 of every other file.

`manifest.sig` holds the 64 bytes of the signature of `PREFIX` followed by the exact bytes of
`manifest.json`. The prefix keeps a signature from ever meaning something else that the key signs.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from kp_runtime.errors import InputError, MissingExtraError, SignatureError
from kp_runtime.files import as_path, read_plain

__all__ = [
    "PREFIX",
    "SIGNATURE_NAME",
    "PublicKey",
    "check_signature",
    "cryptography_modules",
    "is_signed",
    "pem_bytes",
    "signature_state",
]

SIGNATURE_NAME = "manifest.sig"
PREFIX = b"kp-edge bundle manifest, signature 1\n"
PublicKey = str | os.PathLike[str] | bytes
"""The path of a PEM file, the bytes of one, or the 32 bytes of the key itself."""

_BYTES = 64
_LARGEST_PEM = 1 << 16


def is_signed(bundle: str | os.PathLike[str]) -> bool:
    """Whether a signature lies in the bundle; whose it is and whether it holds, only a key can tell."""
    return os.path.lexists(Path(bundle) / SIGNATURE_NAME)


def signature_state(bundle: str | os.PathLike[str]) -> str:
    """What can be said of a bundle's signature without a key, in words."""
    return "there is one, not checked: kp inspect --public-key KEY.pub.pem" if is_signed(bundle) else "none"


def check_signature(bundle: str | os.PathLike[str], manifest: bytes, public_key: PublicKey) -> None:
    """Checks that these bytes are a manifest that the key's owner signed.

    Args:
        bundle: the bundle's folder, with the signature.
        manifest: what was read from its `manifest.json`, and will be parsed.
        public_key: see `PublicKey`.

    Raises:
        SignatureError: the bundle is not signed, or the signature is of other bytes or by another key.
        InputError: `public_key` is no Ed25519 public key.
        MissingExtraError: cryptography is not installed.
    """
    key = _public_key(public_key)
    path = Path(bundle) / SIGNATURE_NAME
    try:
        signature = read_plain(path, _BYTES)
    except FileNotFoundError as error:
        raise SignatureError(
            f"the bundle {bundle} is not signed, and a public key was given; get the signed bundle, or sign it with: "
            f"kp sign {shlex.quote(str(bundle))} --key PRIVATE.pem"
        ) from error
    except OSError as error:
        raise SignatureError(f"{path} can't be read ({error.strerror}); get the signed bundle again") from error
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, PREFIX + manifest)
    except InvalidSignature as error:
        raise SignatureError(
            f"{path} is no signature of this manifest by the public key that was given: the manifest was changed, "
            "or another key signed it; get the bundle again from whom you trust"
        ) from error


def _public_key(given: PublicKey) -> Any:
    serialization, ed25519 = cryptography_modules()
    if isinstance(given, bytes) and len(given) == 32:
        return ed25519.Ed25519PublicKey.from_public_bytes(given)
    name, data = (
        ("the public key", given) if isinstance(given, bytes) else (str(given), pem_bytes(as_path(given, "public_key")))
    )
    try:
        key = serialization.load_pem_public_key(data)
    except Exception as error:  # cryptography's exceptions share no base of their own
        raise InputError(f"{name} is no public key in PEM: give the .pub.pem that kp sign --new-key wrote") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"{name} is no Ed25519 key; make one with: kp sign --new-key release.pem")
    return key


def pem_bytes(path: Path) -> bytes:
    """A key's file as it lies on the disk.

    Raises:
        InputError: it can't be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read(_LARGEST_PEM)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise InputError(f"the key {path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def cryptography_modules() -> Any:
    """The two modules of the package that are used: serialization, ed25519.

    Raises:
        MissingExtraError: cryptography is not installed.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("cryptography", "sign", "signing bundles and checking signatures") from error
    return serialization, ed25519
