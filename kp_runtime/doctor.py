"""`kp doctor`: what of this machine works, what does not, and what to do about it.

Files and package records are read in this process; whatever loads a library is asked in one of its own
(`probes`), so that a crash is a line of the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kp_runtime import doctor_checks as checks
from kp_runtime.backend_by_name import BACKENDS, ORDER
from kp_runtime.backend_trt import MODULES as TENSORRT_MODULES
from kp_runtime.doctor_checks import ABSENT, OK, PROBLEM, WARNING, Finding, Gpu, Surroundings
from kp_runtime.errors import KpError
from kp_runtime.machine import Machine, machine_from_system
from kp_runtime.manifest import Manifest, folder_of
from kp_runtime.probes import Outcome

__all__ = ["Diagnosis", "diagnose"]

_HEEDED = ("KP_", "ORT_", "OMP_", "OPENBLAS_", "OPENCV_", "CUDA_", "NVIDIA_VISIBLE", "LD_", "PYTHONPATH")
"""How the names of variables begin that kp and the libraries below it heed; of others, some may be secret."""

_PACKAGES = ("kp-edge", "numpy", "onnxruntime", "opencv", "tensorrt", "cuda-", "nvidia-")
"""How the names of packages begin that decide what runs."""


@dataclass(frozen=True)
class Diagnosis:
    """The whole report.

    Attributes:
        findings: a line each, in reading order.
        working: the backends that put the golden crop's keypoints where PyTorch does.
        engines: of each backend that answered, what runs on it: the `BackendReport`'s fields.
        machine: as `kp bench` records it, but that `versions` are those of the packages as they were installed.
        environment: the variables that kp and the libraries below it heed.
    """

    findings: tuple[Finding, ...]
    working: tuple[str, ...]
    engines: tuple[Mapping[str, Any], ...] = ()
    machine: Machine | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """At least one backend works, and there is no problem."""
        return bool(self.working) and all(finding.status != PROBLEM for finding in self.findings)


def diagnose(
    bundle: Path | None,
    no_bundle: str = "none was named",
    *,
    detector: Path | None = None,
    here: Surroundings | None = None,
    seconds: float = 60.0,
    backend_seconds: float = 300.0,
    step: Callable[[str], None] = lambda subject: None,
) -> Diagnosis:
    """Looks at everything; nothing that is wrong with the machine raises.

    Args:
        bundle: whose golden crop proves the backends; None where there is none, which is a problem.
        no_bundle: why there is none.
        detector: a face detector's bundle beside the program's own source; see `detector_name`.
        here: what is looked at.
        seconds: time that each probe has.
        backend_seconds: time that each backend's inference has; a first start of TensorRT can take minutes.
        step: told what is looked at next; in the end nothing, `""`.
    """
    here = here or Surroundings.here()
    findings = [checks.computer(here), *checks.jetson(here)]
    step("GPU")
    gpus, gpu = checks.gpus_found(here, here.ask("driver", seconds=seconds))
    findings += [*gpus, checks.cuda_python(here, gpu)]
    step("crops on the GPU")
    findings += [checks.nvrtc(gpu, here.ask("nvrtc", gpu.arch if gpu else "", seconds=seconds))]
    findings += [checks.gpu_crops(here.ask("crops", seconds=seconds))] if gpu else []
    step("ONNX Runtime")
    onnxruntime = here.ask("onnxruntime", seconds=seconds)
    findings += [checks.onnxruntime(here, onnxruntime), *checks.provider(here, gpu, onnxruntime)]
    step("TensorRT")
    tensorrt = {name: here.ask("module", name, seconds=seconds) for name in TENSORRT_MODULES}
    findings += [checks.tensorrt(here, gpu, tensorrt)]
    step("OpenCV")
    findings += [checks.opencv(here, here.ask("cv2", seconds=seconds))]
    step("face detector")
    findings += [checks.detector(here.ask("detector", str(detector or ""), seconds=seconds))]
    manifest, found = _bundle(bundle, no_bundle)
    findings += [found]
    working, engines = [], []
    for name in BACKENDS:
        if reason := _not_claimed(here, name, gpu, onnxruntime, tensorrt, manifest):
            findings += [Finding(name, ABSENT, reason)]
            continue
        step(name)
        answer = here.ask("backend", name, str(bundle), seconds=backend_seconds)
        findings += [_backend(name, answer)]
        if answer.state == "answered":
            working += [name]
            engines += [answer.facts]
    step("")
    if not working and all(finding.status != PROBLEM for finding in findings):
        findings += [Finding("backends", PROBLEM, "none works here", "start with: pip install 'kp-edge[ort]'")]
    heeded = {name: here.environment[name] for name in sorted(here.environment) if name.startswith(_HEEDED)}
    packages: dict[str, str | None] = {
        name: here.packages[name] for name in sorted(here.packages) if name.startswith(_PACKAGES)
    }
    machine = dataclasses.replace(machine_from_system(here.root, versions=False), versions=packages)
    return Diagnosis(tuple(findings), tuple(working), tuple(engines), machine, heeded)


def _bundle(bundle: Path | None, reason: str) -> tuple[Manifest | None, Finding]:
    if bundle is None:
        return None, Finding("bundle", PROBLEM, reason, "name one: kp doctor BUNDLE")
    try:
        folder = folder_of(bundle)
        manifest = Manifest.read(folder)
        for name in manifest.files:
            manifest.check_file(folder, name)
    except KpError as error:
        return None, Finding("bundle", PROBLEM, str(error), "name another one: kp doctor BUNDLE")
    kinds = sorted({str(entry.precision) for entry in manifest.files.values() if entry.kind in ("onnx", "plan")})
    return manifest, Finding("bundle", OK, f"{bundle}: {', '.join(kinds) or 'no model file'}; all hashes hold")


def _not_claimed(
    here: Surroundings,
    name: str,
    gpu: Gpu | None,
    onnxruntime: Outcome,
    runtimes: Mapping[str, Outcome],
    manifest: Manifest | None,
) -> str | None:
    """Why a backend does not even claim to work here: GPU, provider, library or file is not there.

    The names of ONNX Runtime's backends say which of its providers they are.
    """
    engine, _, provider = name.partition("-")
    if provider != "cpu" and gpu is None:
        return "no GPU that works"
    if engine == "ort":
        providers: list[Any] = onnxruntime.facts.get("providers", [])
        if not any(known.lower().startswith(provider) for known in providers):
            return "ONNX Runtime has no such provider here"
    if "tensorrt" in name and not here.has_nvinfer() and all(answer.state == "absent" for answer in runtimes.values()):
        return "TensorRT is not installed"
    if manifest is None:
        return "no bundle to run"
    if engine == "tensorrt" and all(entry.kind != "plan" for entry in manifest.files.values()):
        return "the bundle has no plan; kp plan builds one"
    has = {entry.precision for entry in manifest.files.values() if entry.kind == "onnx"}
    if engine == "ort" and provider != "cpu" and not has & set(ORDER[name]):
        return f"the bundle has no {' or '.join(ORDER[name])} file; kp export BUNDLE --fp16 --out FOLDER makes one"
    return None


def _backend(name: str, answer: Outcome) -> Finding:
    if answer.state == "answered":
        facts = answer.facts
        crop = "" if facts.get("crop_grey") is None else f", golden crop {facts['crop_grey']} grey levels off"
        told = f"{facts['file']}: golden keypoints {facts['golden_error_px']:.3f} px from PyTorch's{crop}"
        if warnings := facts.get("warnings"):
            return Finding(name, WARNING, "; ".join([told, *warnings]), "where it is slow or wrong, build a plan here")
        return Finding(name, OK, told)
    if answer.state == "hung":
        return Finding(name, PROBLEM, answer.text, "where a first start only takes longer, raise --timeout")
    if answer.state == "crashed":
        return Finding(name, PROBLEM, answer.text, _advice_on_crash(name, answer))
    # a plan fits one GPU and one TensorRT: that none of a bundle's does is no fault of the machine
    wrong = name != "tensorrt" or "golden keypoint" in answer.text
    return Finding(name, PROBLEM if wrong else WARNING, answer.text, "see the lines above, or use another backend")


def _advice_on_crash(name: str, answer: Outcome) -> str:
    """What to do where an engine ended its process."""
    if "SIGKILL" in answer.text:
        return "end other programs, or let its container, unit or user have more memory"
    if name == "ort-cpu":
        return "see whether memory is short (free -m, ulimit -v); else install another release of onnxruntime"
    return "its libraries do not fit this driver or GPU; see the lines above"
