"""The CUDA crop kernel, run on the CPU block by block (`cuda_shim.h`), against the CPU path and the reference."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from kp_runtime.errors import InputError
from kp_runtime.frame import Frame, as_frame
from kp_runtime.geometry import crop_plan, matrices_from_boxes, mirrored_matrices
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.preprocess_cuda import faces_from_matrices
from tests.emulation import EmulatedKernel, built, case_bytes
from tests.reference import reference_crop, reference_luma, waves
from tests.test_geometry import BOXES, MARGIN, SIZE
from tests.tolerances import CROP_GREY, CROP_GREY_MEAN, CROP_NOISE, CROP_NOISE_MEAN, assert_close

LAYOUTS = ("bgr", "rgb", "bgra", "rgba", "gray", "nv12", "i420")
ALL_BOXES = BOXES | {
    "outside, left": (-500.0, 20.0, -400.0, 90.0),
    "outside, far below": (100.0, 9000.0, 3000.0, 12000.0),
}
ALL = np.array(list(ALL_BOXES.values()))


def frame_of(layout: str, bgr: np.ndarray, luma_range: str = "full", gap: int = 0) -> Frame:
    """A frame with the picture of `(h, w, 3)` BGR, h and w even; `gap` bytes of noise between its rows."""
    height, width = bgr.shape[:2]
    if layout in ("gray", "nv12", "i420"):
        noise = np.random.default_rng(1).integers(0, 256, (height // 2, width), dtype=np.uint8)
        data = reference_luma(bgr) if layout == "gray" else np.vstack([reference_luma(bgr), noise])
    else:
        data = bgr if layout.startswith("bgr") else bgr[:, :, ::-1]
        data = np.dstack([data, bgr[:, :, 1]]) if layout.endswith("a") else data
    rows = data.reshape(len(data), -1)
    spaced = np.random.default_rng(2).integers(0, 256, (rows.shape[0], rows.shape[1] + gap), dtype=np.uint8)
    spaced[:, : rows.shape[1]] = rows
    strides = (spaced.strides[0], *np.empty(data.shape, np.uint8).strides[1:])
    return Frame(np.lib.stride_tricks.as_strided(spaced, data.shape, strides), layout, luma_range)


def check(kernel: EmulatedKernel, frame: Frame, matrices: np.ndarray, size: int = SIZE, order: int = 0) -> np.ndarray:
    """The kernel's crops, every element written, equal to the CPU path's."""
    before = frame.data.copy()
    crops = kernel.crops(frame, matrices, size, order, poison=0)
    assert np.array_equal(crops, kernel.crops(frame, matrices, size, order, poison=255))
    assert np.array_equal(frame.data, before)
    wanted = crops_from_frame(frame, matrices, size)
    apart = np.abs(crops.astype(int) - wanted)
    assert apart.max(initial=0) == 0, f"{(apart > 0).mean():.3%} differ, by up to {apart.max()}"
    return crops


@pytest.fixture
def bgr(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (302, 404, 3), dtype=np.uint8)


@pytest.mark.parametrize("gap", [0, 1, 13, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_stride(kernel: EmulatedKernel, layout: str, gap: int, bgr: np.ndarray) -> None:
    check(kernel, frame_of(layout, bgr, gap=gap), matrices_from_boxes(ALL, SIZE, MARGIN, angle=0.2))


@pytest.mark.parametrize("layout", ["gray", "nv12", "i420"])
def test_limited_range(kernel: EmulatedKernel, layout: str, bgr: np.ndarray) -> None:
    matrices = matrices_from_boxes(ALL, SIZE, MARGIN, angle=-0.1)
    limited = check(kernel, frame_of(layout, bgr, "limited"), matrices)
    assert not np.array_equal(limited, kernel.crops(frame_of(layout, bgr), matrices, SIZE))


@pytest.mark.parametrize("angle", [0.0, 0.4, np.pi / 4, np.pi / 2, -2.0])
@pytest.mark.parametrize("box", ALL_BOXES.values(), ids=ALL_BOXES.keys())
def test_crops_follow_the_rule(
    kernel: EmulatedKernel, box: tuple[float, ...], angle: float, rng: np.random.Generator
) -> None:
    matrices = matrices_from_boxes(np.array([box]), SIZE, MARGIN, angle=angle)
    smooth = waves(301, 403, max(24.0, (box[2] - box[0]) / 4))
    noise = rng.integers(0, 256, (301, 403), dtype=np.uint8)
    for luma, most, mean in ((smooth, CROP_GREY, CROP_GREY_MEAN), (noise, CROP_NOISE, CROP_NOISE_MEAN)):
        crop = check(kernel, as_frame(luma), matrices)[0, 0]
        wanted = reference_crop(luma, np.array(box), SIZE, MARGIN, angle)
        assert_close(crop, wanted, most, "crop")
        assert np.abs(crop - wanted).mean() <= mean


def test_mirrored_crops(kernel: EmulatedKernel, bgr: np.ndarray) -> None:
    matrices = matrices_from_boxes(ALL, SIZE, MARGIN, angle=0.2)
    check(kernel, as_frame(bgr), mirrored_matrices(matrices, SIZE))


@pytest.mark.parametrize("angle", [0.0, 0.3, np.pi / 4])
@pytest.mark.parametrize("face", [20, 344, 345, 500, 2000])
def test_sizes_of_faces(kernel: EmulatedKernel, face: int, angle: float, rng: np.random.Generator) -> None:
    """Of 20 px (magnified) to 2,000 px (blocks of 11), and both sides of the first block of 2, at 224 px."""
    luma = rng.integers(0, 256, (2203, 2502), dtype=np.uint8)
    box = np.array([[251.0, 130.5, 251.0 + face, 130.5 + 0.95 * face]])
    check(kernel, as_frame(luma), matrices_from_boxes(box, 224, MARGIN, angle=angle), 224)


@pytest.mark.parametrize(("height", "width"), [(8192, 60), (60, 8192)])
def test_long_images(kernel: EmulatedKernel, height: int, width: int, rng: np.random.Generator) -> None:
    luma = rng.integers(0, 256, (height, width), dtype=np.uint8)
    boxes = np.array([[0, 0, width, height], [width - 70, height - 70, width, height], [3, 3, 40, 40]], float)
    matrices = matrices_from_boxes(boxes, 224, MARGIN, angle=[0.0, 0.5, 0.1])
    assert crop_plan(matrices[0], 224, luma.shape).block == 47
    check(kernel, as_frame(luma), matrices, 224)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 300), (2, 7), (300, 1)])
def test_tiny_images(kernel: EmulatedKernel, size_hw: tuple[int, int], rng: np.random.Generator) -> None:
    bgr = rng.integers(0, 256, (*size_hw, 3), dtype=np.uint8)
    check(kernel, as_frame(bgr), matrices_from_boxes(ALL, SIZE, MARGIN, angle=0.3))


@pytest.mark.parametrize("size", [1, 7, 31, 32, 33, 97, 112])
def test_crops_that_are_no_whole_tiles(kernel: EmulatedKernel, size: int, bgr: np.ndarray) -> None:
    check(kernel, as_frame(bgr), matrices_from_boxes(ALL, size, MARGIN, angle=0.3), size)


@pytest.mark.parametrize("skew", [(8.0, 0.5), (0.3, 6.0), (40.0, 0.1), (300.0, 20.0)])
def test_matrices_that_are_no_squares(kernel: EmulatedKernel, skew: tuple[float, float], bgr: np.ndarray) -> None:
    """They can touch more means than shared memory holds; mirrored and sheared, too."""
    shapes = [np.diag(skew), np.array([[skew[0], 1.5], [0.2, -skew[1]]])]
    matrices = np.array([np.c_[np.linalg.inv(shape), [SIZE / 2, SIZE / 3]] for shape in shapes])
    check(kernel, as_frame(bgr), matrices)


@pytest.mark.parametrize(
    ("shape", "block"), [([[57.6, 0], [0, 10.0]], 24), ([[3.0, 15.0], [0, 3.0]], 3)], ids=["sums", "means"]
)
def test_a_tile_of_more_than_shared_memory_holds_of_one_kind(
    kernel: EmulatedKernel, shape: list[list[float]], block: int, rng: np.random.Generator
) -> None:
    """Few means of more strips of columns than can be summed, and more means than their part of it holds."""
    luma = rng.integers(0, 256, (700, 4000), dtype=np.uint8)
    matrix = np.c_[np.linalg.inv(shape), [0, 0]]
    assert crop_plan(matrix, SIZE, (700, 4000)).block == block
    check(kernel, as_frame(luma), matrix[None])


def test_random_faces_and_orders_of_threads(kernel: EmulatedKernel, bgr: np.ndarray, rng: np.random.Generator) -> None:
    """What depends on the order of threads within a phase would be a race on a GPU."""
    corner = rng.uniform(-60, 380, (90, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(3, 500, (90, 2)) ** [1.0, 0.98]], axis=1)
    matrices = matrices_from_boxes(boxes, SIZE, MARGIN, angle=rng.uniform(-3, 3, 90))
    for order in (0, 1, 2):
        check(kernel, as_frame(bgr), matrices, order=order)


def test_256_faces_as_one_by_one(kernel: EmulatedKernel, bgr: np.ndarray, rng: np.random.Generator) -> None:
    corner = rng.uniform(0, 300, (256, 2))
    matrices = matrices_from_boxes(np.concatenate([corner, corner + 60], axis=1), SIZE, MARGIN)
    crops = check(kernel, as_frame(bgr), matrices)
    for i in (0, 100, 255):
        assert np.array_equal(crops[i], kernel.crops(as_frame(bgr), matrices[i : i + 1], SIZE)[0])


def test_zero_faces(kernel: EmulatedKernel, bgr: np.ndarray) -> None:
    assert kernel.crops(as_frame(bgr), np.empty((0, 2, 3)), SIZE).shape == (0, 1, SIZE, SIZE)


@pytest.mark.parametrize(
    ("matrices", "size", "message"),
    [
        (np.zeros((2, 3)), 64, r"must be \(n, 2, 3\) and a size at least 1, got \(2, 3\) and 64"),
        (np.zeros((1, 2, 3)), 0, "a size at least 1, .* and 0"),
        (np.zeros((65536, 2, 3)), 64, "at most 65535 faces, got 65536; cut them in parts"),
        (np.array([[[1e-4, 0, 0], [0, 1e-4, 0]]]), 64, "a face is 10000 times larger than its crop"),
    ],
)
def test_matrices_that_are_not_taken(matrices: np.ndarray, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        faces_from_matrices(matrices, size, (100, 100))


@pytest.mark.slow
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path, bgr: np.ndarray) -> None:
    """As a program with sanitizers, each case in memory of its exact size."""
    program = built(tmp_path, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    matrices = matrices_from_boxes(ALL, SIZE, MARGIN, angle=np.linspace(-2, 2, len(ALL)))
    cases = [(frame_of(layout, bgr, gap=gap), matrices, SIZE) for layout in LAYOUTS for gap in (0, 5)]
    cases += [(as_frame(bgr), np.array([[[0.01, 0.02, 3], [1.1, -1.3, 9]]]), 70)]
    cases += [(as_frame(np.full((h, w), 9, np.uint8)), matrices, 33) for h, w in ((1, 1), (1, 90), (90, 1))]
    cases += [(frame_of("nv12", bgr, "limited"), matrices, SIZE)]
    (tmp_path / "cases").write_bytes(b"".join(case_bytes(*case) for case in cases))
    done = subprocess.run([str(program), str(tmp_path / "cases")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b"".join(crops_from_frame(*case).tobytes() for case in cases)
    # and the sanitizer does look: a frame that is one byte too short
    (tmp_path / "cases").write_bytes(case_bytes(*cases[0], missing=1))
    done = subprocess.run([str(program), str(tmp_path / "cases")], capture_output=True, check=False)
    assert done.returncode != 0
    assert b"heap-buffer-overflow" in done.stderr
