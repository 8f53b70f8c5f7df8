"""The contract of a model and the manifest of its bundle: read, checked and written.

A bundle is a folder with `manifest.json` and the files that it names. The manifest says what
the model takes and gives (`ModelSpec`), what every file is (`FileEntry`: sha256, size, what it
was made from and how), how the weights were trained, how accurate they are, and under which
licences weights and data come. Its schema has a version; newer ones are refused, not guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kp_runtime.errors import BundleError, IntegrityError, KpError, SchemaError

__all__ = [
    "MANIFEST_NAME",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "FileEntry",
    "Manifest",
    "ModelSpec",
    "file_entry",
    "sha256_of_file",
    "writing",
]

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PRECISIONS = ("fp32", "fp16", "int8", "int8-trt")
"""Of files; `int8-trt` is the graph whose quantisation TensorRT can take."""


@dataclass(frozen=True)
class ModelSpec:
    """What a model takes and gives; the same for every file and backend of a bundle.

    Input `crops`: uint8 `(n, 1, size, size)`, luma 0 to 255. Output `keypoints`: float32
    `(n, points, 2)`, pixels of the crop, x then y, an integer is a pixel's centre.

    Attributes:
        name: the model's name, such as `resnet18-68`.
        size: side of the crop in pixels.
        margin: side of the square that is cut out, in longer sides of the box.
        box: what a box means: `keypoints` (tight around the 68 points) or `frame` (the
            original project's view, `geometry.frame_box`).
        points: number of points.
        scheme: the mark-up of the points.
    """

    name: str
    size: int = 224
    margin: float = 1.3
    box: str = "keypoints"
    points: int = 68
    scheme: str = "ibug68"

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 1024:
            raise BundleError(f"the model's crop size must be 32 to 1024 pixels, got {self.size}")
        if not 0.5 <= self.margin <= 4:
            raise BundleError(f"the model's margin must be 0.5 to 4, got {self.margin}")
        if self.box not in ("keypoints", "frame"):
            raise BundleError(f"the model's box must be 'keypoints' or 'frame', got {self.box!r}")
        if (self.scheme, self.points) != ("ibug68", 68):
            raise BundleError(f"only the 68-point mark-up ibug68 is known, got {self.points} points of {self.scheme!r}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a bundle.

    Attributes:
        sha256: of the whole file, hexadecimal.
        bytes: its size.
        kind: `checkpoint`, `onnx`, `plan`, `golden` or `report`.
        precision: one of `PRECISIONS`, where it applies.
        parent_sha256: of the file that it was made from.
        made: how: tool, versions, options.
    """

    sha256: str
    bytes: int
    kind: str
    precision: str | None = None
    parent_sha256: str | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.sha256, str) and isinstance(self.bytes, int) and isinstance(self.kind, str)):
            raise BundleError(f"a file's sha256, bytes and kind must be text, a number and text; got {self}")
        if self.precision not in (None, *PRECISIONS):
            raise BundleError(f"a file's precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a bundle.

    Attributes:
        spec: the model's contract.
        files: file name to entry.
        training: configuration, data sources with their sha256, seeds, versions, git revision.
        accuracy: measured accuracy, one entry a data set.
        licence: of the code, the weights and the data.
        schema: version of this layout.
    """

    spec: ModelSpec
    files: dict[str, FileEntry] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    licence: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA_VERSION

    @classmethod
    def read(cls, bundle: str | os.PathLike[str]) -> Manifest:
        """Reads and checks a bundle's manifest.

        Raises:
            BundleError: no such folder, no manifest in it, or fields that are not the schema's.
            SchemaError: the manifest is newer than this release.
        """
        path = Path(bundle) / MANIFEST_NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise BundleError(
                f"{path.parent} is not a bundle: it has no {MANIFEST_NAME}; give a folder that "
                "`kp train` or `kp export` wrote"
            ) from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise BundleError(f"{path} can't be read as JSON ({error}); make the bundle again") from error
        return cls.from_json(raw, str(path))

    @classmethod
    def from_json(cls, raw: Any, origin: str = MANIFEST_NAME) -> Manifest:
        """The manifest of a decoded JSON document; `origin` stands in the messages."""
        if not isinstance(raw, dict) or not isinstance(raw.get("schema"), int):
            raise BundleError(f"{origin} has no schema number; it is not a bundle's manifest")
        if raw["schema"] > SCHEMA_VERSION:
            raise SchemaError(
                f"{origin} has schema {raw['schema']}, this release reads up to {SCHEMA_VERSION}; "
                "update kp-edge, or export the bundle with this release"
            )
        try:
            spec = ModelSpec(**raw["spec"])
            files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            rest = {key: raw[key] for key in ("training", "accuracy", "licence") if key in raw}
            if wrong := [key for key, value in rest.items() if not isinstance(value, dict)]:
                raise TypeError(f"{wrong[0]} must be an object")
            manifest = cls(spec=spec, files=files, schema=raw["schema"], **rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{origin} lacks a field of schema {raw['schema']} or has a wrong one: {error}"
            ) from error
        for name in files:
            if Path(name).name != name or name in (".", "..", "") or "\0" in name:
                raise BundleError(f"{origin} names the file {name!r}; a bundle's files lie in its own folder")
        return manifest

    def write(self, bundle: str | os.PathLike[str]) -> None:
        """Writes `manifest.json` into the folder, the old one kept whole until the new one is."""
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=False) + "\n"
        with writing(Path(bundle) / MANIFEST_NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def check_file(self, bundle: str | os.PathLike[str], name: str) -> Path:
        """The path of one of the bundle's files, after size and sha256 were compared.

        Raises:
            BundleError: the manifest has no such file.
            IntegrityError: the file is missing, cut off, or another one.
        """
        path = Path(bundle) / name
        entry = self.files.get(name)
        if entry is None:
            known = ", ".join(sorted(self.files)) or "none"
            raise BundleError(f"the bundle {bundle} has no file {name}; it has: {known}")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise IntegrityError(
                f"{path} stands in the manifest but is not there; copy the whole bundle, or run kp export"
            ) from error
        if size != entry.bytes:
            raise IntegrityError(
                f"{path} has {size} bytes, the manifest says {entry.bytes}: it is cut off or was "
                "replaced; copy the bundle again, or run kp export"
            )
        found = sha256_of_file(path)
        if found != entry.sha256:
            raise IntegrityError(
                f"{path} has sha256 {found[:12]}…, the manifest says {entry.sha256[:12]}…: the file "
                "was changed; copy the bundle again, or run kp export"
            )
        return path


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """The same for Python 3.10, which has no `hashlib.file_digest`."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path, kind: str, **fields: Any) -> FileEntry:
    """The manifest's entry of a file as it lies on the disk."""
    return FileEntry(sha256=sha256_of_file(path), bytes=path.stat().st_size, kind=kind, **fields)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well.

    A block that raises, or a process that is killed, leaves the old file whole. A full disk or
    a folder that can't be written becomes a `KpError` that names the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise KpError(f"can't write {path}: {error.strerror or error}; what was there before is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
