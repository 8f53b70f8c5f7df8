"""`kp verify`: each file of a bundle against the bundle's checkpoint in PyTorch, on the user's faces.

Keypoints are `(n, 68, 2)`, pixels of the crop, x then y. A file that this machine can't run is
listed with the reason and is never counted as one that passed.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kp_export.bundle import answer_from_net
from kp_export.half_on_cpu import half_on_cpu
from kp_export.parity import LIMITS, FaceSet, Parity, answers_to, check_parity, parity
from kp_runtime.backend import Answer
from kp_runtime.backend_by_name import open_backend
from kp_runtime.backend_ort import OrtCpuBackend
from kp_runtime.errors import BackendError, BundleError, DataError, MissingExtraError, ParityError
from kp_runtime.manifest import FileEntry, Manifest
from kp_runtime.spec import ModelSpec
from kp_train.bar import Bar, no_bar
from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint

__all__ = ["FileVerdict", "Verification", "check_verification", "verification_json", "verify_bundle"]

MODEL_KINDS = ("onnx", "plan")


@dataclass(frozen=True)
class FileVerdict:
    """What was found about one file.

    Attributes:
        file: the file's name in the bundle.
        entry: its entry in the manifest; the sha256 was compared.
        verdict: `passed`, `failed` or `not run`.
        reason: why it failed or was not run; empty for a file that passed.
        required: an ONNX file, or one that was asked for by name: what is not run counts against it.
        parity: the distances to PyTorch; None for a file that was not run.
        keypoints: `(n, 68, 2)` float32, the file's own answer; None for a file that was not run.
    """

    file: str
    entry: FileEntry
    verdict: Literal["passed", "failed", "not run"]
    reason: str
    required: bool
    parity: Parity | None = None
    keypoints: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Verification:
    """A bundle's files beside PyTorch on the same crops.

    Attributes:
        bundle: the bundle's folder.
        spec: the model's contract.
        checkpoint_sha256: of the weights that PyTorch ran.
        faces: what was compared on.
        reference: `(n, 68, 2)` float32, PyTorch's answer.
        files: a verdict for each file.
    """

    bundle: Path
    spec: ModelSpec
    checkpoint_sha256: str
    faces: FaceSet
    reference: NDArray[np.float32]
    files: tuple[FileVerdict, ...]

    @property
    def passed(self) -> bool:
        """Whether at least one file passed, every required one did, and none failed."""
        verdicts = {file.verdict for file in self.files}
        required = all(file.verdict == "passed" for file in self.files if file.required)
        return "passed" in verdicts and required and "failed" not in verdicts


def verify_bundle(bundle: Path, faces: FaceSet, *, files: Sequence[str] = (), bar: Bar = no_bar) -> Verification:
    """Compares files of a bundle with its checkpoint in PyTorch.

    Args:
        bundle: the bundle's folder.
        faces: crops of the bundle's own size, from `bundled_faces` or `faces_from_sources`.
        files: names of model files; all of the bundle when empty.
        bar: wraps each list of batches, to show progress.

    Raises:
        BundleError: no bundle or checkpoint there, or no model file of that name in it.
        IntegrityError: a file is not the one in the manifest.
        DataError: no faces, or crops of another size.
        MissingExtraError: onnxruntime is not installed.
    """
    manifest = Manifest.read(bundle)
    chosen = _chosen_files(bundle, manifest, files)
    size = manifest.spec.size
    if not len(faces.crops) or faces.crops.shape[1:] != (1, size, size):
        raise DataError(
            f"the comparison needs at least one crop of 1x{size}x{size}, got {faces.crops.shape}; "
            "make the faces with the bundle's own spec"
        )
    for name in chosen:
        manifest.check_file(bundle, name)
    net, _ = load_checkpoint(bundle)
    reference = answers_to(answer_from_net(net), faces.shown, bar)

    def verdict(name: str) -> FileVerdict:
        return _verdict(bundle, manifest, name, name in files, faces, reference, bar)

    checkpoint = manifest.files[CHECKPOINT_NAME].sha256
    wanted = reference.keypoints[: len(faces.crops)]
    return Verification(bundle, manifest.spec, checkpoint, faces, wanted, tuple(map(verdict, chosen)))


def check_verification(verification: Verification) -> None:
    """Holds a verification to its promise: what was asked for was compared, and is near enough.

    Raises:
        ParityError: a file is over a limit, or a required one was not run; one line for all.
    """
    if verification.passed:
        return
    bad = [file for file in verification.files if file.verdict == "failed" or file.required]
    reasons = [_reason(file) for file in bad if file.verdict != "passed"]
    if not reasons:
        raise ParityError(f"no file of {verification.bundle} could be compared on this machine")
    strays = any(file.verdict == "failed" for file in bad)
    raise ParityError("; ".join(reasons) + "; what to do: docs/parity.md" * strays)


def verification_json(verification: Verification) -> dict[str, Any]:
    """The verification without its pixels and points, as plain JSON; a distance that is not finite is null."""
    return {
        "bundle": str(verification.bundle),
        "spec": dataclasses.asdict(verification.spec),
        "checkpoint_sha256": verification.checkpoint_sha256,
        "faces": len(verification.faces.names),
        "origin": verification.faces.origin,
        "passed": verification.passed,
        "files": [
            {
                "file": file.file,
                "kind": file.entry.kind,
                "precision": file.entry.precision,
                "sha256": file.entry.sha256,
                "verdict": file.verdict,
                "reason": file.reason,
                "required": file.required,
                "parity": _finite(dataclasses.asdict(file.parity)) if file.parity else None,
            }
            for file in verification.files
        ],
    }


def _chosen_files(bundle: Path, manifest: Manifest, files: Sequence[str]) -> list[str]:
    """The model files to compare, in the manifest's order or as they were asked for."""
    models = [name for name, entry in manifest.files.items() if entry.kind in MODEL_KINDS]
    if not models:
        make = f"kp export {shlex.quote(str(bundle))}"
        raise BundleError(f"the bundle {bundle} holds no model file; make them with: {make}")
    if unknown := [name for name in files if name not in models]:
        raise BundleError(f"the bundle {bundle} has no model file {', '.join(unknown)}; it has: {', '.join(models)}")
    return list(dict.fromkeys(files)) or models


