"""The two label layouts, their faults, the split by person, and crops equal to the run-time's."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from kp_export.parity import faces_from_sources
from kp_runtime.errors import DataError
from kp_runtime.frame import as_frame, image_from_file
from kp_runtime.geometry import apply_matrix, boxes_from_points, crop_from_luma, frame_box, matrices_from_boxes
from kp_runtime.interchange import faces_from_file, faces_to_file, with_sizes
from kp_runtime.labelled_face import LabelledFace
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.scheme68 import MIRROR
from kp_runtime.spec import ModelSpec
from kp_train.augment import augment_from_name
from kp_train.data import Face, evenly_spread, is_held_out, luma_from_file, lumas_of_faces, parse_source, read_source
from kp_train.dataset import FaceDataset, start_of_workers
from kp_train.face_windows import Pictures, WindowDataset, read_pictures
from kp_train.loaders import Loaders, SourceSampler, held_out_batches
from kp_train.synthetic import drawn_face, mean_shape, write_csv_source


def pts_text(xy: np.ndarray) -> str:
    return "version: 1\nn_points: 68\n{\n" + "\n".join(f"{x + 1} {y + 1}" for x, y in xy) + "\n}\n"


@pytest.fixture
def csv_source(tmp_path: Path) -> Path:
    return write_csv_source(tmp_path, people=3)


def test_csv_rows_become_faces(csv_source: Path) -> None:
    source = parse_source(f"{csv_source}=1.5")
    assert source.weight == 1.5
    assert [face.image.name for face in source.faces[:2]] == ["person0_0.png", "person0_1.png"]
    row = csv_source.read_text().splitlines()[1].split(",")
    np.testing.assert_allclose(source.faces[0].xy.ravel(), np.array(row[1:], float), atol=1e-4)


def test_a_few_of_many_lie_evenly() -> None:
    assert evenly_spread(11, 3) == [0, 5, 10]
    assert (evenly_spread(3, 9), evenly_spread(5, 1), evenly_spread(0, 9)) == ([0, 1, 2], [0], [])


def test_a_path_with_an_equals_sign_needs_no_weight(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert parse_source(str(write_csv_source(folder, people=1))).weight == 1.0
    shutil.copytree(folder, tmp_path / "a=2")
    assert parse_source(str(tmp_path / "a=2" / "training_frames_keypoints.csv")).weight == 1.0
    shutil.copy(tmp_path / "a=2" / "training" / "person0_0.png", tmp_path / "a=2" / "x.png")
    (tmp_path / "a=2" / "x.pts").write_text(pts_text(read_source(folder / "training_frames_keypoints.csv").faces[0].xy))
    named = parse_source(str(tmp_path / "a=2"))
    assert (named.path.name, named.weight) == ("a=2", 1.0)
    assert parse_source(f"{tmp_path / 'a=2'}=3").weight == 3.0
    (tmp_path / "a=2").rename(tmp_path / "a")
    (tmp_path / "a=2").mkdir()  # where there are both, the number is a weight
    assert parse_source(str(tmp_path / "a=2")).weight == 2.0


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_a_weight_must_be_a_positive_number(csv_source: Path, weight: str) -> None:
    with pytest.raises(DataError, match="must be a number over 0"):
        parse_source(f"{csv_source}={weight}")


def break_row(path: Path, change: object) -> None:
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    lines[2] = ",".join(change(cells))  # type: ignore[operator]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells[:-2], r"line 3 \(person0_1.png\).* got 134 numbers"),
        (lambda cells: [*cells[:5], "left", *cells[6:]], r"line 3 .*not a number"),
        (lambda cells: [*cells[:5], "nan", *cells[6:]], r"line 3 .*not finite"),
        (lambda cells: [*cells[:5], "1e39", *cells[6:]], r"line 3 .*over what float32 holds"),
        (
            lambda cells: [cells[0], *[f"0.{i}" for i in range(136)]],
            r"line 3 .*within one pixel \(fractions of the image\? pixels are needed\)",
        ),
        (lambda cells: [*cells[:91], *cells[73:75], *cells[93:]], r"line 3 .*outer eye corners lie on one spot"),
    ],
)
def test_a_bad_csv_row_is_named(csv_source: Path, change: object, message: str) -> None:
    break_row(csv_source, change)
    with pytest.raises(DataError, match=message):
        read_source(csv_source)


@pytest.mark.parametrize("change", [lambda xy: xy[:, MIRROR], lambda xy: xy * [[[1, -1]]] + [0, 160]])
@pytest.mark.parametrize("turn", [[[1, 0], [0, 1]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]]])
def test_points_of_a_mirrored_face_are_no_face_s(tmp_path: Path, csv_source: Path, change: Any, turn: Any) -> None:
    """As where left is the person's left, or y counts upwards: pictures of points don't show it."""
    shown = np.stack([face.xy for face in faces_from_file(csv_source)]) @ np.array(turn)
    for xy, refused in ((shown, False), (change(shown), True)):
        faces = [LabelledFace(face.image, points) for face, points in zip(faces_from_file(csv_source), xy, strict=True)]
        faces_to_file(faces, tmp_path / "training_x.csv")
        told = pytest.raises(DataError, match=r"line 2 .*: its points are a mirrored face's: 36 to 41 are the eye on")
        with told if refused else contextlib.nullcontext():
            read_source(tmp_path / "training_x.csv")


def test_a_csv_without_its_images_says_where_it_looked(csv_source: Path) -> None:
    (csv_source.parent / "training").rename(csv_source.parent / "elsewhere")
    with pytest.raises(DataError, match=r"person0_0.png, which is in none of: .*training.*; put the photos into one"):
        read_source(csv_source)


def test_photos_that_a_csv_names_from_the_working_folder_are_found(
    csv_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `kp predict photos --format csv` names them in `out/keypoints.csv`."""
    (tmp_path / "training").rename(tmp_path / "shots")
    (tmp_path / "out").mkdir()
    csv_source.rename(tmp_path / "out" / "keypoints.csv")
    path = tmp_path / "out" / "keypoints.csv"
    path.write_text(path.read_text().replace("person", "shots/person"))
    with pytest.raises(DataError, match=r"is in none of: .*, the working folder; put the photos"):
        read_source(path)
    monkeypatch.chdir(tmp_path)
    assert all(face.image.is_file() for face in read_source(path).faces)


