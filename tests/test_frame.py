from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kp_runtime.errors import ImageError, InputError, MissingExtraError
from kp_runtime.frame import (
    IMAGE_SUFFIXES,
    Frame,
    _is_cut_off,
    _orientation,
    as_frame,
    image_from_bytes,
    image_from_file,
)
from tests.conftest import short_of_memory


def exif(orientation: int, order: str = ">") -> bytes:
    """A TIFF header and one tag, 0x0112."""
    start = b"MM" if order == ">" else b"II"
    return start + struct.pack(f"{order}HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


# turn by 90 degrees clockwise to see the picture upright
EXIF_TURNED = b"Exif\0\0" + exif(6)


def encoded(image: np.ndarray, suffix: str) -> bytes:
    return bytes(cv2.imencode(suffix, image)[1])


def turned_jpeg(image: np.ndarray, orientation: int) -> bytes:
    return with_app1(encoded(image, ".jpg"), b"Exif\0\0" + exif(orientation))


def turned_png(image: np.ndarray, orientation: int) -> bytes:
    png, chunk = encoded(image, ".png"), b"eXIf" + exif(orientation)
    return png[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def turned_webp(image: np.ndarray, orientation: int, prefix: bytes = b"", order: str = "<") -> bytes:
    """Lossless; in front of the picture a chunk of odd length, as any may be that a reader does not know."""
    picture = bytes(cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1])[12:]
    if picture.startswith(b"VP8X"):  # OpenCV 5's own
        picture = picture[18:]
    (height, width), kept = image.shape[:2], prefix + exif(orientation, order)
    sides = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
    chunks = [(b"VP8X", b"\x08\0\0\0" + sides), (b"KEEP", b"odd"), (b"EXIF", kept)]
    full, odd, last = (name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for name, body in chunks)
    body = b"WEBP" + full + odd + picture + last
    return b"RIFF" + struct.pack("<I", len(body)) + body


def turned_tiff(image: np.ndarray, orientation: int) -> bytes:
    """OpenCV's file with another directory at its end."""
    tiff = encoded(image, ".tif")
    at = int.from_bytes(tiff[4:8], "little")
    tags = [tiff[i : i + 12] for i in range(at + 2, at + 2 + 12 * int.from_bytes(tiff[at : at + 2], "little"), 12)]
    tags = [tag for tag in tags if tag[:2] != b"\x12\x01"] + [struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)]
    tags.sort(key=lambda tag: int.from_bytes(tag[:2], "little"))
    tiff += b"\0" * (len(tiff) % 2)
    directory = struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + directory


TURNED = {
    ".jpg": turned_jpeg,
    ".jpeg": turned_jpeg,
    ".png": turned_png,
    ".webp": turned_webp,
    ".tif": turned_tiff,
    ".tiff": turned_tiff,
}


def with_app1(jpeg: bytes, body: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


@pytest.fixture
def picture() -> np.ndarray:
    """Dark with a bright top-left, so that a turn shows."""
    image = np.full((40, 60, 3), 30, np.uint8)
    image[:20, :30] = (200, 120, 220)
    return image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5, 3), np.uint16), r"must be uint8.*got uint16; scale it down first, the camera's own white"),
        (np.zeros((5, 5, 3), np.float32), r"must be uint8.*got float32$"),
        (np.zeros((5, 5, 2), np.uint8), r"got shape \(5, 5, 2\)"),
        (np.zeros((5, 5, 5), np.uint8), r"got shape \(5, 5, 5\)"),
        (np.zeros((2, 5, 5, 3), np.uint8), r"got shape \(2, 5, 5, 3\)"),
        (np.zeros(5, np.uint8), r"got shape \(5,\)"),
        (np.zeros((0, 5, 3), np.uint8), r"the image is empty: its shape is \(0, 5, 3\)"),
        ([[1, 2], [3, 4]], "must be a numpy array, got list"),
        (None, "must be a numpy array, got NoneType; kp_runtime.image_from_file gives one, and says"),
    ],
)
def test_bad_arrays(image: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        as_frame(image)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "hint"), [("a.jpg", ""), ("a.HEIC", "; save it as JPEG"), ("a.MOV", "; kp run takes videos")]
)
def test_what_to_do_with_what_is_no_image(name: str, hint: str) -> None:
    with pytest.raises(ImageError, match=rf"{name} is no image that OpenCV can decode \(.*\){hint}$"):
        image_from_bytes(b"no image", name)


def test_bad_channel_order() -> None:
    with pytest.raises(ImageError, match="must be 'bgr' or 'rgb', got 'gbr'"):
        as_frame(np.zeros((5, 5, 3), np.uint8), "gbr")


