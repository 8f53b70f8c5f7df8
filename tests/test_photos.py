from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path, PureWindowsPath
from typing import Any

import cv2
import numpy as np
import pytest

from kp_runtime import ImageError, InputError, Keypoints, Model, StageTimer, load
from kp_runtime.draw import put_boxes, put_keypoints
from kp_runtime.frame import image_from_file
from kp_runtime.geometry import frame_box
from kp_runtime.photos import NotDrawnError, Photo, photos_from_paths, predict_photo, write_results
from kp_runtime.scheme68 import point_names
from kp_runtime.spec import ModelSpec
from tests.models import tiny_bundle
from tests.reference import waves
from tests.tolerances import MAP_PX, assert_close

BOXES = np.array([[20.0, 30.0, 80.0, 100.0], [90.5, 40.25, 150.0, 110.0]])


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle, threads=1)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return write_picture(tmp_path / "in" / "a face.png")


def write_picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(cv2.imencode(path.suffix, waves(140, 180, 30))[1]))
    return path


def made_up(path: str, n: int) -> Photo:
    xy = np.random.default_rng(n).uniform(0, 100, (n, 68, 2)).astype(np.float32)
    return Photo(Path(path), Keypoints(xy, np.arange(4.0 * n).reshape(n, 4), np.zeros((n, 2, 3)), (90, 80)), None)


def test_photos_of_a_folder_and_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    inside = [write_picture(folder / name) for name in ("b.JPG", "a.png", "c.webp")]
    (folder / "notes.txt").write_text("")
    (folder / "folder.jpg").mkdir()
    (folder / "._a.png").write_bytes(b"left by a Mac")
    assert photos_from_paths([inside[2], folder]) == [inside[2], inside[1], inside[0], inside[2]]


def test_folder_without_photos(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ImageError, match=r"holds no photos \(\.jpg, \.jpeg, \.png.*\)$"):
        photos_from_paths([tmp_path])
    (tmp_path / "a.HEIC").write_text("")
    with pytest.raises(ImageError, match=r"holds no photos .* is not read: a\.HEIC; save them as JPEG$"):
        photos_from_paths([tmp_path])


def test_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no photo or folder at .*none\.jpg$"):
        photos_from_paths([tmp_path / "none.jpg"])
    with pytest.raises(ImageError, match=r"at https:/.*a\.jpg; of an address, download it first$"):
        photos_from_paths([Path("https://example.org/a.jpg")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="pipe is a pipe or a device; photos are read from files"):
        photos_from_paths([tmp_path / "pipe"])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_drawn_copy(suffix: str, model: Model, photo: Path, tmp_path: Path) -> None:
    before = photo.read_bytes()
    result = predict_photo(model, photo, boxes_xyxy=BOXES, drawn=tmp_path / "out" / f"d{suffix}")
    assert result.keypoints.xy.shape == (2, 68, 2)
    assert result.drawn == tmp_path / "out" / f"d{suffix}"
    drawn, source = cv2.imread(str(result.drawn)), cv2.imread(str(photo))
    assert drawn is not None
    assert drawn.shape == (140, 180, 3)
    assert not np.array_equal(drawn, source)
    assert photo.read_bytes() == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == [f"d{suffix}"]


def test_a_box_that_holds_no_face_is_drawn_without_points(photo: Path, tmp_path: Path) -> None:
    found = dataclasses.replace(made_up("", 2).keypoints, boxes_xyxy=BOXES, lost_score=np.float32([0.1, 0.9]))

    def model(*_: object, **__: object) -> Keypoints:
        return found

    model.spec = ModelSpec("x", 64, lost_limit=0.5)  # type: ignore[attr-defined]
    expected = image_from_file(photo)
    put_boxes(expected, BOXES)
    put_keypoints(expected, found.xy[:1])
    predict_photo(model, photo, boxes_xyxy=BOXES, drawn=tmp_path / "d.png")  # type: ignore[arg-type]
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "d.png")), expected)


