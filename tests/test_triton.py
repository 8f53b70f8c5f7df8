"""Triton model repositories: what is written, whole or not at all. `test_triton_server.py` has the server."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import kp_runtime
from kp_export import triton
from kp_export.triton import TritonModel, pbtxt, write_repository
from kp_runtime.errors import BundleError, ExportError
from kp_runtime.manifest import DetectorManifest, Manifest, file_entry
from kp_runtime.triton_model import PROBE, detector_of
from tests.conftest import DETECTOR
from tests.models import tiny_bundle
from tests.test_cli import kp


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def with_plan(
    bundle: Path, name: str, profile: tuple[int, int, int], precision: str | None = "fp16", **made: Any
) -> None:
    """Enters a file that stands for a plan in the manifest."""
    (bundle / name).write_bytes(name.encode())
    facts = {"profile": profile, "compute_capability": "8.7", "tensorrt": "10.3.0", **made}
    entry = file_entry(bundle / name, "plan", precision=precision, made=facts)
    manifest = Manifest.read(bundle)
    dataclasses.replace(manifest, files=manifest.files | {name: entry}).write(bundle)


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be changed."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def test_a_repository_holds_what_the_bundle_can(own: Path, tmp_path: Path) -> None:
    with_plan(own, "model.fp16.sm87.trt10.3.0.plan", (1, 8, 16))
    with_plan(own, "model.int8.sm87.trt10.3.0.plan", (1, 8, 16), "int8")
    with_plan(own, "model.fp16.sm90.trt10.3.0.plan", (4, 4, 4), compute_capability="9.0")
    with_plan(own, "model.int8-trt.sm87.trt10.3.0.plan", (1, 8, 16), "int8-trt")
    with_plan(own, "model.sm87.trt10.3.0.plan", (1, 8, 16), None)
    with_plan(own, "model.int8.sm87.trt10.3.0.dla1.plan", (1, 8, 16), "int8", options={"dla_core": 1})
    report = write_repository(own, tmp_path / "repo")
    assert report.models == (
        TritonModel("tiny-images", 1, True, None),
        TritonModel("tiny-crops-onnx", 1, True, "model.fp32.onnx"),
        TritonModel("tiny-crops-sm87-trt10.3.0", 1, True, "model.int8.sm87.trt10.3.0.plan"),
    )
    assert [reason.split(":")[0] for reason in report.left_out] == [
        "model.int8-trt.sm87.trt10.3.0.plan",
        "model.sm87.trt10.3.0.plan",
        "model.int8.sm87.trt10.3.0.dla1.plan",
        "model.fp16.sm87.trt10.3.0.plan",
        "model.fp16.sm90.trt10.3.0.plan",
    ]
    repo = tmp_path / "repo"
    assert (repo / "tiny-crops-onnx/1/model.onnx").read_bytes() == (own / "model.fp32.onnx").read_bytes()
    assert (repo / "tiny-crops-sm87-trt10.3.0/1/model.plan").read_bytes() == b"model.int8.sm87.trt10.3.0.plan"
    config = (repo / "tiny-crops-sm87-trt10.3.0/config.pbtxt").read_text()
    assert "max_batch_size: 16\n" in config
    assert "kind: KIND_GPU\n" in config
    assert sorted(p.name for p in (repo / "tiny-images/1/bundle").glob("*.onnx")) == ["model.fp32.onnx"]
    assert not list(repo.rglob(".*"))


def test_a_model_of_crops_says_the_licence_of_its_weights(own: Path, tmp_path: Path) -> None:
    dataclasses.replace(Manifest.read(own), licence={"code": "MIT", "weights": 'for "research"'}).write(own)
    write_repository(own, tmp_path / "repo")
    config = (tmp_path / "repo/tiny-crops-onnx/config.pbtxt").read_text()
    assert 'key: "kp_weights_licence"\n  value {\n    string_value: "for \\"research\\""\n' in config


def test_a_version_under_another_licence_is_said(own: Path, tmp_path: Path) -> None:
    """A model's config stays as it is, the licence of its first version with it."""
    manifest, repo = Manifest.read(own), tmp_path / "repo"
    config = repo / "tiny-crops-onnx/config.pbtxt"
    for licence, told in [
        ({"weights": "MIT"}, None),
        ({"weights": "MIT"}, None),
        ({"weights": "NC"}, "model.fp32.onnx is under 'NC', which kp_weights_licence does not say; change it there"),
        ({"code": "MIT"}, "model.fp32.onnx has none; change it there"),
    ]:
        dataclasses.replace(manifest, licence=licence).write(own)
        said = [reason for reason in write_repository(own, repo).left_out if "licence" in reason]
        assert [reason.startswith(f"the licence in {config}, which stays as it is: {told}") for reason in said] == (
            [True] if told else []
        )


