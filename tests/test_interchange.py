"""Labelled faces there and back in every format, and what is refused."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_runtime.errors import DataError, ImageError, InputError, KpError, MissingExtraError
from kp_runtime.interchange import FORMATS, faces_from_file, faces_to_file, format_of, with_sizes
from kp_runtime.labelled_face import LabelledFace
from kp_runtime.pts import pts_text
from kp_runtime.scheme68 import point_names

PLACES = {"pts": "out", "coco": "faces.json", "csv": "faces.csv", "parquet": "faces.parquet"}


def made_up(image: str, seed: int) -> LabelledFace:
    xy = np.round(np.random.default_rng(seed).uniform(-5, 300, (68, 2)), 3)
    return LabelledFace(image, xy, np.array([1.5, 2.0, 80.25, 90.0]) + seed, (240, 320))


FACES = [made_up("a.jpg", 0), made_up("a.jpg", 1), made_up('folder/b, "c".png', 2)]


@pytest.fixture(params=sorted(FORMATS))
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return str(request.param)


def test_points_and_what_a_format_has_a_place_for_come_back(kind: str, tmp_path: Path) -> None:
    written = faces_to_file(FACES, tmp_path / PLACES[kind])
    assert len(written) == (3 if kind == "pts" else 1)
    back = faces_from_file(tmp_path / PLACES[kind])
    for face, found in zip(FACES, back, strict=True):
        np.testing.assert_allclose(found.xy, face.xy, atol=5.1e-4)
        if kind == "pts":
            assert (found.box_xyxy, found.size_hw) == (None, None)
            continue
        assert found.image == face.image
        assert found.box_xyxy is not None
        assert face.box_xyxy is not None
        np.testing.assert_allclose(found.box_xyxy, face.box_xyxy, atol=1e-3)
        assert found.size_hw == (face.size_hw if kind == "coco" else None)


def test_pts_names_and_pixels_from_one(tmp_path: Path) -> None:
    written = faces_to_file(FACES, tmp_path)
    assert [path.name for path in written] == ["a_0.pts", "a_1.pts", 'b, "c".pts']
    first = np.array(written[0].read_text().splitlines()[3].split(), float)
    np.testing.assert_allclose(first, FACES[0].xy[0] + 1, atol=5.1e-4)
    (tmp_path / "a_0.jpeg").touch()
    assert faces_from_file(tmp_path)[0].image == "a_0.jpeg"
    assert faces_from_file(written[1])[0].image == "a_1"
    with pytest.raises(InputError, match="can hold one face, not 3; name a folder"):
        faces_to_file(FACES, tmp_path / "x.pts")
    with pytest.raises(InputError, match=r"y/a\.png and a photo before it would both be a\.pts; write json or csv"):
        faces_to_file([made_up("x/a.jpg", 0), made_up("y/a.png", 1)], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_pts_files_that_are_labels_lie_beside_their_photos_and_replace_none(tmp_path: Path) -> None:
    names = ["anna/1.png", "ben/1.png", "../up.png", "/abs/whole.png"]
    faces = [made_up(name, i) for i, name in enumerate(names)]
    written = faces_to_file(faces, tmp_path, as_labels=True)
    assert written == [tmp_path / name for name in ("anna/1.pts", "ben/1.pts", "up.pts", "whole.pts")]
    before = written[1].read_bytes()
    for place, one in ((tmp_path, [faces[2], faces[1]]), (written[1], faces[:1])):
        with pytest.raises(InputError, match=r"(up|1)\.pts is there already and may be a label made by hand"):
            faces_to_file(one, place, as_labels=True)
    assert written[1].read_bytes() == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "header",
    [
        "," + ",".join(map(str, range(136))), "image," + ",".join(map(str, range(136))), "image,x0", "",
        "image.path,x0,y0", "\nimage,x0", "file.name," + ",".join(map(str, range(136))),
    ],
)  # fmt: skip
def test_every_header_line_of_a_csv_is_none_of_its_faces(tmp_path: Path, header: str, encoding: str) -> None:
    rows = [f"{face.image}," + ",".join(map(str, face.xy.ravel())) for face in FACES[:2]]
    (tmp_path / "f.csv").write_text("\n".join([header, *rows] if header else rows), encoding=encoding)
    assert [face.image for face in faces_from_file(tmp_path / "f.csv")] == ["a.jpg", "a.jpg"]


@pytest.mark.parametrize(
    ("columns", "refused"),
    [
        ([f"{axis}_{i}" for axis in "xy" for i in range(68)], True),
        ([f"nose_{i}_{axis}" for i in range(68) for axis in "YX"], True),
        ([f"{axis}{i}" for i in range(68) for axis in "xy"], False),
        ([f"y{i} (x)" for i in range(136)], False),
        ([f"x{i}" for i in range(136)], False),
        ([f"lefteye{axis}" for axis in "xy"] * 68, False),
    ],
)
@pytest.mark.parametrize("between", ["", "face,x0,y0,x1,y1,"])
def test_a_header_of_another_order_is_refused(tmp_path: Path, columns: list[str], refused: bool, between: str) -> None:
    row = f"a.jpg,{'0,1,2,3,4,' if between else ''}" + ",".join(map(str, FACES[0].xy.ravel()))
    (tmp_path / "f.csv").write_text(f"image,{between}{','.join(columns)}\n{row}\n")
    if not refused:
        assert len(faces_from_file(tmp_path / "f.csv")) == 1
        return
    with pytest.raises(DataError, match=rf"begin with {columns[0]}, {columns[1]}; wanted are x and y of each point in"):
        faces_from_file(tmp_path / "f.csv")


NAMES_SORTED = [point_names(), [f"p{i}" for i in range(1, 69)], [str(i) for i in range(68)]]
"""Names that tell the points' order, which a tool that sorts them as text loses."""


