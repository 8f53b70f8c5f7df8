"""Training and export of the face detector, on drawn faces."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import kp_train.train_detector as module
from kp_export.detector_bundle import export_detector
from kp_runtime.center_detector import MODEL_NAME, CenterDetector
from kp_runtime.errors import BundleError, DataError, IntegrityError, KpError
from kp_runtime.geometry import boxes_from_points, overlaps
from kp_runtime.manifest import DetectorManifest
from kp_runtime.spec import DetectorSpec
from kp_train.checkpoint import CHECKPOINT_NAME, load_detector, save_detector
from kp_train.config import DetectorConfig
from kp_train.data import Face, parse_source
from kp_train.detector_net import DetectorNet, detector_loss
from kp_train.face_windows import WINDOW, Pictures, WindowDataset, _view, read_pictures
from kp_train.synthetic import drawn_face, write_csv_source
from kp_train.train_detector import train_detector
from tests.conftest import DETECTOR
from tests.test_cli import kp

WEIGHTS = [1.0] * 20
COMMAND = ("train-detector", "--data")
SMALL = DetectorConfig(steps=4, batch_size=4, val_fraction=0.3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv_source(tmp_path_factory.mktemp("faces"), people=20, each=1)


def run(source: Path, out: Path, config: DetectorConfig = SMALL, **options: object) -> Path:
    return train_detector([parse_source(str(source))], Pictures(), config, out, say=lambda text: None, **options)  # type: ignore[arg-type]


def small_bundle(folder: Path) -> Path:
    torch.manual_seed(0)
    net = DetectorNet().eval()
    torch.nn.init.normal_(net.head.weight, std=0.3)  # cells of which no two are alike
    save_detector(folder, net, DetectorManifest(DetectorSpec("untrained")))
    return folder


def test_the_network_is_small() -> None:
    assert sum(parameter.numel() for parameter in DetectorNet().parameters()) < 150_000


def test_a_window_is_drawn_by_its_index_alone(source: Path) -> None:
    faces = parse_source(str(source)).faces
    one, other = (WindowDataset(faces, WEIGHTS, Pictures(), 3, 10) for _ in range(2))
    assert len(one) == 10
    assert all(torch.equal(a, b) for a, b in zip(one[7], other[7], strict=True) if not a.isnan().any())
    assert not torch.equal(one[7][0], one[8][0])
    assert not torch.equal(one[7][0], WindowDataset(faces, WEIGHTS, Pictures(), 4, 10)[7][0])


def test_boxes_lie_where_the_faces_are(tmp_path: Path) -> None:
    """Faces that are white discs: a window's box must be the disc's own."""
    (tmp_path / "training").mkdir()
    angles = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    xy = np.stack([100 + 40 * np.cos(angles), 90 + 40 * np.sin(angles)], axis=1)
    disc = np.zeros((180, 200), np.uint8)
    cv2.circle(disc, (100, 90), 40, 255, -1)
    cv2.imwrite(str(tmp_path / "training" / "a_1.png"), disc)
    row = "a_1.png," + ",".join(f"{value:.3f}" for value in xy.ravel())
    (tmp_path / "training_frames_keypoints.csv").write_text("name\n" + row + "\n")
    dataset = WindowDataset(
        parse_source(str(tmp_path / "training_frames_keypoints.csv")).faces, [1], Pictures(), 0, 120
    )
    with_face = [(w[0].numpy(), b.numpy(), bool(clean)) for w, b, clean in dataset]
    boxed = [(w, b) for w, b, _ in with_face if not np.isnan(b).any()]
    assert 60 < len(boxed) < 110
    assert all(np.isnan(b).any() for _, b, clean in with_face if clean)
    darker = 0
    for window, (x0, y0, x1, y1) in boxed:
        assert 15 < max(x1 - x0, y1 - y0) < 150
        assert -WINDOW < x0 < x1 < 2 * WINDOW
        cx, cy, half = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
        ring = [(cx + f * half * np.cos(a), cy + f * half * np.sin(a)) for f in (0.8, 1.25) for a in angles]
        levels = [window[round(y), round(x)] if 0 <= x < 95 and 0 <= y < 95 else None for x, y in ring]
        inside, outside = ([int(v) for v in part if v is not None] for part in (levels[:68], levels[68:]))
        darker += not inside or not outside or np.median(inside) > np.median(outside) + 20
    assert darker > 0.85 * len(boxed)  # a background may be as bright as a disc


def test_windows_by_their_shares_places_and_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faces that are upright bars on black, one of four white and the others grey; backgrounds are dark grey."""
    monkeypatch.setattr("kp_train.face_windows._lit", lambda window, rng: window)
    monkeypatch.setattr("kp_train.face_windows._corner_of", lambda box, rng: np.full(4, -99.0))  # none is covered
    for name, dark in (("_background", 40), ("_picture", 0)):
        monkeypatch.setattr(WindowDataset, name, lambda self, rng, dark=dark: np.full((WINDOW, WINDOW), dark, np.uint8))
    faces = []
    for level in (255, 128):
        photo = np.zeros((200, 320), np.uint8)
        photo[50:140, 145:175] = level
        cv2.imwrite(str(tmp_path / f"{level}.png"), photo)
        corners = [[144.5, 49.5], [174.5, 49.5], [174.5, 139.5], [144.5, 139.5]]
        faces.append(Face(tmp_path / f"{level}.png", np.array(corners * 17, np.float32)))
    windows = [
        (w[0].numpy(), b.numpy(), bool(clean)) for w, b, clean in WindowDataset(faces, [1, 3], Pictures(), 0, 400)
    ]
    shown = [(window, box) for window, box, _ in windows if not np.isnan(box).any()]
    hidden = [window for window, box, _ in windows if np.isnan(box).any()]
    assert len(shown) / 400 == pytest.approx(0.72, abs=0.06)
    assert sum(clean for *_, clean in windows) / 400 == pytest.approx(0.1, abs=0.05)  # of photos others may be in them
    assert max((window > 60).sum() for window in hidden) < 9  # the face is covered, but for a rounded corner
    assert np.mean([window.max() > 200 for window, _ in shown]) == pytest.approx(0.25, abs=0.07)
    assert 0.3 < np.mean([(window == 40).sum() > 99 for window, _ in shown]) < 1  # where the photo ends
    off = []
    for window, (x0, y0, x1, y1) in shown:
        assert y1 - y0 > x1 - x0  # none is turned by more than 30 degrees
        if min(x0, y0) > 1 and max(x1, y1) < WINDOW - 2:
            found = cv2.moments(window * (window > 60))
            off.append([found["m10"] / found["m00"] - (x0 + x1) / 2, found["m01"] / found["m00"] - (y0 + y1) / 2])
    assert len(off) > 100
    assert np.abs(off).max() < 0.5


