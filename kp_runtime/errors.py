"""The exception tree: every error that this project raises on purpose; and the root of its warnings.

    KpError                     the root; the command line prints it as one line and exits 1
    ├── InputError              what the caller gave can't be used
    │   ├── ImageError          an image: missing, cut off, wrong dtype or shape
    │   │   └── NotDrawnError   a photo whose keypoints are there, but not its drawn copy (in photos.py)
    │   ├── BoxError            face boxes: NaN, no size, outside the image, wrong shape
    │   └── DataError           a data set: labels, folders, too few faces
    ├── BundleError             a model file or its manifest
    │   ├── SchemaError         a manifest of a version that this release can't read
    │   ├── SignatureError      a manifest that is not signed, or not by the key that is trusted
    │   └── IntegrityError      a file that is missing, cut off, or not the one in the manifest
    ├── BackendError            an inference engine that can't run, or gives wrong results
    │   └── MissingExtraError   a package is not installed; the message has the pip line
    └── ExportError             an export that did not reach its goal; the old bundle is untouched
        └── ParityError         a file whose keypoints are too far from PyTorch's

Each message says what is wrong, what was expected, and what to do next.
"""

from __future__ import annotations

import copyreg
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


__all__ = [
    "BackendError",
    "BoxError",
    "BundleError",
    "DataError",
    "ExportError",
    "ImageError",
    "InputError",
    "IntegrityError",
    "KpError",
    "KpWarning",
    "MissingExtraError",
    "ParityError",
    "SchemaError",
    "SignatureError",
]


class KpError(Exception):
    """The root of all errors that this project raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Passes between processes by its message: some are made of something else."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class KpWarning(UserWarning):
    """The root of all warnings of this project; those without a class of their own are this one."""


class InputError(KpError, ValueError):
    """What the caller gave can't be used."""


class ImageError(InputError):
    """An image is missing, cut off, or of a dtype or shape that is not taken."""


class BoxError(InputError):
    """A face box is not finite, has no size, or does not touch the image."""


class DataError(InputError):
    """A data set's labels or files can't be read."""


class BundleError(KpError):
    """A bundle's files or manifest can't be used."""


class SchemaError(BundleError):
    """The manifest has a schema version, or a field, that this release does not know."""


class SignatureError(BundleError):
    """The manifest is not signed, or not by the key that the caller trusts."""


class IntegrityError(BundleError):
    """A file is missing, cut off, or not the one that the manifest names."""


class BackendError(KpError, RuntimeError):
    """An inference engine can't be opened, or does not compute what it should."""


class MissingExtraError(BackendError, ImportError):
    """A package that this part needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed; run: pip install 'kp-edge[{extra}]'"
        )


class ExportError(KpError, RuntimeError):
    """An export did not reach its goal; the files that were there before are untouched."""


class ParityError(ExportError):
    """A file's keypoints are further from PyTorch's than its tolerance allows."""


def missing_or_broken(error: ImportError, module: str, package: str, extra: str, purpose: str) -> BackendError:
    """The error to raise where a module can't be imported: it is not installed, or it is and does not load."""
    if isinstance(error.__cause__, KeyboardInterrupt):  # of a module in C++, Ctrl-C becomes a failure to load
        raise error.__cause__
    if isinstance(error, ModuleNotFoundError) and (error.name or module).partition(".")[0] == module:
        return MissingExtraError(package, extra, purpose)
    return BackendError(
        f"{purpose} needs the package {package}, which is here but can't be loaded: {reason_of(error)}; "
        "kp doctor says what does not fit"
    )


def reason_of(error: BaseException, lines: int | None = None) -> str:
    """What an error of a library says, as part of a line: all of it, or its first lines alone."""
    return " ".join(" ".join(str(error).strip().splitlines()[:lines]).split())[:400] or type(error).__name__


def shortened(value: object, text: Callable[[Any], str] = repr) -> str:
    """A value in a message: a hostile file's may be megabytes long."""
    shown = text(value)
    return shown if len(shown) <= 200 else shown[:200] + "…"
