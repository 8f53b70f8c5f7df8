"""Labels moved towards what a network sees: by networks whose answers are known, and the script on drawn faces."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import clean_labels
import numpy as np
import pytest
import torch

from kp_runtime.errors import DataError, InputError, KpError
from kp_runtime.geometry import boxes_from_points
from kp_runtime.manifest import Manifest
from kp_runtime.scheme68 import MIRROR
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import save_checkpoint
from kp_train.config import TrainConfig
from kp_train.data import Source, is_held_out, luma_from_file, read_source
from kp_train.model import KeypointNet
from kp_train.synthetic import mean_shape, write_csv_source
from tests.test_label_bias import SHAPE, SPEC, Line, lines

CONFIG = dataclasses.asdict(TrainConfig(size=112))
TRAINING = {"config": CONFIG, "held_out": {"val_fraction": 0.3}}
SCALE = SPEC.size / float(np.ptp(SHAPE, axis=0).max()) / SPEC.margin
MIDDLE = (SPEC.size - 1) / 2 - SCALE * float(SHAPE[:, 1].min() + SHAPE[:, 1].max()) / 2


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_labels_go_to_what_the_network_sees_and_keep_their_side(tmp_path: Path, share: float) -> None:
    """Labels to the right of the lines that they are about, and scattered; the network puts a face exactly there."""
    net = Line(SHAPE * (SCALE - 20) + [0, MIDDLE - 50])
    source = Source(tmp_path, 1.0, tuple(lines(tmp_path, np.array([0.02, 0]), spread=0.002)), "")
    done = clean_labels.cleaned(net, SPEC, source, 0.3, MIRROR, share)  # type: ignore[arg-type]
    assert 8 < done.kept.sum() < 30
    right = 0.02 * float(np.ptp(SHAPE, axis=0).max()) * 30 * SPEC.margin
    for old, xy, kept in zip(source.faces, done.xy, done.kept, strict=True):
        assert kept == is_held_out(old.person, 0.3)
        if kept:
            assert (xy == old.xy).all()
            continue
        seen = SHAPE[:, 0] * 30 + luma_from_file(old.image).sum(axis=0).argmax() + right
        np.testing.assert_allclose(xy[:, 0], (1 - share) * old.xy[:, 0] + share * seen, atol=0.3)
        np.testing.assert_allclose(xy[:, 1], old.xy[:, 1], atol=0.05)
    assert (done.off > 0).all(), "of held-out faces it is told too"
    whole = dataclasses.replace(source, whole=True)
    bias = np.tile([0.02, 0], (68, 1))
    every = clean_labels.cleaned(net, SPEC, whole, 0.3, MIRROR, share, bias)  # type: ignore[arg-type]
    assert not every.kept.any(), "nobody is held out of a source that was learned whole"
    np.testing.assert_allclose(every.xy[~done.kept], done.xy[~done.kept], atol=0.1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A network that answers the mean face, whatever it sees."""
    torch.manual_seed(1)
    net, box = KeypointNet(112).eval(), boxes_from_points(mean_shape())
    scale = 112 / SPEC.margin / float((box[2:] - box[:2]).max())
    net.start_from_mean(torch.from_numpy((mean_shape() - (box[:2] + box[2:]) / 2) * scale + 55.5).float())
    save_checkpoint(tmp_path / "run", net, Manifest(SPEC, training=TRAINING))
    return tmp_path / "run"


def script(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["clean_labels.py", *map(str, words)])
    clean_labels.main()


