"""Threads and cores: what is started, where it runs, and that nothing stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kp_runtime
from kp_runtime.backend_by_name import open_backend
from kp_runtime.backend_ort import OrtCpuBackend
from kp_runtime.cores import (
    checked_cores,
    checked_threads,
    cores_from_text,
    cpu_quota,
    default_threads,
    on_cores,
    usable_cores,
)
from kp_runtime.errors import BackendError, InputError
from kp_runtime.manifest import Manifest
from tests.conftest import DETECTOR
from tests.models import SIZE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen and /proc is read on Linux alone")
two_cores = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
ROOT = Path(__file__).resolve().parents[1]


def tasks() -> set[int]:
    """The kernel's numbers of this process' threads, those that no Python code started too."""
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def cores_of(task: int) -> frozenset[int]:
    """Where a thread may run, as the kernel says."""
    lines = Path(f"/proc/self/task/{task}/status").read_text().splitlines()
    (text,) = [line.split(":")[1].strip() for line in lines if line.startswith("Cpus_allowed_list:")]
    ends = [list(map(int, part.split("-"))) for part in text.split(",")]
    return frozenset(core for end in ends for core in range(end[0], end[-1] + 1))


PROGRAM = """
import os, sys
import numpy as np, cv2
import kp_runtime
cv2.setNumThreads(1)
before = set(os.listdir("/proc/self/task"))
model = kp_runtime.load(sys.argv[1], threads=int(sys.argv[2]))
model.warmup(3)
image = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
model(image, [[100, 100, 1100, 1100], [50, 60, 110, 120]])
print(len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.parametrize(("threads", "started"), [(1, 0), pytest.param(2, 2, marks=two_cores)])
def test_a_fresh_process_gets_the_threads_that_were_asked_for(threads: int, started: int, bundle: Path) -> None:
    """In a process that has not imported ONNX Runtime yet. Two threads: one of the session, and one that
    takes a part of a batch side by side; the caller's own is the other of each."""
    pytest.importorskip("cv2", reason="OpenCV, which cuts the crops, is not installed")
    settings = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(bundle), str(threads)], cwd=ROOT, env=settings, capture_output=True
    )
    assert int(done.stdout or -1) == started, done.stderr.decode()


@pytest.mark.parametrize(
    ("limit", "threads"), [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("max 100000", 64)]
)
def test_a_containers_quota_bounds_the_threads_of_whoever_names_no_number(
    limit: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert default_threads(tmp_path) == threads
    assert checked_threads(64) == usable_cores() == 64


@pytest.mark.parametrize(
    ("group", "quota"),
    [("/a.slice/kp.service", 1.5), ("/a.slice", 2.0), ("/", 4.0), ("/b.slice/deeper", 0.5), ("/none/there", 4.0)],
)
def test_the_quota_is_the_least_of_the_groups_around_a_process(group: str, quota: float, tmp_path: Path) -> None:
    """systemd's CPUQuota= is told in the unit's own group, and a limit of a slice holds for all in it."""
    limits = {".": 4, "a.slice": 2, "a.slice/kp.service": 1.5, "b.slice": 0.5, "b.slice/deeper": 3, "c": 1}
    for name, cores in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{cores * 100000:.0f} 100000\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"4:memory:/c\n1:name=systemd:/c\n0::{group}\n")
    assert cpu_quota(tmp_path) == quota


