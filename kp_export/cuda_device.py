"""The CUDA device that a plan is built on: proven to work before TensorRT is touched.

TensorRT's runtime ends the process with a segmentation fault where CUDA can't be initialised, so
`cuda_device` opens the device through the CUDA driver first.
"""

from __future__ import annotations

from dataclasses import dataclass

from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.machine import driver_version, l4t_release

__all__ = ["CudaDevice", "cuda_device"]


@dataclass(frozen=True)
class CudaDevice:
    """A CUDA device that answered.

    Attributes:
        index: its number.
        name: such as `Orin`.
        compute_capability: such as `8.7`.
        cuda: the newest CUDA version that the driver runs, such as `12.6`.
        driver: version of the kernel driver, where Linux tells it.
        l4t: first line of `/etc/nv_tegra_release`, on a Jetson.
        multiprocessors: how many it has, where that was asked.
    """

    index: int
    name: str
    compute_capability: str
    cuda: str
    driver: str | None = None
    l4t: str | None = None
    multiprocessors: int | None = None

    @property
    def sm(self) -> str:
        """The compute capability as it stands in file names: `sm87`."""
        return "sm" + self.compute_capability.replace(".", "")


def cuda_device() -> CudaDevice:
    """Opens the first CUDA device, makes it the current one, and says what it is.

    Raises:
        MissingExtraError, BackendError: as `CudaDriver`.
    """
    driver = CudaDriver()
    name = bytes(driver.call("cuDeviceGetName", 256, driver.call("cuDeviceGet", driver.device_id))).split(b"\0")[0]
    release = l4t_release()
    return CudaDevice(
        index=driver.device_id,
        name=name.decode("utf-8", "replace"),
        compute_capability=f"{driver.arch[3:-1]}.{driver.arch[-1]}",
        cuda=driver.cuda,
        driver=driver_version(),
        l4t=release.lstrip("# ") if release else None,
        multiprocessors=driver.multiprocessors,
    )
