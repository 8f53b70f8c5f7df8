"""Files that are written whole or not at all, and read only where they are plain files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from io import BufferedReader
from pathlib import Path

from kp_runtime.errors import DataError, InputError, KpError

__all__ = [
    "as_path",
    "files_below",
    "files_with_suffix",
    "git_revision",
    "make_folder",
    "open_plain",
    "read_plain",
    "sha256_of_file",
    "sha256_of_open_file",
    "short_name",
    "sync",
    "write_file",
    "writing",
]


def as_path(given: str | os.PathLike[str], what: str) -> Path:
    """What a caller gave as a path; `what` it is of stands in the message.

    Raises:
        InputError: it is none.
    """
    try:
        return Path(given)
    except TypeError as error:
        raise InputError(f"{what} must be a path, as text or of pathlib; got {type(given).__name__}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    A block that raises, or a process that is killed, leaves the old file whole. A full disk or
    a folder that can't be written becomes a `KpError` that names the path.
    """
    if reason := _fault_of_name(path):
        raise KpError(f"can't write {str(path)!r}: {reason}; name a file")
    temporary = path.with_name(f".{short_name(path.name)}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise KpError(f"can't write {path}: it is a folder, device or pipe; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise KpError(f"can't write {path}: {error.strerror or error}; what was there before is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file by `writing`, text as UTF-8."""
    with writing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Waits until a file that was written is on its disk."""
    with open(path, "r+b") as file:  # Windows refuses to sync what is open for reading alone
        os.fsync(file.fileno())


def files_with_suffix(paths: Iterable[Path], suffixes: Collection[str]) -> list[Path]:
    """The files among some paths with one of these suffixes, in small letters or capitals, in order.

    Without those that a Mac leaves beside files on other systems' disks and in archives: `._photo.jpg` is no photo.
    """
    return sorted(
        path for path in paths if path.suffix.lower() in suffixes and not path.name.startswith("._") and path.is_file()
    )


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Those of `files_with_suffix` in a folder and in the folders in it, none of which is left out unseen.

    Raises:
        DataError: a folder may not be read, which `Path.rglob` passes over.
    """

    def refuse(error: OSError) -> None:
        reason = error.strerror or error
        raise DataError(
            f"{error.filename} can't be read: {reason}; let this user read it, or take it out of {folder}"
        ) from error

    walk = os.walk(folder, onerror=refuse)
    return files_with_suffix((Path(place, name) for place, _, names in walk for name in names), suffixes)


def make_folder(out: Path) -> None:
    """Makes the folder that `--out` names, before there is anything to lose.

    Raises:
        KpError: it can't be made, or nothing can be written into it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(out, os.W_OK | os.X_OK) else "it may not be written"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise KpError(f"can't write into {out}: {reason}; name another folder with --out")


def short_name(name: str) -> str:
    """A file's name as part of a temporary one's, which has room for 255 bytes: of a long one, its hash."""
    data = os.fsencode(name)
    return name if len(data) <= 200 else hashlib.sha256(data).hexdigest()


def _fault_of_name(path: Path) -> str | None:
    """Why a path can't be a file's, as of a name out of a damaged label file."""
    if not path.name:
        return "it is a folder"
    try:
        return "there is a zero byte in its name" if b"\0" in os.fsencode(path) else None
    except UnicodeEncodeError:
        return "its name is no text"


def read_plain(path: Path, largest: int) -> bytes:
    """The bytes of a plain file of at most `largest` bytes; an OSError says what else it is."""
    with open_plain(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"it has over {largest} bytes", str(path))
    return data


def open_plain(path: Path, *, links: bool = False) -> BufferedReader:
    """Opens a file that is no folder, device or pipe, and unless `links` no link, and never waits for one."""
    # Windows has neither of the first two; it needs to be told that the file is not text
    names = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY", *(() if links else ("O_NOFOLLOW",)))
    try:
        descriptor = os.open(path, os.O_RDONLY | sum(getattr(os, name, 0) for name in names))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    return open(descriptor, "rb")


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return sha256_of_open_file(file)


def sha256_of_open_file(file: BufferedReader) -> str:
    """The sha256, hexadecimal, of what an open file still has to read."""
    if hasattr(hashlib, "file_digest"):
        return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()  # Python 3.10
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def git_revision() -> str | None:
    """The revision of this source tree, `-dirty` where files differ; None outside a checkout."""
    import subprocess

    here = Path(__file__).parent
    if not (here.parent / ".git").exists():  # installed, maybe below somebody's own checkout
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
