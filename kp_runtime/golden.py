"""The golden crop: what every engine must get right when it opens a bundle."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.errors import IntegrityError
from kp_runtime.spec import ModelSpec

__all__ = ["GOLDEN_NAME", "Golden", "arrays_from_npz", "golden_from_bytes"]

GOLDEN_NAME = "golden.npz"
_MOST_CROPS = 16
_LARGEST_ARRAY = 32 << 20
"""In bytes, unpacked; sixteen of the largest crops are half of it."""


@dataclass(frozen=True, eq=False)
class Golden:
    """Crops `(n, 1, size, size)` uint8, and PyTorch's answer to them.

    Attributes:
        crops: those.
        keypoints: `(n, 68, 2)`, pixels of the crop.
        lost_score: `(n,)`; None of a model that gives none.
    """

    crops: NDArray[np.uint8]
    keypoints: NDArray[np.floating]
    lost_score: NDArray[np.floating] | None = None


def golden_from_bytes(data: bytes, spec: ModelSpec, origin: str = GOLDEN_NAME) -> Golden:
    """Reads the file's bytes; `origin` stands in the messages.

    Raises:
        IntegrityError: no such archive, or arrays of another shape or dtype.
    """
    crops, *outputs = arrays_from_npz(data, ("crops", *spec.outputs), origin)
    n = len(crops) if crops.ndim else 0
    right = crops.shape == (n, 1, spec.size, spec.size) and crops.dtype == np.uint8 and 1 <= n <= _MOST_CROPS
    for array, shape in zip(outputs, spec.outputs.values(), strict=True):
        right = right and array.dtype.kind == "f" and array.shape == (n, *shape)
    if not right:
        arrays = zip(("crops", *spec.outputs), (crops, *outputs), strict=True)
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays)
        raise IntegrityError(f"{origin} is no golden crop ({found}); export the bundle again")
    return Golden(crops, outputs[0], outputs[1].reshape(-1) if len(outputs) > 1 else None)


def arrays_from_npz(data: bytes, names: tuple[str, ...], origin: str) -> list[NDArray[Any]]:
    """The named arrays of an archive of numpy's, none of them a pickle.

    Raises:
        IntegrityError: no such archive, or an array that is missing, damaged or too large.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return [_array(archive, f"{name}.npy") for name in names]
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds on a damaged file
        raise IntegrityError(f"{origin} is no golden crop ({str(error)[:200]}); export the bundle again") from error


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array of the archive; a header that promises gigabytes is refused before they are unpacked."""
    if (size := archive.getinfo(name).file_size) > _LARGEST_ARRAY:
        raise ValueError(f"{name} has {size} bytes unpacked, at most {_LARGEST_ARRAY} are read")
    return np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