@pytest.mark.parametrize("names", NAMES_SORTED)
def test_coco_points_that_a_tool_sorted_by_name_come_back_in_order(tmp_path: Path, names: Sequence[str]) -> None:
    (path,) = faces_to_file(FACES, tmp_path / "c.json")
    document, order = json.loads(path.read_text()), sorted(range(68), key=names.__getitem__)
    document["categories"][0]["keypoints"] = [names[i] for i in order]
    for annotation in document["annotations"]:
        annotation["keypoints"] = np.reshape(annotation["keypoints"], (68, 3))[order].ravel().tolist()
    path.write_text(json.dumps(document))
    for face, found in zip(FACES, faces_from_file(path), strict=True):
        np.testing.assert_allclose(found.xy, face.xy, atol=5.1e-4)


@pytest.mark.parametrize("names", NAMES_SORTED)
def test_a_header_whose_points_were_sorted_by_name_is_refused(tmp_path: Path, names: Sequence[str]) -> None:
    header = ",".join(f"{name}_{axis}" for name in sorted(names) for axis in "xy")
    path = tmp_path / "a.csv"
    path.write_text(f"image,{header}\na.jpg," + ",".join(map(str, range(1, 137))) + "\n")
    with pytest.raises(DataError, match=r"sorted otherwise than the points: \w+ stands where \w+ should; put them"):
        faces_from_file(path)


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_columns_that_no_commas_separate_are_said(tmp_path: Path, mark: str, name: str) -> None:
    for point in ".,":  # the latter as a spreadsheet has it in many countries
        (tmp_path / "f.csv").write_text(mark.join(["a.jpg", *(f"{x}".replace(".", point) for x in FACES[0].xy.flat)]))
        with pytest.raises(DataError, match=f"separated by {name}; save it with commas"):
            faces_from_file(tmp_path / "f.csv")


def test_a_first_face_with_a_blank_number_is_no_header(tmp_path: Path) -> None:
    row = "frame0001," + ",".join(map(str, FACES[0].xy.ravel()))
    (tmp_path / "f.csv").write_text(row.rpartition(",")[0] + ",\n" + row + "\n")
    with pytest.raises(DataError, match="line 1"):
        faces_from_file(tmp_path / "f.csv")


def test_a_line_without_end_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("," * 1_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="holds no labelled face"):
        faces_from_file(tmp_path / "f.csv")
    assert tracemalloc.get_traced_memory()[1] < 60e6
    tracemalloc.stop()


def test_what_stands_behind_a_dot_is_a_names(tmp_path: Path) -> None:
    names = ["frame.0001", "frame.0002", "v1.2_a.png", "photo.v2.jpg", "photo.v1", "photo.v3", "scan.jp2"]
    written = faces_to_file([made_up(name, i) for i, name in enumerate(names)], tmp_path)
    stems = ["frame.0001", "frame.0002", "v1.2_a", "photo.v2", "photo.v1", "photo.v3", "scan"]
    assert [path.name for path in written] == [f"{stem}.pts" for stem in stems]