def test_photos_of_another_csv_are_not_taken(tmp_path: Path) -> None:
    """Of `photos.csv` and `photos_68.csv` each has a folder of its name, and both folders a photo of one name."""
    for name, level in (("photos", 10), ("photos_68", 200)):
        path = write_csv_source(tmp_path / "drawn", people=1, each=1)
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "person0_0.png"), np.full((160, 150), level, np.uint8))
        shutil.copy(path, tmp_path / f"{name}.csv")
    for name, level in (("photos", 10), ("photos_68", 200)):
        assert luma_from_file(read_source(tmp_path / f"{name}.csv").faces[0].image).mean() == level


@pytest.mark.parametrize("moved", [(200, 0), (0, 200), (-200, 0), (0, 1e9)])
def test_a_face_beside_its_photo_is_named(csv_source: Path, moved: tuple[float, float]) -> None:
    face = read_source(csv_source).faces[1]
    beside = dataclasses.replace(face, xy=face.xy + np.float32(moved))
    with pytest.raises(DataError, match=r"person0_1\.png has 150 x 160 pixels, and none of its face's points lies in"):
        FaceDataset([face, beside], ModelSpec("x", 64))
    with pytest.raises(DataError, match=r"person0_1\.png has 150 x 160 pixels"):
        WindowDataset([face, beside], [1.0, 1.0], Pictures(), 0, 1)
    partly = dataclasses.replace(face, xy=face.xy + np.float32([70, 0]))  # as on the edge of many photos
    assert len(FaceDataset([partly], ModelSpec("x", 64))) == 1


def test_a_face_may_lie_at_the_far_end_of_a_wide_photo(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "wide.png"), np.zeros((100, 400), np.uint8))
    face = Face(tmp_path / "wide.png", (mean_shape() * 30 + (340, 50)).astype(np.float32))
    assert lumas_of_faces([face])[0].shape == (100, 400)
    with pytest.raises(DataError, match="none of its face's points lies in them"):
        lumas_of_faces([dataclasses.replace(face, xy=face.xy[:, ::-1])])


