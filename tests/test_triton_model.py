"""What Triton runs for whole images, without a server. `test_triton_server.py` has the server."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

import kp_runtime
from kp_export.triton import write_repository
from kp_runtime import triton_model
from kp_runtime.backend_ort import OrtCpuBackend
from kp_runtime.errors import BackendError, ImageError, InputError
from kp_runtime.manifest import Manifest
from kp_runtime.triton_model import PROBE, ImagesModel, TritonPythonModel, check_numpy, threads_of
from tests.conftest import short_of_memory
from tests.models import LOST_LIMIT, tiny_bundle


def test_threads_that_are_no_number_are_named() -> None:
    assert (threads_of(""), threads_of("2")) == (None, 2)
    with pytest.raises(
        InputError, match=r"the parameter threads must be a whole number, or empty for all cores, got 'all'"
    ):
        threads_of("all")


def test_an_instance_is_what_the_config_asks_for(
    bundle: Path, own_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    server = SimpleNamespace(TritonModelException=RuntimeError, Logger=SimpleNamespace(log_info=said.append))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    monkeypatch.setattr(triton_model, "check_numpy", lambda: None)
    warmed: list[int] = []
    monkeypatch.setattr(OrtCpuBackend, "warmup", lambda backend, faces: warmed.append(faces))
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "7")  # so that what the model sets is undone
    shutil.copytree(bundle, tmp_path / "1" / "bundle")

    def instance(**asked: str) -> ImagesModel:
        config = {"parameters": {name: {"string_value": value} for name, value in asked.items()}}
        model = TritonPythonModel()
        model.initialize({"model_config": json.dumps(config), "model_repository": str(tmp_path), "model_version": "1"})
        return model._images

    images = instance(threads="1")
    assert (said, warmed) == ([images.report], [triton_model.FACES])
    assert (images._backend.threads, images._detector._threads) == (1, 1)  # type: ignore[attr-defined]
    assert os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] == "7"
    monkeypatch.delenv("OPENCV_IO_MAX_IMAGE_PIXELS")
    instance()
    assert os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] == "40000000"
    for name, wrong in (("threads", "all"), ("backend", "none"), ("detector", "none")):
        with pytest.raises(RuntimeError, match=wrong):
            instance(**{name: wrong})


@pytest.fixture
def images(bundle: Path, own_detector: Path) -> Iterator[ImagesModel]:
    model = ImagesModel(bundle, threads=1)
    yield model
    model.close()


def test_the_server_s_log_tells_what_runs_and_whose_boxes_it_takes(
    images: ImagesModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, own = images._backend.report, images._detector.sha256  # type: ignore[attr-defined]
    runs = (
        f"kp {kp_runtime.__version__}: ort-cpu runs model.fp32.onnx of tiny, sha256 {report.sha256}; "
        f"faces by CenterDetector, sha256 {own}; rejected: {' | '.join(report.rejected)}"
    )
    assert images.report == runs
    monkeypatch.setattr(triton_model, "box_advice", lambda spec: f"boxes of {spec.name}")
    assert images.report == f"{runs}; boxes of tiny"


def jpeg(image: np.ndarray) -> bytes:
    data: bytes = cv2.imencode(".jpg", image)[1].tobytes()
    return data


@pytest.mark.parametrize("lost_limit", [LOST_LIMIT, None])
def test_answers_have_the_dimensions_of_the_config(
    lost_limit: float | None, tmp_path: Path, astronaut: Path, own_detector: Path
) -> None:
    bundle = tiny_bundle(tmp_path / "tiny", lost_limit=lost_limit)
    write_repository(bundle, tmp_path / "repo")
    config = (tmp_path / "repo/tiny-images/config.pbtxt").read_text()
    wanted = dict(re.findall(r'output {\n  name: "(\w+)"\n.*\n  dims: (.*)\n', config))
    images = ImagesModel(bundle, "ort-cpu", threads=1)
    (answer,) = images([[jpeg(kp_runtime.image_from_file(astronaut))]])
    assert not isinstance(answer, Exception)
    found = triton_model._arrays(answer)
    assert list(found) == list(wanted) == ["faces", "boxes", "keypoints", *["lost_score"] * (lost_limit is not None)]
    for name, array in found.items():
        dims = json.loads(wanted[name])
        assert len(dims) == array.ndim - 1
        assert all(dim in (-1, length) for dim, length in zip(dims, array.shape[1:], strict=True))
    crops = (tmp_path / "repo/tiny-crops-onnx/config.pbtxt").read_text()
    dims = dict(re.findall(r'output {\n  name: "(\w+)"\n.*\n  dims: (.*)\n', crops))
    assert dims == {name: str(list(shape)) for name, shape in Manifest.read(bundle).spec.outputs.items()}


def test_images_with_fewer_faces_end_in_rows_of_nan() -> None:
    one, none = ((np.ones((faces, 4), np.float32), np.ones((faces, 68, 2), np.float32)) for faces in (1, 0))
    found = triton_model._arrays([none, one])
    assert found["faces"].tolist() == [[0], [1]]
    for name in ("boxes", "keypoints"):
        assert np.isnan(found[name][0]).all()
        assert (found[name][1] == 1).all()


def test_images_are_answered_as_one_by_one(images: ImagesModel, bundle: Path, astronaut: Path) -> None:
    one = kp_runtime.image_from_file(astronaut)
    two, dark = np.hstack([one, one]), (one * 0.6).astype(np.uint8)
    pictures = [jpeg(picture) for picture in (two, dark, np.zeros((40, 30), np.uint8), one)]
    model, detector = kp_runtime.load(bundle, threads=1), kp_runtime.load_detector()
    answers = images([pictures[:2], [pictures[2]], [pictures[3]]])
    found = [faces for answer in answers if not isinstance(answer, Exception) for faces in answer]
    for data, (boxes, keypoints, scores) in zip(pictures, found, strict=True):
        image = kp_runtime.image_from_bytes(data)
        wanted = model(image, detector(image))
        assert (boxes == wanted.boxes_xyxy.astype(np.float32)).all()
        assert np.abs(keypoints - wanted.xy).max(initial=0) < 1e-3
        assert wanted.lost_score is not None
        assert np.abs(scores[:, 0] - wanted.lost_score).max(initial=0) < 1e-5
    assert [len(boxes) for boxes, *_ in found] == [2, 1, 0, 1]


def test_a_bad_image_is_its_callers_alone(images: ImagesModel, astronaut: Path) -> None:
    good = jpeg(kp_runtime.image_from_file(astronaut))
    bad, fine, cut_off = images([[good, b"text"], [good], [good[:-100]]])
    assert isinstance(bad, ImageError)
    assert "image 1" in str(bad)
    assert isinstance(cut_off, ImageError)
    assert isinstance(fine, list)
    assert fine[0][1].shape == (1, 68, 2)


def test_an_image_that_no_memory_holds_is_its_callers_alone(
    images: ImagesModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch)
    failed, fine = images([[jpeg(np.zeros((40, 30, 3), np.uint8))], []])
    told = "there is too little memory now: image 0 can't be decoded: .*Failed to allocate .* bytes; try again"
    assert isinstance(failed, BackendError)
    assert re.fullmatch(told, str(failed))
    assert fine == []


def test_an_image_of_too_many_faces_is_its_callers_alone(
    images: ImagesModel, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_model, "MOST_FACES", 1)
    one = kp_runtime.image_from_file(astronaut)
    crowd, fine = images([[jpeg(np.hstack([one, one]))], [jpeg(one)]])
    assert isinstance(crowd, ImageError)
    assert str(crowd) == "image 0 has 2 faces, at most 1 are taken; send a part of it"
    assert isinstance(fine, list)


def test_points_that_are_no_numbers_are_no_answer(
    images: ImagesModel, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a client they would be rows that hold no face."""
    right = images._backend._run
    monkeypatch.setattr(images._backend, "_run", lambda crops: [array * np.float32("nan") for array in right(crops)])
    (answer,) = images([[jpeg(kp_runtime.image_from_file(astronaut))]])
    assert isinstance(answer, BackendError)
    assert "points that are not finite" in str(answer)


def test_the_probe_runs_the_network(images: ImagesModel) -> None:
    ((boxes, keypoints, scores),) = images([[PROBE]])[0]  # type: ignore[misc]
    assert (boxes.shape, keypoints.shape, scores.shape) == ((0, 4), (0, 68, 2), (0, 1))
    images._golden.keypoints[...] += 1
    (error,) = images([[PROBE]])
    assert isinstance(error, BackendError)
    assert "puts a golden keypoint 1.414 px from PyTorch's" in str(error)


@pytest.mark.usefixtures("own_detector", "half_a_pixel_off")
def test_a_server_that_cuts_crops_wrongly_has_no_model(bundle_with_image: Path) -> None:
    with pytest.raises(BackendError, match="golden crop is cut with a grey level"):
        ImagesModel(bundle_with_image, threads=1)


def test_numpy_2_is_refused() -> None:
    check_numpy("1.26.4")
    with pytest.raises(BackendError, match=r"numpy 2.1.0 .*wrong numbers without an error.*pip install 'numpy<2'"):
        check_numpy("2.1.0")
