"""A short soak of the tiny bundle, and that each kind of leak is found."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import soak
from benchmarks.soak import Soak, check, device_memory, model_round, slope_of, watch
from kp_runtime.cores import usable_cores
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.errors import BackendError, KpError
from kp_runtime.pipeline import Model
from tests.cuda_driver_double import DriverDouble

LEAK = 4 << 20
"""Bytes a round."""

NIGHTLY = Path(__file__).resolve().parents[1] / "scripts" / "nightly"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is read")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "LEAST_ROUNDS", 40)
    monkeypatch.setattr(soak, "SECONDS_TO_END", 0.2)


@pytest.fixture
def ended() -> Iterator[threading.Event]:
    """Ends the threads of a test that leaves some."""
    event = threading.Event()
    yield event
    event.set()


def round_of(bundle: Path, **more: object) -> Callable[[], int]:
    return model_round(bundle, threads=2, engine_threads=min(2, usable_cores()), calls=10, **more)  # type: ignore[arg-type]


@pytest.mark.slow
def test_nothing_leaks(bundle: Path) -> None:
    """A minute of load, infer, unload in several threads; `make soak` goes on for longer."""
    result = watch(round_of(bundle), seconds=60)
    check(result)
    assert result.calls == result.rounds * 20
    assert result.slope.low <= result.slope.value <= result.slope.high
    assert 0 < result.first_mib <= result.peak_mib


def test_a_soak_that_is_told_to_stop_says_what_it_saw(bundle: Path, few: None) -> None:
    result = watch(round_of(bundle), seconds=3600, calls=10**9, stop=lambda: True)
    assert (result.rounds, result.calls) == (40, 800)


def test_memory_that_is_kept_is_found(bundle: Path, few: None) -> None:
    kept = []

    def keep(model: Model) -> None:
        kept.append(mmap.mmap(-1, LEAK))  # not malloc's: what this process freed before would take it in
        kept[-1].write(bytes(LEAK))

    result = watch(round_of(bundle, use=keep), seconds=0)
    with pytest.raises(KpError, match=r"after 40 loads and 800 calls memory grows by .* bytes a call \("):
        check(result)
    grown = LEAK / 20
    assert result.slope.low < 1.2 * grown
    assert result.slope.high > 0.8 * grown


def test_a_descriptor_that_stays_open_is_found(bundle: Path, few: None, tmp_path: Path) -> None:
    (tmp_path / "left.txt").touch()
    opened: list[int] = []
    once = round_of(bundle, use=lambda model: opened.append(os.open(tmp_path / "left.txt", os.O_RDONLY)))
    try:
        result = watch(once, seconds=0)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    assert len(result.descriptors) == 40
    with pytest.raises(KpError, match=r"40 descriptors are left open: .*left\.txt"):
        check(result)


def test_a_thread_that_stays_is_found(bundle: Path, few: None, ended: threading.Event) -> None:
    once = round_of(bundle, use=lambda model: threading.Thread(target=ended.wait, args=(60,), daemon=True).start())
    result = watch(once, seconds=0)
    assert len(result.threads) == 40
    with pytest.raises(KpError, match="40 threads are left over"):
        check(result)


@pytest.mark.parametrize("kept", [True, False])
def test_memory_of_the_gpu_that_is_kept_is_found(few: None, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", DriverDouble(None))
    driver = CudaDriver()

    def once() -> int:
        block = driver.call("cuMemAlloc", 1 << 16)
        if not kept:
            driver.call("cuMemFree", block)
        return 20

    result = watch(once, seconds=0, in_use=device_memory())
    assert result.device is not None
    assert result.device.grows == kept
    if kept:
        with pytest.raises(KpError, match=r"after 40 loads and .*the GPU's memory grows by .* bytes a call \("):
            check(result)


def test_the_engine_that_was_asked_for_is_soaked(bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"no NVIDIA driver|plan"):
        round_of(bundle, backend="tensorrt")()


def walking(rng: np.random.Generator, n: int = 600) -> np.ndarray:
    """Memory that takes a step at about every fiftieth sample, up or down, and stays there."""
    return np.cumsum(rng.choice([-64e3, 0, 64e3], n, p=[0.01, 0.98, 0.01])) + 1e8


def wandering(rng: np.random.Generator, n: int = 600) -> np.ndarray:
    """Memory about a level: each sample keeps 80% of the one before."""
    noise = rng.normal(0, 20e3, n)
    for i in range(1, n):
        noise[i] += 0.8 * noise[i - 1]
    return noise + 1e8


@pytest.mark.parametrize("noise", [walking, wandering])
@pytest.mark.parametrize("slope", [0.0, 5.0])
def test_the_interval_holds_the_slope(noise: Callable[..., np.ndarray], slope: float, rng: np.random.Generator) -> None:
    """A 95% interval may miss one time in twenty: of 400, 20 are expected; over 35 would be a chance of 1 in 1000."""
    at = np.arange(600) * 100.0
    found = [slope_of(at, noise(rng) + slope * at) for _ in range(400)]
    assert sum(not s.low <= slope <= s.high for s in found) <= 35
    assert sum(s.grows for s in found) <= 4 or slope > 0


def test_a_leak_is_told_from_steps_and_noise(rng: np.random.Generator) -> None:
    at = np.arange(600) * 100.0
    assert all(slope_of(at, wandering(rng) + 20 * at).grows for _ in range(100))
    assert slope_of(at, 1e8 + np.floor(20 * at / 4096) * 4096).grows  # memory comes in pages


def test_a_single_step_is_no_leak() -> None:
    """An allocator that takes one more block, once, does not leak."""
    at = np.arange(600) * 100.0
    assert not slope_of(at, np.where(at > 12000, 1.01e8, 1e8)).grows


def test_a_clean_run_passes() -> None:
    clean = Soak(1, 80, 800, soak.Slope(1, -1, 3, False), 1, 1, 1, (), ())
    check(clean)


@pytest.mark.parametrize("failing", ["scripts/fuzz.py", "benchmarks.soak", "nox", "none"])
def test_a_night_has_all_its_parts_and_tells_which_failed(failing: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nfor word; do [ "$word" != "{failing}" ] || exit 3; done\n')
    python.chmod(0o755)
    place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEED": "5"}
    done = subprocess.run([NIGHTLY], env=os.environ | place, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (int(failing != "none"), "")
    *_, hostile, soaked, pythons = done.stdout.splitlines()
    assert "== python scripts/fuzz.py --cases 2000 --seed 5\n" in done.stdout
    told = {"scripts/fuzz.py": hostile, "benchmarks.soak": soaked, "nox": pythons}
    assert [part for part, line in told.items() if not line.startswith("ok  ")] == [failing][: done.returncode]
