"""The real TensorRT runtime without a GPU: whatever it is given, an error comes back and the process lives.

It needs the package tensorrt-lean-cu13 (or another of `MODULES`), which works without a GPU as far as this.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from kp_runtime.backend_trt import MODULES
from kp_runtime.cuda_driver import has_driver

INSTALLED = [name for name in MODULES if importlib.util.find_spec(name)]

pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="no TensorRT runtime is installed: pip install tensorrt-lean-cu13"),
    pytest.mark.skipif(has_driver(), reason="this machine has NVIDIA's driver; what happens without one is tested"),
]

OPENED = """
import sys
from kp_runtime.backend_trt import TensorRtBackend, tensorrt_module
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.errors import BackendError
from kp_runtime.manifest import FileEntry
from kp_runtime.spec import ModelSpec

class Driver:  # says that all is well, as an older driver than TensorRT needs does
    cuda = "12.6"
    def make_current(self): pass

made = {"options": {"version_compatible": sys.argv[1] == "compatible", "dla_core": 0 if sys.argv[1] == "dla" else None}}
try:
    TensorRtBackend(b"ftrt" + bytes(1000), FileEntry("", 0, "plan", "fp16", None, made), ModelSpec("m"), Driver(),
                    tensorrt_module())
except BackendError as error:
    kept = error  # with the traceback, and so with TensorRT's objects
    print(error)
del kept
print("alive")
"""

NO_DEVICE = """
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.errors import BackendError
try:
    CudaDriver()
except BackendError as error:
    print(error)
print("alive")
"""


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.splitlines()


@pytest.mark.parametrize("plan", ["plain", "compatible", "dla"])
def test_a_driver_that_is_too_old_for_tensorrt_is_an_error(plan: str) -> None:
    message, alive = run(OPENED, plan)
    assert "can't use CUDA here: " in message
    assert "CUDA initialization failure with error: 35" in message
    assert message.endswith("the driver runs up to CUDA 12.6: update it, or install the TensorRT that is made for it")
    assert alive == "alive"


def test_no_device_is_an_error_before_tensorrt_is_asked() -> None:
    message, alive = run(NO_DEVICE)
    assert "libcuda can't be loaded" in message or "cuda-python" in message
    assert alive == "alive"


def test_without_the_guard_the_process_would_die() -> None:
    """The reason for all this; where a later TensorRT survives, the guard may go."""
    code = f"""
import {INSTALLED[0]} as trt
trt.Runtime(trt.Logger()).deserialize_cuda_engine(b"ftrt" + bytes(1000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert done.returncode < 0
