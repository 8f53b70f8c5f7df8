from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kp_runtime import preprocess_cpu
from kp_runtime.cores import usable_cores
from kp_runtime.frame import Frame, Scratch, as_frame
from kp_runtime.geometry import crop_from_luma, matrices_from_boxes
from kp_runtime.preprocess_cpu import CpuCropper, crops_from_frame
from tests.conftest import no_thread_at
from tests.reference import reference_luma

SIZE = 64
BOXES = np.array([[5, 8, 30, 30], [-40, -20, 90, 100], [100.5, 60.25, 290, 215], [10, 20, 390, 290]], float)
LAYOUTS = ("bgr", "rgb", "bgra", "rgba")


@pytest.fixture
def bgr(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (301, 403, 3), dtype=np.uint8)


@pytest.fixture
def matrices() -> np.ndarray:
    return matrices_from_boxes(BOXES, SIZE, 1.3, angle=[0.0, 0.3, -0.2, 1.0])


def frame_in(layout: str, bgr: np.ndarray) -> Frame:
    colour = bgr if layout.startswith("bgr") else bgr[:, :, ::-1]
    return Frame(np.dstack([colour, bgr[:, :, 1]]) if layout.endswith("a") else colour, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_luma_is_opencv_s_integer_formula(layout: str, bgr: np.ndarray) -> None:
    luma = frame_in(layout, bgr).luma(3, 7, 397, 290)
    assert np.array_equal(luma, reference_luma(bgr)[7:290, 3:397])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_crops(layout: str, bgr: np.ndarray, matrices: np.ndarray) -> None:
    crops = crops_from_frame(frame_in(layout, bgr), matrices, SIZE)
    assert crops.shape == (4, 1, SIZE, SIZE)
    assert np.array_equal(crops, crops_from_frame(as_frame(reference_luma(bgr)), matrices, SIZE))


@pytest.mark.parametrize("rows", ["close", "apart", "upside down"])
@pytest.mark.parametrize("layout", ["nv12", "i420"])
def test_video_frames_are_cut_from_their_luma_plane(
    layout: str, rows: str, matrices: np.ndarray, rng: np.random.Generator
) -> None:
    data = rng.integers(0, 256, (450, 500), dtype=np.uint8)
    data = {"close": data[:, :402].copy(), "apart": data[:, 20:422], "upside down": data[::-1, 20:422]}[rows]
    plane = np.ascontiguousarray(data[:300])
    crops = crops_from_frame(Frame(data, layout), matrices, SIZE)
    assert np.array_equal(crops, crops_from_frame(Frame(plane, "gray"), matrices, SIZE))


def test_limited_range_is_stretched_before_anything_else(matrices: np.ndarray, rng: np.random.Generator) -> None:
    """H.273: (y - 16) * 255 / 219, rounded; no level lies half-way, since 219 is odd."""
    plane = rng.integers(0, 256, (300, 402), dtype=np.uint8)
    stretched = np.clip(np.rint((plane.astype(np.float64) - 16) * 255 / 219), 0, 255).astype(np.uint8)
    video = np.vstack([plane, rng.integers(0, 256, (150, 402), dtype=np.uint8)])
    wanted = crops_from_frame(Frame(stretched, "gray"), matrices, SIZE)
    for frame in (Frame(plane, "gray", "limited"), Frame(plane[:, :, None], "gray", "limited")):
        assert np.array_equal(crops_from_frame(frame, matrices, SIZE), wanted)
    assert np.array_equal(crops_from_frame(Frame(video, "nv12", "limited"), matrices, SIZE), wanted)


def test_one_by_one_from_the_whole_image_gives_the_same_bits(bgr: np.ndarray, matrices: np.ndarray) -> None:
    crops = crops_from_frame(as_frame(bgr), matrices, SIZE)
    for crop, matrix in zip(crops, matrices, strict=True):
        assert np.array_equal(crop[0], crop_from_luma(reference_luma(bgr), matrix, SIZE))


@pytest.mark.parametrize("layout", [*LAYOUTS, "gray"])
def test_a_face_that_is_cut_in_bands_has_the_same_bits(
    layout: str, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = Frame(bgr[..., 0], "gray") if layout == "gray" else frame_in(layout, bgr)
    boxes = np.array([[0, 0, 401, 299], [-90, -40, 300, 310], [20, 30, 390, 270]], float)
    crops = [(size, matrices_from_boxes(boxes, size, 1.2, angle=0.2)) for size in (200, 64, 7)]
    wanted = [crops_from_frame(frame, matrices, size) for size, matrices in crops]
    for pixels in (1, 5000, 60_000):
        monkeypatch.setattr("kp_runtime.geometry._BAND", pixels)
        for (size, matrices), cut in zip(crops, wanted, strict=True):
            assert np.array_equal(crops_from_frame(frame, matrices, size), cut)


def test_a_huge_face_leaves_little_memory_with_the_thread_that_cut_it() -> None:
    """Of 12 million pixels, the grey levels and their whole blocks; each thread of a service would keep them."""
    scratch, boxes = Scratch(), np.array([[200.0, 100, 3801, 2900]])
    frame = Frame(np.zeros((2999, 3999, 3), np.uint8), "bgr")
    for size in (64, 999):
        crops_from_frame(frame, matrices_from_boxes(boxes, size, 1.3), size, scratch=scratch)
    blocks = {name: block.size for name, block in scratch._blocks.items()}
    maps = blocks.keys() & {"pixels", "weights"}  # OpenCV 5 is told where to sample: of the crop's size, not the face's
    assert sum(blocks[name] for name in blocks.keys() - maps) < 4 << 20
    assert sum(blocks[name] for name in maps) in (0, 6 * 999**2)


def test_out_is_filled_in_place(bgr: np.ndarray, matrices: np.ndarray) -> None:
    buffer = np.full((6, 1, SIZE, SIZE), 77, np.uint8)
    assert crops_from_frame(as_frame(bgr), matrices, SIZE, out=buffer[1:5]).base is buffer
    assert np.array_equal(buffer[1:5], crops_from_frame(as_frame(bgr), matrices, SIZE))
    assert (buffer[[0, 5]] == 77).all()


@pytest.mark.parametrize("size_hw", [(301, 403), (1, 1), (2, 700)])
def test_image_is_not_touched(size_hw: tuple[int, int], matrices: np.ndarray, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    before = image.copy()
    crops_from_frame(as_frame(image), matrices, SIZE)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("view", ["read-only", "flipped", "fortran", "every other", "padded rows", "grey (h, w, 1)"])
def test_memory_order_does_not_matter(view: str, bgr: np.ndarray, matrices: np.ndarray) -> None:
    views = {
        "read-only": np.frombuffer(bgr.tobytes(), np.uint8).reshape(bgr.shape),
        "flipped": bgr[::-1, ::-1],
        "fortran": np.asfortranarray(bgr),
        "every other": bgr[::2, ::2],
        "padded rows": np.pad(bgr, ((0, 0), (3, 8), (0, 0)))[:, 3:-8],
        "grey (h, w, 1)": bgr[:, :, :1],
    }
    image = views[view]
    frame = Frame(image, "gray") if view.startswith("grey") else as_frame(image)
    wanted = crops_from_frame(as_frame(np.ascontiguousarray(image)), matrices, SIZE)
    assert np.array_equal(crops_from_frame(frame, matrices, SIZE), wanted)


def test_zero_faces(bgr: np.ndarray) -> None:
    crops = crops_from_frame(as_frame(bgr), np.empty((0, 2, 3)), SIZE)
    assert crops.shape == (0, 1, SIZE, SIZE)
    assert crops.dtype == np.uint8


def grid(n: int) -> np.ndarray:
    corner = np.random.default_rng(n).uniform(0, 60, (n, 2))
    return matrices_from_boxes(np.concatenate([corner, corner + 20 + n % 7], axis=1), 64, 1.3)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 15, 33])
def test_several_threads_cut_the_same_crops(n: int, bgr: np.ndarray) -> None:
    cropper = CpuCropper(3)
    for _ in range(2):
        found = cropper.crops_from_frame(Frame(bgr, "bgr"), grid(n), 64)
        assert np.array_equal(found, crops_from_frame(Frame(bgr, "bgr"), grid(n), 64))
    cropper.close()


def test_threads_are_started_for_eight_faces_and_end_with_the_cropper(bgr: np.ndarray) -> None:
    def running() -> int:
        return sum(thread.name.startswith("kp-crops") for thread in threading.enumerate())

    frame, cropper = Frame(bgr, "bgr"), CpuCropper(2)
    cropper.crops_from_frame(frame, grid(7), 64)
    assert running() == 0
    cropper.crops_from_frame(frame, grid(8), 64)
    assert running() == 1
    cropper.close()
    assert running() == 0
    CpuCropper(1).crops_from_frame(frame, grid(40), 64)
    assert running() == 0


@pytest.mark.skipif(sys.platform != "linux" or usable_cores() < 2, reason="needs Linux and two cores")
def test_threads_run_on_the_croppers_cores(bgr: np.ndarray) -> None:
    mine = os.sched_getaffinity(0)
    for core in sorted(mine)[:2]:
        cropper = CpuCropper(2, frozenset([core]))
        cropper.crops_from_frame(Frame(bgr, "bgr"), grid(8), 64)
        (started,) = [thread for thread in threading.enumerate() if thread.name.startswith("kp-crops")]
        assert os.sched_getaffinity(started.native_id or 0) == {core}
        assert os.sched_getaffinity(0) == mine
        cropper.close()


def test_a_croppers_memory_is_used_again_until_it_is_closed(bgr: np.ndarray) -> None:
    cropper, frame = CpuCropper(1), Frame(bgr, "bgr")
    first, second = (cropper.crops_from_frame(frame, grid(3), 64) for _ in range(2))
    assert np.shares_memory(first, second)
    cropper.close()
    assert not np.shares_memory(first, cropper.crops_from_frame(frame, grid(3), 64))


def test_callers_of_one_cropper_do_not_disturb_each_other(bgr: np.ndarray) -> None:
    cropper, frame = CpuCropper(2), Frame(bgr, "bgr")
    right = {n: crops_from_frame(frame, grid(n), 64) for n in (8, 20)}

    def calls(n: int) -> bool:
        return all(np.array_equal(cropper.crops_from_frame(frame, grid(n), 64), right[n]) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, [8, 20, 8, 20]))
    cropper.close()


