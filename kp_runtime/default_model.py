"""The bundles that are opened when none is named: what `KP_MODEL` names, else the installed model wheel's."""

from __future__ import annotations

import os
from pathlib import Path

from kp_runtime.errors import BundleError
from kp_runtime.manifest import MANIFEST_NAME

__all__ = ["MODEL_DISTRIBUTION", "MODEL_VARIABLE", "default_bundle", "default_detector"]

MODEL_VARIABLE = "KP_MODEL"
MODEL_DISTRIBUTION = "kp-edge-model"
MODEL_PACKAGE, DETECTOR_PACKAGE = "kp_model", "kp_face_detector"


def default_bundle(checkout: Path | None = None) -> Path:
    """The default bundle's folder, or the model file that `KP_MODEL` names.

    Only what was set or installed counts: the current folder is never searched, so the same program opens
    the same model wherever it is started.

    Args:
        checkout: a bundle beside the program's own source; taken last, where it is there.

    Raises:
        BundleError: `KP_MODEL` leads nowhere, the model wheel is damaged, or there is no default model.
    """
    if given := os.environ.get(MODEL_VARIABLE):
        if not os.path.exists(given):  # noqa: PTH110  pathlib's raises where it may not look
            raise BundleError(
                f"{MODEL_VARIABLE} names {given}, which is not there or may not be read; set it to a bundle's folder"
            )
        return Path(given)
    if (found := _installed_or(MODEL_PACKAGE, checkout)) is not None:
        return found
    raise BundleError(
        f"no model was named and there is no default one: name a bundle (a checkout has engines/resnet18-68), set "
        f"{MODEL_VARIABLE} to its folder, or install the wheel kp-edge-model"
    )


def default_detector(checkout: Path | None = None) -> Path | None:
    """The folder of the project's own face detector: the model wheel's, else the one in the checkout, else None.

    Raises:
        BundleError: the model wheel is damaged.
    """
    return _installed_or(DETECTOR_PACKAGE, checkout)


def _installed_or(package: str, checkout: Path | None) -> Path | None:
    if (installed := _installed_bundle(package)) is not None:
        return installed
    return checkout if checkout is not None and (checkout / MANIFEST_NAME).exists() else None


def _installed_bundle(package: str) -> Path | None:
    """A folder of the model wheel by the record of installed packages: a folder of its name elsewhere is not one."""
    from importlib import metadata  # here, as it takes longer to import than all of this run-time's own modules

    try:
        wheel = metadata.distribution(MODEL_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    folder = Path(str(wheel.locate_file(package)))
    if not (folder / MANIFEST_NAME).exists():
        raise BundleError(
            f"{MODEL_DISTRIBUTION} {wheel.version} is installed, but {folder} holds no {MANIFEST_NAME}; run: "
            f"pip install --force-reinstall --no-deps {MODEL_DISTRIBUTION}"
        )
    return folder