def test_a_background_is_shown_where_the_photo_ends(rng: np.random.Generator) -> None:
    """A white photo with a black edge, which all beyond it repeats."""
    photo = np.zeros((60, 200), np.uint8)
    photo[1:-1, 1:-1] = 255
    face = np.array([[120, 15], [150, 45]], np.float32)
    for _ in range(20):
        window, inside, _ = _view(photo, face, 20.0, rng)
        assert ((window > 127) != (inside > 0)).mean() < 0.05


def test_pictures_without_faces(tmp_path: Path, source: Path) -> None:
    with pytest.raises(DataError, match="has no pictures"):
        read_pictures([tmp_path])
    (tmp_path / "more").mkdir()
    cv2.imwrite(str(tmp_path / "more" / "A.PNG"), np.full((50, 60), 77, np.uint8))
    (tmp_path / "more" / "._A.PNG").write_bytes(b"left by a Mac")
    pictures = read_pictures([tmp_path])
    assert [luma.shape for luma in pictures.lumas] == [(50, 60)]
    assert len(pictures.sha256) == 64
    windows = WindowDataset(parse_source(str(source)).faces, WEIGHTS, pictures, 0, 30)
    assert all(windows[i][0].shape == (1, WINDOW, WINDOW) for i in range(30))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b\.png"):
        read_pictures([tmp_path])


