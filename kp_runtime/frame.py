"""An image as the crop path takes it: a host array with a known layout of its channels, in a `Frame`."""

from __future__ import annotations

import errno
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kp_runtime.errors import ImageError, InputError, missing_or_broken, reason_of
from kp_runtime.files import as_path, open_plain

__all__ = [
    "CHANNELS",
    "IMAGE_SUFFIXES",
    "OTHER_SUFFIXES",
    "Frame",
    "Scratch",
    "as_frame",
    "bgr_copy",
    "bytes_of_picture",
    "check_layout",
    "cv2_name",
    "image_from_bytes",
    "image_from_file",
    "import_cv2",
    "size_hw_from_shape",
]

CHANNELS = {"bgr": 3, "rgb": 3, "bgra": 4, "rgba": 4, "gray": 1, "nv12": 1, "i420": 1}
"""The layouts, with the bytes from a pixel to the next in what is read of them."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Of files that are taken for photos where a folder is named."""

OTHER_SUFFIXES = (
    ".heic", ".heif", ".avif", ".gif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"
)  # fmt: skip
"""Of pictures, camera raws among them, that are not: most OpenCVs have no decoder for them."""

_LARGEST_PICTURE = (1 << 31) - 1  # bytes of a file; OpenCV counts them in 31 bits

_LUMA_PLANES = ("gray", "nv12", "i420")
_VIDEO = ("nv12", "i420")

_PNG = b"\x89PNG\r\n\x1a\n"
_MARKER = re.compile(rb"\xff+")  # how one begins: a JPEG may have any number of fill bytes (ISO/IEC 10918-1, B.1.1.2)
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length of their own: TEM, restarts (B.1.1.3)
_MOST_MARKERS = 10_000  # in front of a JPEG's scan, or chunks; an upload of these alone would keep all threads waiting
_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}
"""What cv2.flip is told for an orientation (Exif 2.3, 4.6.4); over 4 the picture is transposed first."""

# ITU-T H.273, 8.3, VideoFullRangeFlag 0: 16 is black, 235 is white
_STRETCHED = np.clip((np.arange(256) - 16) * 255 / 219 + 0.5, 0, 255).astype(np.uint8)


def check_layout(layout: str, luma_range: str) -> None:
    """Checks the names of a layout and of a range.

    Raises:
        ImageError: an unknown one, or limited luma of a layout that has no luma plane.
    """
    if layout not in CHANNELS:
        raise ImageError(f"there is no layout {layout!r}; choose from {', '.join(CHANNELS)}")
    if luma_range not in ("full", "limited"):
        raise ImageError(f"the range must be 'full' or 'limited', got {luma_range!r}")
    if luma_range == "limited" and layout not in _LUMA_PLANES:
        raise ImageError(
            f"a {layout} frame can't have limited range, which is of luma planes ({', '.join(_LUMA_PLANES)}); "
            "leave range at 'full'"
        )


def size_hw_from_shape(layout: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width of an image whose array has this shape; None where the layout has no such arrays."""
    if 0 in shape or len(shape) not in (2, 3):
        return None
    if layout in _VIDEO:
        fits = len(shape) == 2 and shape[0] % 3 == 0 and shape[1] % 2 == 0
        return (shape[0] // 3 * 2, shape[1]) if fits else None
    channels = CHANNELS[layout]
    fits = shape[2:] == (channels,) or (channels == 1 and len(shape) == 2)
    return (shape[0], shape[1]) if fits else None


class Scratch:
    """Working memory kept between calls: one block for each use, as large as the largest asked for.

    Not for two threads at once.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, NDArray[np.uint8]] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """An array of this shape with any content; the next one for the same use takes its place."""
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        block = self._blocks.get(use)
        if block is None or block.size < wanted:
            block = self._blocks[use] = np.empty(wanted, np.uint8)
        return block[:wanted].view(dtype).reshape(shape)


