from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from kp_runtime import detect
from kp_runtime.detect import BoxMap, Detector, HaarDetector, YuNetDetector, map_from_pairs
from kp_runtime.errors import BackendError, ImageError, InputError, MissingExtraError
from kp_runtime.files import sha256_of_file
from kp_runtime.frame import as_frame, image_from_file
from tests.conftest import SHARED, needs_haar
from tests.models import tiny_graph

YUNET = SHARED / "detectors" / "yunet_n_640_640.onnx"
YUNET_BLOCKER = (
    "the YuNet model is not beside this checkout"
    if not YUNET.is_file()
    else "OpenCV before 4.8 can't read the YuNet model"
    if tuple(map(int, cv2.__version__.split(".")[:2])) < (4, 8)
    else ""
)
FACE = (181, 88, 269, 178)
"""The astronaut's face from brow to chin and from cheek to cheek, read off the photograph."""


def iou(a: np.ndarray, b: tuple[int, ...]) -> float:
    overlap = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return float(overlap / (areas - overlap))


@pytest.fixture(scope="module")
def photo(astronaut: Path) -> np.ndarray:
    return image_from_file(astronaut)


def small_part(photo: np.ndarray) -> np.ndarray:
    return photo[40:240, 120:320]


@needs_haar
def test_haar_finds_the_astronaut(photo: np.ndarray) -> None:
    boxes = HaarDetector()(photo)
    assert boxes.dtype == np.float64
    assert len(boxes) == 1
    assert iou(boxes[0], FACE) > 0.7


@needs_haar
def test_haar_looks_for_what_was_asked_for(photo: np.ndarray) -> None:
    found = {
        key: len(HaarDetector(**{key: value}).raw(as_frame(photo)))  # type: ignore[arg-type]
        for key, value in {"smallest": 0.5, "neighbors": 0, "scale": 9.0}.items()
    }
    assert (found["smallest"], found["scale"]) == (0, 0)
    assert found["neighbors"] > 10  # each raw hit


@needs_haar
@pytest.mark.parametrize("size_hw", [(100, 1000), (1000, 100)])
def test_haars_smallest_face_is_a_share_of_the_shorter_side(size_hw: tuple[int, int]) -> None:
    detector, least = HaarDetector(smallest=0.5), []
    detector._cascade = SimpleNamespace(detectMultiScale=lambda *_, **given: least.append(given["minSize"]) or ())
    detector.raw(as_frame(np.zeros(size_hw, np.uint8)))
    assert least == [(50, 50)]


@needs_haar
def test_a_process_that_was_forked_while_another_thread_had_its_turn_waits_for_none(
    photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = HaarDetector()
    known = detector(photo)
    monkeypatch.setattr("os.getpid", lambda: 1)
    with ThreadPoolExecutor(1) as thread, detector._turn:
        assert np.array_equal(thread.submit(detector, photo).result(60), known)


@needs_haar
def test_what_opencv_fails_on_is_told() -> None:
    def fails(*_: object, **__: object) -> None:
        raise cv2.error("(-4:Insufficient memory) Failed to allocate 6000000000 bytes")

    detector = HaarDetector()
    detector._cascade = SimpleNamespace(detectMultiScale=fails)
    with pytest.raises(BackendError, match=r"OpenCV can't find faces on 60 x 40 px: .*Insufficient memory"):
        detector(np.zeros((40, 60), np.uint8))


@needs_haar
def test_haar_finds_the_face_after_a_very_high_and_a_very_wide_picture(photo: np.ndarray) -> None:
    detector = HaarDetector()
    known = detector(photo)
    for size_hw in ((60_000, 25), (25, 60_000)):
        assert len(detector(np.full(size_hw, 90, np.uint8))) == 0
    assert np.array_equal(detector(photo), known)


@needs_haar
def test_haar_sees_the_same_in_every_layout(photo: np.ndarray) -> None:
    bgr = small_part(photo)
    detector = HaarDetector()
    wanted = detector(bgr)
    assert len(wanted) == 1
    grey = as_frame(bgr).luma(0, 0, 200, 200)
    assert np.array_equal(detector(grey), wanted)
    assert np.array_equal(detector(bgr[:, :, ::-1], "rgb"), wanted)


@pytest.mark.skipif(bool(YUNET_BLOCKER), reason=YUNET_BLOCKER)
def test_yunet_finds_the_astronaut(photo: np.ndarray) -> None:
    detector = YuNetDetector(YUNET)
    boxes = detector(photo)
    assert len(boxes) == 1
    assert iou(boxes[0], FACE) > 0.7
    rgba = np.dstack([photo[:, :, ::-1], photo[:, :, 0]])
    assert np.array_equal(detector(rgba, "rgb"), boxes)
    grey = detector(as_frame(photo).luma(0, 0, 512, 512))
    assert iou(grey[0], FACE) > 0.7


@pytest.mark.parametrize(
    ("size_hw", "input_wh"), [((100, 300), (300, 100)), ((40, 300), (300, 64)), ((300, 40), (64, 300))]
)
def test_yunet_is_told_the_width_and_height_of_what_it_sees(
    size_hw: tuple[int, int], input_wh: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def detect_faces(bgr: np.ndarray) -> tuple[int, np.ndarray]:
        seen.append(bgr.shape[1::-1])
        return 1, np.arange(15, dtype=np.float32)[None]

    net = SimpleNamespace(setInputSize=seen.append, detect=detect_faces)
    fake = SimpleNamespace(**vars(cv2) | {"FaceDetectorYN": SimpleNamespace(create=lambda *_: net)})
    monkeypatch.setattr(detect, "import_cv2", lambda: fake)
    (tmp_path / "a.onnx").touch()
    boxes = YuNetDetector(tmp_path / "a.onnx").raw(as_frame(np.zeros((*size_hw, 3), np.uint8)))
    assert seen == [input_wh, input_wh]
    assert boxes.tolist() == [[0, 1, 0 + 2, 1 + 3]]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(HaarDetector, marks=needs_haar),
        pytest.param(lambda: YuNetDetector(YUNET), marks=pytest.mark.skipif(bool(YUNET_BLOCKER), reason=YUNET_BLOCKER)),
    ],
    ids=["haar", "yunet"],
)
@pytest.mark.parametrize("size_hw", [(1, 1), (7, 300), (300, 32), (60, 60)])
def test_image_without_a_face(size_hw: tuple[int, int], make: Callable[[], Detector]) -> None:
    assert make()(np.full((*size_hw, 3), 90, np.uint8)).shape == (0, 4)


