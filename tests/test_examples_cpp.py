"""The C++ host: its preflight as it is, and the whole program on a stub of TensorRT and CUDA."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kp_export.sign import new_key, sign_bundle
from kp_runtime.manifest import FileEntry, Manifest, file_entry
from kp_runtime.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
HOST, STUB = ROOT / "examples" / "cpp_host", ROOT / "tests" / "tensorrt_stub"
COMPILE = ("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{STUB}")
SIZE = 32

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host, built on the stubs."""
    for header, package in (("nlohmann/json.hpp", "nlohmann-json3-dev"), ("openssl/evp.h", "libssl-dev")):
        found = subprocess.run(
            ["g++", "-E", "-x", "c++", "-"], input=f"#include <{header}>", text=True, capture_output=True
        )
        if found.returncode:
            pytest.skip(f"{package} is not installed")
    built = tmp_path_factory.mktemp("cpp") / "kp_host"
    sources = (HOST / "main.cpp", HOST / "preflight.cpp", STUB / "stub.cpp")
    subprocess.run([*COMPILE, f"-I{STUB}/cuda", *sources, "-lcrypto", "-o", built], check=True)
    return built


def entry_of(path: Path, **changed: Any) -> FileEntry:
    """A plan's entry as `kp plan` writes it, for an Orin with JetPack 6."""
    made: dict[str, Any] = {
        "gpu": "Orin", "compute_capability": "8.7", "cuda": "12.6", "tensorrt": "10.3.0",
        "options": {"version_compatible": False, "hardware_compatible": False, "dla_core": None},
        "rebuild": "kp plan BUNDLE --precision fp16 --max-batch 4",
    }  # fmt: skip
    options = {name: value for name, value in changed.items() if name in made["options"]}
    made |= {name: value for name, value in changed.items() if name not in options}
    made["options"] |= options
    return file_entry(path, "plan", precision="fp16", made=made)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with golden crops, and what the line of the program's head makes of them."""
    folder = tmp_path_factory.mktemp("golden")
    crops = np.random.default_rng(3).integers(0, 256, (5, 1, SIZE, SIZE), dtype=np.uint8)
    first_two = crops[:, 0, :1, :2].astype("<f4")  # what the stub's network answers 68 times
    keypoints, scores = np.broadcast_to(first_two, (5, 68, 2)), crops[:, 0, 0, 2:3] / 256
    np.savez_compressed(folder / "golden.npz", crops=crops, keypoints=keypoints, lost_score=scores)
    head = (HOST / "main.cpp").read_text().replace("\n//", "\n").replace("BUNDLE/", "")
    subprocess.run([sys.executable, "-c", head.split('python3 -c "')[1].split('"')[0]], cwd=folder, check=True)
    return folder


