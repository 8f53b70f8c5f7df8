"""A bundle's folder is replaced whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kp_runtime.errors import ExportError

__all__ = ["staging"]


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder beside `target`, filled with links to its files, that takes its place at the end."""
    stage = target.with_name(f".{target.name}.new")
    old = target.with_name(f".{target.name}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock"), target):
            if old.exists() and not target.exists():
                os.replace(old, target)  # an export that was killed between its two last moves
            for stale in (stage, old):
                shutil.rmtree(stale, ignore_errors=True)
            if target.exists():
                shutil.copytree(target, stage, copy_function=_link_or_copy)
            else:
                stage.mkdir()
            try:
                yield stage
                _swap(stage, target, old)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise ExportError(
            f"can't write the bundle {target}: {error.strerror or error}; what was there before is unchanged"
        ) from error


def _swap(stage: Path, target: Path, old: Path) -> None:
    """Puts `stage` where `target` is; on an error `target` is back in its place."""
    if not target.exists():
        os.replace(stage, target)
        return
    os.replace(target, old)
    try:
        os.replace(stage, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    """Files are replaced, never changed in place, so a link to the old one is as good as a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ExportError(f"another export is at work on {target}; wait for it to end") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
