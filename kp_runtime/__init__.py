"""68 facial keypoints from images, with the results that PyTorch would give. Needs numpy alone.

>>> import kp_runtime
>>> model = kp_runtime.load("engines/resnet18-68")
>>> keypoints = model(image, boxes_xyxy)          # image: (h, w, 3) uint8 BGR
>>> keypoints.xy                                  # (n, 68, 2) float32, pixels of the image
"""

from kp_runtime.detect import HaarDetector, YuNetDetector
from kp_runtime.draw import draw_keypoints
from kp_runtime.errors import (
    BackendError,
    BoxError,
    BundleError,
    DataError,
    ExportError,
    ImageError,
    InputError,
    IntegrityError,
    KpError,
    MissingExtraError,
    ParityError,
    SchemaError,
)
from kp_runtime.frame import Frame, image_from_file
from kp_runtime.geometry import boxes_from_points
from kp_runtime.pipeline import Model, load
from kp_runtime.results import Keypoints
from kp_runtime.spec import Manifest, ModelSpec
from kp_runtime.timing import StageTimer

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BoxError",
    "BundleError",
    "DataError",
    "ExportError",
    "Frame",
    "HaarDetector",
    "ImageError",
    "InputError",
    "IntegrityError",
    "Keypoints",
    "KpError",
    "Manifest",
    "MissingExtraError",
    "Model",
    "ModelSpec",
    "ParityError",
    "SchemaError",
    "StageTimer",
    "YuNetDetector",
    "boxes_from_points",
    "draw_keypoints",
    "image_from_file",
    "load",
]
