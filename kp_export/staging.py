"""A bundle's folder is replaced whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kp_runtime.errors import ExportError
from kp_runtime.files import sync
from kp_runtime.manifest import MANIFEST_NAME, Manifest, any_manifest

__all__ = ["alone", "check_replaced", "locked", "mend", "staging"]

_CHECKPOINT = "checkpoint.safetensors"  # kp_train's name of it, without PyTorch

_HERE, _EXCHANGE = -100, 2
"""Linux's AT_FDCWD and RENAME_EXCHANGE (its renameat2(2))."""


def mend(target: Path) -> None:
    """Puts a bundle back that an export was moving when it was killed; call it before reading one.

    Where an export is at work it moves the bundle itself, and nothing is done.
    """
    target = target.resolve()
    if not target.exists() and _beside(target, "old").exists():
        with contextlib.suppress(ExportError), alone(target):
            pass


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """No other process of this project changes the bundle meanwhile.

    Raises:
        ExportError: another one does, or there is no lock to be had.
    """
    target = target.resolve()
    with contextlib.ExitStack() as stack:
        # who may not write beside the bundle, where the lock lies, can't replace it either
        if target.name and os.access(target.parent, os.W_OK | os.X_OK):
            stack.enter_context(locked(_beside(target, "lock"), target))
            _put_back(target)
        yield


def _put_back(target: Path) -> None:
    old = _beside(target, "old")
    if old.exists() and not target.exists():
        os.replace(old, target)


def check_replaced(target: Path, source: Manifest) -> None:
    """Checks that what is to be made of `source` takes the place of no checkpoint that may be the only copy.

    It is one where a run of training left it, or nothing was exported of it, or the model has another name. What was
    made of an older checkpoint of the same model may be replaced: whoever trains on exports there again.

    Raises:
        ExportError: such a checkpoint lies in `target`.
    """
    there = any_manifest(target) if (target / MANIFEST_NAME).exists() else None  # of a damaged one it is said
    if not (target / _CHECKPOINT).exists():
        return
    old = there.files.get(_CHECKPOINT) if there else None
    if there and old:
        is_export = old.sha256 in {entry.parent_sha256 for entry in there.files.values()}
        is_model = (type(there), there.spec.name) == (type(source), source.spec.name)
        if old == source.files.get(_CHECKPOINT) or (is_export and is_model and not (target / "run.json").exists()):
            return
    raise ExportError(f"{target} holds another checkpoint, which may be the only copy; name another folder with --out")


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder beside `target`, filled with links to its files, that takes its place at the end.

    Files in it must be replaced (`kp_runtime.files.writing`), never written in place: they are the
    old bundle's own until then.

    Raises:
        ExportError: the folder can't be written or replaced, or another process has it staged.
    """
    if os.path.ismount(target):
        raise ExportError(
            f"the bundle {target} is a mount point, whose place no new one can take; mount the folder that it lies in"
        )
    stage, old = _beside(target, "new"), _beside(target, "old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not os.access(target, os.W_OK):
            raise ExportError(f"the bundle {target} is read-only; make it writable, or work on a copy")
        with locked(_beside(target, "lock"), target):
            _put_back(target)
            for stale in (stage, old):
                shutil.rmtree(stale, ignore_errors=True)
            try:
                if target.exists():
                    shutil.copytree(target, stage, copy_function=_link_or_copy)
                    _check_movable(stage, target)
                else:
                    stage.mkdir()
                yield stage
                _swap(stage, target, old)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise ExportError(
            f"can't write the bundle {target}: {error.strerror or error}; what was there before is unchanged"
        ) from error


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _check_movable(stage: Path, target: Path) -> None:
    """Before the work, while both have the same files, they are exchanged there and back.

    Raises:
        ExportError: the bundle can't be moved: it came with a container's image, or is mounted from the same disk.
    """
    if _exchanged(stage, target):
        _exchanged(stage, target)
    elif ctypes.get_errno() in (errno.EXDEV, errno.EBUSY):
        raise ExportError(
            f"the bundle {target} can't be moved, as it came with a container's image or is a mount point; work on a "
            "copy of it (cp -r), or mount the folder that it lies in"
        )


def _swap(stage: Path, target: Path, old: Path) -> None:
    """Puts `stage` where `target` is; on an error `target` is back in its place."""
    if not target.exists():
        os.replace(stage, target)
        return
    if _exchanged(stage, target):
        return
    os.replace(target, old)
    try:
        os.replace(stage, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Two folders get each other's name in one step, so that a loss of power leaves both.

    False, and nothing was done, where the system or the file system can't: macOS, NFS. `ctypes.get_errno` says why.
    """
    ctypes.set_errno(0)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = (_HERE, os.fsencode(one), _HERE, os.fsencode(other))
    return renameat2 is not None and renameat2(*paths, _EXCHANGE) == 0


def _link_or_copy(source: str, target: str) -> None:
    """Files are replaced, never changed in place, so a link to the old one is as good as a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(Path(target))  # the old one is removed in the end
        shutil.copystat(source, target)


@contextlib.contextmanager
def locked(path: Path, target: Path) -> Iterator[None]:
    """Holds the lock file `path`, which is gone afterwards, while `target` is written.

    Raises:
        ExportError: another process holds it, or it can't be had.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                file = stack.enter_context(open(path, "w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ExportError(f"another command is at work on {target}; wait for it to end") from error
            except OSError as error:  # another user's that was left, or NFS without locks
                raise ExportError(
                    f"can't write {target}: its lock {path} can't be had ({error.strerror or error}); see that this "
                    "user may write there and that the disk has locks, or take a folder elsewhere"
                ) from error
            # the one before may have removed the file between our opening and locking it
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    os.register_at_fork(after_in_child=file.close)  # else whoever outlives us would hold the lock
                    break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
