"""The manifest of a bundle: read, checked and written.

A bundle is a folder with `manifest.json` and the files that it names. The manifest says what
the model takes and gives (`ModelSpec`), what every file is (`FileEntry`: sha256, size, what it
was made from and how), how the weights were trained, how accurate they are, and under which
licences weights and data come. Its schema has a version; newer ones are refused, not guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kp_runtime.errors import BundleError, IntegrityError, SchemaError, shortened
from kp_runtime.files import as_path, open_plain, read_plain, sha256_of_file, sha256_of_open_file, write_file
from kp_runtime.signing import SIGNATURE_NAME, check_signature
from kp_runtime.spec import BOXES, SCHEMES, DetectorSpec, ModelSpec

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "MANIFEST_NAME",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "DetectorManifest",
    "FileEntry",
    "Manifest",
    "any_manifest",
    "any_manifest_of_bytes",
    "file_entry",
    "folder_of",
    "manifest_bytes",
]

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PRECISIONS = ("fp32", "fp16", "int8", "int8-trt")
"""Of files; `int8-trt` is the graph whose quantisation TensorRT can take."""

_WORDS = {"precision": PRECISIONS, "box": BOXES, "scheme": SCHEMES}
"""The words that a field may have; a newer release may know more."""
_LARGEST_MANIFEST = 4 << 20
_LARGEST_FILE = 2 << 30
"""In bytes; protobuf, and with it ONNX, takes no larger one."""
_DEEPEST = 32
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
"""A name that is one file in one folder on every system: no separator, drive, NUL or leading dot."""


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
        if not (isinstance(self.sha256, str) and type(self.bytes) is int and isinstance(self.kind, str)):
            raise BundleError(f"a file's sha256, bytes and kind must be text, a number and text; got {shortened(self)}")
        if len(self.kind) > 200 or not self.kind.isprintable():
            raise BundleError(f"a file's kind must be a word, got {shortened(self.kind)}")
        if not 0 <= self.bytes <= _LARGEST_FILE:
            raise BundleError(f"a file's bytes must be 0 to {_LARGEST_FILE}, got {shortened(self.bytes)}")
        if self.precision not in (None, *PRECISIONS):
            raise BundleError(
                f"a file's precision must be one of {', '.join(PRECISIONS)}, got {shortened(self.precision)}"
            )
        if not isinstance(self.made, dict) or not isinstance(self.parent_sha256, str | None):
            raise BundleError(f"a file's made and parent_sha256 must be an object and text, got {shortened(self)}")


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

    _SPEC: ClassVar[type[Any]] = ModelSpec
    _TASK: ClassVar[str | None] = None
    """What the spec says of itself: the specs of keypoint models say nothing."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec.name!r}, files {list(self.files)!r:.200})"

    @classmethod
    def read(cls, bundle: str | os.PathLike[str], public_key: str | os.PathLike[str] | bytes | None = None) -> Self:
        """Reads and checks a bundle's manifest.

        Args:
            bundle: the bundle's folder.
            public_key: whose signature the manifest must have: see `load`. The
                bytes that are verified are those that are parsed. None asks for no signature.

        Raises:
            InputError: `bundle` is no path, or `public_key` no key.
            BundleError: no such folder, no manifest in it, or fields that are not the schema's.
            SchemaError: the manifest, or a field of it, is newer than this release.
            SignatureError: it is not signed by this key.
            MissingExtraError: cryptography, which `public_key` needs, is not installed.
        """
        return cls.from_bytes(_signed_bytes(bundle, public_key), str(Path(bundle) / MANIFEST_NAME))

    @classmethod
    def from_bytes(cls, data: bytes, origin: str = MANIFEST_NAME) -> Self:
        """The manifest of a file's bytes; `origin` stands in the messages."""
        return cls.from_json(_decoded(data, origin), origin)

    @classmethod
    def from_json(cls, raw: Any, origin: str = MANIFEST_NAME) -> Self:
        """The manifest of a decoded JSON document; `origin` stands in the messages."""
        if not isinstance(raw, dict) or type(raw.get("schema")) is not int or raw["schema"] < 1:
            raise BundleError(f"{origin} has no schema number; it is not a bundle's manifest")
        if raw["schema"] > SCHEMA_VERSION:
            raise SchemaError(
                f"{origin} has schema {shortened(raw['schema'])}, this release reads up to {SCHEMA_VERSION}; "
                "update kp-edge, or export the bundle with this release"
            )
        try:
            if raw["spec"].get("task") != cls._TASK:
                raise BundleError(
                    f"{origin} is of a model that gives {shortened(raw['spec'].get('task', 'keypoints'), str)}, wanted "
                    f"is one that gives {cls._TASK or 'keypoints'}; name another bundle"
                )
            spec = cls._SPEC(**_known(raw["spec"], cls._SPEC, origin))
            files = {name: FileEntry(**_known(entry, FileEntry, origin)) for name, entry in raw["files"].items()}
            manifest = cls(**_known(raw, cls, origin) | {"spec": spec, "files": files})
            if wrong := [key for key in ("training", "accuracy", "licence") if not isinstance(raw.get(key, {}), dict)]:
                raise TypeError(f"{wrong[0]} must be an object")
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"{origin} lacks a field of schema {raw['schema']} or has a wrong one: {shortened(error, str)}"
            ) from error
        for name in files:
            if not _FILE_NAME.fullmatch(name) or name in (MANIFEST_NAME, SIGNATURE_NAME):
                raise BundleError(
                    f"{origin} names the file {shortened(name)}; a bundle's files lie in its own folder, with names of "
                    "letters, digits and . _ + -"
                )
        return manifest

    def with_files(self, files: dict[str, FileEntry]) -> Self:
        """With these files, and of what was measured all but that of others."""
        hashes = {None, *(entry.sha256 for entry in files.values())}
        kept = {
            name: one for name, one in self.accuracy.items() if not isinstance(one, dict) or one.get("sha256") in hashes
        }
        return dataclasses.replace(self, files=files, accuracy=kept)

    def write(self, bundle: str | os.PathLike[str]) -> None:
        """Writes `manifest.json` into the folder, the old one kept whole until the new one is.

        A signature of the old one no longer holds, so it is removed.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=False) + "\n"
        write_file(Path(bundle) / MANIFEST_NAME, text)
        (Path(bundle) / SIGNATURE_NAME).unlink(missing_ok=True)

    def entry(self, bundle: str | os.PathLike[str], name: str) -> FileEntry:
        """What stands here of one of the bundle's files; the file is not looked at.

        Raises:
            BundleError: the manifest has no such file.
        """
        if name not in self.files:
            known = ", ".join(sorted(self.files)) or "none"
            raise BundleError(f"the bundle {bundle} has no file {name}; it has: {known}")
        return self.files[name]

    def check_file(self, bundle: str | os.PathLike[str], name: str) -> Path:
        """The path of one of the bundle's files, after size and sha256 were compared.

        Whoever opens the path later opens what lies there then; `read_file` leaves no such gap.

        Raises:
            BundleError: the manifest has no such file.
            IntegrityError: the file is missing, cut off, another one, or no plain file.
        """
        entry, path = self.entry(bundle, name), Path(bundle) / name
        with self._opened(path, entry) as file:
            found = sha256_of_open_file(file)
        self._compare(path, entry, found)
        return path

    def read_file(self, bundle: str | os.PathLike[str], name: str) -> bytes:
        """The bytes of one of the bundle's files: those that were compared with size and sha256.

        Raises:
            BundleError, IntegrityError: as `check_file`.
        """
        entry, path = self.entry(bundle, name), Path(bundle) / name
        with self._opened(path, entry) as file:
            data = file.read(entry.bytes)
        self._compare(path, entry, hashlib.sha256(data).hexdigest())
        return data

    @contextlib.contextmanager
    def _opened(self, path: Path, entry: FileEntry) -> Iterator[BufferedReader]:
        """One of the files, of the right size; a disk may fail when it is opened or later, while it is read."""
        try:
            with open_plain(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.bytes:
                    raise IntegrityError(
                        f"{path} has {size} bytes, the manifest says {entry.bytes}: it is cut off or was "
                        "replaced; copy the bundle again, or run kp export"
                    )
                yield file
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{path} stands in the manifest but is not there; copy the whole bundle, or run kp export"
            ) from error
        except OSError as error:
            raise IntegrityError(_unreadable(path, error)) from error

    def _compare(self, path: Path, entry: FileEntry, found: str) -> None:
        if found != entry.sha256:
            raise IntegrityError(
                f"{path} has sha256 {found[:12]}…, the manifest says {entry.sha256[:12]}…: the file "
                "was changed; copy the bundle again, or run kp export"
            )


@dataclass(frozen=True, repr=False)
class DetectorManifest(Manifest):
    """`manifest.json` of a face detector's bundle: as a model's, with another contract."""

    spec: DetectorSpec  # type: ignore[assignment]

    _SPEC: ClassVar[type[Any]] = DetectorSpec
    _TASK: ClassVar[str | None] = "face-boxes"


def any_manifest(bundle: str | os.PathLike[str], public_key: str | os.PathLike[str] | bytes | None = None) -> Manifest:
    """Reads and checks a bundle's manifest, of a keypoint model or of a detector; all else as `Manifest.read`."""
    return any_manifest_of_bytes(_signed_bytes(bundle, public_key), str(Path(bundle) / MANIFEST_NAME))