@pytest.mark.parametrize("newer_first", [True, False])
def test_a_plan_that_wants_a_flag_of_the_server_gives_way_to_one_that_does_not(
    newer_first: bool, own: Path, tmp_path: Path
) -> None:
    plans = [("model.fp16.sm87.trt10.3.0.newer.plan", "fp16"), ("model.fp16.sm87.trt10.3.0.plan", "fp16")]
    plans += [("model.int8.sm87.trt10.3.0.newer.plan", "int8"), ("model.fp16.sm87.trt10.3.0.ampere.plan", "fp16")]
    for name, precision in plans if newer_first else reversed(plans):
        with_plan(own, name, (1, 8, 16), precision)
    report = write_repository(own, tmp_path / "repo")
    assert report.models[-1].file == "model.fp16.sm87.trt10.3.0.plan"
    assert not any("--backend-config" in reason for reason in report.left_out)


def test_the_flag_that_a_version_compatible_plan_wants_is_told(own: Path, tmp_path: Path) -> None:
    with_plan(own, name := "model.fp16.sm87.trt10.3.0.newer.plan", (1, 8, 16))
    report = write_repository(own, tmp_path / "repo")
    assert report.models[-1].file == name
    assert report.left_out == (
        "a plan without --version-compatible, as the bundle has none for tiny-crops-sm87-trt10.3.0: the server loads "
        f"{name} by --backend-config=tensorrt,version-compatible=true alone",
    )


def test_of_several_onnx_files_the_best_one_for_a_cpu_runs_there(own: Path, tmp_path: Path) -> None:
    assert write_repository(own, tmp_path / "one").left_out == ()
    manifest = Manifest.read(own)
    files = dict(manifest.files)
    for precision in ("int8", "fp16"):
        shutil.copy(own / "model.fp32.onnx", path := own / f"model.{precision}.onnx")
        files[path.name] = file_entry(path, "onnx", precision=precision)
    dataclasses.replace(manifest, files=files).write(own)
    report = write_repository(own, tmp_path / "repo")
    assert report.models[1].file == "model.int8.onnx"
    pack = f"for a GPU export a bundle of it: kp pack {own} --precision fp16 --out SLIM"
    assert report.left_out == (f"model.fp16.onnx: tiny-crops-onnx runs model.int8.onnx; {pack}",)
    assert "kind: KIND_CPU\n" in (tmp_path / "repo/tiny-crops-onnx/config.pbtxt").read_text()
    packed = tmp_path / "repo/tiny-images/1/bundle"  # whose engine is chosen where it runs
    assert sorted(path.name for path in packed.glob("*.onnx")) == [f"model.{p}.onnx" for p in ("fp16", "fp32", "int8")]


def test_a_model_is_warmed_up_with_no_more_than_it_takes(own: Path, tmp_path: Path) -> None:
    with_plan(own, "model.fp16.sm87.trt10.3.0.plan", (1, 2, 4))
    write_repository(own, tmp_path / "repo")
    batches = {
        name: re.findall(
            r"^  batch_size: (\d+)$", (tmp_path / "repo" / name / "config.pbtxt").read_text(), re.MULTILINE
        )
        for name in ("tiny-images", "tiny-crops-onnx", "tiny-crops-sm87-trt10.3.0")
    }
    assert list(batches.values()) == [["1"], ["1", "8", "32"], ["1", "4"]]
    probe = (tmp_path / "repo/tiny-images/warmup/probe").read_bytes()
    assert (int.from_bytes(probe[:4], "little"), probe[4:]) == (len(PROBE), PROBE)


def test_a_bundle_whose_export_was_killed_between_its_last_moves_is_mended(own: Path, tmp_path: Path) -> None:
    own.rename(own.with_name(".own.old"))
    assert len(write_repository(own, tmp_path / "repo").models) == 2


def test_the_text_of_a_config() -> None:
    message = {
        "name": 'a "b"',
        "max": 3,
        "on": True,
        "kind": triton.Word("KIND_CPU"),
        "dims": [-1, 4],
        "input": [{"name": "x"}, {"name": "y"}],
        "policy": {"latest": {}},
    }
    assert pbtxt(message) == (
        'name: "a \\"b\\""\nmax: 3\non: true\nkind: KIND_CPU\ndims: [-1, 4]\n'
        'input {\n  name: "x"\n}\ninput {\n  name: "y"\n}\npolicy {\n  latest {\n  }\n}\n'
    )


