"""`kp pack`: a bundle with only what a device runs."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from kp_export.staging import check_replaced, mend, staging
from kp_runtime.errors import BundleError
from kp_runtime.files import write_file, writing
from kp_runtime.manifest import MANIFEST_NAME, FileEntry, Manifest, any_manifest, file_entry

__all__ = ["pack_bundle"]


def pack_bundle(bundle: Path, out: Path, precisions: Sequence[str], *, checkpoint: bool = False) -> Manifest:
    """Copies a bundle with some of its models alone: those, the golden crop, and what was measured of them.

    Where `out` is a bundle, it is replaced when the new one is whole; files that no manifest names
    (a model card) stay.

    Args:
        bundle: the bundle's folder.
        out: the folder to fill; may be `bundle` itself.
        precisions: of the ONNX files and plans to keep.
        checkpoint: keep the checkpoint too.

    Returns:
        The new manifest.

    Raises:
        BundleError: the bundle can't be used, or has no model of a precision, or no checkpoint that was asked for.
        ExportError: `out` can't be written, or holds a checkpoint that may be the only copy.
    """
    bundle = bundle.resolve()
    mend(bundle)
    manifest = any_manifest(bundle)
    kept = {
        name: entry
        for name, entry in manifest.files.items()
        if (entry.kind in ("onnx", "plan") and entry.precision in precisions)
        or entry.kind in ("golden", "report")
        or (checkpoint and entry.kind == "checkpoint")
    }
    have = sorted({str(entry.precision) for entry in manifest.files.values() if entry.kind in ("onnx", "plan")})
    if missing := [precision for precision in precisions if precision not in have]:
        raise BundleError(f"{bundle} has no model of precision {missing[0]}, only {', '.join(have) or 'none'}")
    if checkpoint and all(entry.kind != "checkpoint" for entry in kept.values()):
        raise BundleError(f"{bundle} has no checkpoint to keep; pack it from a bundle that has one")
    out = out.resolve()
    with staging(out) as stage:
        check_replaced(out, manifest)
        old = any_manifest(out).files if (out / MANIFEST_NAME).exists() else {}  # errors name it, not the stage
        for name in {**old, **manifest.files}:
            if name not in kept:
                (stage / name).unlink(missing_ok=True)
        for name, entry in kept.items():
            with writing(stage / name) as temporary:
                shutil.copyfile(manifest.check_file(bundle, name), temporary)
            if entry.kind == "report":
                kept[name] = _shortened(stage / name, set(kept))
        packed = manifest.with_files(kept)
        packed.write(stage)
    return packed


def _shortened(report: Path, names: set[str]) -> FileEntry:
    """Leaves a parity report the lines of the files that are kept; another report stays as it is."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        rows = [row for row in json.loads(report.read_text(encoding="utf-8")) if row["file"] in names]
        write_file(report, json.dumps(rows, indent=2) + "\n")
    return file_entry(report, "report")