def test_coco_images_of_one_id_are_refused(tmp_path: Path) -> None:
    (path,) = faces_to_file(FACES, tmp_path / "c.json")
    document = json.loads(path.read_text())
    document["images"].append(dict(document["images"][0], file_name="other.jpg"))
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"has two images of the id \d+; number them anew"):
        faces_from_file(path)


@pytest.mark.parametrize("kind", ["pts", "csv", "parquet"])
def test_faces_of_another_number_of_points(kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    faces_to_file([replace(face, xy=face.xy[:5]) for face in FACES[:1]], tmp_path / PLACES[kind])
    (found,) = faces_from_file(tmp_path / PLACES[kind], points=5)
    np.testing.assert_allclose(found.xy, FACES[0].xy[:5], atol=5.1e-4)
    assert str(tmp_path / PLACES[kind]) in found.where
    with pytest.raises(DataError, match="68 points"):
        faces_from_file(tmp_path / PLACES[kind])


def test_coco_is_what_its_tools_expect(tmp_path: Path) -> None:
    (path,) = faces_to_file(FACES, tmp_path / "c.json")
    document = json.loads(path.read_text())
    assert [(i["file_name"], i["width"], i["height"]) for i in document["images"]] == [
        ("a.jpg", 320, 240), ('folder/b, "c".png', 320, 240),
    ]  # fmt: skip
    assert [a["image_id"] for a in document["annotations"]] == [1, 1, 2]
    assert [a["id"] for a in document["annotations"]] == [1, 2, 3]  # for COCO's own tool 0 is none
    annotation, (category,) = document["annotations"][1], document["categories"]
    assert annotation["bbox"] == [2.5, 3.0, 78.75, 88.0]
    assert annotation["area"] == 78.75 * 88
    assert annotation["keypoints"][3:6] == [*FACES[1].xy[1].tolist(), 2]
    assert (len(category["keypoints"]), category["keypoints"][36]) == (68, "left_eye_0")
    assert {1, 68} <= {point for edge in category["skeleton"] for point in edge} <= set(range(1, 69))


def test_coco_boxes_of_other_things_are_left_out(tmp_path: Path) -> None:
    (path,) = faces_to_file(FACES[:1], tmp_path / "faces.json", "coco")
    document = json.loads(path.read_text())
    document["categories"].insert(0, {"id": 2, "name": "person"})
    document["annotations"].insert(0, {"id": 9, "image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5]})
    path.write_text(json.dumps(document))
    (face,) = faces_from_file(path)
    np.testing.assert_allclose(face.xy, FACES[0].xy, atol=6e-4)


def test_coco_takes_sizes_from_the_images(tmp_path: Path) -> None:
    faces = [LabelledFace("a.png", FACES[0].xy)]
    with pytest.raises(InputError, match=r"needs the height and width of a\.png.*add the folder.*--images"):
        faces_to_file(faces, tmp_path / "c.json")
    with pytest.raises(ImageError, match=r"a\.png can't be read"):
        with_sizes(faces, tmp_path)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((30, 50, 3), np.uint8))
    faces_to_file(with_sizes(faces, tmp_path), tmp_path / "c.json")
    known = LabelledFace("elsewhere.png", FACES[0].xy, size_hw=(7, 9))  # is not looked for
    assert [face.size_hw for face in with_sizes([*faces, known], tmp_path)] == [(30, 50), (7, 9)]
    (back,) = faces_from_file(tmp_path / "c.json")
    assert back.size_hw == (30, 50)
    np.testing.assert_allclose(back.box_xyxy, [*FACES[0].xy.min(axis=0), *FACES[0].xy.max(axis=0)], atol=2e-3)  # type: ignore[arg-type]


def test_csv_without_boxes_is_the_layout_that_training_reads(tmp_path: Path) -> None:
    faces = [LabelledFace(face.image, face.xy) for face in FACES]
    (path,) = faces_to_file(faces, tmp_path / "f.csv")
    assert len(path.read_text().splitlines()[0].split(",")) == 137
    for face, found in zip(faces, faces_from_file(path), strict=True):
        np.testing.assert_allclose(found.xy, face.xy, atol=5.1e-4)


def _coco(**changes: object) -> str:
    annotation = {"image_id": 1, "category_id": 1, "keypoints": [1.0, 2.0, 2] * 68, "bbox": [0, 0, 9, 9]} | changes
    return json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg", "height": 9, "width": 9}],
        "categories": [{"id": 1, "keypoints": ["p"] * 68}],
        "annotations": [annotation],
    })  # fmt: skip