def test_a_point_far_off_its_photo_is_named(csv_source: Path) -> None:
    """Its crop would need more memory than there is."""
    face = read_source(csv_source).faces[1]
    far = dataclasses.replace(face, xy=face.xy.copy())
    far.xy[3] = 7021234567, 12
    message = (
        r"person0_1\.png has 150 x 160 pixels, and its face is over 10 times as large: point 3 lies at 7\.02123e\+09"
    )
    with pytest.raises(DataError, match=message):
        FaceDataset([face, far], ModelSpec("x", 64))
    source = dataclasses.replace(read_source(csv_source), faces=(far,))
    with pytest.raises(DataError, match=message):
        faces_from_sources([source], ModelSpec("x", 64))


def test_a_csv_without_a_header_loses_no_row(csv_source: Path) -> None:
    whole = read_source(csv_source).faces
    csv_source.write_text("\n".join(csv_source.read_text().splitlines()[1:]) + "\n")
    assert [face.image for face in read_source(csv_source).faces] == [face.image for face in whole]


@pytest.mark.parametrize("suffix", ["webp", "tif", "tiff"])
def test_the_first_row_is_a_face_whatever_its_photos_suffix(
    tmp_path: Path, rng: np.random.Generator, suffix: str
) -> None:
    image, xy = drawn_face(rng)
    cv2.imwrite(str(tmp_path / f"ada_1.{suffix}"), image)
    (tmp_path / "faces.csv").write_text(f"ada_1.{suffix}," + ",".join(map(str, xy.ravel())), encoding="utf-8-sig")
    (tmp_path / "ada_1.pts").write_text(pts_text(xy))
    for path in (tmp_path / "faces.csv", tmp_path):
        assert [face.image.name for face in read_source(path).faces] == [f"ada_1.{suffix}"]


def test_what_kp_convert_writes_is_trained_on(csv_source: Path) -> None:
    """COCO, as labelling tools have it, to CSV: face and box stand between the photo's name and its points."""
    faces = with_sizes(faces_from_file(csv_source), csv_source.parent / "training")
    (coco,) = faces_to_file(faces, csv_source.with_name("faces.json"))
    (written,) = faces_to_file(faces_from_file(coco), csv_source.with_name("training_of_coco.csv"))
    assert written.read_text().startswith("image,face,x0,y0,x1,y1,")
    for face, found in zip(read_source(csv_source).faces, read_source(written).faces, strict=True):
        assert found.image == face.image
        np.testing.assert_allclose(found.xy, face.xy, atol=5.1e-4)


def test_folders_named_as_labels_and_pictures_are_no_files(csv_source: Path) -> None:
    folder = csv_source.parent / "training"
    (folder / "x.pts").mkdir()
    (folder / "x.jpg").mkdir()
    with pytest.raises(DataError, match=r"no \.pts files"):
        read_source(folder)
    assert len(read_pictures([folder]).lumas) == 6


def test_16_bit_photos_are_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((50, 50), 30000, np.uint16))
    with pytest.raises(DataError, match=r"deep\.png has uint16 samples; save it with 8 bits a channel"):
        luma_from_file(tmp_path / "deep.png")


def test_an_empty_csv_and_an_unknown_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("header\n")
    with pytest.raises(DataError, match="holds no labelled face: it has no rows"):
        read_source(tmp_path / "empty.csv")
    with pytest.raises(DataError, match=r"neither a CSV .*; check the path"):
        read_source(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no \.pts files"):
        read_source(tmp_path)


@pytest.mark.parametrize("name", ["faces.coco.json", "my faces.parquet"])
def test_a_file_that_convert_reads_is_sent_to_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="make one of it: kp convert") as caught:
        read_source(tmp_path / name)
    typed = str(caught.value).partition("kp convert ")[2]
    assert shlex.split(typed) == [str(tmp_path / name), str((tmp_path / name).with_suffix(".csv"))]
    with pytest.raises(DataError, match="check the path"):  # it converts the 68 points alone
        read_source(tmp_path / name, points=5)


