"""Which model is opened when none is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kp_runtime import load
from kp_runtime.default_model import MODEL_DISTRIBUTION, default_bundle
from kp_runtime.errors import BundleError
from tests.models import tiny_bundle


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, and no model wheel where these tests run."""
    monkeypatch.delenv("KP_MODEL", raising=False)
    monkeypatch.setattr("kp_runtime.default_model.MODEL_DISTRIBUTION", "kp-edge-model-of-these-tests")


def install(site: Path, monkeypatch: pytest.MonkeyPatch, *, whole: bool = True) -> Path:
    """What pip leaves of a model wheel in a folder of installed packages, at the end of the path."""
    record = site / "kp_edge_model-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {MODEL_DISTRIBUTION}\nVersion: 0.1.0\n")
    folder = site / "kp_model"
    if whole:
        tiny_bundle(folder)
    monkeypatch.setattr("kp_runtime.default_model.MODEL_DISTRIBUTION", MODEL_DISTRIBUTION)
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    return folder


def test_without_a_default_the_error_says_all_ways() -> None:
    with pytest.raises(BundleError, match=r"name a bundle .*, set KP_MODEL .*, or install the wheel kp-edge-model"):
        load()


def test_the_installed_wheel_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(tmp_path / "site", monkeypatch)
    assert default_bundle() == folder
    assert load(threads=1).spec.name == "tiny"


def test_the_variable_goes_before_the_wheel(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch)
    monkeypatch.setenv("KP_MODEL", str(bundle))
    assert default_bundle(checkout=bundle) == bundle
    monkeypatch.setenv("KP_MODEL", str(bundle / "model.fp32.onnx"))
    assert load(threads=1).backend.report.file == "model.fp32.onnx"


def test_a_variable_that_leads_nowhere_is_no_reason_to_take_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", monkeypatch)
    monkeypatch.setenv("KP_MODEL", str(tmp_path / "gone"))
    with pytest.raises(BundleError, match=r"KP_MODEL names .*gone, which is not there"):
        load()
    monkeypatch.setenv("KP_MODEL", str(tmp_path / ("gone" * 80)))  # an error of the system's to look at
    with pytest.raises(BundleError, match=r"which is not there or may not be read"):
        load()


def test_a_damaged_wheel_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch, whole=False)
    with pytest.raises(BundleError, match=r"0\.1\.0 is installed, but .*kp_model holds no manifest"):
        load()


def test_the_current_folder_is_never_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_bundle(tmp_path / "kp_model")
    tiny_bundle(tmp_path / "engines" / "resnet18-68")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BundleError, match="there is no default one"):
        load()


def test_a_checkout_comes_last(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_bundle(checkout=bundle) == bundle
    with pytest.raises(BundleError, match="there is no default one"):
        default_bundle(checkout=tmp_path / "gone")
    folder = install(tmp_path / "site", monkeypatch)
    assert default_bundle(checkout=bundle) == folder