def test_data_that_are_refused_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give none to validate on"):
        run(write_csv_source(tmp_path, people=1), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def raw_for(box: tuple[float, ...], score: float = 6.0) -> torch.Tensor:
    """The head's numbers of a network that gives this box from every cell near its centre, else nothing."""
    raw = torch.full((1, 5, 16, 16), -8.0)
    x0, y0, x1, y1 = box
    for row in range(16):
        for column in range(16):
            x, y = 8.0 * column, 8.0 * row
            if abs(x - (x0 + x1) / 2) < 9 and abs(y - (y0 + y1) / 2) < 9:
                reach = torch.tensor([x - x0, y - y0, x1 - x, y1 - y])
                raw[0, :, row, column] = torch.cat([torch.tensor([score]), (reach / 16).log()])
    return raw


def test_held_out_windows_are_drawn_otherwise_than_those_of_training(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the pictures without a face there is one set alone."""
    made: list[WindowDataset] = []

    class Noted(WindowDataset):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(module, "WindowDataset", Noted)
    train_detector([parse_source(str(source))], Pictures(), DetectorConfig(steps=1, batch_size=32), tmp_path / "r")
    learnt, checked = made
    assert not any(torch.equal(learnt[i][0], checked[i][0]) for i in range(32))


def test_the_loss_falls_towards_the_right_box() -> None:
    truth, clean = torch.tensor([[40.0, 36.0, 88.0, 84.0]]), torch.tensor([True])
    right = detector_loss(raw_for((40, 36, 88, 84)), truth, clean, False)
    off = detector_loss(raw_for((48, 36, 96, 84)), truth, clean, False)
    silent = detector_loss(raw_for((40, 36, 88, 84), score=-8), truth, clean, False)
    assert right < 0.05 < off
    assert silent > right + 1


def test_a_score_is_to_be_the_overlap_and_a_face_counts_once() -> None:
    """Its cells have boxes of 36 px instead of 48, and that overlap as score; one that is neither near nor far, any."""
    truth, overlap = torch.tensor([[40.0, 36.0, 88.0, 84.0]]), (36 / 48) ** 2
    raw = raw_for((46, 42, 82, 78), score=np.log(overlap / (1 - overlap)))
    raw[0, 0, 7, 10] = 3.0
    assert (raw[0, 0] > 0).sum() == 7
    wanted = pytest.approx(2 * (1 - overlap), abs=1e-3)
    assert float(detector_loss(raw, truth, torch.tensor([True]), False)) == wanted
    with_none = torch.cat([raw, torch.full_like(raw, -8)]), torch.cat([truth, torch.full_like(truth, torch.nan)])
    assert float(detector_loss(*with_none, torch.tensor([True, True]), False)) == wanted


def test_parts_of_a_face_that_is_much_too_large_are_none() -> None:
    box = (9.0, 9.0, 119.0, 119.0)
    assert detector_loss(raw_for(box), torch.tensor([box]), torch.tensor([True]), False) > 1


def test_a_small_face_between_the_cells_is_one_s() -> None:
    truth, silent = torch.tensor([[52.5, 48.0, 67.5, 72.0]]), torch.full((1, 5, 16, 16), -8.0)
    assert detector_loss(silent, truth, torch.tensor([True]), False) > 1


def test_the_loss_of_a_window_without_a_face() -> None:
    nobody, clean = torch.full((1, 4), torch.nan), torch.tensor([True])
    raw = raw_for((40, 36, 88, 84))
    raw.requires_grad_()
    loss = detector_loss(raw, nobody, clean, True)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss > 1  # a clean window holds no face, whatever the network says
    assert torch.isfinite(raw.grad).all()  # type: ignore[union-attr]
    photo = torch.tensor([False])
    assert detector_loss(raw, nobody, photo, False) == loss
    assert detector_loss(raw, nobody, photo, True) < 0.01  # of a photo it may be somebody else


def test_what_may_be_another_face_lies_well_beside_the_labelled_one() -> None:
    """1.5 times its box's side away."""
    truth, photo = torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([False])
    for column, counts in ((8, True), (14, False)):
        raw = raw_for((8, 8, 40, 40))
        raw[0, 0, 3, column] = 3.0
        assert (float(detector_loss(raw, truth, photo, True)) > 1) == counts
        assert detector_loss(raw, truth, photo, False) > 1


@pytest.mark.parametrize("side", [20.0, 80.0])
def test_faces_of_sizes_between_are_left_alone(side: float) -> None:
    box = (64 - side / 2, 64 - side / 2, 64 + side / 2, 64 + side / 2)
    truth, clean = torch.tensor([box]), torch.tensor([True])
    for score in (6.0, -8.0):
        assert detector_loss(raw_for(box, score), truth, clean, False) < 0.5


def test_a_run_that_was_stopped_ends_as_one_that_was_not(source: Path, tmp_path: Path) -> None:
    whole = run(source, tmp_path / "whole")

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KpError, match=r"stopped in step 2 of 4; .* --resume goes on"):
        train_detector([parse_source(str(source))], Pictures(), SMALL, tmp_path / "b", keep_every=2, say=stop)
    resumed = run(source, tmp_path / "b", resume=True)
    weights = [load_detector(checkpoint.parent)[0].state_dict() for checkpoint in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")]
)
def test_a_run_that_was_stopped_before_its_first_state_starts_again(
    error: BaseException, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, batch: object) -> None:
        raise error

    with monkeypatch.context() as stopped:
        stopped.setattr("kp_train.train_detector._State.learn", interrupted)
        with pytest.raises(KpError, match="stopped in step 0 of 4, before the first state was saved: start it again"):
            run(source, tmp_path / "a")
    assert run(source, tmp_path / "a").is_file()


def test_another_name_can_not_resume_a_run(source: Path, tmp_path: Path) -> None:
    """Nor one that was killed, and has no manifest yet."""
    terms = {"data": "for us alone"}
    run(source, tmp_path / "a", name="mine", licence=terms)
    with pytest.raises(KpError, match=r"began with the licence .*for us alone.*; leave --licence out"):
        run(source, tmp_path / "a", resume=True, name="mine", licence={"data": "for all"})
    for name in ("manifest.json", CHECKPOINT_NAME):
        with pytest.raises(KpError, match="began with --name mine; give the same one"):
            run(source, tmp_path / "a", resume=True)
        (tmp_path / "a" / name).unlink()
    run(source, tmp_path / "a", resume=True, name="mine")
    manifest = DetectorManifest.read(tmp_path / "a")
    assert (manifest.spec.name, manifest.licence) == ("mine", terms)


def test_runs_that_can_not_go_on(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KpError, match="nothing to resume"):
        run(source, tmp_path / "a", resume=True)
    run(source, tmp_path / "a", DetectorConfig(steps=1, batch_size=2, val_fraction=0.3))
    with pytest.raises(KpError, match="already holds a run"):
        run(source, tmp_path / "a")
    with pytest.raises(KpError, match="began with other settings"):
        run(source, tmp_path / "a", resume=True)
    further = dataclasses.replace(SMALL, steps=2, batch_size=2)
    run(source, tmp_path / "a", further, resume=True)
    assert DetectorManifest.read(tmp_path / "a").training["config"]["steps"] == 2
    with pytest.raises(KpError, match="has done 2 steps; give --steps 2 or more"):
        run(source, tmp_path / "a", dataclasses.replace(further, steps=1), resume=True)
    with pytest.raises(KpError, match="other pictures without faces"):
        train_detector([parse_source(str(source))], Pictures((), "x"), further, tmp_path / "a", resume=True)
    tree = tmp_path / "a" / "state" / "last.state" / "tree.json"
    tree.write_text(json.dumps({"dict": []}))
    with pytest.raises(KpError, match="not this network's"):
        run(source, tmp_path / "a", further, resume=True)


@pytest.mark.parametrize(
    "setting",
    [{"steps": 0}, {"steps": 10**18}, {"batch_size": 0}, {"lr": 0.0}, {"ema": 1.0}, {"val_fraction": 1.0},
     {"seed": -1}],
)  # fmt: skip
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    with pytest.raises(KpError, match=f"the setting {next(iter(setting))} must be"):
        DetectorConfig(**setting)  # type: ignore[arg-type]


def test_export_gives_pytorchs_cells_at_every_size(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path / "d")
    assert export_detector(bundle, score=0.25) == bundle / MODEL_NAME
    detector = CenterDetector(bundle, threads=1)
    assert detector.spec.score == 0.25
    net, manifest = load_detector(bundle)
    assert set(manifest.files) == {CHECKPOINT_NAME, MODEL_NAME, "golden.npz"}
    assert manifest.files[MODEL_NAME].parent_sha256 == manifest.files[CHECKPOINT_NAME].sha256
    rng = np.random.default_rng(0)
    for size_hw in [(1, 1), (7, 9), (64, 64), (65, 63), (120, 33)]:
        image = rng.integers(0, 256, size_hw, np.uint8)
        with torch.inference_mode():
            wanted = net(torch.from_numpy(image)[None, None])[0].numpy()
        assert np.allclose(detector.cells(image), wanted, rtol=1e-4, atol=1e-4)
    before = (bundle / MODEL_NAME).read_bytes()
    export_detector(bundle)
    assert (bundle / MODEL_NAME).read_bytes() == before


def test_the_shipped_detectors_checkpoint_gives_the_cells_of_its_file(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (120, 100), np.uint8)
    with torch.inference_mode():
        wanted = load_detector(DETECTOR)[0](torch.from_numpy(image)[None, None])[0].numpy()
    assert np.allclose(CenterDetector(DETECTOR, threads=1).cells(image), wanted, rtol=1e-4, atol=1e-4)


def test_checkpoints_that_can_not_be_exported(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        export_detector(tmp_path / "nowhere")
    bundle = small_bundle(tmp_path / "d")
    file = bundle / CHECKPOINT_NAME
    shutil.copy(file, tmp_path / "kept")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="cut off"):
        export_detector(bundle)
    assert sorted(path.name for path in bundle.iterdir()) == [CHECKPOINT_NAME, "manifest.json"]


def test_a_finished_run_keeps_what_was_measured_and_another_score_does_not(source: Path, tmp_path: Path) -> None:
    config = DetectorConfig(steps=1, batch_size=2, val_fraction=0.3)
    bundle = run(source, tmp_path / "d", config).parent
    export_detector(bundle, score=0.3)
    measured = dataclasses.replace(DetectorManifest.read(bundle), accuracy={"rows": {"found": 1}})
    measured.write(bundle)
    run(source, bundle, config, resume=True)
    export_detector(bundle)
    assert DetectorManifest.read(bundle).accuracy == measured.accuracy
    assert DetectorManifest.read(bundle).spec.score == 0.3
    export_detector(bundle, score=0.4)
    assert DetectorManifest.read(bundle).accuracy == {}


def test_a_longer_run_that_was_killed_before_its_weights_were_written_writes_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = (DetectorConfig(steps=steps, batch_size=2, val_fraction=0.3) for steps in (1, 2))
    run(source, tmp_path / "d", short)
    with monkeypatch.context() as killed:
        killed.setattr("kp_train.train_detector.save_detector", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(source, tmp_path / "d", long, resume=True)
    before = DetectorManifest.read(tmp_path / "d")
    run(source, tmp_path / "d", long, resume=True)
    after = DetectorManifest.read(tmp_path / "d")
    assert (before.training["config"]["steps"], after.training["config"]["steps"]) == (1, 2)
    assert before.files[CHECKPOINT_NAME].sha256 != after.files[CHECKPOINT_NAME].sha256
    with pytest.raises(KpError, match="began with --name face-detector; give the same one"):
        train_detector([parse_source(str(source))], Pictures(), long, tmp_path / "d", name="other", resume=True)


def test_it_learns_drawn_faces(source: Path, tmp_path: Path) -> None:
    config = DetectorConfig(steps=90, batch_size=16, lr=0.006, warmup=5, ema=0.9, val_fraction=0.3)
    net, _ = load_detector(run(source, tmp_path / "d", config).parent)
    rng = np.random.default_rng(99)
    found = 0
    for _ in range(20):
        image, xy = drawn_face(rng, (110, 100))
        with torch.inference_mode():
            cells = net(torch.from_numpy(image[:, :, 0])[None, None])[0].numpy()
        row, column = np.unravel_index(cells[0].argmax(), cells[0].shape)
        x, y, (left, top, right, low) = 8 * column, 8 * row, cells[1:, row, column]
        box = np.array([[x - left, y - top, x + right, y + low]])
        found += overlaps(box, boxes_from_points(xy)[None])[0, 0] > 0.5
    assert found >= 17


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--score", 2), "score between 0 and 1"),
        (("--threads", 0), "got 0"),
        (("--threads", 10_000), "got 10000"),
        (("--licence", "for us"), "takes data=TERMS, weights=TERMS and code=TERMS, each once; got 'for us'"),
        (("--licence", "data=a", "--licence", "data=b"), "each once; got 'data=b'"),
        (("--licence", "weights= "), "got 'weights= '"),
    ],
)
def test_the_command_refuses_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], told: str
) -> None:
    status, _, error = kp(capsys, *COMMAND, tmp_path / "nothing", "--out", tmp_path / "d", *words)
    assert status != 0
    assert told in error


def test_the_command_trains_and_exports(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (*COMMAND, source, "--out", tmp_path / "d", "--threads", 1)
    begin = (*words, "--steps", 1, "--batch-size", 2, "--licence", "weights=by x=y", "--licence", "code=MIT")
    status, printed, _ = kp(capsys, *begin)
    assert status == 0
    assert "step 1/1  held-out loss" in printed
    assert f"--detector own={tmp_path / 'd'}" in printed
    assert CenterDetector(tmp_path / "d")(np.zeros((80, 90, 3), np.uint8)).shape == (0, 4)
    status, _, error = kp(capsys, *begin)
    assert status == 1
    assert "already holds a run" in error
    status, printed, _ = kp(capsys, *words, "--resume", "--score", 0.35)  # the rest is the run's own
    assert status == 0
    assert "d is finished" in printed
    manifest = DetectorManifest.read(tmp_path / "d")
    assert (manifest.spec.score, manifest.training["config"]["steps"]) == (0.35, 1)
    assert manifest.licence == {"weights": "by x=y", "code": "MIT"}
