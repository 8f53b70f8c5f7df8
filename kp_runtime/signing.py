"""Signatures of bundles: Ed25519 (RFC 8032) over the manifest, which holds the sha256 of every other file.

`manifest.sig` holds the 64 bytes of the signature of `PREFIX` followed by the exact bytes of
`manifest.json`. The prefix keeps a signature from ever meaning something else that the key signs.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from kp_runtime.errors import InputError, KpError, MissingExtraError, SignatureError
from kp_runtime.files import as_path, read_plain, write_file
from kp_runtime.spec import MANIFEST_NAME, SIGNATURE_NAME, any_manifest_of_bytes, manifest_bytes

__all__ = ["PREFIX", "PublicKey", "check_signature", "is_signed", "new_key", "sign_bundle", "signature_state"]

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


def sign_bundle(bundle: str | os.PathLike[str], private_key: str | os.PathLike[str]) -> Path:
    """Signs a bundle whose files are those of its manifest.

    Args:
        bundle: the bundle's folder.
        private_key: the path of a PEM file without a passphrase, as `new_key` writes it.

    Returns:
        The signature's path.

    Raises:
        BundleError, IntegrityError: the bundle can't be used, or a file is not the one in the manifest.
        InputError: `private_key` is no Ed25519 private key.
        MissingExtraError: cryptography is not installed.
    """
    key = _private_key(Path(private_key))
    data = manifest_bytes(bundle)
    manifest = any_manifest_of_bytes(data, str(Path(bundle) / MANIFEST_NAME))
    for name in manifest.files:
        manifest.check_file(bundle, name)
    path = Path(bundle) / SIGNATURE_NAME
    write_file(path, key.sign(PREFIX + data))
    return path


def new_key(path: str | os.PathLike[str]) -> Path:
    """Makes a key pair: the private key at `path`, for its owner alone to read, the public one beside it.

    Returns:
        The public key's path: `release.pub.pem` for `release.pem`.

    Raises:
        KpError: one of the two files is there already, which is never overwritten, or can't be written.
        MissingExtraError: cryptography is not installed.
    """
    path = Path(path)
    if not path.name:
        raise KpError(f"{path} is a folder; name a file for the key, such as release.pem")
    serialization, ed25519 = _cryptography()
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    beside = path.with_name(path.stem + ".pub.pem")
    if os.path.lexists(beside):
        raise KpError(f"{beside} is there already, and a key is never overwritten; give another path")
    made: list[Path] = []
    try:
        for file, data, mode in ((path, private, 0o600), (beside, public, 0o644)):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(file)
            with open(descriptor, "wb") as opened:
                opened.write(data)
    except BaseException as error:
        for half in made:
            half.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise KpError(f"{file} is there already, and a key is never overwritten; give another path") from error
        if isinstance(error, OSError):
            raise KpError(f"can't write the key {file}: {error.strerror or error}") from error
        raise
    return beside


def _public_key(given: PublicKey) -> Any:
    serialization, ed25519 = _cryptography()
    if isinstance(given, bytes) and len(given) == 32:
        return ed25519.Ed25519PublicKey.from_public_bytes(given)
    name, data = (
        ("the public key", given) if isinstance(given, bytes) else (str(given), _pem(as_path(given, "public_key")))
    )
    try:
        key = serialization.load_pem_public_key(data)
    except Exception as error:  # cryptography's exceptions share no base of their own
        raise InputError(f"{name} is no public key in PEM: give the .pub.pem that kp sign --new-key wrote") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"{name} is no Ed25519 key; make one with: kp sign --new-key release.pem")
    return key


def _private_key(path: Path) -> Any:
    serialization, ed25519 = _cryptography()
    try:
        key = serialization.load_pem_private_key(_pem(path), password=None)
    except InputError:
        raise
    except Exception as error:  # as above; a key with a passphrase is a TypeError
        raise InputError(
            f"{path} is no private key in PEM without a passphrase: give the .pem that kp sign --new-key wrote"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{path} is no Ed25519 key; make one with: kp sign --new-key release.pem")
    return key


def _pem(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_LARGEST_PEM)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise InputError(f"the key {path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def _cryptography() -> Any:
    """The two modules of the package that are used: serialization, ed25519."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtraError("cryptography", "sign", "signing bundles and checking signatures") from error
    return serialization, ed25519
