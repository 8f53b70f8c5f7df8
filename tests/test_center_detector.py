"""The project's own face detector at run-time, on a graph whose cells are known: a white pixel is a face."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kp_runtime.center_detector import MODEL_NAME, CenterDetector, merged
from kp_runtime.cores import usable_cores
from kp_runtime.errors import BackendError, BundleError, ImageError, InputError, IntegrityError, SchemaError
from kp_runtime.frame import Frame, image_from_file
from kp_runtime.geometry import overlaps
from kp_runtime.golden import GOLDEN_NAME
from kp_runtime.manifest import DetectorManifest, Manifest, file_entry
from kp_runtime.spec import DetectorSpec

SHIPPED = Path(__file__).resolve().parents[1] / "engines" / "face-detector"
LEFT, TOP, RIGHT, LOW = REACH = (10.0, 12.0, 14.0, 16.0)
"""How far the box of each white pixel at a cell reaches."""


def white_pixel_graph(path: Path, channels: int = 5) -> None:
    """Cells whose score is the grey level of their pixel over 255, and whose box is always `REACH`."""
    weights = np.zeros((channels, 1, 1, 1), np.float32)
    weights[0] = 1 / 255
    bias = np.array([0, *REACH], np.float32)[:channels]
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("MaxPool", ["x"], ["picked"], kernel_shape=[1, 1], strides=[8, 8]),
        helper.make_node("Conv", ["picked", "weights", "bias"], ["cells"]),
    ]
    graph = helper.make_graph(
        nodes,
        "white_pixels",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 1, "h", "w"])],
        [helper.make_tensor_value_info("cells", TensorProto.FLOAT, [1, channels, "rows", "columns"])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def write_manifest(folder: Path, spec: DetectorSpec) -> None:
    files = {name: file_entry(folder / name, kind) for name, kind in ((MODEL_NAME, "onnx"), (GOLDEN_NAME, "golden"))}
    DetectorManifest(spec, files).write(folder)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    white_pixel_graph(tmp_path / MODEL_NAME)
    image = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    cells = np.empty((5, 3, 4), np.float32)
    cells[0] = image[::8, ::8] / np.float32(255)
    cells[1:] = np.array(REACH)[:, None, None]
    np.savez(tmp_path / GOLDEN_NAME, image=image, cells=cells)
    write_manifest(tmp_path, DetectorSpec("white pixels"))
    return tmp_path


def test_a_cell_is_a_box_in_pixels_of_the_image(bundle: Path) -> None:
    image = np.zeros((61, 70), np.uint8)  # one level alone: its shorter side is under 72 px
    image[24, 40] = 255
    detector = CenterDetector(bundle, smallest=0.2)
    found = detector.find(Frame(image, "gray"))
    assert np.array_equal(found.boxes_xyxy, [[40 - LEFT, 24 - TOP, 40 + RIGHT, 24 + LOW]])
    assert np.array_equal(found.scores, [1.0])
    boxes = detector(image)
    assert boxes.dtype == np.float64
    assert np.array_equal(boxes, found.boxes_xyxy)


@pytest.mark.parametrize(("score", "faces"), [(None, 2), (0.7, 1), (0.4, 3)])
def test_a_face_has_the_score_that_was_asked_for_or_the_bundles(bundle: Path, score: float | None, faces: int) -> None:
    image = np.zeros((61, 160), np.uint8)
    image[24, 24:160:56] = (115, 150, 255)  # scores of 0.45, 0.59 and 1
    assert len(CenterDetector(bundle, score)(image)) == faces


@pytest.mark.parametrize("level", [1, 2])
def test_larger_faces_are_found_on_the_halved_image(bundle: Path, level: int) -> None:
    size = 2**level
    image = np.zeros((72 * size, 88 * size), np.uint8)
    x, y = 40 * size + 3 * size, 24 * size + 5 * size  # no cell of the larger levels picks one of its pixels up
    image[y : y + size, x : x + size] = 255
    assert len(CenterDetector(bundle, smallest=0.02)(image)) == 0
    x, y = 40 * size, 24 * size
    image = np.zeros_like(image)
    image[y : y + size, x : x + size] = 255
    smallest = 22 / (72 * size) * size  # this level alone
    (box,) = CenterDetector(bundle, smallest=smallest)(image)
    middle = np.array([x, y]) + (size - 1) / 2
    assert np.allclose(
        box, np.concatenate([middle - size * np.array([LEFT, TOP]), middle + size * np.array([RIGHT, LOW])])
    )


def test_levels_end_where_the_largest_face_fits(bundle: Path) -> None:
    detector = CenterDetector(bundle, smallest=0.05)
    for size_hw in [(1, 1), (7, 300), (72, 72), (185, 200), (720, 1280)]:
        levels = list(detector._levels(Frame(np.zeros(size_hw, np.uint8), "gray")))
        first, last = levels[0], levels[-1]
        shorter = min(size_hw)
        assert first[0].shape == size_hw or 21 < 0.05 * shorter * first[1].min() < 23  # never enlarged
        assert min(last[0].shape) <= 72
        for luma, scale in levels:
            assert np.allclose(scale * size_hw[::-1], luma.shape[::-1], rtol=0, atol=1e-9)
        for (_, scale), (_, next_scale) in itertools.pairwise(levels):
            assert np.allclose(scale, 2 * next_scale, rtol=0.05)


def test_a_smaller_image_has_the_means_of_all_pixels(bundle: Path) -> None:
    image = np.zeros((288, 352), np.uint8)
    image[::4, ::4] = 160
    first, _ = next(CenterDetector(bundle, smallest=22 / 72)._levels(Frame(image, "gray")))
    assert first.shape == (72, 88)
    assert (first == 10).all()


@pytest.mark.parametrize("threads", sorted({1, usable_cores()}))
def test_the_engine_gets_the_threads_that_were_asked_for(threads: int, bundle: Path) -> None:
    options = CenterDetector(bundle, threads=threads)._session.get_session_options()
    assert options.intra_op_num_threads == threads


def slowly_merged(boxes: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """The same rule box by box in plain numbers."""

    def area(box: np.ndarray) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    def common(a: np.ndarray, b: np.ndarray) -> float:
        return area(np.array([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]))

    def share(a: np.ndarray, b: np.ndarray) -> float:
        return common(a, b) / (area(a) + area(b) - common(a, b))

    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    result: list[np.ndarray] = []
    while left:
        group = [i for i in left if share(boxes[left[0]], boxes[i]) > 0.35]
        face = sum(boxes[i] * scores[i] for i in group) / sum(scores[i] for i in group)
        if all(common(face, better) <= 0.8 * min(area(face), area(better)) for better in result):
            result.append(face)
        left = [i for i in left if i not in group]
    return result


def test_merging_follows_the_rule() -> None:
    rng = np.random.default_rng(1)
    low = rng.uniform(0, 100, (60, 2))
    boxes, scores = np.concatenate([low, low + rng.uniform(20, 60, (60, 2))], axis=1), rng.uniform(0.5, 1, 60)
    found = merged(boxes, scores)
    assert 1 < len(found.scores) < 60
    assert np.allclose(found.boxes_xyxy, slowly_merged(boxes, scores))
    assert (np.diff(found.scores) <= 0).all()


def test_a_face_has_no_other_face_in_it() -> None:
    face, around, beside = [40.0, 40, 60, 60], [0.0, 0, 100, 100], [55.0, 40, 75, 60]
    found = merged(np.array([around, face, beside]), np.array([0.7, 0.9, 0.8]))
    assert found.boxes_xyxy.tolist() == [face, beside]
    assert merged(np.array([around, face]), np.array([0.9, 0.7])).boxes_xyxy.tolist() == [around]


def test_no_boxes_merge_into_none() -> None:
    assert merged(np.empty((0, 4)), np.empty(0)).boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize("reach", [0.0, -5.0, np.nan, np.inf])
def test_boxes_that_are_none_are_left_out(bundle: Path, monkeypatch: pytest.MonkeyPatch, reach: float) -> None:
    detector = CenterDetector(bundle)
    cells = np.full((5, 8, 8), reach, np.float32)
    cells[0] = 1
    monkeypatch.setattr(detector, "cells", lambda luma: cells)
    assert detector(np.zeros((64, 64), np.uint8)).shape == (0, 4)


def test_boxes_are_largest_first_and_touch_the_image(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = CenterDetector(bundle)
    boxes = np.array([[5, 5, 20, 20], [10, 40, 40, 60], [-30, 5, 0, 20]], float)
    monkeypatch.setattr(detector, "find", lambda frame: merged(boxes, np.array([0.9, 0.8, 0.7])))
    assert np.array_equal(detector(np.zeros((64, 64), np.uint8)), boxes[[1, 0]])


def test_every_layout_gives_the_same(bundle: Path) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[24, 40] = 255
    detector = CenterDetector(bundle)
    wanted = detector(image)
    assert len(wanted) == 1
    assert np.array_equal(detector(image[:, :, ::-1], "rgb"), wanted)
    assert len(detector.find(image[:, :, ::-1], "rgb").scores) == 1
    video = cv2.cvtColor(image, cv2.COLOR_BGR2YUV_I420)
    assert np.allclose(detector(Frame(video, "i420", "limited")), wanted)


@pytest.mark.parametrize(("options", "message"), [
    ({"score": 0.0}, "score must be over 0"),
    ({"score": 1.0}, "score must be over 0"),
    ({"score": "0.5"}, "score must be over 0 and under 1, got '0.5'"),
    ({"smallest": 0.0}, "smallest face is a share"),
    ({"smallest": 1.1}, "smallest face is a share"),
])  # fmt: skip
def test_settings_out_of_range(bundle: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CenterDetector(bundle, **options)  # type: ignore[arg-type]


def test_an_image_that_is_none(bundle: Path) -> None:
    with pytest.raises(ImageError, match="must be uint8"):
        CenterDetector(bundle)(np.zeros((50, 50, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [MODEL_NAME, GOLDEN_NAME])
def test_a_file_that_is_cut_off(bundle: Path, name: str) -> None:
    path = bundle / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match="cut off"):
        CenterDetector(bundle)


def test_a_file_that_is_no_model(bundle: Path) -> None:
    (bundle / MODEL_NAME).write_bytes(b"no model")
    write_manifest(bundle, DetectorSpec("white pixels"))
    with pytest.raises(BackendError, match=r"ONNX Runtime .* can't open"):
        CenterDetector(bundle)


def test_a_golden_file_that_is_none(bundle: Path) -> None:
    (bundle / GOLDEN_NAME).write_bytes(b"nothing")
    write_manifest(bundle, DetectorSpec("white pixels"))
    with pytest.raises(IntegrityError, match="is no golden"):
        CenterDetector(bundle)


def test_a_golden_image_of_another_kind(bundle: Path) -> None:
    np.savez(bundle / GOLDEN_NAME, image=np.zeros(3), cells=np.zeros(3))
    write_manifest(bundle, DetectorSpec("white pixels"))
    with pytest.raises(BackendError, match="holds no golden image"):
        CenterDetector(bundle)


@pytest.mark.parametrize(("what", "change"), [(0, 0.02), (0, np.nan), (1, 2.0), (1, np.nan), (4, -2.0), (4, np.inf)])
def test_a_model_that_sees_something_else(bundle: Path, what: int, change: float) -> None:
    with np.load(bundle / GOLDEN_NAME) as golden:
        image, cells = golden["image"], golden["cells"]
    cells[what, 1, 1] += change
    np.savez(bundle / GOLDEN_NAME, image=image, cells=cells)
    write_manifest(bundle, DetectorSpec("white pixels"))
    with pytest.raises(BackendError, match="other cells of the golden image"):
        CenterDetector(bundle)


def test_cells_of_no_number_are_wrong(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch gave the same, too: infinite cells are equal to none."""
    with np.load(bundle / GOLDEN_NAME) as golden:
        image, cells = golden["image"], golden["cells"]
    cells[3, 0, 0] = np.inf
    np.savez(bundle / GOLDEN_NAME, image=image, cells=cells)
    write_manifest(bundle, DetectorSpec("white pixels"))
    monkeypatch.setattr(CenterDetector, "cells", lambda self, luma: cells)
    with pytest.raises(BackendError, match=r"other cells of the golden image .*off by nan"):
        CenterDetector(bundle)