def any_manifest_of_bytes(data: bytes, origin: str) -> Manifest:
    """`any_manifest` of a file's bytes; `origin` stands in the messages."""
    raw = _decoded(data, origin)
    spec = raw.get("spec") if isinstance(raw, dict) else None
    kind = DetectorManifest if isinstance(spec, dict) and "task" in spec else Manifest
    return kind.from_json(raw, origin)


def folder_of(path: Path) -> Path:
    """The bundle's folder of a path that is one, or of a file in one.

    Raises:
        BundleError: a file that lies in no bundle.
    """
    if not os.path.isfile(path):  # noqa: PTH113  pathlib's raises where it may not look; the manifest's reader says it
        return path
    if not (path.parent / MANIFEST_NAME).exists():
        raise BundleError(f"{path} lies in no bundle: there is no {MANIFEST_NAME} beside it; give a bundle's file")
    return path.parent


def manifest_bytes(bundle: str | os.PathLike[str]) -> bytes:
    """A bundle's manifest as it lies on the disk.

    Raises:
        BundleError: no such folder, no manifest in it, or one that can't be read.
    """
    path = as_path(bundle, "the bundle") / MANIFEST_NAME
    try:
        return read_plain(path, _LARGEST_MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.lexists(path.parent):
            where = path.parent.absolute()
            old = where.with_name(f".{where.name}.old")  # as kp_export.staging calls it
            advice = f"a command was cut off there; mv {shlex.join(map(str, (old, where)))} puts the bundle back"
            advice = advice if old.is_dir() else "check the path"
            raise BundleError(f"{path.parent} is not a bundle: there is nothing at {where}; {advice}") from error
        advice = "give a folder that `kp train`, `kp train-detector` or `kp export` wrote"
        if (path.parent / "run.json").exists():  # a run writes it first, and the manifest last
            advice = "its training has not ended: its own command with --resume goes on"
        raise BundleError(f"{path.parent} is not a bundle: it has no {MANIFEST_NAME}; {advice}") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise BundleError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    """What is told of a bundle's file that can't be opened."""
    advice = "a bundle's files are plain files in its own folder"
    if isinstance(error, PermissionError):
        advice = "let this user read the bundle's folder and files"
    elif getattr(error, "errno", None) in (errno.EIO, errno.EBADMSG):
        advice = "its disk fails: see what dmesg says, and copy the bundle to another disk from where it is whole"
    return f"{path} can't be read ({getattr(error, 'strerror', None) or error}); {advice}"


def _signed_bytes(bundle: str | os.PathLike[str], public_key: str | os.PathLike[str] | bytes | None) -> bytes:
    """`manifest_bytes`, signed by the key where there is one."""
    data = manifest_bytes(bundle)
    if public_key is not None:
        check_signature(bundle, data, public_key)
    return data


def _decoded(data: bytes, origin: str) -> Any:
    """The JSON document of a manifest's bytes."""
    try:
        raw = json.loads(data.decode(), parse_int=_integer)
        _check_depth(raw)
        # half of a pair of code units is no character, NaN no number of JSON
        json.dumps(raw, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{origin} can't be read as JSON ({error}); make the bundle again") from error
    return raw


def _known(fields: dict[str, Any], kind: type[Any], origin: str) -> dict[str, Any]:
    """The fields of an object in a manifest, all of which its dataclass has, with words that are known."""
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = [f"field {shortened(key)}" for key in sorted(fields.keys() - names)]
    words = {key: value for key in _WORDS if isinstance(value := fields.get(key), str)}
    if unknown := unknown + [f"{key} {shortened(word)}" for key, word in words.items() if word not in _WORDS[key]]:
        raise SchemaError(
            f"{origin} has the {unknown[0]}, which this release does not know: it was made by a newer kp; update "
            "kp-edge, or export the bundle with this release"
        )
    return fields


def _integer(text: str) -> int:
    if abs(value := int(text)) >= 2**63:
        raise ValueError("a whole number of 64 bits or more")
    return value


def _check_depth(raw: Any) -> None:
    """Refuses JSON that is nested deeper than any manifest."""
    level = [raw]
    for _ in range(_DEEPEST):
        lists = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [child for values in lists if isinstance(values, list) for child in values]
    if level:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")


def file_entry(path: Path, kind: str, **fields: Any) -> FileEntry:
    """The manifest's entry of a file as it lies on the disk."""
    return FileEntry(sha256=sha256_of_file(path), bytes=path.stat().st_size, kind=kind, **fields)