def test_a_cropper_that_is_closed_beside_calls(bgr: np.ndarray) -> None:
    cropper, frame, ended = CpuCropper(2), Frame(bgr, "bgr"), threading.Event()
    right = crops_from_frame(frame, grid(8), 64)

    def close() -> None:
        while not ended.wait(0.0005):
            cropper.close()

    closing = threading.Thread(target=close)
    closing.start()
    try:
        assert all(np.array_equal(cropper.crops_from_frame(frame, grid(8), 64), right) for _ in range(300))
    finally:
        ended.set()
        closing.join()
        cropper.close()


@pytest.mark.parametrize("fails", [1, 2])
def test_where_a_thread_can_not_be_started_the_others_do_its_part(
    fails: int, bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cropper, frame = CpuCropper(3), Frame(bgr, "bgr")
    failed = no_thread_at(monkeypatch, fails)

    def cut(*words: Any) -> np.ndarray:
        assert failed.wait(60), "a thread that is done before the next one is to be started would do that one's part"
        return crops_from_frame(*words)

    monkeypatch.setattr(preprocess_cpu, "crops_from_frame", cut)
    known = sys.getrefcount(bgr)
    for n in (33, 32):
        found = cropper.crops_from_frame(frame, grid(n), 64)
        assert np.array_equal(found, crops_from_frame(frame, grid(n), 64))
    cropper.close()
    assert sys.getrefcount(bgr) == known  # nothing waits for a thread that may come


def test_what_a_signal_s_error_leaves_at_work_writes_into_no_later_crops(
    bgr: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a deadline by SIGALRM, or Ctrl-C: it ends the wait for the other threads."""
    cropper, matrices, frames = CpuCropper(2), grid(8), [Frame(image, "bgr") for image in (bgr, bgr[::-1].copy())]
    began, late, over = (threading.Event() for _ in range(3))
    caller = threading.current_thread()

    def cut(frame: Frame, *words: Any) -> np.ndarray:
        if frame is frames[0]:
            if threading.current_thread() is caller:
                assert began.wait(60)
                return words[2]
            began.set()
            assert late.wait(60)
        crops = crops_from_frame(frame, *words)
        if frame is frames[0]:
            over.set()
        return crops

    def wait(helpers: list[Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preprocess_cpu, "crops_from_frame", cut)
    with monkeypatch.context() as interrupted:
        interrupted.setattr("kp_runtime.in_order.wait", wait)
        with pytest.raises(KeyboardInterrupt):
            cropper.crops_from_frame(frames[0], matrices, 64)
    found = cropper.crops_from_frame(frames[1], matrices[:7], 64)
    late.set()
    assert over.wait(60)
    assert np.array_equal(found, crops_from_frame(frames[1], matrices[:7], 64))
    cropper.close()


@pytest.mark.parametrize("bad", [0, 30])
def test_a_part_that_fails_is_the_callers_error(bad: int, bgr: np.ndarray) -> None:
    cropper, matrices = CpuCropper(2), grid(32)
    matrices[bad] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        cropper.crops_from_frame(Frame(bgr, "bgr"), matrices, 64)
    cropper.close()
