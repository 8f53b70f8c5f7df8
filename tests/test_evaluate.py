"""`kp eval`: predictions mapped back to the photo, splits, detectors, and what opens a model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_export.evaluate import OpenModel, evaluate, held_out_faces, open_model, trained_on
from kp_runtime.backend import Answer
from kp_runtime.errors import BackendError, BundleError, DataError, InputError, MissingExtraError
from kp_runtime.frame import Frame
from kp_runtime.geometry import boxes_from_points
from kp_runtime.manifest import Manifest
from kp_runtime.spec import ModelSpec
from kp_train.data import Face, Source, is_held_out, luma_from_file, read_source
from kp_train.metrics import interval_over_people
from kp_train.synthetic import mean_shape, write_csv_source
from tests.models import SIZE

LITE = Path(__file__).resolve().parents[1] / "engines" / "resnet18-68-lite"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return read_source(write_csv_source(tmp_path, people=12))


def oracle(source: Source, spec: ModelSpec, error_px: float = 0.0) -> OpenModel:
    """A model that knows the truth and answers it in pixels of the crop, `error_px` to the right."""
    answers = []
    for face in source.faces:
        low, high = face.xy.min(axis=0), face.xy.max(axis=0)
        side = spec.margin * (high - low).max()
        answers.append((face.xy - (low + high) / 2) * spec.size / side + (spec.size - 1) / 2 + (error_px, 0))
    queue = iter(answers)

    def answer(crops: np.ndarray) -> Answer:
        return Answer(np.stack([next(queue) for _ in crops]).astype(np.float32))

    return OpenModel("oracle", Manifest(spec=spec, training={"held_out": {"val_fraction": 0.3}}), answer)


def test_the_truth_has_no_error(source: Source) -> None:
    result = evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces)
    assert result.accuracy.faces == 24
    assert result.accuracy.nme < 1e-6
    assert result.accuracy.auc == pytest.approx(1, abs=1e-4)


def test_an_error_in_the_crop_is_an_error_in_the_photo(source: Source) -> None:
    spec = ModelSpec("x", SIZE)
    result = evaluate(oracle(source, spec, error_px=1.0), source.faces)
    sides = np.array([spec.margin * np.ptp(face.xy, axis=0).max() for face in source.faces])
    eyes = np.array([np.linalg.norm(face.xy[36] - face.xy[45]) for face in source.faces])
    np.testing.assert_allclose(result.errors, sides / SIZE / eyes, rtol=1e-4)
    # each of the 12 people is on two photos in a row
    assert result.interval == interval_over_people(result.errors, [str(i // 2) for i in range(24)])


@pytest.mark.parametrize("looks", [1, 2])
def test_points_that_are_no_numbers_are_not_measured(source: Source, looks: int) -> None:
    def answer(crops: np.ndarray) -> Answer:
        return Answer(np.full((len(crops), 68, 2), np.nan, np.float32))

    model = OpenModel("broken", Manifest(ModelSpec("x", SIZE)), answer)
    with pytest.raises(BackendError, match="broken answers points that are not finite on 24 of 24 faces"):
        evaluate(model, source.faces, looks=looks)


def test_one_point_that_is_no_number_is_enough(source: Source) -> None:
    model = oracle(source, ModelSpec("x", SIZE))

    def answer(crops: np.ndarray) -> Answer:
        points = model.answer(crops).keypoints.copy()
        points[3, 5, 1] = np.nan
        return Answer(points)

    with pytest.raises(BackendError, match="oracle answers points that are not finite on 1 of 24 faces"):
        evaluate(dataclasses.replace(model, answer=answer), source.faces)


def test_a_second_look_is_cut_around_the_points_of_the_first(source: Source) -> None:
    """A network that puts the same points into every crop: where they end can be reckoned."""
    spec, middle = ModelSpec("x", SIZE), (SIZE - 1) / 2
    points = (mean_shape() * 0.6 + 0.04) * SIZE + middle
    fixed = OpenModel("fixed", Manifest(spec=spec), lambda crops: Answer(np.repeat(points[None], len(crops), axis=0)))
    twice = evaluate(fixed, source.faces, looks=2)
    for face, found in zip(source.faces, twice.predicted, strict=True):
        box = boxes_from_points(face.xy)
        for _ in range(2):
            side, centre = 1.3 * (box[2:] - box[:2]).max(), (box[:2] + box[2:]) / 2
            xy = (points - middle) * side / SIZE + centre
            box = boxes_from_points(xy)
        np.testing.assert_allclose(found, xy, atol=1e-6)


def test_a_second_look_is_taken_at_the_far_end_of_a_wide_photo(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "wide.png"), np.zeros((100, 400), np.uint8))
    face = Face(tmp_path / "wide.png", (mean_shape() * 30 + (340, 50)).astype(np.float32))
    points = (mean_shape() * 0.3 * SIZE + (SIZE - 1) / 2).astype(np.float32)
    fixed = OpenModel("fixed", Manifest(spec=ModelSpec("x", SIZE)), lambda crops: Answer(points[None]))
    once, twice = (evaluate(fixed, [face], looks=looks).predicted for looks in (1, 2))
    assert np.ptp(twice[..., 1]) < 0.9 * np.ptp(once[..., 1])


@pytest.mark.parametrize(("spread", "place"), [(0.0, SIZE / 2), (0.6 * SIZE, -9000.0)])
def test_points_without_a_box_of_use_are_looked_for_in_the_first_one(
    source: Source, spread: float, place: float
) -> None:
    """A network whose points lie on one spot, or far outside of the photo."""
    points = mean_shape() * spread + place
    spot = OpenModel("spot", Manifest(spec=ModelSpec("x", SIZE)), lambda crops: Answer(np.stack([points] * len(crops))))
    once, twice = (evaluate(spot, source.faces[:4], looks=looks).predicted for looks in (1, 2))
    np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize("mirror", [False, True])
def test_faces_that_are_taken_for_none_are_counted(source: Source, mirror: bool) -> None:
    """A network whose lost score is the face's number over their number; its mirror image has that less a half."""
    spec, number = ModelSpec("x", SIZE, lost_limit=0.5), iter(range(len(source.faces)))
    points = (mean_shape() * 0.6 * SIZE + (SIZE - 1) / 2).astype(np.float32)

    def answer(crops: np.ndarray) -> Answer:
        faces = len(crops) // (2 if mirror else 1)
        score = np.array([next(number) for _ in range(faces)], np.float32) / len(source.faces)
        both = np.concatenate([score, score - 0.5]) if mirror else score
        return Answer(np.repeat(points[None], len(crops), axis=0), both)

    model = OpenModel("x", Manifest(spec=spec), answer)
    assert evaluate(model, source.faces, mirror=mirror).given_up == (5 if mirror else 11) / 24
    assert evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces).given_up is None