def test_drawn_copy_with_a_name_as_long_as_a_file_can_have(model: Model, photo: Path, tmp_path: Path) -> None:
    result = predict_photo(model, photo, boxes_xyxy=BOXES, drawn=tmp_path / f"{'d' * 251}.png")
    assert [result.drawn] == list(tmp_path.glob("d*"))


@pytest.mark.parametrize("name", ["d", "d.xyz"])
def test_drawn_copy_of_a_kind_that_opencv_does_not_write(name: str, model: Model, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(NotDrawnError, match=rf"can't write a picture as '{name}'; use \.jpg or \.png"):
        predict_photo(model, photo, boxes_xyxy=BOXES, drawn=tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_drawn_copy_of_a_kind_that_is_no_text(model: Model, photo: Path, tmp_path: Path) -> None:
    """OpenCV ends the process at it."""
    with pytest.raises(NotDrawnError, match="its name is no text"):
        predict_photo(model, photo, boxes_xyxy=BOXES, drawn=tmp_path / os.fsdecode(b"d.\xff"))


def test_drawn_copy_in_a_place_that_can_not_be(model: Model, photo: Path) -> None:
    with pytest.raises(NotDrawnError, match=r"a face\.png was not drawn: can't write") as caught:
        predict_photo(model, photo, boxes_xyxy=BOXES, drawn=photo / "d.png")
    assert caught.value.photo.drawn is None
    assert np.array_equal(caught.value.photo.keypoints.xy, predict_photo(model, photo, boxes_xyxy=BOXES).keypoints.xy)


def test_detector_s_boxes_are_used_and_timed(model: Model, photo: Path) -> None:
    def detector(image: object, layout: str = "bgr") -> np.ndarray:
        assert np.shape(image) == (140, 180, 3)
        return BOXES

    timer = StageTimer()
    result = predict_photo(model, photo, detector=detector, timer=timer)
    assert list(timer.seconds) == ["read", "detect", "crop", "infer", "map back"]
    assert np.array_equal(result.keypoints.boxes_xyxy, BOXES)
    assert np.array_equal(result.keypoints.xy, predict_photo(model, photo, boxes_xyxy=BOXES).keypoints.xy)


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 71.5 MiB"), cv2.error("Insufficient memory")])
def test_a_photo_too_large_for_the_memory_is_a_photo_that_failed(
    error: Exception, model: Model, photo: Path, tmp_path: Path
) -> None:
    def fail(*_: object) -> np.ndarray:
        raise error

    told = r"a face\.png is too large for the memory, or OpenCV failed: (Unable to allocate|Insufficient)"
    with pytest.raises(ImageError, match=told):
        predict_photo(model, photo, detector=fail)
    with pytest.raises(NotDrawnError, match=told) as raised:  # the keypoints are known by then
        predict_photo(model, photo, boxes_xyxy=BOXES, drawn=tmp_path / "x.png", draw=fail)
    assert len(raised.value.photo.keypoints) == 2


def test_looks_and_mirror_reach_the_model(model: Model, photo: Path) -> None:
    found = predict_photo(model, photo, boxes_xyxy=BOXES, looks=2, mirror=True).keypoints
    assert np.array_equal(found.xy, model(image_from_file(photo), BOXES, looks=2, mirror=True).xy)


def test_without_a_timer_the_model_times_nothing(
    model: Model, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # on a GPU a timed call waits after each stage and uses no CUDA graph
    given, call = [], Model.__call__

    def told(self: Model, *arguments: Any, **rest: Any) -> Keypoints:
        given.append(rest.get("timer"))
        return call(self, *arguments, **rest)

    monkeypatch.setattr(Model, "__call__", told)
    predict_photo(model, photo, boxes_xyxy=BOXES)
    assert given == [None]


def test_no_boxes_and_no_detector(model: Model, photo: Path) -> None:
    with pytest.raises(InputError, match="give boxes or a detector"):
        predict_photo(model, photo)


def test_model_of_the_whole_frame_needs_no_detector(photo: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "frame", margin=1.0, box="frame")
    result = predict_photo(load(bundle, threads=1), photo).keypoints
    assert_close(result.boxes_xyxy, frame_box((140, 180))[None], MAP_PX, "box")
    # the tiny network's face fills 0.6 of its crop, whose side is 224/250 of the photo's shorter side
    assert np.ptp(result.xy[0][:, 0]) == pytest.approx(0.6 * 140 * 224 / 250, abs=MAP_PX)


def test_json_there_and_back(tmp_path: Path) -> None:
    photos = [made_up("x/a.jpg", 2), made_up("x/b.jpg", 0)]
    (path,) = write_results(photos, tmp_path / "out", "json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert [(entry["image"], len(entry["faces"])) for entry in raw] == [(str(p.path), len(p.keypoints)) for p in photos]
    assert_close([face["keypoints_xy"] for face in raw[0]["faces"]], photos[0].keypoints.xy, MAP_PX, "points")


def test_csv_there_and_back(tmp_path: Path) -> None:
    photos = [made_up('x/a, "quoted".jpg', 2), made_up("x/b.jpg", 1)]
    (path,) = write_results(photos, tmp_path, "csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["face"]) for row in rows] == [
        (str(photos[0].path), "0"),
        (str(photos[0].path), "1"),
        (str(photos[1].path), "0"),
    ]
    for row, xy in zip(rows, [*photos[0].keypoints.xy, *photos[1].keypoints.xy], strict=True):
        read = [[float(row[f"{name}_{axis}"]) for axis in "xy"] for name in point_names()]
        assert_close(read, xy, MAP_PX, "points")
    assert [float(rows[1][name]) for name in ("x0", "y0", "x1", "y1")] == [4, 5, 6, 7]


def test_paths_of_windows_are_written_with_slashes(tmp_path: Path) -> None:
    """So that a file can be read on another system."""
    path: Any = PureWindowsPath("x") / "a.jpg"
    photos = [Photo(path, made_up("", 1).keypoints, None)]
    (table,), (document,) = (write_results(photos, tmp_path, name) for name in ("csv", "json"))
    assert table.read_text(encoding="utf-8").splitlines()[1].startswith("x/a.jpg,")
    assert json.loads(document.read_text(encoding="utf-8"))[0]["image"] == "x/a.jpg"


def test_pts_there_and_back(tmp_path: Path) -> None:
    photos = [made_up("x/a.jpg", 2), made_up("x/b.jpg", 1), made_up("x/c.jpg", 0)]
    written = write_results(photos, tmp_path, "pts")
    assert [path.name for path in written] == ["a_0.pts", "a_1.pts", "b.pts"]
    for path, xy in zip(written, [*photos[0].keypoints.xy, *photos[1].keypoints.xy], strict=True):
        assert_close(np.loadtxt(path.read_text().splitlines()[3:-1]) - 1, xy, MAP_PX, "points")


def test_pts_files_never_take_each_other_s_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"y/a\.png and a photo before it would both be a\.pts; write json or csv"):
        write_results([made_up("x/a.jpg", 1), made_up("y/a.png", 1)], tmp_path / "out", "pts")
    assert not (tmp_path / "out").exists()


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no format 'xml'; choose from json, csv, pts, coco, parquet"):
        write_results([], tmp_path / "out", "xml")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["wide.jpg", "a.pbm"])
def test_a_picture_that_the_format_can_not_hold(name: str, model: Model, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    cv2.imwrite(str(wide), np.zeros((8, 66_000 if name == "wide.jpg" else 40), np.uint8))
    with pytest.raises(NotDrawnError, match=rf"OpenCV can't write a picture .*{name}"):
        predict_photo(model, wide, boxes_xyxy=np.array([[0, 0, 8, 8]]), drawn=tmp_path / name)
    assert not (tmp_path / name).exists()
