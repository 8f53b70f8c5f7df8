"""Fixtures that several test files share; generators are seeded, engines run on one thread."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import typing
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.models import tiny_bundle

if typing.TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kp_runtime import Model
    from kp_runtime.bench_results import Bench
    from tests.cuda_driver_double import DriverDouble
    from tests.emulation import EmulatedKernel

if "PYTEST_XDIST_WORKER" in os.environ:
    # tests that run at the same time share the cores; threads that wait for one another would spin on them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"
DETECTOR = Path(__file__).resolve().parents[1] / "engines" / "face-detector"

needs_haar = pytest.mark.skipif(not hasattr(cv2, "CascadeClassifier"), reason="OpenCV 5 dropped the Haar cascades")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(68)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the tiny graph; tests that change it copy it first."""
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def bundle_with_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but its golden crop has the image that it was cut from."""
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", image=True)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an untrained network in fp32 and fp16, as `kp export` makes it; tests that change it copy it."""
    from kp_export.bundle import export_bundle
    from tests.test_export import known_graph, small_checkpoint

    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kp_export.bundle.onnx_from_checkpoint", known_graph)
        export_bundle(small_checkpoint(folder / "run"), folder / "bundle", precisions=("fp32", "fp16"))
    return folder / "bundle"


@pytest.fixture(scope="session")
def bench(bundle: Path, astronaut: Path) -> Bench:
    """A quick run of `kp bench`."""
    from kp_runtime.bench import run_bench
    from tests.bench_run import QUICK, astronaut_box

    return run_bench(bundle, astronaut, astronaut_box, QUICK)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of kp-edge."""
    from wheels import build_project_wheel

    return build_project_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def tools_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of kp-edge-tools."""
    from wheels import build_tools_wheel

    return build_tools_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home, who names no place for caches either."""

    def home() -> Path:
        raise RuntimeError("could not determine home directory")

    for name in ("KP_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)


@pytest.fixture(params=[False, True], ids=["two looks", "own score"])
def says(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up models that do not say that a face is lost, and ones that do."""
    monkeypatch.setattr("tests.face_world.World.says", request.param)


@pytest.fixture
def half_a_pixel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on all crops are cut half a pixel to one side, on a CPU as on a GPU."""
    from kp_runtime.geometry import crop_plan

    def off(matrix: np.ndarray, size: int, size_hw: tuple[int, int]) -> typing.Any:
        return crop_plan(matrix + np.array([[0, 0, 0.5], [0, 0, 0]]), size, size_hw)

    for module in ("preprocess_cpu", "preprocess_cuda"):
        monkeypatch.setattr(f"kp_runtime.{module}.crop_plan", off)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernel:
    """The CUDA crop kernel on the CPU."""
    from tests.emulation import EmulatedKernel

    return EmulatedKernel(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: EmulatedKernel) -> DriverDouble:
    """A double of the GPU that engines are opened on, whose crop kernel is the emulated one."""
    from tests.cuda_driver_double import DriverDouble

    double = DriverDouble(kernel)
    (tmp_path / "kernel").write_bytes(b"cubin")
    monkeypatch.setenv("KP_CUBIN", str(tmp_path / "kernel"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    return double


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model on the CPU with the graph that `model` computes."""
    from kp_runtime import load

    return load(tiny_bundle(tmp_path_factory.mktemp("bundle")), threads=1)


@pytest.fixture
def model(driver: DriverDouble) -> Iterator[Model]:
    """A model on the double of a GPU, which gets all its memory back."""
    from kp_runtime import Model
    from tests.device_double import DeviceDouble

    with Model(DeviceDouble()) as opened:
        yield opened
    assert not driver.memory, "memory was not freed"
    assert not driver.events, "events were not freed"
    assert not driver.graphs, "graphs were not freed"


@pytest.fixture
def own_detector(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's own detector's bundle; `auto` is this one."""
    monkeypatch.setenv("KP_DETECTOR", f"own={DETECTOR}")
    return DETECTOR


@pytest.fixture(scope="session")
def astronaut() -> Path:
    """The photograph of a face that scikit-image carries (NASA, public domain).

    Where scikit-image is not installed, `KP_ASTRONAUT` may name the file.
    """
    if given := os.environ.get("KP_ASTRONAUT"):
        return Path(given)
    skimage = pytest.importorskip("skimage", reason="scikit-image, which carries the photograph, is not installed")
    return Path(skimage.__file__).parent / "data" / "astronaut.png"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real labelled faces beside the checkout; tests that want them skip where they are not."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the real data sets are not beside this checkout")
    return SHARED / "data"


def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread or process is about to do; a minute is for machines that are busy."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.002)


def no_thread_at(monkeypatch: pytest.MonkeyPatch, fails: int) -> threading.Event:
    """Of the threads that are started from now on, the one of that number, counted from 1, can't be.

    What is returned is set once that one was to be started.
    """
    start, count, failed = threading.Thread.start, itertools.count(1), threading.Event()

    def started(thread: threading.Thread) -> None:
        if next(count) == fails:
            failed.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    return failed


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> typing.Any:
    """The module `examples.service`."""
    pytest.importorskip("fastapi", reason="fastapi, which the service is made of, is not installed")
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "40000000")  # so that what the service sets is undone
    import examples.service

    return examples.service


def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV has no memory for the pixels of an image."""
    import cv2

    error = cv2.error("error: (-4:Insufficient memory) Failed to allocate 108000000 bytes")
    error.code = cv2.Error.StsNoMem

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cv2, "imdecode", fail)
