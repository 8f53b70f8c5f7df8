"""What NVIDIA Triton's python backend runs: encoded images in, boxes and keypoints out.

`kp export --triton` writes a model whose `model.py` imports `TritonPythonModel` from here. Requests that the server
hands over together share one call of the network. `docs/triton.md` has the contract.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend_by_name import golden_error, open_backend
from kp_runtime.detect import box_advice
from kp_runtime.detector_by_name import load_detector
from kp_runtime.errors import BackendError, ImageError, InputError, KpError, reason_of
from kp_runtime.frame import as_frame, image_from_bytes
from kp_runtime.geometry import apply_matrix, invert_matrix, matrices_from_boxes
from kp_runtime.golden import GOLDEN_NAME, check_golden_crop, golden_from_bytes
from kp_runtime.manifest import Manifest
from kp_runtime.pipeline import checked_boxes
from kp_runtime.preprocess_cpu import CpuCropper

__all__ = ["DETECTOR_FOLDER", "PROBE", "ImagesModel", "TritonPythonModel", "check_numpy", "detector_of", "threads_of"]

PROBE = b"kp-health"
"""Sent in place of an image it runs the golden crop: the answer is no face, or the error of what is wrong."""

DETECTOR_FOLDER = "detector"
"""Beside `bundle` in the folder of a version: the face detector of `auto` and `own`."""

FACES = 8
"""Of a call, for which everything is made ready at the start."""

PIXELS = 40_000_000
"""Of an image at most, where the server's environment does not say otherwise: a small file can be a huge image."""

MOST_FACES = 256
"""Of an image: one of 135 KB can show 20,000, which keep the engine for very long."""

Faces = tuple[NDArray[np.float32], ...]
"""Boxes `(n, 4)` and keypoints `(n, points, 2)` of an image, float32, pixels of the image; behind them the lost scores
`(n, 1)` of a model that gives them."""

_Looked = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint8]]


def check_numpy(version: str = np.__version__) -> None:
    """Refuses numpy 2.

    Raises:
        BackendError: Triton's python backend reads the memory of numpy 2's arrays wrongly and says nothing.
    """
    if int(version.partition(".")[0]) >= 2:
        raise BackendError(
            f"numpy {version} is installed, with which Triton's python backend returns wrong numbers without an error; "
            "install an older one for the Python that it runs: pip install 'numpy<2'"
        )


def detector_of(version: Path, name: str) -> str:
    """The detector that a setting means in a version's folder, as `load_detector` takes it."""
    own = version / DETECTOR_FOLDER
    return f"own={own}" if name in ("auto", "own") and own.exists() else name


def threads_of(setting: str) -> int | None:
    """The setting `threads`; None, for all cores, where it is empty.

    Raises:
        InputError: it is no number.
    """
    try:
        return int(setting) if setting else None
    except ValueError:
        raise InputError(
            f"the parameter threads must be a whole number, or empty for all cores, got {setting!r:.40}"
        ) from None


