"""kp tune as a person types it, its settings given to other commands, and the NME that it measures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from kp_export.evaluate import Evaluation, OpenModel, evaluate, measured_rise
from kp_runtime import tune
from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import open_backend
from kp_runtime.errors import BundleError
from kp_runtime.tuned import tuned_from_file
from kp_train.data import Face, read_source
from kp_train.synthetic import write_csv_source
from tests.test_bench_cli import FullDisk
from tests.test_cli import kp, status_of
from tests.test_tune import made_up, make_bundle

MS = {"model.fp32.onnx": 8.0, "model.int8.onnx": 4.0}


@pytest.fixture(autouse=True)
def made_up_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kp_runtime.timing.RESAMPLES", 100)
    monkeypatch.setattr(tune, "measure_in_turns", made_up(MS))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "net", {"fp32": 0.0, "int8": 0.05})


def test_settings_are_written_and_used(
    capsys: pytest.CaptureFixture[str], net: Path, astronaut: Path, tmp_path: Path
) -> None:
    lite = make_bundle(tmp_path / "net-lite", {"int8": 0.2}, size=32)
    settings = tmp_path / "tuned.json"
    words = ("tune", net, "--threads", 1, "--budget", "5ms", "--out", settings)
    status, out, err = kp(capsys, *words)
    assert (status, err) == (0, f"{lite} lies beside it and is tried too; --alone leaves it out\n")
    rows = [line.split() for line in out.splitlines() if line.startswith(("net/", "net-lite/"))]
    assert [(row[0], row[1], row[2], row[3]) for row in rows] == [
        ("net/model.int8.onnx", "ort-cpu", "1", "+0.050"),
        ("net-lite/model.int8.onnx", "ort-cpu", "1", "+0.200"),
        ("net/model.fp32.onnx", "ort-cpu", "1", "+0.000"),
    ]
    assert rows[0][-1] == "chosen"
    assert "chosen: net/model.int8.onnx on ort-cpu, 1 thread: p50 4.00 ms, p95 4.00 ms" in out
    assert out.splitlines()[-2:] == [str(settings), str(tmp_path / "tuned.tried.json")]

    out_folder = tmp_path / "out"
    status, out, err = kp(capsys, "predict", astronaut, "--tuned", settings, "--out", out_folder)
    assert (status, err) == (0, "")
    assert "1 face" in out
    status, _, err = kp(capsys, "predict", astronaut, "--tuned", settings, "--out", out_folder, "--threads", 1)
    assert (status, err.count("\n")) == (1, 1)
    assert "leave out backend, threads and precision" in err
    words = ("filter", astronaut, "--effect", "hat", "--out", out_folder, "--tuned", settings, "--threads", 1)
    assert kp(capsys, *words)[::2] == (status, err)


def test_json_has_the_whole_table(capsys: pytest.CaptureFixture[str], net: Path, tmp_path: Path) -> None:
    words = ("tune", net, "--threads", 1, "--alone", "--json", "--out", tmp_path / "t.json")
    status, out, _ = kp(capsys, *words)
    assert status == 0
    document = json.loads(out)
    assert document == json.loads((tmp_path / "t.tried.json").read_text())
    assert document["trials"][document["chosen"]]["file"] == "model.int8.onnx"


def test_nothing_fits(capsys: pytest.CaptureFixture[str], net: Path, tmp_path: Path) -> None:
    status, out, err = kp(capsys, "tune", net, "--threads", 1, "--budget", "800us", "--out", tmp_path / "t.json")
    assert (status, err.count("\n")) == (1, 1)
    assert "nothing that keeps the accuracy fits 0.8 ms for 1 face(s); the fastest is net/model.int8.onnx" in err
    assert out.splitlines()[-1] == str(tmp_path / "t.tried.json")
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_settings_are_kept_where_stdout_is_gone(
    more: tuple[str, ...], net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert status_of("tune", net, "--threads", 1, "--alone", "--out", tmp_path / "t.json", *more) == 1
    assert tuned_from_file(tmp_path / "t.json").file == "model.int8.onnx"
    assert (tmp_path / "t.tried.json").is_file()


def test_other_conditions_are_a_line(
    capsys: pytest.CaptureFixture[str], net: Path, astronaut: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "t.json"
    assert kp(capsys, "tune", net, "--threads", 1, "--out", settings)[0] == 0
    raw = json.loads(settings.read_text())
    raw["machine"]["CPU"] = "PDP-11"
    settings.write_text(json.dumps(raw))
    status, _, err = kp(capsys, "predict", astronaut, "--tuned", settings, "--out", tmp_path / "out")
    assert status == 0
    assert err.count("\n") == 1
    assert "was tuned under other conditions (CPU PDP-11, then" in err
    shutil.copy(net / "model.fp32.onnx", net / "model.int8.onnx")
    make_bundle(net, {"fp32": 0.0})
    status, _, err = kp(capsys, "predict", astronaut, "--tuned", settings, "--out", tmp_path / "out")
    assert status == 1
    assert "has no such file; run kp tune here" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "5"), "a budget is a time over 0 such as 5ms, 800us or 0.02s; got '5'"),
        (("--faces", "0"), "a call has 1 to 1000000 faces, got 0"),
        (("--backend", "cuda"), "there is no backend 'cuda'"),
        (("--max-nme-rise", "nan"), "the NME may rise by a number of percentage points, got nan"),
        (("--also", "nowhere"), "nowhere is not a bundle"),
        (("--also", "nowhere", "--alone"), "--alone tries no other bundle: leave out --also"),
        (("--data", "nowhere.csv"), "nowhere.csv"),
        (("--photo", "nowhere.jpg"), "nowhere.jpg"),
        (("--out", "."), ". is a folder; name a file in it"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str, net: Path, tmp_path: Path
) -> None:
    status, out, err = kp(capsys, "tune", net, "--out", tmp_path / "t.json", *words)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert not (tmp_path / "t.json").exists()


class Shifted(Backend):
    """A backend whose points are some pixels of the crop to the right of another's."""

    def __init__(self, backend: Backend, px: float) -> None:
        super().__init__(backend.spec)
        self._inner, self._px, self.report = backend, px, backend.report

    def _run(self, crops: np.ndarray) -> list[np.ndarray]:
        keypoints, *scores = self._inner.answer(crops).outputs()
        return [keypoints + np.float32((self._px, 0)), *scores]