@pytest.fixture
def plan_bundle(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a bundle with one plan that the stub takes, and the golden crops beside it."""

    def write(text: str = f"STUB 1 2 {SIZE}", lost_limit: float | None = None, **changed: Any) -> Path:
        plan = tmp_path / "model.fp16.sm87.trt10.3.0.plan"
        plan.write_text(text)
        spec = ModelSpec("stub", size=SIZE, lost_limit=lost_limit)
        Manifest(spec, {plan.name: entry_of(plan, **changed)}).write(tmp_path)
        return Path(shutil.copytree(golden, tmp_path, dirs_exist_ok=True))

    return write


def run(program: Path, bundle: Path, *key: object, **machine: object) -> tuple[int, str, str]:
    """Status, output and error of the program on a machine; an Orin with JetPack 6 unless told otherwise."""
    words = [program, bundle, bundle / "golden.crops", bundle / "golden.keypoints", *key]
    settings = {f"STUB_{name}": str(value) for name, value in machine.items()}
    ended = subprocess.run([str(w) for w in words], env=os.environ | settings, capture_output=True, text=True)
    return ended.returncode, ended.stdout, ended.stderr


def refusal(program: Path, bundle: Path, *key: object, **machine: object) -> str:
    """The one line of a program that refuses; what TensorRT itself says stands above."""
    status, _, err = run(program, bundle, *key, **machine)
    *above, line = err.splitlines()
    assert status == 1
    assert all(text.startswith("TensorRT: ") for text in above)
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("text", [f"STUB 1 2 {SIZE}", f"STUB 2 4 {SIZE}", f"STUB 8 8 {SIZE}", f"STUB 1 5 {SIZE}"])
def test_golden_crops_in_batches_of_the_profile(program: Path, plan_bundle: Callable[..., Path], text: str) -> None:
    status, out, err = run(program, plan_bundle(text))
    assert (status, err) == (0, "")
    assert json.loads(out) == {"plan": "model.fp16.sm87.trt10.3.0.plan", "crops": 5, "worst_px": 0}


def test_a_plan_with_a_lost_score(program: Path, plan_bundle: Callable[..., Path]) -> None:
    """Each output needs a place on the device: the stub, as TensorRT, fails without one."""
    status, out, err = run(program, plan_bundle(f"STUB 1 2 {SIZE} 1", lost_limit=0.5))
    assert (status, err) == (0, "")
    assert json.loads(out)["worst_score"] == 0
    assert "the plan's tensor lost_score is not the contract's" in refusal(program, plan_bundle(lost_limit=0.5))
    assert "TensorRT failed on 2 crops" in refusal(program, plan_bundle(f"STUB 1 2 {SIZE} 1"))


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_wrong_keypoints_are_an_error(program: Path, plan_bundle: Callable[..., Path], wrong: float) -> None:
    bundle = plan_bundle()
    keypoints = np.fromfile(bundle / "golden.keypoints", "<f4")
    keypoints[-1] += wrong
    keypoints.tofile(bundle / "golden.keypoints")
    assert "a golden keypoint is further than 0.0714" in refusal(program, bundle)
    (bundle / "golden.keypoints").write_bytes(b"")
    assert "are not n crops of 32 px and their keypoints" in refusal(program, bundle)


@pytest.mark.parametrize("wrong", [0.021, float("nan")])
def test_a_wrong_lost_score_is_an_error(program: Path, plan_bundle: Callable[..., Path], wrong: float) -> None:
    bundle = plan_bundle(f"STUB 1 2 {SIZE} 1", lost_limit=0.5)
    known = bundle / "golden.lost_score"
    scores = np.fromfile(known, "<f4")
    (scores + np.float32(0.019)).tofile(known)
    assert run(program, bundle)[0] == 0
    scores[-1] += wrong
    scores.tofile(known)
    assert "a golden lost score is further than 0.0200" in refusal(program, bundle)
    known.write_bytes(known.read_bytes()[:-1])
    missing = f"{known} is missing, or has not the lost score of each crop, which this model gives; main.cpp's head has"
    assert missing in refusal(program, bundle)
    known.unlink()
    assert missing in refusal(program, bundle)
    bundle = plan_bundle()  # of a model that gives none
    known.unlink()
    assert run(program, bundle)[0] == 0


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"CAPABILITY": 90}, "is for Orin (sm_87), this GPU is sm_90"),
        ({"TENSORRT": 101600}, "is for TensorRT 10.3.0, here is 10.16.0"),
        ({"TENSORRT": 100301}, "is for TensorRT 10.3.0, here is 10.3.1"),
    ],
)
def test_another_machine_is_refused(
    program: Path, plan_bundle: Callable[..., Path], machine: dict[str, int], reason: str
) -> None:
    wanted = f"model.fp16.sm87.trt10.3.0.plan {reason}; build one here: kp plan BUNDLE --precision fp16 --max-batch 4"
    # a plan that would be refused when it is loaded: the machine is looked at first
    bundle = plan_bundle("changed")
    assert refusal(program, bundle, **machine) == f"{bundle}: {wanted}"


@pytest.mark.parametrize(
    ("options", "machine", "loads"),
    [
        ({"version_compatible": True}, {"TENSORRT": 110400}, True),
        ({"version_compatible": True}, {"TENSORRT": 100200}, False),
        ({"hardware_compatible": True}, {"CAPABILITY": 90}, True),
        ({"hardware_compatible": True}, {"CAPABILITY": 75}, False),
        ({"tensorrt": "10.3.0.26"}, {}, True),
        ({"tensorrt": "10.3.0.26.post1"}, {}, True),
    ],
)
def test_compatible_plans(
    program: Path, plan_bundle: Callable[..., Path], options: dict[str, Any], machine: dict[str, int], loads: bool
) -> None:
    status, _, err = run(program, plan_bundle(**options), **machine)
    assert status == (0 if loads else 1), err
    assert ("host code is allowed" in err) == (loads and "version_compatible" in options)


def test_there_is_no_gpu(program: Path, plan_bundle: Callable[..., Path]) -> None:
    bundle = plan_bundle()
    assert refusal(program, bundle, DEVICES=0) == "there is no CUDA GPU here"
    assert "CUDA failed to find a GPU" in refusal(program, bundle, DEVICES=-1)


def test_files_that_are_not_the_manifests(program: Path, plan_bundle: Callable[..., Path]) -> None:
    bundle = plan_bundle()
    (plan,) = bundle.glob("*.plan")
    plan.write_text(f"STUB 1 3 {SIZE}")
    assert "the file was changed; copy the bundle again" in refusal(program, bundle)
    plan.write_text("STUB")
    assert "has 4 bytes, the manifest says 11: it is cut off or was replaced" in refusal(program, bundle)
    plan.unlink()
    assert "can't be read: it is missing or no plain file" in refusal(program, bundle)


def test_an_unclear_plan_does_not_stand_before_a_good_one(program: Path, plan_bundle: Callable[..., Path]) -> None:
    bundle = plan_bundle()
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    ((name, entry),) = raw["files"].items()
    path.write_text(json.dumps(raw | {"files": {"a.plan": entry | {"made": {"options": {}}}, name: entry}}))
    assert run(program, bundle)[0] == 0


def test_manifests_that_are_not_taken(program: Path, plan_bundle: Callable[..., Path]) -> None:
    bundle = plan_bundle()
    path = bundle / "manifest.json"
    raw = json.loads(path.read_text())
    (name,) = raw["files"]

    def with_(text: str) -> str:
        path.write_text(text)
        return refusal(program, bundle)

    assert with_("{").endswith("make the bundle again")
    assert with_("[]").endswith("make the bundle again")
    assert with_(json.dumps(raw | {"schema": 2})) == f"{bundle}: its schema is 2, this program reads 1"
    assert f"{bundle}: it has no plan; build one here: kp plan" in with_(json.dumps(raw | {"files": {}}))
    assert "it names the file ../a.plan" in with_(json.dumps(raw | {"files": {"../a.plan": raw["files"][name]}}))
    unclear = f"{name} has an entry that does not say for which GPU and TensorRT it is ("
    for version in ("", "10.x", "9999999.1", "-1", "post1", None):
        raw["files"][name]["made"]["tensorrt"] = version
        assert unclear in with_(json.dumps(raw))
    raw["files"][name]["made"].pop("tensorrt")
    assert unclear in with_(json.dumps(raw))
    path.unlink()
    assert "manifest.json can't be read" in refusal(program, bundle)


def test_what_tensorrt_refuses(program: Path, plan_bundle: Callable[..., Path]) -> None:
    assert "TensorRT can't load model.fp16" in refusal(program, plan_bundle("nonsense"))
    assert "the plan's tensor crops is not the contract's" in refusal(program, plan_bundle("STUB 1 2 64"))


def test_a_plan_of_another_kind_of_machine(program: Path, plan_bundle: Callable[..., Path]) -> None:
    told = refusal(program, plan_bundle(processor="riscv64"))
    assert f"is for a riscv64 machine, this one is {platform.machine()}" in told
    assert run(program, plan_bundle(processor=platform.machine()))[0] == 0


def test_the_first_plan_that_fits_is_taken(program: Path, plan_bundle: Callable[..., Path]) -> None:
    bundle = plan_bundle()
    (plan,) = bundle.glob("*.plan")
    other = plan.with_name("model.fp16.sm90.trt10.3.0.plan")
    other.write_text(plan.read_text())
    manifest = Manifest.read(bundle)
    files = {other.name: entry_of(other, compute_capability="9.0")} | manifest.files
    replace(manifest, files=files).write(bundle)
    assert json.loads(run(program, bundle)[1])["plan"] == plan.name
    assert json.loads(run(program, bundle, CAPABILITY=90)[1])["plan"] == other.name
    assert refusal(program, bundle, CAPABILITY=75).count("this GPU is sm_75") == 2


def test_of_plans_that_fit_the_one_that_python_prefers_is_taken(
    program: Path, plan_bundle: Callable[..., Path]
) -> None:
    bundle = plan_bundle()
    (plan,) = bundle.glob("*.plan")
    manifest = Manifest.read(bundle)
    files = {}
    for name in ("fp32", "fp16.newer", "fp16", "int8.ampere", "int8"):  # the worst first
        precision = name.partition(".")[0]
        other = plan.with_name(f"model.{name}.plan")
        other.write_text(plan.read_text())
        files = files | {other.name: replace(entry_of(other), precision=precision)}
        replace(manifest, files=files).write(bundle)
        assert json.loads(run(program, bundle)[1])["plan"] == other.name


def test_a_key_asks_for_a_signature(program: Path, plan_bundle: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography, which signs bundles, is not installed")
    key, other = (new_key(tmp_path / f"{name}.pem") for name in ("release", "other"))
    bundle = plan_bundle()
    assert refusal(program, bundle, key) == (
        f"{bundle} is not signed, and a public key was given; get the signed bundle"
    )
    signature = sign_bundle(bundle, tmp_path / "release.pem")
    assert run(program, bundle, key)[0] == 0
    wrong = f"{signature} is no signature of this manifest by the public key that was given: the manifest was changed"
    assert wrong in refusal(program, bundle, other)
    for no_key in ("", tmp_path / "nowhere.pem", tmp_path / "release.pem", bundle / "manifest.json"):
        no_key_in_pem = f"the key '{no_key}' is no Ed25519 public key in PEM: give the .pub.pem that kp sign --new-key"
        assert no_key_in_pem in refusal(program, bundle, no_key)
    signed = signature.read_bytes()
    for changed in (b"", signed[:-1], signed + b"\n", bytes(64)):
        signature.write_bytes(changed)
        assert wrong in refusal(program, bundle, key)
    # another plan, with its own sha256, under the signature that was there
    plan_bundle(f"STUB 1 3 {SIZE}")
    signature.write_bytes(signed)
    assert run(program, bundle)[0] == 0
    assert wrong in refusal(program, bundle, key)


def test_usage(program: Path) -> None:
    ended = subprocess.run([program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "usage: kp_host BUNDLE CROPS KEYPOINTS [PUBLIC_KEY]\n")


def test_the_host_compiles_with_cudas_own_headers() -> None:
    nvidia = pytest.importorskip("nvidia", reason="the wheels that bring CUDA's headers are not here")
    places = [*(Path(p) / "cu13" / "include" for p in nvidia.__path__), Path("/usr/local/cuda/include")]
    real = next((place for place in places if (place / "crt" / "host_defines.h").exists()), None)
    if real is None:
        pytest.skip("CUDA's headers are not here")
    subprocess.run([*COMPILE, "-fsyntax-only", "-isystem", str(real), HOST / "main.cpp"], check=True)