def test_the_script_writes_what_training_reads_and_says_where_labels_went_wrong(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One face has its points turned upside down; the model differs most there. What is there already is left alone."""
    path = write_csv_source(tmp_path, people=10)
    rows = path.read_text().splitlines()
    name, *numbers = rows[5].split(",")
    xy = np.array(numbers, float).reshape(68, 2)
    xy = xy.max(axis=0) + xy.min(axis=0) - xy
    rows[5] = ",".join([name, *(f"{value:.2f}" for value in xy.ravel())])
    path.write_text("\n".join(rows) + "\n")
    script(monkeypatch, run, path, "--out", tmp_path / "out")
    first, second = capsys.readouterr().out.splitlines()[-clean_labels.FARTHEST :][:2]
    assert name in first
    assert float(first.split()[0][:-1]) > 2 * float(second.split()[0][:-1])
    before, after = read_source(path), read_source(tmp_path / "out" / path.name)
    assert [face.image.resolve() for face in after.faces] == [face.image.resolve() for face in before.faces]
    for old, new in zip(before.faces, after.faces, strict=True):
        assert (np.abs(new.xy - old.xy).max() < 0.002) == is_held_out(old.person, 0.3)
    written = (tmp_path / "out" / path.name).read_bytes()
    manifest = Manifest.read(run)
    dataclasses.replace(manifest, licence={"weights": "for us"}).write(run)
    script(monkeypatch, run, path, "--out", tmp_path / "again")
    assert capsys.readouterr().out.endswith("stays under its licence:\n--licence 'weights=for us'\n")
    with pytest.raises(InputError, match="is already there or would be written twice"):
        script(monkeypatch, run, path, "--out", tmp_path / "out", "--share", 1)
    assert (tmp_path / "out" / path.name).read_bytes() == written
    with pytest.raises(InputError, match="would be written twice"):
        script(monkeypatch, run, path, path, "--out", tmp_path / "new")


def test_who_was_trained_on_by_an_earlier_run_is_not_held_out(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows them by heart, and would tell the labels' bias too small."""
    manifest = Manifest.read(run)
    start = {"training": TRAINING | {"held_out": {"val_fraction": 0.1}}}
    dataclasses.replace(manifest, training=TRAINING | {"start": start}).write(run)
    told: list[tuple[float, bool, object]] = []

    def noted(net: object, spec: object, source: Source, fraction: float, *others: object) -> clean_labels.Cleaned:
        told.append((fraction, source.whole, None if others[2] is None else others[2].tolist()))  # type: ignore[attr-defined]
        xy = np.stack([face.xy for face in source.faces])
        return clean_labels.Cleaned(xy, np.zeros(len(xy)), np.zeros(len(xy), bool))

    monkeypatch.setattr(clean_labels, "cleaned", noted)
    path, bias = write_csv_source(tmp_path, people=2), [[0.01, 0.0]] * 68
    script(monkeypatch, run, path, "--out", tmp_path / "out")
    source = {"sha256": read_source(path).sha256, "whole": True, "label_bias": bias}
    dataclasses.replace(manifest, training=TRAINING | {"sources": [source], "start": start}).write(run)
    script(monkeypatch, run, path, "--out", tmp_path / "whole")
    assert told == [(0.1, False, None), (0.1, True, bias)]


def test_a_file_in_the_folder_s_place_is_told_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean_labels, "cleaned", None)
    path = write_csv_source(tmp_path, people=2)
    with pytest.raises(KpError, match=r"can't write into .*; name another folder with --out"):
        script(monkeypatch, run, path, "--out", path)


def test_a_photo_that_is_a_link_keeps_its_person(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As data under version control often are, with the content's hash for the file's name."""
    path = write_csv_source(tmp_path / "data", people=10, each=1)
    people = [face.person for face in read_source(path).faces]
    (tmp_path / "store").mkdir()
    for number, photo in enumerate(sorted((path.parent / "training").iterdir())):
        photo.symlink_to(photo.rename(tmp_path / "store" / f"{number:032x}.png"))
    script(monkeypatch, run, path, "--out", tmp_path / "out")
    assert [face.person for face in read_source(tmp_path / "out" / path.name).faces] == people


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "nan"])
def test_a_share_that_is_none(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: object) -> None:
    with pytest.raises(InputError, match="share must be over 0 and at most 1"):
        script(monkeypatch, run, tmp_path, "--out", tmp_path / "out", "--share", share)


@pytest.mark.parametrize(
    ("spec", "training"),
    [
        (dataclasses.replace(SPEC, box="frame"), TRAINING),
        (dataclasses.replace(SPEC, points=5, scheme="own"), TRAINING),
        (SPEC, {"config": CONFIG}),
    ],
)
def test_models_that_can_not_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: ModelSpec, training: dict[str, object]
) -> None:
    save_checkpoint(tmp_path / "run", KeypointNet(112, points=spec.points), Manifest(spec, training=training))
    error = InputError if training is TRAINING else DataError
    with pytest.raises(error, match=r"can't clean labels|does not say which people were held out"):
        script(monkeypatch, tmp_path / "run", tmp_path, "--out", tmp_path / "out")