@two_cores
def test_an_engine_under_a_quota_of_one_core_has_one_thread(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kp_runtime.cores.cpu_quota", lambda *_: 0.5)
    assert open_backend(bundle).threads == checked_threads(None) == 1
    assert open_backend(bundle, threads=2).threads == 2


def test_one_thread_stays_one_thread(bundle: Path) -> None:
    open_backend(bundle, threads=1)  # ONNX Runtime is imported now
    before = tasks()
    backend = open_backend(bundle, threads=1)
    backend.warmup(3)
    assert tasks() == before


@two_cores
@pytest.mark.parametrize("core", sorted(os.sched_getaffinity(0))[:2])
def test_threads_run_on_the_chosen_core(
    core: int, bundle: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has one thread here, so where it ran is seen on the thread that calls."""
    mine, seen = os.sched_getaffinity(0), []
    model = kp_runtime.load(bundle, cores=[core])
    run = model.backend._run
    monkeypatch.setattr(model.backend, "_run", lambda crops: (seen.append(os.sched_getaffinity(0)), run(crops))[1])
    model.backend.infer(rng.integers(0, 256, (1, 1, SIZE, SIZE), dtype=np.uint8))
    assert seen == [{core}]
    assert os.sched_getaffinity(0) == mine
    with pytest.raises(InputError, match="threads must be 1 to 1"):
        open_backend(bundle, cores=[core], threads=2)


@two_cores
@pytest.mark.parametrize("core", sorted(os.sched_getaffinity(0))[:2])
def test_threads_that_the_engine_starts_on_a_core_stay_there(core: int, bundle: Path) -> None:
    """More threads than cores, which `open_backend` refuses, so that the machine needs two cores alone."""
    open_backend(bundle, threads=1)  # ONNX Runtime is imported now
    before, mine = tasks(), os.sched_getaffinity(0)
    with on_cores(frozenset([core])):
        backend = OrtCpuBackend(bundle / "model.fp32.onnx", Manifest.read(bundle).spec, threads=3)
        backend.warmup(3)
    started = tasks() - before
    assert len(started) >= 2
    assert {cores_of(task) for task in started} == {frozenset([core])}
    assert os.sched_getaffinity(0) == mine


def test_the_cores_come_back_after_an_error() -> None:
    mine = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError), on_cores(frozenset([min(mine)])):
        raise RuntimeError
    assert os.sched_getaffinity(0) == mine


def test_cores_that_were_taken_away_are_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, backend = os.sched_getaffinity(0), open_backend(bundle, threads=1)
    backend.cores = frozenset([1023])
    with pytest.raises(
        BackendError, match=r"the chosen cores \[1023\] .* only \[.*; load the model anew with cores that are there"
    ):
        backend.warmup()
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {min(mine), 1023})
        with on_cores(frozenset([min(mine)])):
            patch.setattr(os, "sched_setaffinity", lambda *_: os.open("gone", 0))  # an OSError as well
    os.sched_setaffinity(0, mine)


@two_cores
def test_a_thread_that_may_run_on_fewer_cores_stays_there() -> None:
    one, other = sorted(os.sched_getaffinity(0))[:2]
    with on_cores(frozenset([one])), on_cores(frozenset([one, other])):
        assert os.sched_getaffinity(0) == {one}


AT_REST = """
import sys, time
import numpy as np
from kp_runtime.backend_by_name import open_backend
backend = open_backend(sys.argv[1], threads=2)
crops = np.random.default_rng(0).integers(0, 256, (1, 1, backend.spec.size, backend.spec.size), dtype=np.uint8)
used = []
for _ in range(5):
    backend.infer(crops)
    start = time.process_time()
    time.sleep(0.02)
    used.append(time.process_time() - start)
print(np.median(used))
"""


@two_cores
def test_threads_do_not_spin_between_calls() -> None:
    """Spinning threads take as much processor time as passes; these take next to none, in a process that has no others.
    The tiny graph would not do: nothing in it is shared among threads."""
    command = [sys.executable, "-c", AT_REST, str(ROOT / "engines" / "resnet18-68-lite")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout or 1) < 0.002, done.stderr


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ([], "at least one; got \\[\\]"),
        ([5000], "cores must be among .*; got \\[5000\\]"),
        (1, "cores must be whole numbers such as .*, got 1"),
        ("0", "cores must be whole numbers such as .*, got '0'"),
        ([0.0], "cores must be whole numbers such as .*, got "),
    ],
)
def test_cores_that_can_not_be_had(cores: Any, message: str, bundle: Path) -> None:
    with pytest.raises(InputError, match=message):
        open_backend(bundle, cores=cores)


def test_no_choice_of_cores_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.raises(InputError, match="on Linux alone"):
        checked_cores([0])


def test_cores_as_text() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    assert cores_from_text(str(allowed[0])) == {allowed[0]}
    assert cores_from_text(",".join(map(str, allowed))) == set(allowed)
    if allowed == list(range(allowed[0], allowed[-1] + 1)):
        assert cores_from_text(f"{allowed[0]}-{allowed[-1]}") == set(allowed)


@pytest.mark.parametrize("text", ["", "a", "1-", "0,,1", "-1", "0-99999"])
def test_text_that_is_no_list_of_cores(text: str) -> None:
    with pytest.raises(InputError, match="numbers and ranges such as 0,2-3; got"):
        cores_from_text(text)


@pytest.mark.parametrize("text", ["3-1", "0,1-0"])
def test_a_range_that_runs_backwards_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"a range of cores begins at its lower end, such as 2-3; got '{text}'"):
        cores_from_text(text)


FORKED = """
import os, sys
import numpy as np
import kp_runtime
from kp_runtime import CenterDetector, KpError, load
bundle, detector, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
model, faces = load(bundle, threads=threads), CenterDetector(detector, threads=threads)
image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
boxes = np.tile([40.0, 40, 90, 90], (9, 1))
asked = {
    "a face": lambda: model(image, boxes[:1]).xy,
    "crops": lambda: model(image, boxes).xy,
    "detector": lambda: faces(image),
    "submit": lambda: model.submit(image, boxes).result().xy,
}
known = {name: ask() for name, ask in asked.items()}
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
for name, ask in asked.items():
    try:
        print(name, np.array_equal(ask(), known[name]), flush=True)
    except KpError as error:
        print(name, "refused", str(error).split(";")[1], flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=two_cores)])
def test_a_forked_process_does_not_wait_for_threads_that_stayed_behind(threads: int, bundle: Path) -> None:
    pytest.importorskip("cv2", reason="OpenCV, which cuts the crops, is not installed")
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(bundle), str(DETECTOR), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    lines = [line.split(" refused  ")[0] for line in done.stdout.splitlines()]
    called = [f"{name} True" if threads == 1 else name for name in ("a face", "crops", "detector")]
    assert lines == [*called, "submit"], done.stderr
    assert "load models and detectors in each process (on a CPU those with threads=1" in done.stdout