def _verdict(
    bundle: Path,
    manifest: Manifest,
    name: str,
    named: bool,
    faces: FaceSet,
    reference: Answer,
    bar: Bar,
) -> FileVerdict:
    entry = manifest.files[name]
    required = named or entry.kind == "onnx"
    plan = entry.kind == "plan"
    limits = "int8-trt" if plan and entry.precision == "int8" else str(entry.precision)
    if limits not in LIMITS:
        reason = f"not run: no limit is known for precision {entry.precision}; export the bundle again"
        return FileVerdict(name, entry, "not run", reason, required)
    try:
        # without the golden crop: a file that strays is measured here, not refused
        backend = open_backend(bundle / name, "tensorrt" if plan else "ort-cpu", golden=False)
        if entry.precision == "fp16" and not plan:
            backend = OrtCpuBackend(bundle / name, manifest.spec, read=lambda: half_on_cpu(bundle / name))
        found = answers_to(backend.answer, faces.shown, bar)
    except BackendError as error:
        if isinstance(error, MissingExtraError) and not plan:
            raise
        return FileVerdict(name, entry, "not run", f"not run: {error}", required)
    report, own = parity(reference, found, faces, file=name, precision=limits), found.keypoints[: len(faces.crops)]
    try:
        check_parity(report, manifest.spec.size)
    except ParityError as error:
        return FileVerdict(name, entry, "failed", str(error), required, report, own)
    return FileVerdict(name, entry, "passed", "", required, report, own)


def _reason(file: FileVerdict) -> str:
    return file.reason if file.verdict == "failed" else f"{file.file} was {file.reason}"


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN; they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
