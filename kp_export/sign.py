"""`kp sign`: signatures of bundles, as `kp_runtime.signing` checks them, and the keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kp_runtime.errors import InputError, KpError
from kp_runtime.files import write_file
from kp_runtime.manifest import MANIFEST_NAME, any_manifest_of_bytes, manifest_bytes
from kp_runtime.signing import PREFIX, SIGNATURE_NAME, cryptography_modules, pem_bytes

__all__ = ["new_key", "sign_bundle"]


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
    serialization, ed25519 = cryptography_modules()
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


def _private_key(path: Path) -> Any:
    serialization, ed25519 = cryptography_modules()
    try:
        key = serialization.load_pem_private_key(pem_bytes(path), password=None)
    except InputError:
        raise
    except Exception as error:  # as above; a key with a passphrase is a TypeError
        raise InputError(
            f"{path} is no private key in PEM without a passphrase: give the .pem that kp sign --new-key wrote"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{path} is no Ed25519 key; make one with: kp sign --new-key release.pem")
    return key