def test_coco_s_images_of_0_x_0_pixels_are_of_unknown_size(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(_coco().replace('"height": 9, "width": 9', '"height": 0, "width": 0'))
    faces = faces_from_file(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"COCO needs the height and width of a\.jpg.*--images FOLDER"):
        faces_to_file(faces, tmp_path / "b.json")
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((40, 30, 3), np.uint8))
    assert with_sizes(faces, tmp_path)[0].size_hw == (40, 30)


def test_a_first_row_whose_image_has_no_suffix_is_a_face(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("".join(f"face{i}," + ",".join(map(str, range(i, 136 + i))) + "\n" for i in (1, 2)))
    assert [face.image for face in faces_from_file(path)] == ["face1", "face2"]


def test_suffixes_in_capitals_as_cameras_write_them(tmp_path: Path) -> None:
    text = pts_text(FACES[0].xy)
    (tmp_path / "a.PTS").write_text(text)
    (tmp_path / "a.JPG").touch()
    (tmp_path / "b.pts").write_text(text)
    assert [face.image for face in faces_from_file(tmp_path, "pts")] == ["a.JPG", "b"]


def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "faces" / "closed"
    closed.mkdir(parents=True)
    for folder in (closed, closed.parent):
        (folder / "a.pts").write_text(pts_text(FACES[0].xy))
    scandir = os.scandir

    def without_rights(path: str) -> object:  # root, as whom tests may run, has all of them
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_rights)
    with pytest.raises(DataError, match=r"closed can't be read: Permission denied; let this user read it"):
        faces_from_file(closed.parent)


