"""The settings file of `kp tune`: what ran fastest on one machine, opened by `load(tuned=…)`.

The file names a model file by its sha256, so another model is refused. It names the machine by what
decides its speed; under other conditions the settings still give the same keypoints, perhaps not the
fastest way, so that is a warning.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kp_runtime.backend import Backend
from kp_runtime.backend_by_name import BACKENDS, open_backend
from kp_runtime.cores import checked_cores
from kp_runtime.device_backend import DeviceBackend
from kp_runtime.errors import BackendError, BundleError, InputError, KpWarning, MissingExtraError
from kp_runtime.files import as_path, read_plain, write_file
from kp_runtime.machine import changes, driver_version, machine_conditions, machine_from_system
from kp_runtime.manifest import Manifest

__all__ = ["Tuned", "TunedWarning", "open_tuned", "tuned_conditions", "tuned_from_file", "write_tuned"]

SCHEMA = 1
_LARGEST, _LONGEST, _MOST = 1 << 20, 1000, 1 << 20
"""Bytes of a settings file, characters of a text in it, and faces or threads."""

AGAIN = "run kp tune here"


class TunedWarning(KpWarning):
    """Settings that were tuned under other conditions: on another machine, or on this one as it was set then."""


@dataclass(frozen=True)
class Tuned:
    """What `kp tune` chose.

    Attributes:
        bundle: folder of the bundle, from the settings file's own folder.
        file: the model file in it.
        sha256: of that file.
        backend: the engine, one of `BACKENDS`.
        threads: of the engine on the CPU; None on a GPU.
        faces: how many a call was tuned for.
        feeding: how such calls are fed, one of `feeding.WAYS`; None where the engine knows one way.
        machine: what decides a machine's speed, of the one that was tuned on.
        schema: version of this layout.
    """

    bundle: str
    file: str
    sha256: str
    backend: str
    threads: int | None
    faces: int
    feeding: str | None
    machine: dict[str, Any]
    schema: int = SCHEMA


def tuned_conditions(backend: Backend) -> dict[str, object]:
    """What decides how fast an open engine runs here, by a name for people."""
    ort = sys.modules.get("onnxruntime") if backend.name.startswith("ort") else None
    gpu = backend.driver if isinstance(backend, DeviceBackend) else None
    return machine_conditions(machine_from_system(versions=False)) | {
        "GPU": gpu and gpu.arch,
        "NVIDIA driver": gpu and driver_version(),
        "onnxruntime": getattr(ort, "__version__", None),
    }


def write_tuned(tuned: Tuned, path: Path) -> Path:
    """Writes the file, the old one kept whole until the new one is."""
    write_file(path, json.dumps(dataclasses.asdict(tuned), indent=1) + "\n")
    return path


def tuned_from_file(path: Path) -> Tuned:
    """Reads and checks a settings file, which may be a link to one.

    Raises:
        InputError: it can't be read, is no such file, has another schema or a wrong field.
    """
    try:
        raw = json.loads(read_plain(Path(os.path.realpath(path)), _LARGEST))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}; {AGAIN}, which writes one") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); give the file that kp tune --out wrote") from error
    if not isinstance(raw, dict) or not {"schema", "sha256", "faces"} <= raw.keys():
        raise InputError(f"{path} holds no settings of kp tune; give the file that kp tune --out wrote")
    if raw["schema"] != SCHEMA:
        raise InputError(f"{path} has schema {raw['schema']!r:.40}, this release reads {SCHEMA}; {AGAIN}")
    kinds = {"bundle": str, "file": str, "sha256": str, "backend": str, "threads": int, "faces": int, "feeding": str,
             "machine": dict}  # fmt: skip
    for name, kind in kinds.items():
        value = raw.get(name)
        if not _fits(value, kind) and not (name in ("threads", "feeding") and value is None):
            raise InputError(f"{path} has a wrong {name}, {value!r:.40}; {AGAIN}")
    if raw["backend"] not in BACKENDS:
        raise InputError(f"{path} has a wrong backend, {raw['backend']!r:.40}; {AGAIN}")
    fields: dict[str, Any] = {name: raw.get(name) for name in kinds}
    return Tuned(**fields)


def _fits(value: Any, kind: type) -> bool:
    """Whether a field's value is of its kind, and of a size that makes sense."""
    if isinstance(value, str):
        return kind is str and len(value) <= _LONGEST and _is_name(value)
    if type(value) is int:
        return kind is int and 1 <= value <= _MOST
    return type(value) is kind


def _is_name(text: str) -> bool:
    """Whether files can be called so; names need not be printable, such as with an ideographic space."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def open_tuned(
    path: str | os.PathLike[str],
    bundle: str | os.PathLike[str] | None = None,
    public_key: str | os.PathLike[str] | bytes | None = None,
    *,
    golden: bool = True,
    cores: Collection[int] | None = None,
) -> Backend:
    """Opens the model of a settings file with its settings.

    Args:
        path: the settings file.
        bundle: the bundle's folder; where the file says it lies when None.
        public_key: see `backend_by_name.open_backend`.
        golden: likewise.
        cores: likewise.

    Raises:
        InputError: the settings file can't be read, see `tuned_from_file`; `public_key` is no key; or cores that this
            thread may not use.
        BundleError: the bundle can't be used, or does not hold the model that was tuned.
        BackendError: the engine can't run it here, or there are fewer cores than it has threads.

    Warns:
        TunedWarning: this machine, or how it is set, is not what was tuned on; says what differs.
    """
    path = as_path(path, "tuned")
    tuned = tuned_from_file(path)
    folder = Path(os.path.realpath(path)).parent / tuned.bundle if bundle is None else as_path(bundle, "the bundle")
    entry = Manifest.read(folder, public_key).files.get(tuned.file)
    if entry is None or entry.sha256 != tuned.sha256:
        has = "no such file" if entry is None else f"one with {entry.sha256[:12]}…"
        raise BundleError(
            f"{path} was tuned for {tuned.file} with sha256 {tuned.sha256[:12]}…, but {folder} has {has}; {AGAIN}, or "
            "give the bundle that was tuned"
        )
    chosen = None if cores is None else checked_cores(cores)
    try:
        backend = open_backend(folder / tuned.file, tuned.backend, "auto", tuned.threads, public_key, golden=golden,
                               cores=chosen)  # fmt: skip
        if tuned.feeding is not None:
            backend.settle(tuned.faces, tuned.feeding)
    except MissingExtraError:
        raise
    except (BackendError, InputError) as error:  # what is wrong with the caller's own is known by now
        raise BackendError(f"the settings of {path} can't be used here: {error}; {AGAIN}") from error
    here = tuned_conditions(backend)
    both = [name for name in here if name in tuned.machine]  # an older release recorded less
    if differs := changes({name: tuned.machine[name] for name in both}, {name: here[name] for name in both}):
        warnings.warn(
            f"{path} was tuned under other conditions ({'; '.join(differs):.500}): it need not be the fastest here; "
            f"{AGAIN}",
            TunedWarning,
            stacklevel=3,
        )
    return backend
