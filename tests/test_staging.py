"""A bundle is replaced whole or not at all, by one at a time."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO
from unittest.mock import Mock

import pytest

from kp_export.pack import pack_bundle
from kp_export.staging import _exchanged, alone, locked, mend, staging
from kp_runtime.errors import BundleError, ExportError
from kp_runtime.manifest import Manifest
from tests.test_cli import kp
from tests.test_export import contents


def test_who_reads_leaves_a_swap_under_way_alone(bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    with open(copied.with_name(".bundle.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copied.rename(copied.with_name(".bundle.old"))
        mend(copied)
        assert not copied.exists()
    mend(copied)
    assert Manifest.read(copied).files
    assert [p.name for p in copied.parent.iterdir()] == ["bundle"]


def test_who_can_not_mend_is_told_how(bundle: Path, tmp_path: Path) -> None:
    """A program on a device, which has no `kp_export`."""
    copied = Path(shutil.copytree(bundle, tmp_path / ".a bundle.old")).with_name("a bundle")
    with pytest.raises(BundleError, match=r"nothing at .*; a command was cut off there; mv .* puts the bundle") as told:
        Manifest.read(copied)
    subprocess.run("mv" + str(told.value).partition("; mv")[2].partition(" puts ")[0], shell=True, check=True)
    assert Manifest.read(copied).files


def test_a_root_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="/ is not a bundle"):
        pack_bundle(Path("/"), tmp_path / "b", ["fp32"])


def test_who_may_not_write_beside_a_bundle_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / ".bundle.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ExportError, match="another command is at work"), alone(tmp_path / "bundle"):
            pass
        monkeypatch.setattr("os.access", lambda path, mode: False)
        with alone(tmp_path / "bundle"), alone(Path("/")):
            pass


@pytest.mark.parametrize("work", [alone, staging])
def test_a_lock_that_can_not_be_had_is_told(
    work: Callable[[Path], AbstractContextManager[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS without its lock daemon, or where a killed command of another user has left its file."""
    (tmp_path / "b").mkdir()

    def none(file: TextIO, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    told = r"its lock .*/\.b\.lock can't be had \({}\); see that .* disk has locks"
    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(ExportError, match=told.format("No locks available")), work(tmp_path / "b"):
        pass
    monkeypatch.undo()
    (tmp_path / ".b.lock").unlink()
    (tmp_path / ".b.lock").mkdir()
    with pytest.raises(ExportError, match=told.format("Is a directory")), work(tmp_path / "b"):
        pass


@pytest.mark.parametrize("anew", [False, True])
def test_a_lock_whose_file_is_gone_when_it_is_had_is_taken_again(
    anew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before removes the file, and a third may have made another one, while we open and lock it."""
    path, flock, taken = tmp_path / ".b.lock", fcntl.flock, []

    def late(file: TextIO, how: int) -> None:
        if not taken:
            path.unlink()
            if anew:
                path.touch()
        taken.append(file)
        flock(file, how)

    monkeypatch.setattr("fcntl.flock", late)
    with locked(path, tmp_path / "b"):
        assert len(taken) == 2
        with pytest.raises(ExportError, match="another command is at work"), locked(path, tmp_path / "b"):
            pass
    assert not path.exists()


def test_a_lock_whose_file_goes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fstat, asked = tmp_path / ".b.lock", os.fstat, []

    def late(file: int) -> os.stat_result:
        if not asked:
            path.unlink()
        asked.append(file)
        return fstat(file)

    monkeypatch.setattr("os.fstat", late)
    with locked(path, tmp_path / "b"):
        assert len(asked) == 2
    assert not path.exists()


KILLED = """
import os, sys, time
from pathlib import Path
from kp_export.staging import alone
with alone(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    time.sleep(600)
"""


def test_a_worker_that_outlives_a_killed_command_holds_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "b"], stdout=subprocess.PIPE) as command:
        assert command.stdout is not None
        worker = int(command.stdout.readline())
        with pytest.raises(ExportError, match="another command is at work"), alone(tmp_path / "b"):
            pass
        command.kill()
        command.wait()
        try:
            with alone(tmp_path / "b"):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_a_swap_that_fails_puts_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("old")
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(source).name == ".b.new":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("kp_export.staging._exchanged", lambda one, other: False)
    monkeypatch.setattr("os.replace", full)
    message = "No space left on device; what was there before is unchanged"
    with pytest.raises(ExportError, match=message), staging(tmp_path / "b"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "x").read_text() == "old"


def test_a_bundle_is_never_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of power between two moves would leave none, and a board's service would not start."""
    for name in ("b", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    if not _exchanged(tmp_path / "b", tmp_path / "other"):
        pytest.skip("this system or its file system can't exchange two folders")
    assert contents(tmp_path / "b") == {"x": b"other"}
    monkeypatch.setattr("os.replace", lambda source, target: pytest.fail(f"{target} was moved"))
    with staging(tmp_path / "b") as stage:
        (stage / "y").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"b", "other"}
    assert contents(tmp_path / "b") == {"x": b"other", "y": b"new"}


def test_where_folders_can_not_be_exchanged_they_are_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    assert not _exchanged(tmp_path / "b", tmp_path / "none")
    monkeypatch.setattr("ctypes.CDLL", lambda name, **_: object())  # macOS, which has no renameat2
    with staging(tmp_path / "b") as stage:
        (stage / "y").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert contents(tmp_path / "b") == {"y": b"new"}


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be renamed, which a container's user learned after minutes of building."""
    monkeypatch.setattr("os.path.ismount", lambda path: path in (tmp_path / "b", Path("/")))
    for target in (tmp_path / "b", Path("/")):
        with pytest.raises(ExportError, match=rf"{target} is a mount point, .*; mount the folder"), staging(target):
            pytest.fail("it was staged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EBUSY, errno.EINVAL])
def test_a_bundle_that_can_not_be_moved_is_refused_before_the_work(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a container's image, whose lower layer stays where it is, or mounted from the same disk; not one on NFS."""

    def refuses(*_: object) -> int:
        ctypes.set_errno(reason)
        return -1

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_text("old")
    monkeypatch.setattr("ctypes.CDLL", lambda name, **_: SimpleNamespace(renameat2=refuses))
    if reason == errno.EINVAL:
        with staging(tmp_path / "b"):
            pass
    else:
        told = r"b can't be moved, as .* container's image .*; work on a copy of it \(cp -r\), or mount the folder"
        with pytest.raises(ExportError, match=told), staging(tmp_path / "b"):
            pytest.fail("it was staged")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert contents(tmp_path / "b") == {"x": b"old"}


def test_what_a_killed_export_left_is_cleared_away(tmp_path: Path) -> None:
    """Before its swap or after it; the next swap would find its places taken."""
    for name in ("b", ".b.new", ".b.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    with staging(tmp_path / "b") as stage:
        (stage / "y").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert contents(tmp_path / "b") == {"x": b"b", "y": b"new"}


def test_where_a_file_can_not_be_linked_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as on exFAT."""

    def refused(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    old, synced = tmp_path / "b" / "x", []
    old.parent.mkdir()
    old.write_text("old")
    old.chmod(0o444)
    monkeypatch.setattr("os.link", refused)
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.pread(file, 9, 0)))
    with staging(tmp_path / "b") as stage:
        (stage / "y").write_text("new")
    assert contents(tmp_path / "b") == {"x": b"old", "y": b"new"}
    assert (synced, old.stat().st_mode & 0o777) == ([b"old"], 0o444)


@pytest.mark.parametrize("command", ["train", "train-detector"])
def test_one_command_at_a_time_trains_in_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The states of two would be mixed; the workers of one run are the same command."""
    from lightning.pytorch.utilities import rank_zero_only

    from kp_train.synthetic import write_csv_source

    said, data, runs = [], write_csv_source(tmp_path / "faces", people=2), tmp_path / "runs"
    words = (command, "--data", data, "--out", runs / "a")

    def run(*args: object, **rest: object) -> Path:
        said.append(kp(capsys, *words)[2] if not said else "")
        return runs / "a"

    monkeypatch.setattr("kp_train.train.train", run)
    monkeypatch.setattr("kp_train.train_detector.train_detector", run)
    monkeypatch.setattr("kp_export.detector_bundle.export_detector", lambda out, score: out)
    assert kp(capsys, *words)[0] == 0
    assert said == [f"kp: another command is at work on {runs / 'a'}; wait for it to end\n"]
    assert not list(runs.iterdir())
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with alone(runs / "a"):
        assert kp(capsys, *words)[0] == (command != "train")


@pytest.mark.parametrize("locks", ["none on Windows", "none on a disk"])
def test_a_run_needs_no_lock_where_there_are_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    from kp_train.synthetic import write_csv_source

    data, run = write_csv_source(tmp_path / "faces", people=2), tmp_path / "runs" / "a"
    monkeypatch.setattr("kp_train.train.train", lambda *args, **rest: run)
    if locks == "none on a disk":
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))))
    else:
        monkeypatch.delitem(sys.modules, "kp_export.staging", raising=False)
        monkeypatch.setitem(sys.modules, "fcntl", None)
    status, _, err = kp(capsys, "train", "--data", data, "--out", run)
    told = f"{run} is not locked, see that no other command trains there ([Errno 38] Function not implemented)\n"
    assert (status, err) == (0, told if locks == "none on a disk" else "")


def test_a_system_that_locks_files_otherwise_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    for name in ("kp_export.pack", "kp_export.staging"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows has none
    status, _, err = kp(capsys, "pack", bundle, "--precision", "fp32", "--out", tmp_path / "p")
    assert status == 1
    assert err == "kp: this command needs Linux or macOS, as it locks bundles by fcntl; on Windows use WSL\n"
