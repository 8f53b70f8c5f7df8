"""The data set that training draws from, and what its loaders' processes ask of the machine."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchvision import tv_tensors

from kp_runtime.errors import KpError
from kp_runtime.geometry import apply_matrix, boxes_from_points, crop_from_luma, frame_box, matrices_from_boxes
from kp_runtime.spec import ModelSpec
from kp_train.augment import Augment, scale_of
from kp_train.data import Face, lumas_of_faces

__all__ = ["FaceDataset", "check_memory", "is_stop", "same_photos", "start_of_workers"]


def start_of_workers(workers: int) -> str | None:
    """How a loader's processes begin: on Linux by fork, so that they share the images in memory; None leaves it open.

    From Python 3.14 on each would otherwise be sent a copy.
    """
    return "fork" if workers and sys.platform == "linux" else None


def is_stop(error: BaseException) -> bool:
    """Whether a run was told to stop: by Ctrl-C, or a SIGTERM, which may reach a loader's process first.

    Lightning makes a `SystemExit` of either; PyTorch's own error may stand behind one of a lost process.
    """
    told = f"{error} {error.__cause__}"
    return isinstance(error, (SystemExit, KeyboardInterrupt)) or "is killed by signal: Terminated" in told


def check_memory(error: BaseException, batch_size: int) -> None:
    """Tells PyTorch's errors of too little memory in a line: a GPU's, the processor's, or of a process that was killed.

    Raises:
        KpError: it is one of these.
    """
    if "DataLoader worker (pid" in str(error):
        raise KpError(
            "a process that makes crops was killed, as the system does where memory is short, or in a container shared "
            "memory (docker run --shm-size); go on with fewer --workers"
        ) from error
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        raise KpError(f"the device has too little memory for {batch_size} crops; lower --batch-size") from error


class FaceDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Crops and their points, ready for the network.

    An item is `(crop, xy_crop)`: uint8 `(1, size, size)` and float32 `(points, 2)`, pixels of the crop (see `detail`).
    All images are decoded to grey once and kept in memory (about 50 KB a face of the public
    data sets), so that worker processes share them and an epoch reads no files.

    Args:
        faces: the labelled faces.
        spec: the contract: size, margin and what a box is.
        augment: how crops are varied; `None` gives the plain crop of the run-time.
        boxes_xyxy: `(n, 4)` boxes of the faces, pixels of the images; those of their points when None.
        detail: crops are that many times larger, as a network of that size sees them; points stay in pixels of the
            plain crop.

    Raises:
        DataError: an image can't be read, or no point of a face lies in its own.
    """

    def __init__(
        self,
        faces: Sequence[Face],
        spec: ModelSpec,
        augment: Augment | None = None,
        boxes_xyxy: NDArray[np.float64] | None = None,
        detail: int = 1,
    ) -> None:
        self.faces = faces
        self.detail = detail
        self.spec = spec
        self.augment = augment
        self._boxes = boxes_xyxy
        self._lumas = lumas_of_faces(faces)

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One face: an index, or `(index, seed)` for an augmentation that the seed alone decides."""
        if isinstance(key, int):
            return self._item(key)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(key[1])  # torch.manual_seed seeds GPUs too, and takes long
            return self._item(key[0])

    def _item(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        luma, xy, spec = self._lumas[index], self.faces[index].xy, self.spec
        size = spec.size * self.detail
        if self._boxes is not None:
            box = self._boxes[index]
        else:
            box = frame_box((luma.shape[0], luma.shape[1])) if spec.box == "frame" else boxes_from_points(xy)
        mirrored = self.augment.draw_tight() if self.augment else None
        jitter = self.augment.draw_jitter((luma.shape[0], luma.shape[1])) if self.augment else {}
        matrix = matrices_from_boxes(box[None], size, spec.margin, **jitter)[0]
        if self.augment:
            matrix = self.augment.deform(matrix, size)
        # labels with a bias have it in the varied picture too: they are varied without it, and get it again
        side = spec.margin * float(max(box[2] - box[0], box[3] - box[1]))
        known = self.faces[index].bias
        bias = np.zeros((len(xy), 2)) if known is None or not self.augment else known * side
        if self.augment and mirrored is not None:
            matrix = self.augment.tightened(matrix, xy - bias, bias, size, spec.margin, mirrored)
        image = tv_tensors.Image(torch.from_numpy(crop_from_luma(luma, matrix, size))[None])
        points = tv_tensors.KeyPoints(
            torch.from_numpy(apply_matrix(matrix, xy - bias)).float(), canvas_size=(size, size)
        )
        if self.augment:
            image, points = self.augment(image, points, mirrored)
        xy_crop = points.as_subclass(torch.Tensor) + torch.from_numpy(bias * scale_of(matrix)).float()
        if self.detail > 1:
            xy_crop = (xy_crop + 0.5) / self.detail - 0.5
        return image.as_subclass(torch.Tensor), xy_crop

    def photo_hashes(self) -> list[tuple[tuple[int, ...], bytes]]:
        """Of each face's photo, which tell whether two have the same grey levels."""
        return [(luma.shape, hashlib.blake2b(np.ascontiguousarray(luma).data).digest()) for luma in self._lumas]


def same_photos(held_out: FaceDataset, others: FaceDataset) -> list[tuple[Face, Face]]:
    """The held-out faces whose photo is one of the others' under another name, each with one of these."""
    known = dict(zip(others.photo_hashes(), others.faces, strict=True))
    found = zip(held_out.faces, held_out.photo_hashes(), strict=True)
    return [(face, known[photo]) for face, photo in found if photo in known]
