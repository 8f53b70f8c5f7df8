"""Faces made small enough to carry: what training sees of them stays."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pack_faces
import pytest

from kp_runtime.errors import InputError
from kp_runtime.interchange import faces_from_file, faces_to_file
from kp_runtime.spec import ModelSpec
from kp_train.data import read_source
from kp_train.dataset import FaceDataset
from kp_train.synthetic import write_csv_source
from tests.tolerances import PACKED_LEVELS, PACKED_PX


def pack(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pack_faces.py", *map(str, words)])
    pack_faces.main()


def test_training_sees_the_same_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_csv_source(tmp_path, people=4)
    pack(monkeypatch, data, "--out", tmp_path / "packed")
    before, after = read_source(data), read_source(tmp_path / "packed" / data.name)
    assert [face.person for face in after.faces] == [face.person for face in before.faces]
    spec = ModelSpec("a", 112, 1.3)
    for old, new in zip(FaceDataset(before.faces, spec), FaceDataset(after.faces, spec), strict=True):
        assert np.abs(old[0].numpy().astype(float) - new[0].numpy()).mean() < PACKED_LEVELS
        np.testing.assert_allclose(new[1], old[1], atol=PACKED_PX)


def test_faces_of_another_number_of_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_csv_source(tmp_path, people=1, each=1)
    faces = [replace(face, xy=face.xy[30:35]) for face in faces_from_file(data)]
    data = faces_to_file(faces, data.with_name("training_five.csv"))[0]
    pack(monkeypatch, data, "--out", tmp_path / "packed", "--points", 5)
    (face,) = read_source(tmp_path / "packed" / data.name, points=5).faces
    np.testing.assert_allclose(np.diff(face.xy, axis=0), np.diff(faces[0].xy, axis=0), atol=2e-3)


def test_large_faces_are_shrunk_and_their_points_with_them() -> None:
    luma = np.zeros((600, 800), np.uint8)
    luma[200:400, 300:500] = 255  # a square whose corners are the points
    xy = np.array([[300, 200], [499, 200], [499, 399], [300, 399]], np.float32)
    part, moved = pack_faces.packed_face(luma, xy, cut=2.0, most=50)
    assert np.abs(np.subtract(part.shape, 100)).max() <= 1
    low, high = moved[0], moved[2]
    # pixel 300 of four that became one: its centre lies 1.5 of them to the left of the new one's
    np.testing.assert_allclose(high - low, 199 * part.shape[1] / 402, atol=0.5)
    lit = np.argwhere(part > 127)[:, ::-1]
    np.testing.assert_allclose(lit.min(axis=0), low, atol=0.5)
    np.testing.assert_allclose(lit.max(axis=0), high, atol=0.5)


def test_a_face_at_the_edge_keeps_its_points() -> None:
    luma = np.zeros((90, 80), np.uint8)
    xy = np.array([[-5, 40], [30, 40], [30, 95], [-5, 95]], np.float32)
    part, moved = pack_faces.packed_face(luma, xy)
    np.testing.assert_array_equal(moved - moved[0], xy - xy[0])
    assert np.less_equal(part.shape, luma.shape).all()


def test_folders_and_several_faces_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_csv_source(tmp_path / "one", people=2, each=1)
    text = data.read_text().splitlines()
    data.write_text("\n".join([*text, text[1]]) + "\n")  # a second face on the first picture
    pack(monkeypatch, data, "--out", tmp_path / "packed")
    packed = read_source(tmp_path / "packed" / data.name)
    assert [face.image.name for face in packed.faces] == ["person0_0.webp", "person1_0.webp", "person0_0-2.webp"]
    assert [face.person for face in packed.faces] == ["person0", "person1", "person0"]

    plain = tmp_path / "plain" / data.name
    (plain.parent / "training").mkdir(parents=True)
    rows = [text[1].partition(",")[2], text[2].partition(",")[2]]
    for name, number in (("party", 0), ("party_2", 1)):
        shutil.copy(read_source(data).faces[number].image, plain.parent / "training" / f"{name}.png")
    names = ("party.png", "party.png", "party_2.png", "party.png")
    plain.write_text("\n".join([text[0], *(f"{name},{rows[i % 2]}" for i, name in enumerate(names))]) + "\n")
    pack(monkeypatch, plain, "--out", tmp_path / "again")
    packed_plain = read_source(tmp_path / "again" / data.name)
    assert [face.image.name for face in packed_plain.faces] == [
        "party.webp", "party_3.webp", "party_2.webp", "party_4.webp",
    ]  # fmt: skip
    assert {face.person for face in packed_plain.faces} == {"party"}  # so all are held out, or none

    nested = tmp_path / "photos_68"
    for part, face in zip(("helen", "afw"), packed.faces, strict=False):
        (nested / part).mkdir(parents=True)
        shutil.copy(face.image, nested / part / "7_1.webp")
        lines = [f"{x + 1:.3f} {y + 1:.3f}" for x, y in face.xy]
        (nested / part / "7_1.pts").write_text("version: 1\nn_points: 68\n{\n" + "\n".join(lines) + "\n}\n")
    pack(monkeypatch, nested, "--out", tmp_path / "packed")
    faces = read_source(tmp_path / "packed" / "photos_68.csv").faces
    assert sorted(face.image.parent.name for face in faces) == ["afw", "helen"]


@pytest.mark.parametrize("words", [("--cut", "0.5"), ("--face", "0"), ("--quality", "101")])
def test_settings_out_of_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="--cut and --face must be 1 or more"):
        pack(monkeypatch, write_csv_source(tmp_path, people=1), "--out", tmp_path / "packed", *words)
    assert not (tmp_path / "packed").exists()


def test_nothing_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_csv_source(tmp_path, people=1)
    labels = data.read_bytes()
    with pytest.raises(InputError, match=rf"{data.name} is already there, and nothing is written over; name another"):
        pack(monkeypatch, data, "--out", tmp_path)
    assert data.read_bytes() == labels
    pack(monkeypatch, data, "--out", tmp_path / "packed")
    with pytest.raises(InputError, match="already there"):  # another source of the same name
        pack(monkeypatch, data, "--out", tmp_path / "packed")
