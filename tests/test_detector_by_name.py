"""Which face detector a name means, and which one is used where none is named."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest

import kp_runtime
from kp_runtime import default_model
from kp_runtime.center_detector import CenterDetector
from kp_runtime.detect import HaarDetector
from kp_runtime.detector_by_name import DetectorWarning, detector_name, load_detector
from kp_runtime.errors import BackendError, BundleError, InputError
from kp_runtime.frame import image_from_file
from kp_runtime.geometry import overlaps
from tests.conftest import needs_haar

SHIPPED = Path(__file__).resolve().parents[1] / "engines" / "face-detector"


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KP_DETECTOR", raising=False)
    monkeypatch.setattr(default_model, "_installed_bundle", lambda package: None)


@pytest.mark.parametrize("name", ["haar", "own=some/folder", "yunet=a.onnx", "yunet=a=b.onnx"])
def test_a_whole_name_means_itself(name: str) -> None:
    assert detector_name(name) == name


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(InputError, match="there is no detector 'None'; choose from auto, own, own=BUNDLE, haar"):
        load_detector(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "hear", "haar=", "haar=x", "own=", "yunet", "yunet=", "auto=x"])
def test_other_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"there is no detector '{name}'; choose from auto, own, own=BUNDLE, haar"):
        load_detector(name)
    if name:
        monkeypatch.setenv("KP_DETECTOR", name)
        with pytest.raises(InputError, match=rf"there is no detector '{name}' \(KP_DETECTOR names it\)"):
            load_detector()


def test_the_model_wheel_has_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_installed_bundle", lambda package: {"kp_face_detector": SHIPPED}.get(package))
    for name in ("auto", "own"):
        assert detector_name(name, checkout=Path("elsewhere")) == f"own={SHIPPED}"
        assert isinstance(load_detector(name), CenterDetector)


def test_a_checkout_counts_only_where_it_is_named() -> None:
    assert detector_name("auto", checkout=SHIPPED) == f"own={SHIPPED}"
    with pytest.raises(BundleError, match=r"not installed: name it .*: own=engines/face-detector, or install"):
        load_detector("own")


@needs_haar
def test_auto_says_that_it_takes_haar() -> None:
    with pytest.warns(DetectorWarning, match=r"Haar cascade, .* not installed; name it .*: own=engines/face-det"):
        assert isinstance(load_detector(), HaarDetector)
    with pytest.warns(DetectorWarning):
        detector_name("auto", checkout=Path("nowhere"))


def test_auto_without_onnxruntime_is_haar(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.warns(DetectorWarning, match="needs ONNX Runtime"):
        assert detector_name("auto", checkout=SHIPPED) == "haar"


@needs_haar
def test_the_variable_says_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv("KP_DETECTOR", "haar")
        assert isinstance(load_detector(), HaarDetector)
        monkeypatch.setenv("KP_DETECTOR", f"own={SHIPPED}")
        assert isinstance(load_detector(), CenterDetector)
    assert detector_name("haar") == "haar"  # what was asked for goes before it
    monkeypatch.setenv("KP_DETECTOR", "yunet=nowhere.onnx")
    with pytest.raises(BackendError, match="no YuNet model at nowhere"):
        load_detector()


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KP_DETECTOR", "")
    assert detector_name("auto", checkout=SHIPPED) == f"own={SHIPPED}"


@pytest.mark.parametrize("threads", [0, -3, 9999])
def test_threads_that_are_not_there(threads: int) -> None:
    with pytest.raises(InputError, match=f"threads must be 1 to .* got {threads}"):
        load_detector(f"own={SHIPPED}", threads=threads)


def test_settings_reach_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(
        "kp_runtime.detector_by_name.CenterDetector", lambda bundle, **given: seen.update(given, bundle=bundle)
    )
    load_detector("own=here", smallest=0.2, threads=3)
    assert seen == {"bundle": "here", "smallest": 0.2, "threads": 3, "public_key": None}
    monkeypatch.setattr("kp_runtime.detector_by_name.HaarDetector", lambda **given: given)
    assert load_detector("haar", smallest=0.2) == {"smallest": 0.2}


def test_auto_with_a_public_key_takes_no_detector_without_a_signature(tmp_path: Path) -> None:
    with pytest.warns(DetectorWarning, match="is not signed, and a public key was given"):
        assert detector_name("auto", checkout=SHIPPED, public_key=tmp_path / "key.pub.pem") == "haar"


def test_a_public_key_and_yunet_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = tmp_path / "key.pub.pem"
    with pytest.raises(InputError, match="no public key signs YuNet's file: leave the key out, or take another"):
        detector_name("yunet=a.onnx", public_key=key)
    monkeypatch.setenv("KP_DETECTOR", "yunet=a.onnx")
    with pytest.raises(InputError, match=r"no public key signs YuNet's file \(KP_DETECTOR names it\): leave the"):
        load_detector(public_key=key)


@needs_haar
def test_a_public_key_is_asked_for_before_a_detector_is_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_model, "_installed_bundle", lambda package: SHIPPED)
    with pytest.warns(DetectorWarning, match="is not signed"):
        assert isinstance(load_detector(public_key=tmp_path / "key.pub.pem"), HaarDetector)


@needs_haar
def test_the_default_one_and_haar_see_the_same_face(astronaut: Path) -> None:
    photo = image_from_file(astronaut)
    boxes = [kp_runtime.load_detector(name)(photo) for name in (f"own={SHIPPED}", "haar")]
    assert [len(found) for found in boxes] == [1, 1]
    assert overlaps(*boxes)[0, 0] > 0.6
    assert np.isfinite(boxes[0]).all()