def test_each_face_is_looked_at_on_its_photo_and_in_its_mirror_image(source: Source) -> None:
    seen: list[np.ndarray] = []

    def answer(crops: np.ndarray) -> Answer:
        seen.append(crops.astype(int))
        return Answer(np.zeros((len(crops), 68, 2), np.float32))

    model, faces = OpenModel("x", Manifest(spec=ModelSpec("x", SIZE)), answer), source.faces[:3]
    for face in faces:
        evaluate(model, [face])
    evaluate(model, faces, mirror=True)
    *alone, both = seen
    plain = np.concatenate(alone)
    np.testing.assert_array_equal(both[:3], plain)
    assert np.abs(both[3:] - plain[..., ::-1]).max() <= 2  # places are rounded from the other side


def test_looks_that_cannot_be(source: Source) -> None:
    with pytest.raises(InputError, match="looks must be 1 or more, got 0"):
        evaluate(oracle(source, ModelSpec("x", SIZE)), source.faces, looks=0)
    with pytest.raises(InputError, match="looks must be 1 for this model, got 2"):
        evaluate(oracle(source, ModelSpec("x", SIZE, box="frame")), source.faces, looks=2)


def test_a_detectors_boxes_and_misses(source: Source) -> None:
    boxes = iter([boxes_from_points(face.xy) for face in source.faces])
    calls = 0

    def detector(image: Frame, layout: str = "bgr") -> np.ndarray:
        nonlocal calls
        calls += 1
        box = next(boxes)
        elsewhere = box + 1000
        return np.empty((0, 4)) if calls == 1 else elsewhere[None] if calls == 2 else np.stack([elsewhere, box])

    spec = ModelSpec("x", SIZE)
    known = dataclasses.replace(source, faces=source.faces[2:])
    result = evaluate(oracle(known, spec), source.faces, detector)  # type: ignore[arg-type]
    assert result.missed == 2
    assert result.accuracy.faces == 22
    assert result.accuracy.nme < 1e-6
    assert result.accuracy.failures == 2 / 24
    assert result.accuracy.auc == pytest.approx(22 / 24)
    assert result.interval == pytest.approx((0, 0), abs=1e-6)
    with pytest.raises(DataError, match="found none of the 24 faces"):
        evaluate(oracle(source, spec), source.faces, lambda image, layout="bgr": np.empty((0, 4)))  # type: ignore[arg-type]


