"""68 facial keypoints from images, with the results that PyTorch would give. Needs numpy alone.

>>> import kp_runtime
>>> model = kp_runtime.load("engines/resnet18-68")
>>> keypoints = model(image, boxes_xyxy)          # image: (h, w, 3) uint8 BGR
>>> keypoints.xy                                  # (n, 68, 2) float32, pixels of the image
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kp_runtime.backend import Answer, Backend, BackendReport
    from kp_runtime.center_detector import CenterDetector, Found
    from kp_runtime.cuda_graphs import GraphReport, GraphWarning
    from kp_runtime.detect import Detector, HaarDetector, YuNetDetector
    from kp_runtime.detector_by_name import DetectorWarning, load_detector
    from kp_runtime.device_frame import DeviceFrame
    from kp_runtime.draw import draw_keypoints
    from kp_runtime.effect_pictures import open_effect
    from kp_runtime.effects import Effect
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
        KpWarning,
        MissingExtraError,
        ParityError,
        SchemaError,
        SignatureError,
    )
    from kp_runtime.frame import Frame, image_from_bytes, image_from_file
    from kp_runtime.geometry import boxes_from_points
    from kp_runtime.manifest import FileEntry, Manifest
    from kp_runtime.photos import NotDrawnError
    from kp_runtime.pipeline import Model, load
    from kp_runtime.results import Keypoints
    from kp_runtime.smooth import OneEuro
    from kp_runtime.spec import DetectorSpec, ModelSpec
    from kp_runtime.timing import StageTimer, TimeSummary
    from kp_runtime.track import FindFaces, FindPoints, Track, Tracker, TrackerSettings
    from kp_runtime.tuned import TunedWarning

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Backend",
    "BackendError",
    "BackendReport",
    "BoxError",
    "BundleError",
    "CenterDetector",
    "DataError",
    "Detector",
    "DetectorSpec",
    "DetectorWarning",
    "DeviceFrame",
    "Effect",
    "ExportError",
    "FileEntry",
    "FindFaces",
    "FindPoints",
    "Found",
    "Frame",
    "GraphReport",
    "GraphWarning",
    "HaarDetector",
    "ImageError",
    "InputError",
    "IntegrityError",
    "Keypoints",
    "KpError",
    "KpWarning",
    "Manifest",
    "MissingExtraError",
    "Model",
    "ModelSpec",
    "NotDrawnError",
    "OneEuro",
    "ParityError",
    "SchemaError",
    "SignatureError",
    "StageTimer",
    "TimeSummary",
    "Track",
    "Tracker",
    "TrackerSettings",
    "TunedWarning",
    "YuNetDetector",
    "boxes_from_points",
    "draw_keypoints",
    "image_from_bytes",
    "image_from_file",
    "load",
    "load_detector",
    "open_effect",
]

_HOME = {
    "backend": ("Answer", "Backend", "BackendReport"),
    "center_detector": ("CenterDetector", "Found"),
    "cuda_graphs": ("GraphReport", "GraphWarning"),
    "detect": ("Detector", "HaarDetector", "YuNetDetector"),
    "detector_by_name": ("DetectorWarning", "load_detector"),
    "device_frame": ("DeviceFrame",),
    "draw": ("draw_keypoints",),
    "effect_pictures": ("open_effect",),
    "effects": ("Effect",),
    "frame": ("Frame", "image_from_bytes", "image_from_file"),
    "geometry": ("boxes_from_points",),
    "manifest": ("FileEntry", "Manifest"),
    "photos": ("NotDrawnError",),
    "pipeline": ("Model", "load"),
    "results": ("Keypoints",),
    "smooth": ("OneEuro",),
    "spec": ("DetectorSpec", "ModelSpec"),
    "timing": ("StageTimer", "TimeSummary"),
    "track": ("FindFaces", "FindPoints", "Track", "Tracker", "TrackerSettings"),
    "tuned": ("TunedWarning",),
}
"""The module of each public name; the rest are in `errors`. A module is imported when it is first used."""


if not TYPE_CHECKING:  # for a type checker it would give any name, misspelt ones too

    def __getattr__(name: str) -> Any:
        """Imports a public name's module."""
        if name not in __all__:
            raise AttributeError(f"module 'kp_runtime' has no attribute {name!r}")
        home = next((module for module, names in _HOME.items() if name in names), "errors")
        return getattr(importlib.import_module(f"kp_runtime.{home}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