@dataclass(frozen=True, eq=False)
class Frame:
    """A host image: `data` uint8 in the given `layout`; not copied.

    Attributes:
        data: uint8, with any distance between rows; its shape is the layout's.
        layout: `bgr` or `rgb` `(h, w, 3)`, `bgra` or `rgba` `(h, w, 4)`, `gray` `(h, w)` or `(h, w, 1)`, `nv12` or
            `i420` `(h + h / 2, w)` with the luma plane on top, h and w even. Of these two the luma plane alone is
            read; where it lies apart from the colour, it is a `gray` frame.
        range: of the luma of `gray`, `nv12` and `i420`: `full` is 0 to 255 and read as it is;
            `limited` is 16 to 235, as most video has it, and is stretched to 0 to 255.

    Raises:
        ImageError: an unknown layout or range, or data that the layout does not describe.
    """

    data: NDArray[Any]
    layout: str
    range: str = "full"

    def __post_init__(self) -> None:
        check_layout(self.layout, self.range)
        if not isinstance(self.data, np.ndarray):
            raise ImageError(f"a frame's data must be a numpy array, got {type(self.data).__name__}")
        if self.data.dtype != np.uint8 or size_hw_from_shape(self.layout, self.data.shape) is None:
            wanted = f"with {CHANNELS[self.layout]} channel(s)"
            if self.layout in _VIDEO:
                wanted = "(h + h / 2, w) with even h and w (give the luma plane alone as 'gray')"
            raise ImageError(
                f"a {self.layout} frame must be uint8 {wanted}, not empty; got {self.data.dtype} {self.data.shape}"
            )

    def __repr__(self) -> str:
        height, width = self.size_hw
        return f"Frame({width} x {height} px, {self.layout!r}, {self.range!r})"

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.data.shape[:2]
        return (height // 3 * 2 if self.layout in _VIDEO else height), width

    def luma(self, x0: int, y0: int, x1: int, y1: int, scratch: Scratch | None = None) -> NDArray[np.uint8]:
        """The grey levels of a window, `(y1 - y0, x1 - x0)` uint8, by OpenCV's BGR2GRAY.

        A view of a luma plane of full range; otherwise in `scratch`'s memory when it is given.
        """
        window = self.data[y0:y1, x0:x1]
        plane = self.layout in _LUMA_PLANES
        if plane:
            window = window[:, :, 0] if window.ndim == 3 else window
            if self.range == "full":
                return window
        cv2 = import_cv2()
        grey = None if scratch is None else scratch.array("luma", (y1 - y0, x1 - x0))
        if plane:
            return cv2.LUT(window, _STRETCHED, dst=grey)  # type: ignore[no-any-return]
        return cv2.cvtColor(window, getattr(cv2, f"COLOR_{self.layout.upper()}2GRAY"), dst=grey)  # type: ignore[no-any-return]


def as_frame(image: Frame | NDArray[Any], layout: str = "bgr") -> Frame:
    """Checks an image and wraps it.

    Args:
        image: a `Frame`, or a uint8 array: `(h, w, 3)` in the order of `layout`, `(h, w, 4)` with
            a fourth channel that is ignored, or grey as `(h, w)` or `(h, w, 1)`.
        layout: `bgr` (as OpenCV reads) or `rgb`; it matters for colour images only.

    Raises:
        ImageError: not an array, not uint8, empty, or another number of channels.
    """
    if isinstance(image, Frame):
        return image
    if layout not in ("bgr", "rgb"):
        raise ImageError(f"the channel order must be 'bgr' or 'rgb', got {layout!r}")
    if not isinstance(image, np.ndarray):
        hint = "kp_runtime.image_from_file gives one, and says what is wrong with a file"
        raise ImageError(f"an image must be a numpy array, got {type(image).__name__}; {hint}")
    if image.dtype != np.uint8:
        deep = "; scale it down first, the camera's own white to 255: (image >> 8).astype(np.uint8), of 12 bits >> 4"
        hint = deep if image.dtype == np.uint16 else ""
        raise ImageError(f"an image must be uint8 (0 to 255), got {image.dtype}{hint}")
    if image.size == 0:
        raise ImageError(f"the image is empty: its shape is {image.shape}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim == 2:
        return Frame(image, "gray")
    if image.ndim == 3 and image.shape[2] in (3, 4):
        return Frame(image, layout + ("a" if image.shape[2] == 4 else ""))
    raise ImageError(f"an image must be (h, w), (h, w, 3) or (h, w, 4), got shape {image.shape}")


def bgr_copy(image: Frame | NDArray[Any]) -> NDArray[np.uint8]:
    """A copy of an image that `as_frame` takes, `(h, w, 3)` uint8 BGR; an array is BGR or grey, of video luma is kept.

    Raises:
        ImageError: as `as_frame`.
    """
    frame = as_frame(image)
    if frame.layout == "bgr":
        return frame.data.copy()
    cv2, (height, width), luma = import_cv2(), frame.size_hw, frame.layout in _LUMA_PLANES
    source, layout = (frame.luma(0, 0, width, height), "GRAY") if luma else (frame.data, frame.layout.upper())
    return cv2.cvtColor(source, getattr(cv2, f"COLOR_{layout}2BGR"))  # type: ignore[no-any-return]


def image_from_file(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Decodes an image file, turned upright by its EXIF orientation.

    Returns:
        `(h, w, 3)` uint8, BGR.

    Raises:
        InputError: `path` is none.
        ImageError: the file is missing, cut off, 16 bits deep, or no image. Damage inside a JPEG is not noticed: the
            decoder fills what it can't read.
        MemoryError: there is none for its pixels.
        MissingExtraError: OpenCV is not installed.
    """
    return image_from_bytes(bytes_of_picture(as_path(path, "an image's file")), str(path))


def bytes_of_picture(path: Path) -> bytes:
    """What is in a picture's file, which a file of somebody else's may name: no device or pipe, that have no end.

    Raises:
        ImageError: it can't be read, is no plain file or a link to one, or is larger than OpenCV takes.
    """
    try:
        with open_plain(path, links=True) as file:
            if os.fstat(file.fileno()).st_size > _LARGEST_PICTURE:
                raise OSError(errno.EFBIG, f"it has over {_LARGEST_PICTURE} bytes")
            return file.read()
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise ImageError(f"{str(path)[:1000]} can't be read: {getattr(error, 'strerror', None) or error}") from error


def image_from_bytes(data: bytes | bytearray | memoryview, origin: str = "the image") -> NDArray[np.uint8]:
    """Decodes an image file's bytes, turned upright by its EXIF orientation; `origin` stands in the messages.

    Returns:
        `(h, w, 3)` uint8, BGR.

    Raises:
        ImageError: the image is cut off, 16 bits deep, or none.
        MemoryError: there is none for its pixels.
        MissingExtraError: OpenCV is not installed.
    """
    if isinstance(data, memoryview):
        data = bytes(data)
    if not isinstance(data, bytes | bytearray):
        raise ImageError(f"{origin} must be given as bytes, got {type(data).__name__}; image_from_file takes a path")
    if _is_cut_off(data):
        raise ImageError(f"{origin} is cut off: the end of the image is missing; copy or download it again")
    cv2, turn = import_cv2(), _orientation(data)
    buffer = np.frombuffer(data, np.uint8)
    try:
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | (cv2.IMREAD_IGNORE_ORIENTATION if turn > 1 else 0)
        image = cv2.imdecode(buffer, flags) if data else None
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise ImageError(f"{origin} has more pixels than are taken; OPENCV_IO_MAX_IMAGE_PIXELS sets it") from error
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(f"{origin} can't be decoded: {reason_of(error)}") from error
        raise ImageError(f"{origin} can't be decoded: {reason_of(error)}") from error
    if image is None:
        suffix = Path(origin).suffix.lower()
        hint = "; save it as JPEG" if suffix in OTHER_SUFFIXES else ""
        if suffix in (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm"):
            hint = "; kp run takes videos"
        raise ImageError(f"{origin} is no image that OpenCV can decode (JPEG, PNG, BMP, TIFF, WebP){hint}")
    if image.dtype != np.uint8:
        raise ImageError(
            f"{origin} has {image.dtype} samples; save it with 8 bits a channel, "
            "the camera's own white, such as 4095 of 12 bits, as 255"
        )
    image = cv2.transpose(image) if turn > 4 else image
    return cv2.flip(image, _FLIPS[turn]) if turn in _FLIPS else image  # type: ignore[no-any-return]


def _orientation(data: bytes | bytearray) -> int:
    """That of a PNG's or WebP's EXIF, 1 to 8: not every OpenCV turns these. 1, upright, of what all of them turn."""
    if data.startswith(_PNG):
        at, head, behind = 8, struct.Struct(">I4s"), 4  # a checksum behind each chunk
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        at, head, behind = 12, struct.Struct("<4sI"), 0
    else:
        return 1
    for _ in range(_MOST_MARKERS):
        if at + 8 > len(data):
            break
        one, other = head.unpack_from(data, at)
        name, size = (other, one) if behind else (one, other)
        at += 8
        if name in (b"eXIf", b"EXIF"):
            return _orientation_of_exif(bytes(data[at : at + size]).removeprefix(b"Exif\0\0"))
        at += size + (behind or size % 2)
    return 1


def _orientation_of_exif(tiff: bytes) -> int:
    """The tag 0x0112 of a TIFF header's first directory (Exif 2.3, 4.6.2)."""

    def number(at: int, length: int) -> int:
        return int.from_bytes(tiff[at : at + length], "little" if tiff.startswith(b"II") else "big")

    first = number(4, 4) + 2
    for at in range(first, first + 12 * number(first - 2, 2), 12):
        if number(at, 2) == 0x0112:
            return turn if 1 <= (turn := number(at + 8, 2)) <= 8 else 1
    return 1


def _is_cut_off(data: bytes | bytearray) -> bool:
    """Whether a JPEG or PNG lacks its end; OpenCV would decode it and leave the rest grey."""
    if data.startswith(_PNG):
        return b"IEND" not in data
    if not data.startswith(b"\xff\xd8"):
        return False
    at = 2
    for _ in range(_MOST_MARKERS):
        marker = _MARKER.match(data, at)
        if marker is None or marker.end() + 3 > len(data) or data[marker.end()] == 0xDA:
            break
        at = marker.end() + 1
        if data[at - 1] not in _ALONE:
            at += int.from_bytes(data[at : at + 2], "big")
    return data.find(b"\xff\xd9", at) < 0


def cv2_name(name: str | os.PathLike[str]) -> str:
    """A file's name as OpenCV takes it, which ends the process at one that is no text.

    Raises:
        InputError: it is none.
    """
    text = os.fspath(name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{text!r}: its name is no text in UTF-8, which OpenCV needs; rename it") from error
    return text


def import_cv2() -> Any:
    """OpenCV, or the error that says how to get it."""
    try:
        import cv2
    except ImportError as error:
        purpose = "cropping and drawing on the CPU"
        raise missing_or_broken(error, "cv2", "opencv-python-headless", "image", purpose) from error
    return cv2