@needs_haar
def test_largest_face_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.array([[0, 0, 10, 10], [50, 0, 90, 40], [0, 50, 20, 70]], float)
    monkeypatch.setattr(HaarDetector, "raw", lambda self, frame: raw)
    assert np.array_equal(HaarDetector()(np.zeros((99, 99), np.uint8)), HaarDetector.BOX_MAP.apply(raw[[1, 2, 0]]))


@needs_haar
def test_a_box_that_a_model_would_refuse_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HaarDetector, "BOX_MAP", BoxMap(0, 1.5, 1, 1))
    raw = np.array([[10.0, 10, 40, 40], [10, 70, 40, 100], [5, 5, 5.2, 5.2]])
    monkeypatch.setattr(HaarDetector, "raw", lambda self, frame: raw)
    boxes = HaarDetector()(np.zeros((100, 100, 3), np.uint8))
    np.testing.assert_allclose(boxes, [[10, 55, 40, 85]])


@needs_haar
def test_bad_image_is_refused() -> None:
    with pytest.raises(ImageError, match="must be uint8"):
        HaarDetector()(np.zeros((50, 50, 3)))  # type: ignore[arg-type]


@needs_haar
def test_threads_may_share_a_detector(photo: np.ndarray) -> None:
    detector, pictures = HaarDetector(), [photo, photo[60:320, 100:360]]
    wanted = [detector(picture) for picture in pictures]

    def agrees(i: int) -> bool:
        return np.array_equal(detector(pictures[i % 2]), wanted[i % 2])

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(agrees, range(24)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"smallest": 7}, {"smallest": 0}, {"scale": 1.0}, {"scale": math.inf}, {"neighbors": -1},
        {"smallest": "0.1"}, {"scale": None}, {"neighbors": 1.5},
    ],
)  # fmt: skip
def test_arguments_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))}.* got"):
        HaarDetector(**wrong)
    for score in (5, "0.5"):
        with pytest.raises(InputError, match=f"score must be over 0 and under 1, got {score!r}"):
            YuNetDetector("any.onnx", score=score)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a YuNet model must be a path, as text or of pathlib; got int"):
        YuNetDetector(5)  # type: ignore[arg-type]


def test_yunet_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"there is no YuNet model at .*none\.onnx; docs/detectors\.md"):
        YuNetDetector(tmp_path / "none.onnx")
    with pytest.raises(BackendError, match="there is no YuNet model at"):
        YuNetDetector("n" * 300)


@pytest.mark.parametrize("content", [b"not a network", tiny_graph().SerializeToString()], ids=["text", "other graph"])
def test_yunet_file_is_another(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    said = (
        r"a\.onnx as (a YuNet model; take OpenCV 4\.8 or newer and a file that docs/detectors\.md names, such|YuNet:)"
    )
    with pytest.raises(BackendError, match=rf"OpenCV .*can't (read|run) .*{said}") as caught:
        YuNetDetector(tmp_path / "a.onnx")(np.zeros((64, 64, 3), np.uint8))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(bool(YUNET_BLOCKER), reason=YUNET_BLOCKER)
def test_the_page_says_which_yunet_files_were_tried() -> None:
    page = (Path(__file__).parents[1] / "docs" / "detectors.md").read_text(encoding="utf-8")
    for path, result in ((YUNET, "works"), (YUNET.with_name("yunet_n_dynamic.onnx"), "can't read it")):
        assert re.search(rf"`{path.name}` \|.*`{sha256_of_file(path)}` \| {result}", page)


def test_opencv_without_cascades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "import_cv2", lambda: SimpleNamespace(__version__="5.0.0"))
    with pytest.raises(BackendError, match=r"OpenCV 5\.0\.0 has no Haar cascades.*opencv-python-headless<5"):
        HaarDetector()


@pytest.mark.parametrize("make", [HaarDetector, lambda: YuNetDetector("any.onnx")])
def test_without_opencv_the_error_has_the_pip_line(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kp-edge\[image\]'"):
        make()


def test_box_map_by_hand() -> None:
    mapped = BoxMap(dx=0.1, dy=-0.25, width=0.5, height=2.0).apply(np.array([[10, 20, 110, 60]]))
    assert mapped.tolist() == [[45, -10, 95, 70]]
    assert BoxMap(0, 0, 1, 1).apply(np.empty((0, 4))).shape == (0, 4)


def test_map_from_pairs_finds_the_map_despite_false_matches(rng: np.random.Generator) -> None:
    corner = rng.uniform(0, 500, (21, 2))
    detected = np.concatenate([corner, corner + rng.uniform(20, 200, (21, 2))], axis=1)
    wanted_map = BoxMap(dx=0.0123, dy=0.1518, width=0.8605, height=0.75)
    wanted = wanted_map.apply(detected)
    wanted[:8] += 300
    assert map_from_pairs(detected, wanted) == wanted_map
