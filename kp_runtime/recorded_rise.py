"""What a model file costs in accuracy, as the bundles record it: nothing is measured here.

A plan computes in the types of the ONNX file that it was built from, so that one's record is its own.

A rise is in percentage points of the NME over that of a first bundle's fp32. Within a bundle
`parity.json` knows it; between two bundles their manifests' measured accuracies do.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kp_runtime.manifest import Manifest

__all__ = ["PARITY_NAME", "Rise", "parity_rows", "recorded_rise"]

PARITY_NAME = "parity.json"


@dataclass(frozen=True)
class Rise:
    """A rise of the NME in percentage points, None where it is not known; and how it is known, or why not."""

    points: float | None
    how: str


def recorded_rise(first: Path, bundle: Path, file: str) -> Rise:
    """The recorded rise of a file over the first bundle's fp32.

    Args:
        first: the folder of the bundle whose fp32 is compared with.
        bundle: the folder of the file's bundle; may be the same.
        file: its name there.

    Raises:
        BundleError: a bundle or its parity report can't be used.
    """
    manifest = Manifest.read(bundle)
    own = _rise_of_file(bundle, manifest, file)
    if own.points is None or bundle.resolve() == first.resolve():
        return own
    between = _rise_of_weights(Manifest.read(first), manifest)
    if between.points is None:
        return between
    return Rise(between.points + own.points, f"{between.how}; {own.how}")


def _rise_of_file(bundle: Path, manifest: Manifest, file: str) -> Rise:
    """Over the fp32 of its own bundle."""
    entry = manifest.files[file]
    if entry.kind == "plan":
        onnx = {e.sha256: name for name, e in manifest.files.items() if e.kind == "onnx"}
        if (source := onnx.get(str(entry.parent_sha256))) is None:
            return Rise(None, "the ONNX file that it was built from is not in the bundle")
        found = _rise_of_file(bundle, manifest, source)
        return Rise(found.points, f"of {source}, from which it was built: {found.how}")
    if (entry.kind, entry.precision) == ("onnx", "fp32"):
        return Rise(0.0, "fp32")
    row = next((row for row in parity_rows(bundle, manifest) if row.get("file") == file), {})
    rise, nme = (_number(row.get(name)) for name in ("rise", "nme"))
    if rise is not None:
        return Rise(rise, f"recorded on {row.get('faces')} labelled faces")
    if nme is not None:  # about: it is counted in PyTorch's own eye distances, and a rise in the labels'
        return Rise(nme, "about at most: the recorded distance to PyTorch, on faces without labels")
    return Rise(None, f"{PARITY_NAME} records nothing of it")


def _number(value: Any) -> float | None:
    """What a report has for a number; None where it is none, or not finite: Python's JSON has these, too."""
    return float(value) if type(value) in (int, float) and abs(value) <= sys.float_info.max else None


def parity_rows(bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The rows of a bundle's parity report; none where it has none, or one that is no list.

    Raises:
        IntegrityError: it is not the manifest's.
    """
    if PARITY_NAME not in manifest.files:
        return []
    try:
        rows = json.loads(manifest.read_file(bundle, PARITY_NAME))
    except (ValueError, RecursionError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _rise_of_weights(first: Manifest, other: Manifest) -> Rise:
    """The largest difference on a data set that both were measured on, as nobody knows which is the user's."""
    if _weights(first) & _weights(other):
        return Rise(0.0, "the same weights")
    shared = [
        (after["nme"] - before["nme"]) * 100
        for name, before in first.accuracy.items()
        if _is_of_weights(before) and _is_of_weights(after := other.accuracy.get(name, {})) and _alike(before, after)
    ]
    if not shared:
        return Rise(None, "the manifests record no accuracy on the same faces, measured alike")
    return Rise(max(shared), f"the manifests' worst of {len(shared)} data sets")


def _is_of_weights(measured: Any) -> bool:
    """Whether a record has an NME that no other file than the checkpoint or the fp32 one has."""
    return (
        isinstance(measured, dict)
        and type(measured.get("nme")) in (int, float)
        and type(measured.get("faces")) is int
        and measured.get("precision") in (None, "fp32")
    )


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are of the same faces seen in the same way, as far as both tell; older ones tell less."""
    if one.get("nme_unit") != other.get("nme_unit"):  # older releases counted own points in another one, without a word
        return False
    how = ("faces", "missed", "looks", "mirror", "boxes", "detector", "detector_sha256", "split", "sources")
    return all(one[key] == other[key] for key in how if key in one and key in other)


def _weights(manifest: Manifest) -> set[str]:
    """The checkpoint's sha256, from its own entry or those of the files made from it."""
    return {
        entry.sha256 if entry.kind == "checkpoint" else str(entry.parent_sha256)
        for entry in manifest.files.values()
        if entry.kind == "checkpoint" or (entry.kind == "onnx" and entry.parent_sha256)
    }