def test_the_rise_is_measured_on_labelled_faces(net: Path, tmp_path: Path) -> None:
    source = read_source(write_csv_source(tmp_path, people=4))
    rise = measured_rise(net, [source])
    backend = open_backend(net, "ort-cpu", "fp32", 1)
    assert rise(net, backend).points == 0
    assert rise(net, backend).how == f"measured on {len(source.faces)} labelled faces"
    steps = [rise(net, Shifted(backend, px)).points or 0.0 for px in (20.0, 40.0)]
    assert 1 < steps[0] < steps[1]


def test_of_many_faces_some_from_the_first_to_the_last_are_measured(
    net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = read_source(write_csv_source(tmp_path, people=4)), []

    def noted(model: OpenModel, faces: list[Face]) -> Evaluation:
        seen.append([face.image for face in faces])
        return evaluate(model, faces)

    monkeypatch.setattr("kp_export.evaluate.MOST", 2)
    monkeypatch.setattr("kp_export.evaluate.evaluate", noted)
    found = measured_rise(net, [source])(net, open_backend(net, "ort-cpu", "fp32", 1))
    assert found.how == "measured on 2 labelled faces"
    assert seen == [[source.faces[i].image for i in (0, -1)]] * 2


def test_without_fp32_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    source = read_source(write_csv_source(tmp_path, people=4))
    with pytest.raises(BundleError, match="packed has neither an fp32 ONNX file nor a checkpoint"):
        measured_rise(make_bundle(tmp_path / "packed", {"int8": 0.0}), [source])


def test_measured_rises_decide(capsys: pytest.CaptureFixture[str], net: Path, tmp_path: Path) -> None:
    table = write_csv_source(tmp_path, people=4)
    status, out, _ = kp(capsys, "tune", net, "--threads", 1, "--data", table, "--out", tmp_path / "t.json")
    assert status == 0
    assert "NME rise of all: measured on 8 labelled faces" in out
    assert tuned_from_file(tmp_path / "t.json").file == "model.int8.onnx"


def test_faces_are_not_measured_before_the_settings_are_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, net: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("kp_export.evaluate.evaluate", lambda *_: pytest.fail("measured"))
    table = write_csv_source(tmp_path, people=4)
    status, _, err = kp(capsys, "tune", net, "--threads", 999, "--data", table, "--out", tmp_path / "t.json")
    assert (status, err.count("\n")) == (1, 1)
    assert "threads must be 1 to" in err


def test_bundles_of_one_name_are_told_apart(capsys: pytest.CaptureFixture[str], net: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other" / "net", {"int8": 0.2})
    words = ("tune", net, "--also", other, "--threads", 1, "--out", tmp_path / "t.json")
    status, out, _ = kp(capsys, *words)
    assert status == 0
    for bundle in (net, other):
        assert f"{bundle}/model.int8.onnx" in out