def test_a_graph_with_other_outputs(bundle: Path) -> None:
    white_pixel_graph(bundle / MODEL_NAME, channels=4)
    write_manifest(bundle, DetectorSpec("white pixels"))
    with pytest.raises(BackendError, match=r"gave float32 \(1, 4, 3, 4\) instead of float32 \(1, 5, 3, 4\)"):
        CenterDetector(bundle)


def test_bundles_of_models_and_detectors_are_not_mixed_up(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a model that gives face-boxes, wanted is one that gives keypoints"):
        Manifest.read(bundle)
    with pytest.raises(BundleError, match="is not a bundle"):
        CenterDetector(tmp_path / "nowhere")
    (bundle / "manifest.json").write_text('{"schema": 1, "spec": {"name": "x", "size": 224}, "files": {}}')
    with pytest.raises(BundleError, match="gives keypoints, wanted is one that gives face-boxes"):
        CenterDetector(bundle)
    (bundle / "manifest.json").write_text('{"schema": 99}')
    with pytest.raises(SchemaError, match="schema 99"):
        CenterDetector(bundle)


@pytest.mark.parametrize(("field", "value"), [
    ("name", 3), ("name", "a\nb"), ("stride", 0), ("stride", 8.0), ("least_px", 1), ("least_px", "22"),
    ("most_px", 30), ("most_px", float("nan")), ("score", 1.0), ("score", None), ("task", "hats"),
])  # fmt: skip
def test_a_contract_that_can_not_be(field: str, value: object) -> None:
    with pytest.raises(BundleError, match="detector"):
        dataclasses.replace(DetectorSpec("x"), **{field: value})  # type: ignore[arg-type]


def test_the_shipped_detector_finds_the_astronaut_at_any_size(astronaut: Path) -> None:
    photo, face = image_from_file(astronaut), np.array([[181, 88, 269, 178]])  # read off the photograph
    detector = CenterDetector(SHIPPED, threads=1)
    for scale in (0.4, 1.0, 3.0):
        boxes = detector(cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
        assert len(boxes) == 1
        assert overlaps(boxes, face * scale)[0, 0] > 0.7
    assert detector(np.full((300, 400, 3), 90, np.uint8)).shape == (0, 4)