class ImagesModel:
    """Encoded images to the boxes and keypoints of their faces, all crops in one call of the network.

    Args:
        bundle: the bundle's folder.
        backend: as `open_backend` takes it.
        detector: as `load_detector` takes it.
        threads: of the engine on the CPU; None takes all cores.

    Raises:
        KpError: the bundle, the engine or the detector can't be used.
    """

    def __init__(self, bundle: Path, backend: str = "auto", detector: str = "auto", threads: int | None = None) -> None:
        self._backend = open_backend(bundle, backend, threads=threads)
        self._backend.warmup(FACES)
        self._cropper = CpuCropper(self._backend.threads)
        self._detector = load_detector(detector, threads=threads)
        data = Manifest.read(bundle).read_file(bundle, GOLDEN_NAME)
        spec = self._backend.spec
        self._golden = golden_from_bytes(data, spec)
        check_golden_crop(self._golden, spec, self._cropper.crops_from_frame)
        self._no_crops = np.empty((0, 1, spec.size, spec.size), np.uint8)

    @property
    def report(self) -> str:
        """What runs, as a line, with what is to be known of its boxes."""
        from kp_runtime import __version__

        report, spec = self._backend.report, self._backend.spec
        runs = f"kp {__version__}: {report.backend} runs {report.file} of {spec.name}, sha256 {report.sha256}"
        faces = f"faces by {type(self._detector).__name__}, sha256 {getattr(self._detector, 'sha256', 'unknown')}"
        rejected = f"rejected: {' | '.join(report.rejected)}" * bool(report.rejected)
        return "; ".join(filter(None, [runs, faces, rejected, box_advice(spec)]))

    def __call__(self, calls: Sequence[Sequence[bytes]]) -> list[list[Faces] | KpError]:
        """Answers each of several calls with the faces of its images, or the error of the first bad one.

        An error of the network is everyone's.
        """
        looked: list[list[_Looked] | KpError] = []
        for images in calls:
            try:
                looked.append([self._crops(data, i) for i, data in enumerate(images)])
            except KpError as error:
                looked.append(error)
            except MemoryError as error:
                looked.append(BackendError(f"there is too little memory now: {reason_of(error)}; try again"))
        crops = [found for call in looked if not isinstance(call, KpError) for *_, found in call]
        try:
            given = self._backend.answer(np.concatenate([self._no_crops, *crops]))
            self._backend.check_finite(given)
        except KpError as error:
            return [call if isinstance(call, KpError) else error for call in looked]
        ends = np.cumsum([len(found) for found in crops], dtype=int)
        parts = zip(*(np.split(array, ends) for array in given.outputs()), strict=True)
        return [
            call
            if isinstance(call, KpError)
            else [
                (boxes.astype(np.float32), apply_matrix(invert_matrix(matrices), xy).astype(np.float32), *scores)
                for (boxes, matrices, _), (xy, *scores) in zip(call, parts, strict=False)  # the next calls' remain
            ]
            for call in looked
        ]

    def _crops(self, data: bytes, index: int) -> _Looked:
        """Boxes, matrices and crops of an image's faces."""
        spec = self._backend.spec
        if data == PROBE:
            golden_error(self._backend, self._golden, self._backend.report.precision)
            return np.empty((0, 4)), np.empty((0, 2, 3)), self._no_crops
        frame = as_frame(image_from_bytes(data, f"image {index}"))
        boxes = checked_boxes(self._detector(frame), frame.size_hw)
        if len(boxes) > MOST_FACES:
            raise ImageError(f"image {index} has {len(boxes)} faces, at most {MOST_FACES} are taken; send a part of it")
        matrices = matrices_from_boxes(boxes, spec.size, spec.margin)
        crops = self._cropper.crops_from_frame(frame, matrices, spec.size)
        return boxes, matrices, crops.copy()  # the next image uses the same memory

    def close(self) -> None:
        """Frees what was kept."""
        self._cropper.close()


class TritonPythonModel:
    """The class that Triton's python backend looks for; one object an instance, each in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the bundle that lies beside `model.py`.

        Raises:
            TritonModelException: with the one line that the server logs and answers.
        """
        import triton_python_backend_utils as triton

        self._triton = triton
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(PIXELS))  # OpenCV reads it once, when it is imported
        given = json.loads(args["model_config"])["parameters"]
        settings = {name: value["string_value"] for name, value in given.items()}
        version = Path(args["model_repository"]) / args["model_version"]
        try:
            check_numpy()
            self._images = ImagesModel(
                version / "bundle",
                settings.get("backend", "auto"),
                detector_of(version, settings.get("detector", "auto")),
                threads_of(settings.get("threads", "")),
            )
        except (KpError, ValueError, OSError) as error:
            raise triton.TritonModelException(" ".join(str(error).split())) from None
        triton.Logger.log_info(self._images.report)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers requests that came together: each its own result or its own error."""
        triton = self._triton
        calls = []
        for request in requests:
            given = triton.get_input_tensor_by_name(request, "image").as_numpy()
            calls.append([bytes(data) for data in given.reshape(-1)])
        return [
            triton.InferenceResponse(error=triton.TritonError(" ".join(str(answer).split())))
            if isinstance(answer, KpError)
            else triton.InferenceResponse([triton.Tensor(name, array) for name, array in _arrays(answer).items()])
            for answer in self._images(calls)
        ]

    def finalize(self) -> None:
        """Frees the engine."""
        self._images.close()


def _arrays(faces: Sequence[Faces]) -> dict[str, NDArray[Any]]:
    """The output tensors of a call: images with fewer faces than another end in rows of NaN."""
    counts = np.array([[len(boxes)] for boxes, *_ in faces], np.int32)
    most = int(counts.max(initial=0))
    arrays = {"faces": counts}
    for name, each in zip(("boxes", "keypoints", "lost_score"), zip(*faces, strict=True), strict=False):
        arrays[name] = np.full((len(faces), most, *each[0].shape[1:]), np.nan, np.float32)
        for row, own in zip(arrays[name], each, strict=True):
            row[: len(own)] = own
    return arrays
