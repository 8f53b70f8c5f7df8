"""`kp predict` as a person types it: what it draws, writes and prints, and what is left when something fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

import kp_runtime.photos
from kp_cli import faces, options
from kp_runtime.errors import MissingExtraError
from kp_runtime.ray_batches import _ray
from tests.models import tiny_bundle
from tests.test_backend_trt import with_plan
from tests.test_cli import kp
from tests.test_video import video


def test_predict_draws_and_writes(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    status, out, _ = kp(
        capsys, "predict", astronaut, "--model", bundle, "--out", tmp_path, "--times",
        "--format", "json", "--format", "csv", "--format", "pts",
    )  # fmt: skip
    assert status == 0
    assert out.splitlines()[0].endswith("astronaut.png: 1 face")
    for stage in ("read", "detect", "crop", "infer", "map back"):
        assert stage in out
    assert str(tmp_path / "astronaut_keypoints.jpg") in out.splitlines()
    assert Path(out.splitlines()[-1]) == tmp_path / "keypoints.json"
    (photo,) = json.loads((tmp_path / "keypoints.json").read_text())
    assert np.array(photo["faces"][0]["keypoints_xy"]).shape == (68, 2)
    assert (tmp_path / "astronaut.pts").read_text().startswith("version: 1\nn_points: 68\n{\n")
    drawn = cv2.imread(str(tmp_path / "astronaut_keypoints.jpg"))
    assert np.abs(drawn.astype(int) - cv2.imread(str(astronaut))).max() > 100


@pytest.mark.parametrize("command", [("predict",), ("filter", "--effect", "blur")])
def test_pictures_of_a_folder_that_are_not_read_are_said(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    shutil.copy(astronaut, tmp_path / "a.png")
    for name in ("IMG_1.HEIC", "b.avif", "c.gif", "d.heic", "notes.txt"):
        (tmp_path / name).write_text("")
    status, out, err = kp(capsys, *command, tmp_path, "--model", bundle, "--out", tmp_path / "out", "--json")
    assert (status, len(json.loads(out))) == (0, 1)
    told = "holds pictures whose format is not read: IMG_1.HEIC, b.avif, c.gif and 1 more; save them as JPEG"
    assert err.splitlines()[0] == f"{tmp_path} {told}"


def test_kp_run_takes_no_model_of_whole_frames(
    capsys: pytest.CaptureFixture[str], astronaut: Path, tmp_path: Path
) -> None:
    whole = tiny_bundle(tmp_path / "whole", margin=1.0, box="frame")
    told = "kp: tiny sees whole frames, not face boxes; give a model that takes boxes\n"
    assert kp(capsys, "run", str(astronaut), "--model", str(whole)) == (1, "", told)


def test_times_are_of_whole_photos(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    words = ("predict", astronaut, "--model", bundle, "--out", tmp_path, "--box", "165,70,280,195", "--times")
    status, out, _ = kp(capsys, *words, "--looks", "3")
    assert status == 0
    assert len(rows := re.findall(r"^ *(?:read|crop|infer|map back) .*", out, re.MULTILINE)) == 4, out
    assert all(re.search(r"(?:read|crop|infer|back) +1 ", row) for row in rows)


@pytest.mark.parametrize("command", [("predict",), ("filter", "--effect", "hat")], ids=["predict", "filter"])
def test_looks_mirror_and_threads_are_passed_on(
    command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    bundle: Path,
    astronaut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def predict_photo(*words: object, **options: object) -> object:
        asked.append((options.get("looks"), options.get("mirror")))
        return predict(*words, **options)  # type: ignore[arg-type]

    def open_detector(*words: object, **options: object) -> object:
        asked.append(options)
        return opened(*words, **options)  # type: ignore[arg-type]

    predict, opened = kp_runtime.photos.predict_photo, faces.open_detector
    monkeypatch.setattr("kp_runtime.photos.predict_photo", predict_photo)
    monkeypatch.setattr(faces, "open_detector", open_detector)
    words = (*command, astronaut, "--model", bundle, "--out", tmp_path, "--looks", 2, "--mirror", "--threads", 1)
    assert kp(capsys, *words)[0] == 0
    assert asked == [{"smallest": 0.05, "threads": 1, "public_key": None}, (2, True)]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("predict",), "stopped after 1 of 3 photos; what is written is of these"),
        (("filter", "--effect", "hat"), "stopped after 1 of 3 photos"),
    ],
)
def test_ctrl_c_keeps_the_photos_that_are_done(
    command: tuple[str, ...],
    told: str,
    capsys: pytest.CaptureFixture[str],
    bundle: Path,
    astronaut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in "abc":
        shutil.copy(astronaut, photos / f"{name}.png")

    def predict_photo(*words: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return predict(*words, **options)  # type: ignore[arg-type]

    predict = kp_runtime.photos.predict_photo
    monkeypatch.setattr("kp_runtime.photos.predict_photo", predict_photo)
    status, out, err = kp(capsys, *command, photos, "--model", bundle, "--out", tmp_path / "out", "--json")
    assert (status, err.splitlines()[-2:]) == (130, ["stopping after this photo; once more stops at once", told])
    (photo,) = json.loads(out)
    assert photo["image"] == str(photos / "a.png")
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 1


def test_a_photo_that_can_not_be_drawn_keeps_its_keypoints(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    shutil.copy(astronaut, photos / "a.png")
    shutil.copy(astronaut, photos / "c.png")
    (photos / "b.jpg").write_text("no photo")
    (out / "a_keypoints.jpg").mkdir(parents=True)  # in the picture's place
    status, printed, err = kp(capsys, "predict", photos, "--model", bundle, "--out", out)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("kp: 1 of 3 photos failed: ")
    assert "a.png was not drawn: can't write" in err
    assert err.endswith(" (--drawn FILE); the keypoints are kept\n")
    assert f"{photos / 'a.png'}: 1 face\n" in printed
    written = json.loads((out / "keypoints.json").read_text())
    a, torn, c = written
    assert [(Path(photo["image"]).name, len(photo["faces"])) for photo in (a, c)] == [("a.png", 1), ("c.png", 1)]
    assert (torn.keys(), torn["image"]) == ({"image", "error"}, str(photos / "b.jpg"))
    assert torn["error"] in err
    assert (out / "c_keypoints.jpg").is_file()


def test_a_picture_too_wide_for_a_jpeg_is_one_line(bundle: Path, tmp_path: Path) -> None:
    """OpenCV has nothing to say beside it, which only shows in a process that loads it anew."""
    wide, words = tmp_path / "wide.png", ["--box", "0,0,8,8", "--threads", "1"]
    cv2.imwrite(str(wide), np.zeros((8, 65_501), np.uint8))
    command = [sys.executable, "-m", "kp_cli", "predict", wide, "--model", bundle, "--out", tmp_path / "out", *words]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "wide.png was not drawn: OpenCV can't write a picture of 65501 x 8 px as" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["keypoints.json"]


@pytest.mark.parametrize("place", [shutil.copy, os.symlink])
def test_labels_beside_the_photos_are_not_written_over(
    place: Callable[[Path, Path], None],
    capsys: pytest.CaptureFixture[str],
    bundle: Path,
    astronaut: Path,
    tmp_path: Path,
) -> None:
    photo, label = tmp_path / "a.png", tmp_path / "a.pts"
    place(astronaut, photo)
    label.write_text("mine")
    status, _, err = kp(capsys, "predict", tmp_path, "--out", tmp_path, "--format", "pts", "--model", bundle)
    assert (status, err) == (
        1, f"kp: {label} and its like lie beside the photos and may be labels; name another --out\n"
    )  # fmt: skip
    assert label.read_text() == "mine"


def test_many_drawn_photos_are_counted(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    for i in range(6):
        shutil.copy(astronaut, tmp_path / f"{i}.png")
    out = tmp_path / "out"
    lines = kp(capsys, "predict", tmp_path, "--out", out, "--model", bundle)[1].splitlines()
    assert lines[6:] == [f"6 drawn photos in {out}", str(out / "keypoints.json")]


@pytest.mark.parametrize("name", ["a.pts", "a_0.pts"])
def test_pts_files_of_an_earlier_run_are_not_written_over(
    name: str, capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    """They may be corrected by hand, and of another number of faces they would stay beside the new ones."""
    photo, out = tmp_path / "a.png", tmp_path / "out"
    shutil.copy(astronaut, photo)
    out.mkdir()
    (out / name).write_text("mine")
    words = ("predict", photo, "--out", out, "--format", "pts", "--model", bundle)
    told = f"kp: {out / name} is there already and may be a label made by hand; name another --out\n"
    assert kp(capsys, *words)[::2] == (1, told)
    (out / name).rename(out / "b.pts")  # another photo's
    assert kp(capsys, *words)[0] == 0


def test_without_a_bundle_it_is_the_default_one(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KP_MODEL", raising=False)
    monkeypatch.setattr("kp_runtime.default_model.MODEL_DISTRIBUTION", "kp-edge-model-of-these-tests")
    monkeypatch.chdir(tmp_path)
    assert "resnet18-68" in kp(capsys, "inspect")[1], "the checkout's, from any folder"
    monkeypatch.setenv("KP_MODEL", str(bundle))
    assert str(bundle) in (out := kp(capsys, "inspect")[1])
    monkeypatch.setenv("KP_MODEL", str(bundle / "model.fp32.onnx"))
    assert kp(capsys, "inspect")[1] == out, "a model file stands for its bundle"
    for command in ("plan", "verify"):
        assert "is not a bundle" not in kp(capsys, command)[2]
    for command in ("tune", "bench"):
        assert "of precision int8, only fp32" in kp(capsys, command, "--precision", "int8")[2]
    monkeypatch.delenv("KP_MODEL")
    monkeypatch.setattr(options, "DEFAULT_BUNDLE", Path("not-there"))
    status, _, err = kp(capsys, "inspect")
    assert (status, err.count("\n")) == (1, 1)
    assert "name a bundle (a checkout has engines/resnet18-68), set KP_MODEL to its folder, or install" in err


def test_predict_with_boxes_needs_no_detector(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faces, "open_detector", None)
    words = ("predict", astronaut, "--model", bundle, "--out", tmp_path, "--json")
    status, out, _ = kp(capsys, *words, "--box", "180,80,265,180", "--box", "1,1,60,60")
    assert status == 0
    (photo,) = json.loads(out)
    assert [face["box_xyxy"] for face in photo["faces"]] == [[180, 80, 265, 180], [1, 1, 60, 60]]


@pytest.mark.parametrize("command", [("predict",), ("filter", "--effect", "hat")], ids=["predict", "filter"])
def test_a_model_of_whole_frames_opens_no_detector(
    command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    astronaut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faces, "open_detector", None)
    words = (*command, astronaut, "--model", tiny_bundle(tmp_path / "tiny", margin=1.0, box="frame"), "--out", tmp_path)
    status, out, err = kp(capsys, *words, "--detector", "haar")
    assert (status, out) == (1, "")
    assert err == "kp: this model sees whole frames, not face boxes: leave out --detector\n"
    assert kp(capsys, *words)[0] == 0
    if command == ("predict",):
        assert kp(capsys, *words, "--detector", "haar", "--ray", "local") == (1, "", err)


def test_predict_on_an_engine_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_runtime.backend_by_name.has_driver", lambda: False)
    for backend in ("tensorrt", "ort-tensorrt", "ort-cuda"):
        status, out, err = kp(capsys, "predict", astronaut, "--model", bundle, "--backend", backend)
        assert (status, out) == (1, "")
        assert "this machine has no NVIDIA driver (libcuda.so.1); where there is a GPU, install it" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["predict", "run"])
def test_a_plan_that_does_not_run_here_is_told(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_runtime.backend_by_name.has_driver", lambda: False)
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((60, 60, 3), np.uint8))
    video(tmp_path / "talk.avi", 2)
    source = tmp_path / {"predict": "photo.png", "run": "talk.avi"}[command]
    words = (command, source, "--out", tmp_path / "out", "--model")
    plain, planned = tiny_bundle(tmp_path / "plain"), with_plan(tmp_path / "planned")
    assert kp(capsys, *words, plain)[::2] == (0, "")
    status, _, err = kp(capsys, *words, planned)
    assert (status, err) == (
        0,
        "ort-cpu runs model.fp32.onnx in place of the bundle's plan; tensorrt: this machine has no NVIDIA driver "
        "(libcuda.so.1); where there is a GPU, install it\n",
    )


def test_ray_that_is_not_installed_is_one_line(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # where Ray's own settings are put
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ("predict", astronaut, "--ray", "local", "--model", bundle, "--out", tmp_path / "out")
    status, out, err = kp(capsys, *words)
    assert (status, out) == (1, "")
    assert "predicting on Ray needs the package ray[data]" in err
    assert "pip install 'kp-edge[ray]'" in err
    assert err.count("\n") == 1


def test_a_cluster_is_asked_by_who_has_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is a mere number; the token is looked for in a home alone."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="predicting on Ray needs"):
        _ray("auto")


@pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen on Linux alone")
def test_cores_are_no_matter_of_a_running_ray_cluster(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # where Ray's own settings are put
    monkeypatch.setitem(sys.modules, "ray", None)
    cores = min(os.sched_getaffinity(0))
    words = ("predict", astronaut, "--cores", cores, "--model", bundle, "--out", tmp_path / "out", "--ray")
    status, out, err = kp(capsys, *words, "auto")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "--cores goes with --ray local: a running cluster chooses its own; leave it out" in err
    assert "needs the package ray[data]" in kp(capsys, *words, "local")[2]


def test_boxes_that_hold_no_face_are_said(capsys: pytest.CaptureFixture[str], astronaut: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny", lost_limit=0.135)  # its score is a quarter of the crop's mean grey level
    words = ("--model", bundle, "--out", tmp_path / "out", "--box", "175,85,272,180", "--box", "5,300,60,360")
    status, _, err = kp(capsys, "predict", astronaut, *words)
    assert status == 0
    (face, other) = json.loads((tmp_path / "out" / "keypoints.json").read_text())[0]["faces"]
    assert face["lost_score"] != other["lost_score"]
    lost = max(face, other, key=lambda box: box["lost_score"])
    assert min(face["lost_score"], other["lost_score"]) < 0.135 < lost["lost_score"]
    place = ",".join(f"{value:.0f}" for value in lost["box_xyxy"])
    assert err.splitlines() == [
        f"{astronaut}: box {place} seems to hold no face (lost score {lost['lost_score']:.2f}, a face has up to 0.135)"
    ]


def test_one_bad_photo_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(astronaut, photos / "b.png")
    (photos / "a.jpg").write_bytes(b"\xff\xd8 no picture")
    status, out, err = kp(capsys, "predict", photos, "--model", bundle, "--out", tmp_path / "out")
    assert status == 1
    assert "b.png: 1 face" in out
    assert err.count("\n") == 1
    assert err.startswith("kp: 1 of 2 photos failed: ")
    assert "a.jpg" in err


@pytest.mark.parametrize("command", [("predict",), ("filter", "--effect", "hat")], ids=["predict", "filter"])
def test_many_bad_photos_have_a_line_each(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    photos = [tmp_path / f"{name}.jpg" for name in "abcdef"]
    for photo in photos:
        photo.write_text("no picture")
    status, _, err = kp(capsys, *command, *photos, "--model", bundle, "--out", tmp_path / "out")
    assert status == 1
    *lines, last = err.splitlines()
    assert [line.split()[0] for line in lines] == [str(photo) for photo in photos]
    assert last == "kp: 6 of 6 photos failed: each is told in a line above"


def test_many_photos_that_can_not_be_drawn_have_a_line_each(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    photos = [tmp_path / f"{name}.png" for name in "abcdef"]
    for photo in photos:
        shutil.copy(astronaut, photo)
        (tmp_path / "out" / f"{photo.stem}_keypoints.jpg").mkdir(parents=True)  # in the picture's place
    status, _, err = kp(capsys, "predict", *photos, "--model", bundle, "--out", tmp_path / "out")
    assert status == 1
    *lines, last = err.splitlines()
    assert [line.partition(" was not drawn")[0] for line in lines] == [str(photo) for photo in photos]
    assert last == "kp: 6 photos were not drawn: each is told in a line above; the keypoints are kept"


def test_what_was_found_is_told_where_it_can_not_be_written(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "keypoints.json").mkdir(parents=True)
    words = ("predict", astronaut, "--model", bundle, "--out", tmp_path / "out", "--box", "165,70,280,195", "--json")
    status, out, err = kp(capsys, *words)
    assert status == 1
    assert len(json.loads(out)) == 1
    assert err.startswith("kp: can't write ")
    assert "keypoints.json: it is a folder" in err


def test_each_format_is_written_or_told_by_itself(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    (tmp_path / "keypoints.csv").mkdir()
    words = ("predict", astronaut, "--model", bundle, "--out", tmp_path, "--box", "165,70,280,195", "--format", "csv")
    status, out, err = kp(capsys, *words, "--format", "coco")
    assert (status, err.count("\n")) == (1, 1)
    assert out.splitlines()[2:] == [str(tmp_path / name) for name in ("keypoints.coco.json", "keypoints.json")]
    (tmp_path / "keypoints.json").unlink()
    (tmp_path / "keypoints.json").mkdir()
    status, out, err = kp(capsys, *words, "--json")
    assert (status, err.count("\n"), len(json.loads(out))) == (1, 1, 1)
    assert "keypoints.csv: it is a folder" in err
    assert "keypoints.json: it is a folder" in err


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_a_photo_whose_name_most_locales_do_not_print(bundle: Path, astronaut: Path, tmp_path: Path) -> None:
    photo = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(astronaut, photo)
    done = subprocess.run(
        [sys.executable, "-m", "kp_cli", "predict", photo, "--box", "165,70,280,195", "--model", bundle],
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf\\udce9.png: 1 face" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="closes a descriptor as a POSIX shell does")
def test_a_closed_stderr_loses_nothing(bundle: Path, astronaut: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copy(astronaut, tmp_path / f"{name}.png")
    words = [sys.executable, "-m", "kp_cli", "predict", "a.png", "b.png", "--model", bundle, "--json"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert len(json.loads(done.stdout)) == 2


def test_keypoints_whose_pts_files_would_have_one_name_are_kept_all_the_same(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    picture = cv2.imread(str(astronaut))
    cv2.imwrite(str(tmp_path / "a.png"), np.hstack([picture, picture]))  # a_0.pts and a_1.pts
    cv2.imwrite(str(tmp_path / "a_0.png"), picture)
    words = ("predict", tmp_path / "a.png", tmp_path / "a_0.png", "--model", bundle, "--out", tmp_path / "o")
    status, _, err = kp(capsys, *words, "--format", "pts")
    assert (status, err.count("\n")) == (1, 1)
    assert "would both be a_0.pts" in err
    assert err.endswith(f"all keypoints are in {tmp_path / 'o' / 'keypoints.json'}\n")
    assert [len(photo["faces"]) for photo in json.loads((tmp_path / "o" / "keypoints.json").read_text())] == [2, 1]


def test_two_photos_of_one_name_are_not_mixed_up(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    other = tmp_path / astronaut.name
    shutil.copy(astronaut, other)
    status, _, err = kp(capsys, "predict", astronaut, other, "--model", bundle, "--out", tmp_path / "out")
    assert status == 1
    assert "would both be drawn as" in err
    assert "take each in a run with its own --out" in err  # a second run would replace the first one's picture
    assert not (tmp_path / "out").exists()


def test_a_line_break_in_a_name_makes_no_line(
    capsys: pytest.CaptureFixture[str], astronaut: Path, bundle: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "x\nkp: all is well.png"
    shutil.copyfile(astronaut, photo)
    status, out, _ = kp(
        capsys, "predict", str(photo), "--model", str(bundle), "--box", "170,80,280,200", "--out", str(tmp_path / "o")
    )
    assert status == 0
    assert [line.partition(str(tmp_path))[0] for line in out.splitlines()] == [""] * 3