def test_what_a_mac_leaves_beside_files_is_no_label(tmp_path: Path) -> None:
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "a.pts").write_text(pts_text(FACES[0].xy))
    for name in ("._a.pts", "__MACOSX/._a.pts"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert [face.image for face in faces_from_file(tmp_path, "pts")] == ["a"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_name_that_is_no_text(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    face = replace(FACES[0], image=os.fsdecode(b"\xff.jpg"))
    (path,) = faces_to_file([face], tmp_path / "a", kind)
    assert faces_from_file(path, kind)[0].image == "\\udcff.jpg"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.pts", "version: 1", "has no .pts header"),
        ("a.pts", "n_points: 68\n{\n1 2\n}", "expected 68 points, got 1"),
        ("a.pts", "n_points: 68\n{\n" + "5.25 5.25\n" * 67 + "5.25 5", r"a\.pts is cut off: there is no } behind"),
        ("a.pts", "n_points: 68\n{\n" + "1 x\n" * 68 + "}", "a coordinate is not a number"),
        (
            "a.csv",
            "image,x\na.jpg,1,2\n",
            r"line 2 \(a.jpg\): .* and 136 numbers for 68 points, got 2 numbers",
        ),
        ("a.csv", "a.jpg" + ",nan" * 136, r"line 1 \(a.jpg\): a coordinate is not finite; correct it"),
        ("a.csv", "image,x\na.jpg" + ",inf" * 136, r"line 2 \(a.jpg\): a coordinate is not finite"),
        ("a.csv", "image,x\na.jpg,0,1,2,3,b" + ",1" * 136, r"line 2 \(a.jpg\): a number of the box is none"),
        ("a.csv", "image,x\n", "holds no labelled face: it has no rows"),
        ("a.json", "{", "is no JSON"),
        (
            "a.json",
            "[]",
            "is a list, as kp predict writes its own JSON, and no COCO file; run kp predict with",
        ),
        ("a.json", "{}", "is no COCO keypoint file: it lacks 'images'"),
        ("a.json", _coco(image_id=2), "annotation 0: the file lists no image of the image_id 2"),
        ("a.json", _coco().replace('"a.jpg"', "null"), "annotation 0: the image's name is no text"),
        ("a.json", _coco(category_id=2), "annotation 0 lacks or has a wrong 2"),
        ("a.json", _coco(keypoints=[1, 2, 2] * 17), "expected 68 points, got 17"),
        ("a.json", _coco(keypoints=[1, 2, 0] * 68), r"a point is not labelled \(visibility 0\)"),
        ("a.json", _coco(bbox=[1, 2]), "a box must have 4 finite numbers"),
        ("a.parquet", "PAR1", "is no Parquet file of labelled faces"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        faces_from_file(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_of_two_lines_stays_one_and_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    (path,) = faces_to_file([replace(FACES[0], image="a\r\nb.jpg")], tmp_path / "a.csv")
    assert [face.image for face in faces_from_file(path)] == ["a\r\nb.jpg"]
    path.write_bytes(path.read_bytes() + b"c.jpg,1\n")
    with pytest.raises(DataError, match=r"line 4 \(c\.jpg\)"):
        faces_from_file(path)


@pytest.mark.parametrize("mark", [0.0, -1.0])
def test_a_point_that_is_marked_as_not_labelled_is_no_label(kind: str, mark: float, tmp_path: Path) -> None:
    xy = FACES[0].xy.copy()
    xy[7] = mark - (kind == "pts")  # its files count from 1
    faces_to_file([replace(FACES[0], xy=xy)], tmp_path / PLACES[kind])
    with pytest.raises(DataError, match=rf"point 7 is not labelled \({mark:g}, {mark:g}\); all 68 are needed, hidden"):
        faces_from_file(tmp_path / PLACES[kind])
    xy[7] = mark, 12  # a label may lie beside the image
    faces_to_file([replace(FACES[0], xy=xy)], tmp_path / PLACES[kind])
    assert faces_from_file(tmp_path / PLACES[kind])[0].xy[7].tolist() == [mark, 12]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_is_read_is_never_all_in_memory_beside_its_faces(suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    (path,) = faces_to_file(FACES * 1000, tmp_path / f"a.{suffix}")
    tracemalloc.start()
    try:
        faces = faces_from_file(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(faces) == 3000
    assert peak - kept < 8e6  # all numbers as Python's, or the text as wide characters: 13e6


def test_faces_of_which_some_have_no_box_are_no_csv(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"some faces have a box, and others, as one of b\.png, have not.*write coco"):
        faces_to_file([FACES[0], replace(FACES[0], image="b.png", box_xyxy=None)], tmp_path / "a.csv")


@pytest.mark.parametrize("image", [None, b"a\xff.jpg"])
def test_an_image_without_a_name_in_parquet(tmp_path: Path, image: object) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (path,) = faces_to_file(FACES[:1], tmp_path / "a.parquet")
    row = pq.read_table(path).to_pylist()[0] | {"image": image}
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(DataError, match="row 0: the image's name is no text"):
        faces_from_file(path)


@pytest.mark.parametrize("name", ["a\0b.jpg", "a\ud800.jpg"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    face = replace(FACES[0], image=name, size_hw=None)
    with pytest.raises(ImageError, match="can't be read"):
        with_sizes([face], tmp_path)
    with pytest.raises(KpError, match=r"can't write .*: (there is a zero byte in its name|its name is no text)"):
        faces_to_file([face], tmp_path, "pts")


def test_formats_and_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no format 'xml'; choose from pts, coco, csv, parquet"):
        faces_from_file(tmp_path / "a.csv", "xml")
    with pytest.raises(InputError, match="suffix of no known format"):
        format_of(tmp_path / "a.xml")
    with pytest.raises(DataError, match=r"a\.csv can't be read: No such file"):
        faces_from_file(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is no text in UTF-8"):
        faces_from_file(tmp_path / "b.csv")


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"kp-edge\[parquet\]"):
        faces_to_file(FACES, tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "changed", [{"annotations": 5}, {"images": [{"id": 1, "file_name": "a", "height": float("inf")}]}]
)
def test_coco_files_with_odd_values(changed: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    faces_to_file(FACES[:1], path, "coco")
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(DataError, match=r"a\.json"):
        faces_from_file(path, "coco")


def test_a_photo_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe.jpg")
    faces_to_file([made_up(name, 0)], tmp_path / "a.csv")
    assert faces_from_file(tmp_path / "a.csv")[0].image == r"\udcff\udcfe.jpg"


def test_no_faces_make_no_pts_file(tmp_path: Path) -> None:
    assert faces_to_file([], tmp_path / "none.pts") == []
