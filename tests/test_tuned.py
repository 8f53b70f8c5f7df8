"""The settings of kp tune: written, read, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kp_runtime
from kp_runtime.cores import usable_cores
from kp_runtime.errors import BackendError, BundleError, InputError
from kp_runtime.manifest import Manifest
from kp_runtime.tuned import Tuned, TunedWarning, tuned_from_file, write_tuned
from tests.test_tune import make_bundle


@pytest.fixture
def settings_of(tmp_path: Path) -> Callable[..., Path]:
    """A settings file of this machine for a bundle in the same folder, with some fields changed."""
    bundle = make_bundle(tmp_path / "net", {"fp32": 0.0})
    entry = Manifest.read(bundle).files["model.fp32.onnx"]
    backend = kp_runtime.load(bundle, threads=1).backend

    def write(**fields: Any) -> Path:
        machine = kp_runtime.tuned.tuned_conditions(backend)
        tuned = Tuned("net", "model.fp32.onnx", entry.sha256, "ort-cpu", 1, 8, "one by one", machine)
        return write_tuned(dataclasses.replace(tuned, **fields), tmp_path / "tuned.json")

    return write


def test_settings_are_read_as_they_were_written(settings_of: Callable[..., Path], tmp_path: Path) -> None:
    path = settings_of()
    assert tuned_from_file(path).feeding == "one by one"
    elsewhere = tmp_path / "moved"
    shutil.move(tmp_path / "net", elsewhere)
    with pytest.raises(BundleError, match="is not a bundle"):
        kp_runtime.load(tuned=path)
    assert kp_runtime.load(elsewhere, tuned=path).backend.threads == 1


def test_the_bundles_folder_may_have_any_name(settings_of: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("\u3000", "a\u202fb", "a\nb", *([os.fsdecode(b"caf\xe9")] if os.name == "posix" else [])):
        shutil.copytree(tmp_path / "net", tmp_path / name)
        assert kp_runtime.load(tuned=settings_of(bundle=name)).backend.threads == 1


def test_settings_behind_a_link_are_read(settings_of: Callable[..., Path], tmp_path: Path) -> None:
    """As configuration is mounted into containers; the bundle lies where the file itself says."""
    (tmp_path / "mounted").mkdir()
    link, circle = tmp_path / "mounted" / "tuned.json", tmp_path / "mounted" / "circle.json"
    link.symlink_to(settings_of())
    assert kp_runtime.load(tuned=link).backend.threads == 1
    circle.symlink_to(circle)
    with pytest.raises(InputError, match=r"circle\.json can't be read: "):
        tuned_from_file(circle)


def test_what_is_not_said_is_the_engines_own_choice(settings_of: Callable[..., Path], tmp_path: Path) -> None:
    raw = json.loads(settings_of().read_text())
    del raw["feeding"], raw["threads"]
    (tmp_path / "short.json").write_text(json.dumps(raw))
    assert kp_runtime.load(tuned=tmp_path / "short.json").backend.threads == usable_cores()


def test_another_model_is_refused(settings_of: Callable[..., Path]) -> None:
    with pytest.raises(
        BundleError,
        match=r"was tuned for model.fp32.onnx with sha256 0{12}…, but .*net has one with [0-9a-f]{12}…; run kp",
    ):
        kp_runtime.load(tuned=settings_of(sha256="0" * 64))
    with pytest.raises(BundleError, match="has no such file"):
        kp_runtime.load(tuned=settings_of(file="model.fp16.onnx"))


def test_other_conditions_are_warned_of(settings_of: Callable[..., Path]) -> None:
    machine = tuned_from_file(settings_of()).machine
    with pytest.warns(
        TunedWarning, match=r"under other conditions \(CPU PDP-11, then .*; onnxruntime 1.0, then .*\): it need not"
    ):
        kp_runtime.load(tuned=settings_of(machine=machine | {"CPU": "PDP-11", "onnxruntime": "1.0"}))


def test_what_an_older_release_did_not_record_is_no_other_condition(settings_of: Callable[..., Path]) -> None:
    machine = tuned_from_file(settings_of()).machine
    machine = {name: value for name, value in machine.items() if name not in ("CPU", "NVIDIA driver")}
    kp_runtime.load(tuned=settings_of(machine=machine | {"socket": "AM4"}))  # a warning would be an error


def test_a_gpu_s_settings_hold_for_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kp_runtime.tuned.DeviceBackend", SimpleNamespace)
    monkeypatch.setattr("kp_runtime.tuned.driver_version", lambda: "540.4.0")
    backend: Any = SimpleNamespace(name="tensorrt", driver=SimpleNamespace(arch="sm_87"))
    found = kp_runtime.tuned.tuned_conditions(backend)
    assert {"GPU": "sm_87", "NVIDIA driver": "540.4.0"}.items() <= found.items()


def test_settings_that_cannot_be_used_here(settings_of: Callable[..., Path]) -> None:
    with pytest.raises(BackendError, match=r"the settings of .*tuned.json can't be used here: threads must be 1 to"):
        kp_runtime.load(tuned=settings_of(threads=usable_cores() + 1))
    with pytest.raises(InputError, match=r"^cores "):  # the caller's own are no fault of the file
        kp_runtime.load(tuned=settings_of(), cores=[9999])
    by_hand = r"of .*tuned.json can't be used here: there is no way 'by hand' to feed a batch; .*; run kp tune here"
    with pytest.raises(BackendError, match=by_hand):
        kp_runtime.load(tuned=settings_of(feeding="by hand"))
    for name, value in (("backend", "ort-cpu"), ("threads", 1), ("precision", "fp32")):
        with pytest.raises(InputError, match="leave out backend, threads and precision"):
            kp_runtime.load(tuned=settings_of(), **{name: value})


def test_what_load_is_asked_for_beside_the_settings_counts(settings_of: Callable[..., Path]) -> None:
    assert kp_runtime.load(tuned=settings_of()).backend.report.golden_error_px is not None
    assert kp_runtime.load(tuned=settings_of(), golden=False).backend.report.golden_error_px is None
    if hasattr(os, "sched_getaffinity"):
        core = max(os.sched_getaffinity(0))
        assert kp_runtime.load(tuned=settings_of(), cores=[core]).backend.cores == {core}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2, this release reads 1"),
        ({"schema": "x" * 1000}, "has schema 'x"),
        ({"file": None}, "has a wrong file, None"),
        ({"threads": "two"}, "has a wrong threads, 'two'"),
        ({"threads": True}, "has a wrong threads, True"),
        ({"machine": []}, "has a wrong machine"),
        ({"faces": 0}, "has a wrong faces, 0"),
        ({"threads": 10**100}, "has a wrong threads, 1000"),
        ({"backend": "cuda"}, "has a wrong backend, 'cuda'"),
        ({"bundle": "a\0b"}, "has a wrong bundle, 'a"),
        ({"bundle": "a" * 1001}, "has a wrong bundle, 'aaa"),
        ({"bundle": "\ud800"}, "has a wrong bundle, "),
    ],
)
def test_settings_that_are_none(
    change: dict[str, Any], message: str, settings_of: Callable[..., Path], tmp_path: Path
) -> None:
    raw = json.loads(settings_of().read_text()) | change
    (tmp_path / "bad.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message) as told:
        tuned_from_file(tmp_path / "bad.json")
    assert len(str(told.value)) < 300


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"{", "is no JSON"), (b"\xff", "is no JSON"), (b"[]", "holds no settings"), (b"[" * 10000, "is no JSON")],
)
def test_files_that_are_no_settings(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(InputError, match=message):
        tuned_from_file(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"none.json can't be read: .*; run kp tune here"):
        tuned_from_file(tmp_path / "none.json")
    with pytest.raises(InputError, match="tuned must be a path, as text or of pathlib; got int"):
        kp_runtime.load(tuned=5)  # type: ignore[arg-type]
