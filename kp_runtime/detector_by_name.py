"""Face detectors by name, and which one is used where none is named.

The project's own network finds more faces than Haar in a fraction of the time (`docs/detectors.md`), so `auto` takes
it where its bundle and ONNX Runtime are there, and says so where it has to take Haar. The variable `KP_DETECTOR` says
what `auto` means instead.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

from kp_runtime.center_detector import CenterDetector
from kp_runtime.default_model import default_detector
from kp_runtime.detect import Detector, HaarDetector, YuNetDetector
from kp_runtime.errors import BundleError, InputError, KpWarning
from kp_runtime.signing import PublicKey, is_signed

__all__ = ["DETECTORS", "DETECTOR_VARIABLE", "DetectorWarning", "detector_name", "load_detector"]

DETECTOR_VARIABLE = "KP_DETECTOR"
DETECTORS = "auto, own, own=BUNDLE, haar, yunet=FILE"
"""What `load_detector` takes."""


class DetectorWarning(KpWarning):
    """`auto` took Haar; why, and what brings the better detector."""


def load_detector(
    name: str = "auto", *, smallest: float = 0.05, threads: int | None = None, public_key: PublicKey | None = None
) -> Detector:
    """Opens a face detector.

    Args:
        name: `own`, the project's network, or `own=BUNDLE`, a folder of `kp train-detector`; `haar`, OpenCV's cascade;
            `yunet=FILE`, YuNet with a model file of yours; `auto`, what `KP_DETECTOR` says, else the project's network
            where it can be used, else Haar.
        smallest: longer side of the smallest face, as a share of the image's shorter side; YuNet has its own.
        threads: of the network's engine; all cores when None.
        public_key: whose signature the network's bundle must have; see `load`. YuNet's file has none.

    Returns:
        One of the detectors of this page: `detector(image)` gives boxes.

    Raises:
        InputError: there is no such detector, `smallest` is out of range, `threads` are not there, or `public_key` is
            no key, or given with YuNet.
        BundleError: `own` was asked for and is nowhere, or its bundle is damaged.
        BackendError: the engine, OpenCV or the file can't be used.
        MissingExtraError: OpenCV or ONNX Runtime is not installed.
        SignatureError: the bundle is not signed by `public_key`.

    Warns:
        DetectorWarning: `auto` took Haar.
    """
    kind, _, path = detector_name(name, public_key=public_key).partition("=")
    if kind == "own":
        return CenterDetector(path, smallest=smallest, threads=threads, public_key=public_key)
    return YuNetDetector(path) if kind == "yunet" else HaarDetector(smallest=smallest)


def detector_name(name: str, *, checkout: Path | None = None, public_key: PublicKey | None = None) -> str:
    """The name with what it leaves open filled in: `haar`, `own=BUNDLE` or `yunet=FILE`.

    Args:
        name: as `load_detector` takes it.
        checkout: a detector's bundle beside the program's own source; taken last, where it is there.
        public_key: `auto` takes no bundle without a signature where there is one.

    Raises:
        InputError, BundleError: as `load_detector`.

    Warns:
        DetectorWarning: `auto` means Haar here.
    """
    said = os.environ.get(DETECTOR_VARIABLE) if name == "auto" else None
    given = str(said or name)  # a name of another type is none
    kind, _, path = given.partition("=")
    origin = f" ({DETECTOR_VARIABLE} names it)" if said else ""
    if kind == "yunet" and path and public_key is not None:
        raise InputError(f"no public key signs YuNet's file{origin}: leave the key out, or take another detector")
    if given == "haar" or (kind in ("own", "yunet") and path):
        return given
    if given not in ("auto", "own"):
        raise InputError(f"there is no detector {given!r}{origin}; choose from {DETECTORS}")
    bundle = default_detector(checkout)
    get = "name it (a checkout has it): own=engines/face-detector, or install the wheel kp-edge-model"
    if given == "own":
        if bundle is None:
            raise BundleError(f"the project's own face detector is not installed: {get}")
        return f"own={bundle}"
    if bundle is None:
        reason = f"the project's own detector is not installed; {get}"
    elif importlib.util.find_spec("onnxruntime") is None:
        reason = "the project's own detector needs ONNX Runtime; run pip install 'kp-edge[ort]'"
    elif public_key is not None and not is_signed(bundle):
        reason = f"the project's own in {bundle} is not signed, and a public key was given; sign a copy"
    else:
        return f"own={bundle}"
    warnings.warn(
        f"faces are found by OpenCV's Haar cascade, which misses more: {reason}", DetectorWarning, stacklevel=3
    )
    return "haar"