def test_the_faces_of_a_photo_are_looked_for_once(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is decoded once, too; each face gets its own box, and one beside the photo is still refused."""
    first, last = source.faces[0], source.faces[-1]
    small = dataclasses.replace(first, xy=(first.xy - first.xy.mean(axis=0)) * 0.5 + first.xy.mean(axis=0))
    known, read, seen = dataclasses.replace(source, faces=(first, small, last, first)), [], []
    monkeypatch.setattr("kp_train.data.luma_from_file", lambda path: read.append(path) or luma_from_file(path))

    def detector(image: Frame, layout: str = "bgr") -> np.ndarray:
        seen.append(image)
        return np.stack([boxes_from_points(face.xy) for face in known.faces])

    result = evaluate(oracle(known, ModelSpec("x", SIZE)), known.faces, detector)
    assert result.accuracy.nme < 1e-6
    assert read == [first.image, last.image, first.image]
    assert len(seen) == 3
    with pytest.raises(DataError, match="none of its face's points lies in them"):
        evaluate(oracle(known, ModelSpec("x", SIZE)), [first, dataclasses.replace(first, xy=first.xy + 1e4)], detector)


def test_a_frame_model_sees_the_original_projects_view(source: Source) -> None:
    seen = []

    def answer(crops: np.ndarray) -> Answer:
        seen.append(crops)
        return Answer(np.zeros((len(crops), 68, 2), np.float32))

    model = OpenModel("frame", Manifest(spec=ModelSpec("x", 224, margin=1.0, box="frame")), answer)
    result = evaluate(model, source.faces[:1])
    luma = cv2.imread(str(source.faces[0].image), cv2.IMREAD_GRAYSCALE)
    scale = 250 / min(luma.shape)
    # the crop's first pixel in the photo: half of what 224 of 250 leave at the shorter side
    half = 112 / scale
    cx, cy = (luma.shape[1] - 1) / 2, (luma.shape[0] - 1) / 2
    np.testing.assert_allclose(result.predicted[0, 0], [cx - half + 0.5 / scale, cy - half + 0.5 / scale], atol=1e-3)
    assert seen[0].shape == (1, 1, 224, 224)


def test_the_person_split_takes_people_never_trained_on(source: Source) -> None:
    manifest = oracle(source, ModelSpec("x", SIZE)).manifest
    held = held_out_faces([source], manifest)
    assert 0 < len(held) < len(source.faces)
    assert all(is_held_out(face.person, 0.3) for face in held)
    for training in ({}, {"held_out": 5}, {"held_out": {"val_fraction": "x"}}):
        for unclear in (training, manifest.training | {"start": {"training": training}}):
            with pytest.raises(DataError, match="does not say which people"):
                held_out_faces([source], dataclasses.replace(manifest, training=unclear))
    for start in ({"training": manifest.training, "before": 5}, {"before": [manifest.training]}):
        later = {"held_out": {"val_fraction": 0.9}, "start": start}
        assert held_out_faces([source], dataclasses.replace(manifest, training=later)) == held
    none = dataclasses.replace(source, faces=tuple(f for f in source.faces if f not in held))
    assert held_out_faces([none, source], manifest) == held
    with pytest.raises(DataError, match="no face of a person that was held out"):
        held_out_faces([none], manifest)


def test_a_run_that_held_out_nobody_of_a_source_leaves_no_face_of_it(source: Source) -> None:
    """Nor of a source that it did not read: those may be the same people, as test rows are."""
    manifest = oracle(source, ModelSpec("x", SIZE)).manifest
    other, unread = (dataclasses.replace(source, sha256=sha256) for sha256 in ("other", "unread"))
    sources = [{"sha256": source.sha256, "whole": True}, {"sha256": "other", "whole": False}]
    run = manifest.training | {"sources": sources}
    for training in (run, {"held_out": {"val_fraction": 0.9}, "start": {"training": run}}):
        whole = dataclasses.replace(manifest, training=training)
        assert held_out_faces([source, unread, other], whole) == held_out_faces([other], manifest)
        with pytest.raises(DataError, match="no face of a person that was held out"):
            held_out_faces([source, unread], whole)
        assert trained_on([source], whole) == len(source.faces) > trained_on([other], whole) > 0


def test_faces_that_were_trained_on_are_counted(source: Source) -> None:
    manifest = oracle(source, ModelSpec("x", SIZE)).manifest
    run = {"held_out": {"val_fraction": 0.3}, "sources": [5, {"sha256": []}, {"sha256": source.sha256}]}
    seen = len(source.faces) - len(held_out_faces([source], manifest))
    other = dataclasses.replace(source, sha256="of another file")
    for training, count in (
        (run, seen), (run | {"held_out": {}}, len(source.faces)), (run | {"sources": 5}, 0), ({}, 0),
        ({"held_out": {"val_fraction": 0.01}, "start": {"training": run}}, seen),
    ):  # fmt: skip
        assert trained_on([source, other], dataclasses.replace(manifest, training=training)) == count


def test_a_bundles_files_can_be_opened_by_path(bundle: Path) -> None:
    model = open_model(bundle / "model.fp32.onnx")
    assert "ort-cpu" in model.name
    assert open_model(bundle / "model.fp32.onnx", 1).answer.__self__.threads == 1  # type: ignore[union-attr]
    with pytest.raises(BundleError, match="has no file checkpoint"):
        open_model(bundle)
    with pytest.raises(BackendError, match="is a golden file"):
        open_model(bundle / "golden.npz")
    with pytest.raises(BundleError, match=r"there is nothing at .*nothing\.onnx; check the path"):
        open_model(bundle / "nothing.onnx")


@pytest.mark.parametrize("name", ["", "checkpoint.safetensors"])
def test_a_checkpoint_alone_needs_torch(monkeypatch: pytest.MonkeyPatch, bundle: Path, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"a checkpoint, not an ONNX file or a plan, needs the package torch,"):
        open_model(LITE / name)
    with pytest.raises(BundleError, match=r"has no file checkpoint\.safetensors; it has: .*model\.fp32\.onnx"):
        open_model(bundle / name)


def test_the_mean_shape_is_a_face() -> None:
    xy = mean_shape()
    assert xy.shape == (68, 2)
    assert xy[36, 0] < xy[39, 0] < xy[42, 0] < xy[45, 0]
    assert xy[8, 1] == xy[:, 1].max()