def test_pts_files_count_from_one(tmp_path: Path, rng: np.random.Generator) -> None:
    image, xy = drawn_face(rng)
    cv2.imwrite(str(tmp_path / "ada_1.png"), image)
    (tmp_path / "ada_1.pts").write_text(pts_text(xy))
    source = read_source(tmp_path)
    (face,) = source.faces
    assert face.person == "ada"
    assert source.sha256 == hashlib.sha256((tmp_path / "ada_1.pts").read_bytes()).hexdigest()
    np.testing.assert_allclose(face.xy, xy, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n3 4\n", r"no \.pts header"),
        ("version: 1\nn_points: 68\n{\n1 2\n}\n", "expected 68 points, got 1;"),
        ("version: 1\nn_points: 68\n{\n1 two\n}\n", "not a number"),
        ("", "header"),
    ],
)
def test_a_bad_pts_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.pts").write_text(text)
    with pytest.raises(DataError, match=rf"x\.pts.*{message}"):
        read_source(tmp_path)


def test_a_pts_file_without_its_photo_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "x.pts").write_text(pts_text(drawn_face(rng)[1]))
    with pytest.raises(DataError, match=r"has no image beside it .*; put the photos there"):
        read_source(tmp_path)


def test_several_faces_of_a_photo_come_back_from_their_pts_files(tmp_path: Path) -> None:
    source = read_source(write_csv_source(tmp_path / "drawn", people=1, each=1))
    image, (xy,) = source.faces[0].image, [face.xy.astype(float) for face in source.faces]
    shutil.copy(image, tmp_path / "v.2_1.png")
    faces_to_file([LabelledFace("v.2_1.png", xy), LabelledFace("v.2_1.png", xy + 1)], tmp_path, "pts")
    faces = read_source(tmp_path).faces
    assert [(face.image.name, face.person) for face in faces] == [("v.2_1.png", "v.2")] * 2
    np.testing.assert_allclose(faces[1].xy - faces[0].xy, 1, atol=1e-3)

    shutil.copy(image, tmp_path / "v.2_1_1.png")  # a photo of its own, so v.2_1_0 has lost its
    with pytest.raises(DataError, match=r"v\.2_1_0\.pts has no image beside it"):
        read_source(tmp_path)
    (tmp_path / "v.2_1_1.png").unlink()
    shutil.copy(tmp_path / "v.2_1_0.pts", tmp_path / "v.2_1.pts")  # the photo has one face, and this is it
    with pytest.raises(DataError, match=r"v\.2_1_0\.pts has no image beside it"):
        read_source(tmp_path)


def test_a_cut_off_training_image_is_named(csv_source: Path) -> None:
    image = csv_source.parent / "training" / "person1_0.png"
    image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"person1_0\.png is cut off: .*; mend or remove it"):
        FaceDataset(read_source(csv_source).faces, ModelSpec("x", 64))


@pytest.mark.parametrize("size", [64, 112])
def test_a_plain_training_crop_is_the_run_times_crop(csv_source: Path, size: int) -> None:
    spec = ModelSpec("x", size)
    faces = read_source(csv_source).faces
    crop, xy = FaceDataset(faces, spec)[0]
    matrix = matrices_from_boxes(boxes_from_points(faces[0].xy)[None], size, spec.margin)
    expected = crops_from_frame(as_frame(image_from_file(faces[0].image)), matrix, size)
    np.testing.assert_array_equal(crop.numpy(), expected[0])
    assert xy.shape == (68, 2)
    # the square is 1.3 times the points' longer side, centred: they fill 1 / 1.3 of the crop
    assert float(np.ptp(xy.numpy(), axis=0).max()) == pytest.approx(size / 1.3, abs=0.01)