def test_the_same_again_changes_nothing_and_another_adds_a_version(own: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (repo / "other/1").mkdir(parents=True)
    (repo / "other/1/model.onnx").write_bytes(b"other")
    write_repository(own, repo)
    mine = repo / "tiny-crops-onnx/config.pbtxt"
    mine.write_text(mine.read_text().replace("count: 1", "count: 3"))
    (repo / "tiny-images/1/__pycache__").mkdir()
    (repo / "tiny-images/1/__pycache__/model.pyc").write_bytes(b"Triton's Python")
    before = files_of(repo)
    assert [model.is_new for model in write_repository(own, repo).models] == [False, False]
    assert files_of(repo) == before
    data = (own / "model.fp32.onnx").read_bytes() + b"\x72\x00"  # an empty field at the end
    (own / "model.fp32.onnx").write_bytes(data)
    manifest = Manifest.read(own)
    entry = file_entry(own / "model.fp32.onnx", "onnx", precision="fp32")
    dataclasses.replace(manifest, files=manifest.files | {"model.fp32.onnx": entry}).write(own)
    assert [(model.version, model.is_new) for model in write_repository(own, repo).models] == [(2, True), (2, True)]
    after = files_of(repo)
    assert {name: after[name] for name in before} == before
    assert after["tiny-crops-onnx/2/model.onnx"] == data


@pytest.mark.parametrize("again", [False, True])
def test_an_export_that_breaks_off_shows_nothing(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    repo = tmp_path / "repo"
    if again:
        write_repository(own, repo)
        (own / "golden.npz").replace(own / "other.npz")
        manifest = Manifest.read(own)
        files = {name: entry for name, entry in manifest.files.items() if name != "golden.npz"}
        (own / "other.npz").replace(own / "golden.npz")
        files["golden.npz"] = dataclasses.replace(manifest.files["golden.npz"], made={"again": True})
        dataclasses.replace(manifest, files=files).write(own)
    before = files_of(repo)

    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace" if not again else "fsync", broken)
    with pytest.raises((ExportError, kp_runtime.KpError), match="No space left on device"):
        write_repository(own, repo)
    monkeypatch.undo()
    assert files_of(repo) == before
    assert next(model.version for model in write_repository(own, repo).models) == 1 + again


def test_what_a_killed_export_left_is_cleared_away(own: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    (tmp_path / ".repo.tiny-images.new/1").mkdir(parents=True)
    (tmp_path / ".repo.tiny-images.new/config.pbtxt").write_text("half")
    write_repository(own, repo)
    (repo / "tiny-images/.new").mkdir()
    write_repository(own, repo)
    assert not list(tmp_path.rglob(".*"))
    assert (repo / "tiny-images/config.pbtxt").read_text() != "half"


def test_repositories_beside_each_other_are_written_at_once(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = triton._sync

    def in_between(stage: Path) -> None:
        monkeypatch.setattr(triton, "_sync", sync)
        write_repository(own, tmp_path / "other")
        sync(stage)

    monkeypatch.setattr(triton, "_sync", in_between)
    write_repository(own, tmp_path / "repo")
    assert files_of(tmp_path / "repo") == files_of(tmp_path / "other") != {}


def test_models_of_other_names_are_other_models(tmp_path: Path) -> None:
    """Triton's names are ASCII, and a second version would take the first one's place."""
    for name in ("人脸", "模型", "a b", "a_b"):
        own = tiny_bundle(tmp_path / name)
        manifest = Manifest.read(own)
        dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, name=name)).write(own)
        assert {model.version for model in write_repository(own, tmp_path / "repo").models} == {1}
    assert {"a_b-images", "a_b-crops-onnx"} <= {path.name for path in (tmp_path / "repo").iterdir()}


def test_another_contract_is_refused_before_anything_is_written(own: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    other = tiny_bundle(tmp_path / "other", size=96)
    write_repository(other, repo)
    before = files_of(repo)
    with pytest.raises(ExportError, match="tiny-crops-onnx is there and is not a model of 'crops of 64 px"):
        write_repository(own, repo)
    assert files_of(repo) == before


def test_a_plan_for_fewer_than_the_model_takes_is_refused(own: Path, tmp_path: Path) -> None:
    """Triton does not load such a version, and it would be the newest one."""
    repo = tmp_path / "repo"
    with_plan(own, "model.fp16.sm87.trt10.3.0.plan", (1, 8, 32))
    write_repository(own, repo)
    assert not any(model.is_new for model in write_repository(own, repo).models)  # just as many it takes
    before = files_of(repo)
    with_plan(own, "model.fp16.sm87.trt10.3.0.plan", (1, 2, 4))
    told = r"sm87-trt10\.3\.0 takes 32 crops at once, and the plan 4, .*; build it with --max-batch 32, or remove"
    with pytest.raises(ExportError, match=told):
        write_repository(own, repo)
    assert files_of(repo) == before
    config = repo / "tiny-crops-sm87-trt10.3.0/config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 32", "max_batch_size: 4"))  # a user's own choice
    with_plan(own, "model.fp16.sm87.trt10.3.0.plan", (1, 2, 8))
    write_repository(own, repo)
    assert "max_batch_size: 4" in config.read_text()


def test_a_version_for_another_processor_is_said(own: Path, tmp_path: Path) -> None:
    """A model's config stays as it is, and int8 is for the CPU."""
    repo = tmp_path / "repo"
    assert not any("KIND" in reason for reason in write_repository(own, repo).left_out)
    config = repo / "tiny-crops-onnx/config.pbtxt"
    config.write_text(config.read_text().replace("KIND_AUTO", "KIND_CPU"))
    (told,) = [reason for reason in write_repository(own, repo).left_out if "KIND" in reason]
    assert told.startswith(f"the processor in {config}, which stays as it is: it says KIND_CPU, model.fp32.onnx is for")
    config.write_text(config.read_text().replace("KIND_CPU", "KIND_GPU"))  # a user's own choice
    assert not any("KIND" in reason for reason in write_repository(own, repo).left_out)


def test_a_later_packaging_of_tensorrt_is_the_same_version(own: Path, tmp_path: Path) -> None:
    with_plan(own, "a.plan", (1, 8, 16), tensorrt="10.14.1.48.post1")
    names = [model.name for model in write_repository(own, tmp_path / "repo").models]
    assert "tiny-crops-sm87-trt10.14.1.48" in names


def test_bundles_that_lack_something(own: Path, tmp_path: Path) -> None:
    own = own.rename(own.with_name("a bundle"))
    manifest = Manifest.read(own)
    golden = {"golden.npz": manifest.files["golden.npz"]}
    dataclasses.replace(manifest, files=golden).write(own)
    with pytest.raises(
        ExportError, match=r"holds no ONNX file and no plan for Triton; make one first: kp export '.*/a bundle'$"
    ):
        write_repository(own, tmp_path / "repo")
    dataclasses.replace(manifest, files={"model.fp32.onnx": manifest.files["model.fp32.onnx"]}).write(own)
    with pytest.raises(ExportError, match=r"has no golden.npz, which the health check runs"):
        write_repository(own, tmp_path / "repo")
    dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, box="frame")).write(own)
    with pytest.raises(ExportError, match="sees whole frames"):
        write_repository(own, tmp_path / "repo")
    manifest.write(own)
    with_plan(own, "x.plan", (1, 2, 4), tensorrt=None)
    with pytest.raises(BundleError, match=r"lacks what x.plan was made for .*build it again"):
        write_repository(own, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_the_command(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    status, out, err = kp(capsys, "export", bundle, "--triton", repo)
    assert (status, err) == (0, "")
    assert out == f"{repo}/tiny-images: version 1\n{repo}/tiny-crops-onnx: version 1\n"
    status, out, _ = kp(capsys, "export", bundle, "--triton", repo, "--json")
    version = repo / "tiny-images" / "1"
    assert DetectorManifest.read(version / "detector").spec == DetectorManifest.read(DETECTOR).spec
    assert detector_of(version, "auto") == detector_of(version, "own") == f"own={version / 'detector'}"
    assert (detector_of(version, "haar"), detector_of(repo, "auto")) == ("haar", "auto")
    assert json.loads(out)["models"][1] == {
        "name": "tiny-crops-onnx", "version": 1, "is_new": False, "file": "model.fp32.onnx",
    }  # fmt: skip
    status, _, err = kp(capsys, "export", tmp_path, "--triton", repo)
    assert (status, err.count("\n")) == (1, 1)
    assert "is not a bundle" in err
    (tmp_path / "file").write_text("")
    status, _, err = kp(capsys, "export", bundle, "--triton", tmp_path / "file")
    assert (status, err.count("\n")) == (1, 1)
    assert "can't write the model repository" in err


def test_a_repository_that_is_a_file(own: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("mine")
    with pytest.raises(ExportError, match=r"can't write the model repository .*; name a folder that can be written"):
        write_repository(own, tmp_path / "models")
    assert (tmp_path / "models").read_text() == "mine"
