"""The golden crop: what every engine must get right when it opens a bundle, and all that cuts crops for one."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import BackendError, IntegrityError
from kp_runtime.frame import Frame
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.spec import ModelSpec

__all__ = ["GOLDEN_NAME", "Golden", "arrays_from_npz", "check_golden_crop", "golden_from_bytes"]

GOLDEN_NAME = "golden.npz"
_MOST_CROPS = 16
_LARGEST_ARRAY = 32 << 20
"""In bytes, unpacked; sixteen of the largest crops are half of it."""

GOLDEN_TOLERANCE_GREY = 1
"""Most grey levels by which what is cut here may be off. All that was measured gives the same integers (docs/parity.md,
docs/aarch64.md); an OpenCV that rounds luma otherwise is off by one."""


@dataclass(frozen=True, eq=False)
class Golden:
    """Crops `(n, 1, size, size)` uint8, and PyTorch's answer to them.

    Attributes:
        crops: those.
        keypoints: `(n, 68, 2)`, pixels of the crop.
        lost_score: `(n,)`; None of a model that gives none.
        image: `(h, w, 3)` uint8 BGR, which the first crop was cut from; None in the bundles of before.
        box_xyxy: `(4,)`, the face's box in it; None likewise.
    """

    crops: NDArray[np.uint8]
    keypoints: NDArray[np.floating]
    lost_score: NDArray[np.floating] | None = None
    image: NDArray[np.uint8] | None = None
    box_xyxy: NDArray[np.floating] | None = None


def golden_from_bytes(data: bytes, spec: ModelSpec, origin: str = GOLDEN_NAME) -> Golden:
    """Reads the file's bytes; `origin` stands in the messages.

    Raises:
        IntegrityError: no such archive, or arrays of another shape or dtype.
    """
    names = "crops", *spec.outputs
    arrays = arrays_from_npz(data, names, origin, ("image", "box_xyxy"))
    crops, *outputs = arrays[: len(names)]
    source = arrays[len(names) :]
    n = len(crops) if crops.ndim else 0
    right = crops.shape == (n, 1, spec.size, spec.size) and crops.dtype == np.uint8 and 1 <= n <= _MOST_CROPS
    for array, shape in zip(outputs, spec.outputs.values(), strict=True):
        right = right and array.dtype.kind == "f" and array.shape == (n, *shape)
    if not (right and (not source or _is_source(*source))):
        given = zip((*names, "image", "box_xyxy"), arrays, strict=False)
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in given)
        raise IntegrityError(f"{origin} is no golden crop ({found}); export the bundle again")
    return Golden(crops, outputs[0], outputs[1].reshape(-1) if len(outputs) > 1 else None, *source)


def _is_source(image: NDArray[Any], box: NDArray[Any]) -> bool:
    """Whether these are a colour image and a box in it."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or box.dtype.kind != "f" or box.shape != (4,):
        return False
    x0, y0, x1, y1 = box.tolist()
    return bool(0 <= x0 <= x1 - 1 < image.shape[1] and 0 <= y0 <= y1 - 1 < image.shape[0])


def check_golden_crop(
    golden: Golden | None, spec: ModelSpec, cut: Callable[[Frame, NDArray[np.float64], int], NDArray[np.uint8]]
) -> int | None:
    """Most grey levels between the first golden crop and what is cut of its image here; None where it has no image.

    Args:
        golden: the bundle's.
        spec: its contract.
        cut: as `preprocess_cpu.crops_from_frame`.

    Raises:
        BackendError: they are more than may be.
    """
    if golden is None or golden.image is None or golden.box_xyxy is None:
        return None
    matrices = matrices_from_boxes(golden.box_xyxy[None], spec.size, spec.margin)
    worst = int(np.abs(cut(Frame(golden.image, "bgr"), matrices, spec.size)[0].astype(int) - golden.crops[0]).max())
    if worst > GOLDEN_TOLERANCE_GREY:
        raise BackendError(
            f"the golden crop is cut with a grey level {worst} off (at most {GOLDEN_TOLERANCE_GREY} is right): this "
            "machine cuts crops wrongly; try another OpenCV, or on a GPU the backend ort-cpu, and report it"
        )
    return worst


def arrays_from_npz(data: bytes, names: tuple[str, ...], origin: str, more: tuple[str, ...] = ()) -> list[NDArray[Any]]:
    """The named arrays of an archive of numpy's, none of them a pickle; behind them those of `more` where it has all.

    Raises:
        IntegrityError: no such archive, or an array that is missing, damaged or too large.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if {f"{name}.npy" for name in more} <= set(archive.namelist()):
                names += more
            return [_array(archive, f"{name}.npy") for name in names]
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on a damaged file
        raise IntegrityError(f"{origin} is no golden crop ({str(error)[:200]}); export the bundle again") from error


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array of the archive; a header that promises gigabytes is refused before they are unpacked."""
    if (size := archive.getinfo(name).file_size) > _LARGEST_ARRAY:
        raise ValueError(f"{name} has {size} bytes unpacked, at most {_LARGEST_ARRAY} are read")
    return np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