def test_a_training_crop_of_a_whole_photo_is_the_run_times_view(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Varied, it may lie anywhere in the photo: it is told how high and how wide that is."""
    luma = rng.integers(0, 256, (120, 300), np.uint8)
    cv2.imwrite(str(tmp_path / "wide.png"), luma)
    face = Face(tmp_path / "wide.png", (mean_shape() * 30 + (200, 60)).astype(np.float32))
    spec, varied, told = ModelSpec("x", 64, margin=1.0, box="frame"), augment_from_name("crop"), []
    crop, xy = FaceDataset([face], spec)[0]
    matrix = matrices_from_boxes(frame_box((120, 300))[None], 64, 1.0)[0]
    np.testing.assert_array_equal(crop[0].numpy(), crop_from_luma(luma, matrix, 64))
    np.testing.assert_allclose(xy.numpy(), apply_matrix(matrix, face.xy), atol=1e-4)
    monkeypatch.setattr(varied, "draw_jitter", lambda size_hw: told.append(size_hw) or {})
    assert torch.equal(FaceDataset([face], spec, varied)[0][0], crop)
    assert told == [(120, 300)]


def test_the_split_is_by_person_and_does_not_depend_on_order() -> None:
    people = [f"person{i}" for i in range(2000)]
    held = [p for p in people if is_held_out(p, 0.1)]
    assert 150 < len(held) < 250
    assert held == [p for p in reversed(people) if is_held_out(p, 0.1)][::-1]
    assert all(is_held_out(p, 0.2) for p in held)


@pytest.mark.parametrize(("batch_size", "batches"), [(8, [6]), (6, [6]), (4, [4])])
def test_fewer_faces_than_a_batch_are_one(csv_source: Path, batch_size: int, batches: list[int]) -> None:
    """What is left over of whole batches waits for another epoch."""
    faces = FaceDataset(read_source(csv_source).faces, ModelSpec("x", 64))
    loaders = Loaders(faces, faces, SourceSampler([6], [1.0], seed=1), batch_size, workers=0)
    loaders.trainer = SimpleNamespace(global_rank=0, world_size=1)  # type: ignore[assignment]
    assert [len(crops) for crops, _ in loaders.train_dataloader()] == batches


def test_a_worker_loads_its_own_share(csv_source: Path) -> None:
    faces = FaceDataset(read_source(csv_source).faces, ModelSpec("x", 64))
    loaders = Loaders(faces, faces, SourceSampler([6], [1.0], seed=1), 2, workers=0)
    loaders.trainer = SimpleNamespace(global_rank=1, world_size=2)  # type: ignore[assignment]
    draws = loaders.train_dataloader().sampler
    assert list(draws) == list(SourceSampler([6], [1.0], seed=1, rank=1, ranks=2))
    assert loaders.val_dataloader().batch_sampler == held_out_batches(6, 2, rank=1, ranks=2)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes begin as the platform has it")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 on fork beside threads
def test_workers_share_the_images_instead_of_a_copy(csv_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FaceDataset) -> None:
        raise AssertionError("images were copied to a worker")

    monkeypatch.setattr(FaceDataset, "__reduce__", refuse)
    shown = FaceDataset(read_source(csv_source).faces, ModelSpec("shared", size=64))
    loaders = Loaders(shown, shown, SourceSampler([len(shown)], [1.0], 0), batch_size=len(shown), workers=1)
    loaders.trainer = SimpleNamespace(global_rank=0, world_size=1)  # type: ignore[assignment]
    loader = loaders.train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "fork"  # whatever this Python's own is
    assert sum(len(crops) for crops, _ in loader) == len(shown)
    assert start_of_workers(0) is None


def test_a_person_is_a_files_name_up_to_the_last_underscore() -> None:
    names = {"Mary_Ann_Smith_12.jpg": "Mary_Ann_Smith", "ada_1.png": "ada", "ada.png": "ada", "_1.png": "_1"}
    assert {name: Face(Path("x_y", name), np.zeros((68, 2), np.float32)).person for name in names} == names


def test_a_name_that_is_no_text_is_a_person_s() -> None:
    """Such as an old Latin-1 one."""
    assert {is_held_out(os.fsdecode(b"caf\xe9"), fraction) for fraction in (0.0, 1.0)} == {False, True}


def test_faces_of_one_photo_share_it(tmp_path: Path) -> None:
    source = write_csv_source(tmp_path, people=1)
    face = read_source(source).faces[0]
    one, other = lumas_of_faces([face, dataclasses.replace(face, xy=face.xy + 1)])
    assert one is other
    with pytest.raises(DataError, match="none of its face's points"):
        lumas_of_faces([face, dataclasses.replace(face, xy=face.xy + 1e4)])


def test_who_is_held_out_follows_the_rule_in_the_manifest() -> None:
    """Another hash would mix the people of every model that there is."""
    for person in ("ada", "Mary_Ann_Smith", "person0", "é"):
        bucket = int.from_bytes(hashlib.sha256(person.encode()).digest()[:4], "big") / 2**32
        assert not is_held_out(person, bucket)
        assert is_held_out(person, bucket + 2**-32)