@pytest.mark.parametrize(
    ("shape", "order", "layout"),
    [
        ((4, 6), "bgr", "gray"),
        ((4, 6, 1), "rgb", "gray"),
        ((4, 6, 3), "bgr", "bgr"),
        ((4, 6, 3), "rgb", "rgb"),
        ((4, 6, 4), "bgr", "bgra"),
        ((4, 6, 4), "rgb", "rgba"),
    ],
)
def test_layouts(shape: tuple[int, ...], order: str, layout: str) -> None:
    image = np.zeros(shape, np.uint8)
    frame = as_frame(image, order)
    assert (frame.layout, frame.size_hw) == (layout, (4, 6))
    assert np.shares_memory(frame.data, image)
    assert as_frame(frame) is frame


@pytest.mark.parametrize(
    ("data", "layout", "message"),
    [
        (np.zeros((4, 6)), "gray", r"must be uint8 with 1 channel.*got float64"),
        (np.zeros((4, 6), np.uint8), "bgr", r"with 3 channel.*got uint8 \(4, 6\)"),
        (np.zeros((4, 6, 3), np.uint8), "rgba", r"with 4 channel.*got uint8 \(4, 6, 3\)"),
        (np.zeros((4, 0), np.uint8), "gray", r"not empty; got uint8 \(4, 0\)"),
        (np.zeros((4, 6), np.uint8), "yuyv", "no layout 'yuyv'; choose from bgr, rgb.*nv12, i420"),
        (np.zeros((4, 6), np.uint8), "nv12", r"\(h \+ h / 2, w\) with even h and w.*got uint8 \(4, 6\)"),
        (np.zeros((6, 5), np.uint8), "i420", r"give the luma plane alone as 'gray'.*got uint8 \(6, 5\)"),
        (np.zeros((6, 4, 1), np.uint8), "nv12", r"got uint8 \(6, 4, 1\)"),
    ],
)
def test_a_frame_is_what_its_layout_says(data: np.ndarray, layout: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Frame(data, layout)


@pytest.mark.parametrize("layout", ["nv12", "i420"])
def test_video_frames_are_two_thirds_as_high_as_their_data(layout: str) -> None:
    assert Frame(np.zeros((9, 8), np.uint8), layout).size_hw == (6, 8)


@pytest.mark.parametrize(
    ("layout", "luma_range", "message"),
    [
        ("gray", "tv", "range must be 'full' or 'limited', got 'tv'"),
        ("bgr", "limited", r"a bgr frame can't have limited range.*\(gray, nv12, i420\); leave range at 'full'"),
    ],
)
def test_bad_ranges(layout: str, luma_range: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Frame(np.zeros((4, 6, 3), np.uint8), layout, luma_range)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff"])
def test_lossless_files_come_back(suffix: str, picture: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(encoded(picture, suffix))
    assert np.array_equal(image_from_file(tmp_path / f"a{suffix}"), picture)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_files_come_as_bgr(channels: int, picture: np.ndarray, tmp_path: Path) -> None:
    code = cv2.COLOR_BGR2GRAY if channels == 1 else cv2.COLOR_BGR2BGRA
    stored = cv2.cvtColor(picture, code)
    (tmp_path / "a.png").write_bytes(encoded(stored, ".png"))
    wanted = cv2.cvtColor(stored, cv2.COLOR_GRAY2BGR) if channels == 1 else picture
    assert np.array_equal(image_from_file(tmp_path / "a.png"), wanted)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", sorted(set(IMAGE_SUFFIXES) - {".bmp"}))  # it has no EXIF
def test_exif_rotation_comes_upright(suffix: str, orientation: int, picture: np.ndarray, tmp_path: Path) -> None:
    """OpenCV 4.5.4 turns no PNG, and none before 4.13 a WebP."""
    path = tmp_path / f"turned{suffix}"
    path.write_bytes(TURNED[suffix](picture, orientation))
    upright = {
        2: picture[:, ::-1],
        3: np.rot90(picture, 2),
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture),
    }.get(orientation, picture)
    read = image_from_file(path)
    assert read.shape == upright.shape
    assert np.abs(read.astype(int) - upright).mean() < (5 if "jp" in suffix else 0.01)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_exif_of_a_webp_as_its_writers_write_it(prefix: bytes, order: str, picture: np.ndarray) -> None:
    assert np.array_equal(image_from_bytes(turned_webp(picture, 8, prefix, order)), np.rot90(picture))


@pytest.mark.parametrize("kept", range(0, 26, 5))
def test_a_webp_with_a_cut_off_exif_comes_as_it_is(kept: int, picture: np.ndarray) -> None:
    webp = turned_webp(picture, 6)
    at = len(webp) - len(exif(6)) - 8
    end = b"EXIF" + struct.pack("<I", kept) + exif(6)[:kept] + b"\0" * (kept % 2)
    cut = b"RIFF" + struct.pack("<I", at + len(end) - 8) + webp[8:at] + end
    assert image_from_bytes(cut).shape in (picture.shape, (60, 40, 3))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.jpg can't be read: No such file"):
        image_from_file(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="an image's file must be a path, as text or of pathlib; got NoneType"):
        image_from_file(None)  # type: ignore[arg-type]


def test_too_little_memory_is_no_fault_of_the_image(picture: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture, ".png")
    short_of_memory(monkeypatch)
    with pytest.raises(MemoryError, match=r"the image can't be decoded: .*Failed to allocate 108000000 bytes"):
        image_from_bytes(data)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_plain_file_is_not_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    """Label files and effects name pictures: a pipe would be waited for, and a device has no end."""
    make(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png can't be read: it is no plain file"):
        image_from_file(tmp_path / "a.png")


def test_a_file_that_no_memory_holds_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(1 << 40)  # as an archive may hold it, in a few bytes
    with pytest.raises(ImageError, match=r"a\.png can't be read: it has over 2147483647 bytes"):
        image_from_file(tmp_path / "a.png")


def test_a_link_to_a_photo_is_read(picture: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture, ".png"))
    (tmp_path / "b.png").symlink_to("a.png")
    assert np.array_equal(image_from_file(tmp_path / "b.png"), picture)


@pytest.mark.parametrize("content", [b"", b"not an image\n", b"\xff\xd8", b"GIF"], ids=["empty", "text", "soi", "gif"])
def test_no_image(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.jpg (is no image|is cut off)"):
        image_from_file(tmp_path / "a.jpg")


@pytest.mark.parametrize("part", [0.3, 0.7, 0.98])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_cut_off_files(suffix: str, part: float, tmp_path: Path, rng: np.random.Generator) -> None:
    data = encoded(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), suffix)
    (tmp_path / f"a{suffix}").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ImageError, match="is cut off: the end of the image is missing"):
        image_from_file(tmp_path / f"a{suffix}")


def test_cut_off_jpeg_with_a_whole_thumbnail(picture: np.ndarray, tmp_path: Path) -> None:
    """The thumbnail inside an EXIF block has an end marker of its own."""
    thumbnail = encoded(picture[::4, ::4], ".jpg")
    assert thumbnail.endswith(b"\xff\xd9")
    whole = with_app1(encoded(picture, ".jpg"), EXIF_TURNED + thumbnail)
    (tmp_path / "a.jpg").write_bytes(whole)
    assert image_from_file(tmp_path / "a.jpg").shape == (60, 40, 3)
    (tmp_path / "a.jpg").write_bytes(whole[:-20])
    with pytest.raises(ImageError, match="is cut off"):
        image_from_file(tmp_path / "a.jpg")


@pytest.mark.parametrize("before", [b"\xff", b"\xff\x01", b"\xff\xd0"], ids=["fill", "TEM", "RST0"])
def test_markers_without_a_length_are_passed_over(before: bytes, picture: np.ndarray) -> None:
    jpeg, thumbnail = encoded(picture, ".jpg"), encoded(picture[::4, ::4], ".jpg")
    whole = with_app1(jpeg, EXIF_TURNED + thumbnail)
    whole = whole[:2] + before + whole[2:]
    assert image_from_bytes(whole).size == picture.size
    with pytest.raises(ImageError, match="is cut off"):
        image_from_bytes(whole[:-20])


@pytest.mark.parametrize(
    ("asked", "begin", "repeated"),
    [
        (_is_cut_off, b"\xff\xd8", b"\xff"),
        (_is_cut_off, b"\xff\xd8", b"\xff\xd0"),
        (_is_cut_off, b"\xff\xd8", b"\xff\xe0\0\2"),
        (_orientation, b"\x89PNG\r\n\x1a\n", bytes(12)),
        (_orientation, b"RIFF\0\0\0\0WEBP", bytes(8)),
    ],
    ids=["fill", "RST0", "APP0", "PNG", "WebP"],
)
def test_an_upload_of_markers_alone_takes_few_steps(
    asked: Callable[[bytes], int], begin: bytes, repeated: bytes
) -> None:
    """Each holds Python's lock, for which all other threads wait."""
    steps = 0

    def step(*_: object) -> Any:
        nonlocal steps
        steps += 1
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        answer = asked(begin + 100_000 * repeated)
    finally:
        sys.settrace(before)
    assert answer == 1  # cut off, or upright
    assert steps < 100_000


def test_bytes_need_no_file(picture: np.ndarray) -> None:
    assert np.array_equal(image_from_bytes(encoded(picture, ".png")), picture)
    assert np.array_equal(image_from_bytes(memoryview(encoded(picture, ".png"))), picture)
    with pytest.raises(ImageError, match=r"^upload 7 is no image"):
        image_from_bytes(b"text", "upload 7")
    with pytest.raises(ImageError, match="the image must be given as bytes, got str; image_from_file takes a"):
        image_from_bytes("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bit_files(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(encoded(np.full((8, 8, 3), 40000, np.uint16), suffix))
    with pytest.raises(ImageError, match="uint16 samples; save it with 8 bits a channel, the camera's own white"):
        image_from_file(tmp_path / f"a{suffix}")


def test_without_opencv_the_error_has_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, picture: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture, ".png"))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"opencv-python-headless.*pip install 'kp-edge\[image\]'"):
        image_from_file(tmp_path / "a.png")
