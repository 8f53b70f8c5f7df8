"""`kp filter`, and `kp run --effect`, as a person types them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import kp_runtime
from kp_runtime.effects import Blur, face_outline
from kp_runtime.track import TrackerSettings
from kp_runtime.video import draw_effect, run_video
from kp_runtime.video_source import open_source
from kp_train.synthetic import drawn_face
from tests.models import tiny_bundle
from tests.test_cli import kp
from tests.test_video import folder_of_frames, levels, one_face, video

LITE = Path(kp_runtime.__file__).parents[1] / "engines" / "resnet18-68-lite"


def test_a_photo_with_each_effect(capsys: pytest.CaptureFixture[str], astronaut: Path, tmp_path: Path) -> None:
    """The model that is shipped finds the face; the glasses are on its eyes, and so on."""
    photo = kp_runtime.image_from_file(astronaut)
    (face,) = kp_runtime.load(LITE, threads=1)(photo, kp_runtime.HaarDetector()(photo)).xy
    eyes, lip, cheek = face[36:48].mean(axis=0), face[[33, 51]].mean(axis=0), face[[3, 48]].mean(axis=0)
    above = face[17:27].mean(axis=0) - 0.8 * (face[8] - face[27])
    places = {
        "sunglasses": face[36:42].mean(axis=0), "hat": above, "moustache": lip, "mesh": cheek, "blur": eyes,
    }  # fmt: skip
    for effect, (x, y) in places.items():
        words = (astronaut, "--effect", effect, "--model", LITE, "--threads", 1, "--out", tmp_path)
        status, out, err = kp(capsys, "filter", *words)
        target = tmp_path / f"astronaut_{effect}.jpg"
        said = "faces that were not found are not hidden: look at the results\n" * (effect == "blur")
        assert (status, out, err) == (0, f"{astronaut}: 1 face: {target}\n", said)
        drawn = cv2.imread(str(target)).astype(int)
        there = (slice(round(y) - 2, round(y) + 3), slice(round(x) - 2, round(x) + 3))
        assert np.abs(drawn[there] - photo[there]).max() > 40, effect
        assert np.abs(drawn[320:] - photo[320:]).mean() < 4  # JPEG


def test_the_smallest_face_of_a_photo_may_be_named(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def open_detector(name: str, *, smallest: float, **_: object) -> object:
        asked.append(smallest)
        return lambda image: np.empty((0, 4))

    monkeypatch.setattr("kp_cli.faces.open_detector", open_detector)
    words = ("filter", astronaut, "--effect", "blur", "--model", bundle, "--out", tmp_path)
    assert [kp(capsys, *words, *more)[0] for more in ((), ("--smallest", 0.03))] == [0, 0]
    assert asked == [0.05, 0.03]


def test_a_box_that_holds_no_face_is_hidden_but_has_no_picture(
    capsys: pytest.CaptureFixture[str], astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def put(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
        drawn.append(len(xy))
        return image

    boxes = np.array([[175.0, 85, 272, 180], [5, 300, 60, 360]])
    monkeypatch.setattr("kp_cli.faces.open_detector", lambda *_, **__: lambda image: boxes)
    monkeypatch.setattr("kp_runtime.effect_pictures.open_effect", lambda name: put)
    bundle = tiny_bundle(tmp_path / "tiny", lost_limit=0.135)  # as of kp predict's test
    words = ("filter", astronaut, "--model", bundle, "--out", tmp_path, "--effect")
    status, out, err = kp(capsys, *words, "hat")
    assert (status, out) == (0, f"{astronaut}: 1 face: {tmp_path / 'astronaut_hat.jpg'}\n")
    assert "seems to hold no face (lost score" in err
    assert json.loads(kp(capsys, *words, "hat", "--json")[1])[0]["faces"] == 1
    status, out, err = kp(capsys, *words, "blur")
    assert (status, out) == (0, f"{astronaut}: 2 faces: {tmp_path / 'astronaut_blur.jpg'}\n")
    assert err == "faces that were not found are not hidden: look at the results\n"
    assert drawn == [1, 1, 2]


def test_an_effect_of_your_own_on_a_folder(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    cv2.imwrite(str(photos / "a.png"), cv2.imread(str(astronaut)))
    cv2.imwrite(str(photos / "empty.png"), np.full((200, 200, 3), 128, np.uint8))
    cv2.imwrite(str(photos / "face.png"), drawn_face(rng, (320, 300), turn_deg=0)[0])
    (photos / "torn.png").write_bytes(b"torn")
    cv2.imwrite(str(tmp_path / "red.png"), np.full((40, 40, 4), (0, 0, 255, 255), np.uint8))
    (tmp_path / "red.toml").write_text(
        'image = "red.png"\n[anchors]\nleft_eye = [5, 5]\nright_eye = [35, 5]\nmouth = [20, 35]\n', encoding="utf-8"
    )
    words = ("--effect", tmp_path / "red.toml", "--model", bundle, "--out", tmp_path / "out", "--json")
    status, out, err = kp(capsys, "filter", photos, *words)
    assert status == 1
    assert "1 of 4 photos failed" in err
    assert "torn.png is no image" in err
    assert "empty.png: no face was found, so" in err
    *rows, torn = json.loads(out)
    assert (torn.keys(), torn["image"]) == ({"image", "error"}, str(photos / "torn.png"))
    assert torn["error"] in err
    assert [Path(row["drawn"]).name for row in rows] == ["a_red.jpg", "empty_red.jpg", "face_red.jpg"]
    assert [row["faces"] for row in rows][:2] == [1, 0]
    red = cv2.imread(rows[0]["drawn"])
    assert ((red[:, :, 2] > 240) & (red[:, :, :2].max(axis=2) < 20)).sum() > 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("filter", "PHOTO", "--effect", "nose"), "there is no effect 'nose'"),
        (("filter", "PHOTO", "--effect", "gone.toml"), "gone.toml can't be read"),
        (("filter", "gone.jpg", "--effect", "hat"), "there is no photo or folder at gone.jpg"),
        (("filter", "PHOTO", "PHOTO", "--effect", "hat"), "is named twice; name it once"),
        (("run", "FRAMES", "--effect", "nose"), "there is no effect 'nose'"),
        (("run", "FRAMES", "--effect", "hat", "--format", "jsonl"), "--effect goes with --format mp4"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.zeros((50, 50, 3), np.uint8))
    places = {"PHOTO": photo, "FRAMES": folder_of_frames(tmp_path / "frames", 2)}
    status, out, err = kp(capsys, *(places.get(w, w) for w in words), "--model", bundle, "--out", tmp_path / "out")
    assert (status, out) == (1, "")
    assert err.startswith("kp: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_effect_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = kp(capsys, "filter", "photo.jpg")
    assert status == 2
    assert "--effect" in err


def test_a_video_with_an_effect(tmp_path: Path) -> None:
    """The faces of every frame are hidden, and no box or point is drawn."""
    folder, size_hw = tmp_path / "frames", (96, 128)
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (*size_hw, 3), np.uint8)
    for i in range(4):
        cv2.imwrite(str(folder / f"{i}.png"), noise)
    source, tracker = open_source(str(folder)), one_face()
    run = run_video(source, tracker, sinks := [Kept()], draw=draw_effect(Blur(1)))  # type: ignore[list-item]
    assert run.frames == len(sinks[0].frames) == 4
    for tracks, drawn in sinks[0].frames:
        (track,) = tracks
        mask = cv2.fillConvexPoly(np.zeros(size_hw, np.uint8), np.rint(face_outline(track.xy)).astype(np.int32), 1)
        assert len(np.unique(drawn[cv2.erode(mask, np.ones((3, 3))) > 0], axis=0)) == 1
        outside = cv2.dilate(mask, np.ones((5, 5))) == 0
        assert outside.any()
        assert np.array_equal(drawn[outside], noise[outside])


class Kept:
    """A sink that keeps what it is given."""

    pictures, path = True, Path("nowhere")

    def __init__(self) -> None:
        self.frames: list[tuple[tuple[object, ...], np.ndarray]] = []

    def write(self, frame: object, tracks: tuple[object, ...], drawn: np.ndarray) -> None:
        self.frames.append((tracks, drawn))

    def close(self, keep: bool = True) -> None:
        pass


@pytest.mark.parametrize(
    ("words", "smallest", "settings"),
    [
        (("--effect", "blur"), 0.05, TrackerSettings(detect_every=1, smooth=False, trust_detector=True)),
        (
            ("--effect", "blur", "--detect-every", 9, "--smooth", "--smallest", 0.2),
            0.2,
            TrackerSettings(detect_every=9, smooth=True, trust_detector=True),
        ),
        (("--effect", "hat"), 0.1, TrackerSettings()),
    ],
)
def test_hiding_looks_for_faces_on_every_frame(
    capsys: pytest.CaptureFixture[str],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    smallest: float,
    settings: TrackerSettings,
) -> None:
    """And for small ones, and believes the detector; what is asked for by name still holds."""
    asked: list[object] = []

    def open_detector(name: str, *, smallest: float, **_: object) -> object:
        asked.append(smallest)
        return lambda image: np.empty((0, 4))

    def tracker(model: object, detector: object, settings: object) -> object:
        asked.append(settings)
        return one_face()

    importlib.import_module("kp_runtime.prometheus")  # whose tracker is made of the real one
    monkeypatch.setattr("kp_cli.video.open_detector", open_detector)
    monkeypatch.setattr("kp_runtime.track.Tracker", tracker)
    path = video(tmp_path / "talk.avi", 2)
    command = ("run", path, "--model", bundle, "--out", tmp_path, "--format", "avi")
    assert kp(capsys, *command, *words)[0] == 0
    assert asked == [smallest, settings]


def test_run_takes_an_effect(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    path = video(tmp_path / "talk.avi", 5)
    (older := tmp_path / "talk_keypoints.mp4").write_text("with points, and the faces unhidden")
    words = (path, "--effect", "blur", "--model", bundle, "--out", tmp_path, "--threads", 1)
    status, _, err = kp(capsys, "run", *words)
    assert (status, err) == (0, "")
    assert len(levels(tmp_path / "talk_blur.mp4")) == 5
    assert older.read_text() == "with points, and the faces unhidden"
    assert (tmp_path / "talk_keypoints.jsonl").is_file()  # rows are of points, whatever is drawn
