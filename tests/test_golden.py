"""The golden file of a bundle: what an engine and what cuts crops must give again when it is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import golden_error, open_backend
from kp_runtime.errors import BackendError, IntegrityError
from kp_runtime.frame import Frame
from kp_runtime.golden import GOLDEN_NAME, Golden, check_golden_crop
from kp_runtime.manifest import Manifest
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.spec import ModelSpec
from tests.models import SIZE, tiny_bundle, tiny_keypoints, tiny_outputs, tiny_scores
from tests.test_backend import add_file, no_gpu  # noqa: F401  for all tests here, too


@pytest.fixture
def crops(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (2, 1, SIZE, SIZE), dtype=np.uint8)


def with_golden(bundle: Path, **arrays: np.ndarray) -> Path:
    np.savez(bundle / GOLDEN_NAME, **arrays)
    return add_file(bundle, GOLDEN_NAME, (bundle / GOLDEN_NAME).read_bytes(), "golden")


@pytest.mark.parametrize("wrong", [0.05, np.nan])
def test_golden_keypoints_that_the_engine_does_not_give(wrong: float, tmp_path: Path, crops: np.ndarray) -> None:
    expected = tiny_keypoints(crops[:2])
    expected[1, 30, 0] += wrong
    scores = tiny_scores(crops[:2])[:, None]
    bundle = with_golden(tiny_bundle(tmp_path), crops=crops[:2], keypoints=expected, lost_score=scores)
    with pytest.raises(BackendError, match=r"golden keypoint (0\.050|nan) px from PyTorch's \(at most 0\.00571429 px"):
        open_backend(bundle)


@pytest.mark.parametrize("wrong", [0.01, np.nan])
def test_golden_lost_scores_that_the_engine_does_not_give(wrong: float, tmp_path: Path, crops: np.ndarray) -> None:
    keypoints, scores = tiny_outputs(crops[:2])
    arrays = {"crops": crops[:2], "keypoints": keypoints, "lost_score": scores}
    assert open_backend(with_golden(tiny_bundle(tmp_path), **arrays)).report.golden_error_px is not None
    scores[1] += wrong
    with pytest.raises(BackendError, match=r"golden crop a lost score (0\.010|nan) from PyTorch's \(at most 0\.002 is"):
        open_backend(with_golden(tmp_path, **arrays))


@pytest.mark.parametrize(("size", "most"), [(112, 0.01), (224, 0.02), (448, 0.04)])
def test_keypoints_of_larger_crops_may_be_farther_off(size: int, most: float) -> None:
    class Off(Backend):
        name = "off"

        def _run(self, crops: np.ndarray) -> list[np.ndarray]:
            return [np.full((len(crops), 68, 2), (off, 0), np.float32)]

    engine, golden = Off(ModelSpec("x", size)), Golden(np.zeros((1, 1, size, size), np.uint8), np.zeros((1, 68, 2)))
    off = most * 0.9
    assert golden_error(engine, golden, "fp32") == pytest.approx(off)
    off = most * 1.1
    with pytest.raises(BackendError, match=f"at most {most} px is right for fp32"):
        golden_error(engine, golden, "fp32")


def test_a_golden_array_that_promises_too_much_is_not_unpacked(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    np.savez_compressed(bundle / GOLDEN_NAME, crops=np.zeros(32 << 20, np.uint8))
    add_file(bundle, GOLDEN_NAME, (bundle / GOLDEN_NAME).read_bytes(), "golden")
    with pytest.raises(IntegrityError, match=r"crops\.npy has 33554560 bytes unpacked, at most 33554432 are read"):
        open_backend(bundle)


@pytest.mark.parametrize(
    "arrays",
    [
        {"crops": np.zeros((1, 1, SIZE, SIZE), np.uint8)},
        {"crops": np.zeros((1, 1, SIZE, SIZE), np.uint8), "keypoints": np.zeros((1, 68, 2))},
        {
            "crops": np.zeros((1, 1, SIZE, SIZE), np.uint8),
            "keypoints": np.zeros((1, 5, 2)),
            "lost_score": np.zeros((1, 1)),
        },
        {
            "crops": np.zeros((0, 1, SIZE, SIZE), np.uint8),
            "keypoints": np.zeros((0, 68, 2)),
            "lost_score": np.zeros((0, 1)),
        },
        {
            "crops": np.zeros((1, 1, SIZE, SIZE), np.float32),
            "keypoints": np.zeros((1, 68, 2)),
            "lost_score": np.zeros((1, 1)),
        },
        {
            "crops": np.zeros((1, 1, SIZE, SIZE // 2), np.uint8),
            "keypoints": np.zeros((1, 68, 2)),
            "lost_score": np.zeros((1, 1)),
        },
    ],
    ids=["no keypoints", "no lost score", "5 points", "no crops", "grey levels from 0 to 1", "narrow crops"],
)
def test_golden_file_with_the_wrong_arrays(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"golden\.npz is no golden crop .*; export the bundle again"):
        open_backend(with_golden(tiny_bundle(tmp_path), **arrays))


@pytest.mark.parametrize(
    ("image", "box"),
    [
        (np.zeros((30, 40), np.uint8), np.array([3.0, 4, 20, 25])),
        (np.zeros((30, 40, 3), np.float32), np.array([3.0, 4, 20, 25])),
        (np.zeros((30, 40, 3), np.uint8), np.array([3, 4, 20, 25])),
        (np.zeros((30, 40, 3), np.uint8), np.array([3.0, 4, 20])),
        (np.zeros((30, 40, 3), np.uint8), np.array([3.0, np.nan, 20, 25])),
        (np.zeros((30, 40, 3), np.uint8), np.array([3.0, 4, 3, 25])),
        (np.zeros((30, 40, 3), np.uint8), np.array([3.0, 4, 1e300, 25])),
    ],
    ids=["grey", "floats", "whole numbers", "three", "NaN", "empty", "far outside"],
)
def test_golden_file_with_no_image_and_box(image: np.ndarray, box: np.ndarray, tmp_path: Path) -> None:
    with np.load(tiny_bundle(tmp_path) / GOLDEN_NAME) as golden:
        arrays = dict(golden)
    with pytest.raises(IntegrityError, match=r"no golden crop \(crops .*, box_xyxy .*\); export the bundle again"):
        open_backend(with_golden(tmp_path, **arrays, image=image, box_xyxy=box))


def test_a_golden_crop_may_be_off_by_one_grey_level(bundle_with_image: Path) -> None:
    golden, spec = open_backend(bundle_with_image, threads=1).golden, Manifest.read(bundle_with_image).spec
    assert check_golden_crop(golden, spec, lambda *asked: crops_from_frame(*asked) + 1) == 1
    for wrong in (
        lambda *asked: crops_from_frame(*asked) - 2,
        lambda frame, *asked: crops_from_frame(Frame(frame.data, "rgb"), *asked),
    ):
        with pytest.raises(BackendError, match=r"is cut with a grey level (2|19) off"):
            check_golden_crop(golden, spec, wrong)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04cut"])
def test_golden_file_that_is_no_archive(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"golden\.npz is no golden crop"):
        open_backend(add_file(tiny_bundle(tmp_path), GOLDEN_NAME, content, "golden"))
