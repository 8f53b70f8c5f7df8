from __future__ import annotations

import copy
import errno
import fcntl
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import kp_runtime
from kp_runtime.errors import BundleError, InputError, IntegrityError, KpError, SchemaError
from kp_runtime.files import sha256_of_file, writing
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.spec import DetectorSpec, ModelSpec

MODEL = "model.fp32.onnx"


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "bundle")


def raw_manifest(bundle: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    return raw


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_written_and_read_again(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest(
        spec=ModelSpec("m", size=96, margin=2.0, box="frame"),
        files={MODEL: file_entry(bundle / MODEL, "onnx", precision="fp16", parent_sha256="0", made={"tool": "t"})},
        training={"seed": 1},
        accuracy={"set": {"nme": 3.5}},
        licence={"code": "MIT"},
    )
    manifest.write(tmp_path / "new")
    assert Manifest.read(tmp_path / "new") == manifest
    assert names(tmp_path / "new") == ["manifest.json"]


def test_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no manifest\.json; give a folder"):
        Manifest.read(tmp_path)
    with pytest.raises(BundleError, match=r"none is not a bundle: there is nothing at /.*/none; check the path"):
        Manifest.read(tmp_path / "none")
    with pytest.raises(InputError, match="the bundle must be a path, as text or of pathlib; got NoneType"):
        Manifest.read(None)  # type: ignore[arg-type]
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BundleError, match=r"no manifest\.json; its training has not ended: .* --resume goes on"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"])
def test_manifest_that_is_not_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match="can't be read as JSON"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("raw", [None, [], "text", {}, {"schema": "1"}, {"schema": None}])
def test_json_that_is_no_manifest(raw: object) -> None:
    with pytest.raises(BundleError, match="has no schema number"):
        Manifest.from_json(raw)


def test_newer_schema_is_refused_even_when_nothing_else_fits() -> None:
    with pytest.raises(SchemaError, match="has schema 99, this release reads up to 1; update kp-edge"):
        Manifest.from_json({"schema": 99, "other": []})


@pytest.mark.parametrize("path", ["spec", "files", "spec/name", f"files/{MODEL}/sha256", f"files/{MODEL}/kind"])
def test_missing_field(path: str, bundle: Path) -> None:
    raw = raw_manifest(bundle)
    *parents, last = path.split("/")
    owner = raw
    for parent in parents:
        owner = owner[parent]
    del owner[last]
    with pytest.raises(BundleError, match=f"lacks a field of schema 1.*{last}"):
        Manifest.from_json(raw)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 31}, "crop size must be 32 to 1024 pixels, got 31"),
        ({"size": 1025}, "crop size must be 32 to 1024 pixels, got 1025"),
        ({"margin": 0.4}, "margin must be 0.5 to 4, got 0.4"),
        ({"margin": 4.1}, "margin must be 0.5 to 4, got 4.1"),
        ({"margin": float("nan")}, "margin must be 0.5 to 4, got nan"),
        ({"lost_limit": 0.0}, "lost_limit must be between 0 and 1, or null; got 0.0"),
        ({"lost_limit": 1.0}, "lost_limit must be between 0 and 1, or null; got 1.0"),
        ({"lost_limit": True}, "lost_limit must be between 0 and 1, or null; got True"),
        ({"box": "square"}, "box must be 'keypoints' or 'frame', got 'square'"),
        ({"points": 1, "scheme": "own"}, "points must be 2 to 1000, got 1"),
        ({"points": 1001, "scheme": "own"}, "points must be 2 to 1000, got 1001"),
        ({"points": 5}, "any other number is of the mark-up own; got 5 points of 'ibug68'"),
        ({"scheme": "wflw98"}, "got 68 points of 'wflw98'"),
    ],
)
def test_contract_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        ModelSpec("m", **fields)


def test_a_contract_may_reach_its_limits() -> None:
    for size, margin, points in ((32, 0.5, 2), (1024, 4, 1000)):
        assert ModelSpec("x", size=size, margin=margin, points=points, scheme="own").size == size
    for least, most in ((4, 8), (512, 4096)):
        assert DetectorSpec("x", stride=64, least_px=least, most_px=most).least_px == least


def test_whole_files_pass(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert {manifest.check_file(bundle, name) for name in manifest.files} == {bundle / n for n in manifest.files}


def test_file_that_the_manifest_does_not_know(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"has no file x\.onnx; it has: golden\.npz, model\.fp32\.onnx"):
        Manifest.read(bundle).check_file(bundle, "x.onnx")


def test_file_missing(copied: Path) -> None:
    (copied / MODEL).unlink()
    with pytest.raises(IntegrityError, match="stands in the manifest but is not there; copy the whole bundle"):
        Manifest.read(copied).check_file(copied, MODEL)


def test_file_cut_off(copied: Path) -> None:
    data = (copied / MODEL).read_bytes()
    (copied / MODEL).write_bytes(data[:-1])
    with pytest.raises(
        IntegrityError, match=f"has {len(data) - 1} bytes, the manifest says {len(data)}: it is cut off"
    ):
        Manifest.read(copied).check_file(copied, MODEL)


def test_one_changed_bit_at_the_same_size(copied: Path) -> None:
    data = bytearray((copied / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / MODEL).write_bytes(data)
    with pytest.raises(IntegrityError, match=r"has sha256 \w{12}…, the manifest says \w{12}…: the file was changed"):
        Manifest.read(copied).check_file(copied, MODEL)


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "abc") == wanted


def test_writing_replaces_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with writing(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() if text == "first" else path.read_text() == "first"
    assert path.read_text() == "second"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_a_block_that_raises_keeps_the_old_file(error: BaseException, tmp_path: Path) -> None:
    def write_half() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise error

    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, place, full)
    with (
        pytest.raises(KpError, match=r"can't write .*a\.txt: No space left on device; what was there before"),
        writing(path) as temporary,
    ):
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_is_synced_as_windows_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(descriptor: int) -> None:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR

    monkeypatch.setattr(os, "fsync", sync)
    with writing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_writing_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KpError, match="can't write"), writing(tmp_path / "file" / "a.txt"):
        pass  # the folder can't be made, the block is not reached


def test_writing_takes_the_place_of_plain_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path):
        with (
            pytest.raises(KpError, match=r"can't write .*: it is a folder, device or pipe; name a file"),
            writing(path),
        ):
            pass
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx", "/etc/passwd", "a/b.onnx", "..", ".", "", "a\0b",
        "C:\\x.onnx", "a\\b.onnx", "\\\\host\\share", "c:x", ".hidden", "a\nb", "model\u202e.onnx", "é.onnx", "x" * 300,
        "manifest.json", "manifest.sig", "-rf", " ",
    ],
)  # fmt: skip
def test_file_name_that_leaves_the_folder_or_is_not_one_file_everywhere(name: str, bundle: Path) -> None:
    raw = raw_manifest(bundle)
    raw["files"][name] = copy.deepcopy(raw["files"][MODEL])
    with pytest.raises(BundleError, match="a bundle's files lie in its own folder") as error:
        Manifest.from_json(raw)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["../model.fp32.onnx", "/etc/passwd", "sub/model.fp32.onnx", "model.fp32.onnx/"])
def test_only_names_of_the_manifest_are_opened(name: str, bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no file"):
        Manifest.read(bundle).read_file(bundle, name)


@pytest.mark.parametrize("target", ["outside", "golden.npz", "/dev/zero", "nowhere"])
def test_a_link_is_not_followed(target: str, copied: Path) -> None:
    """Neither out of the bundle nor to a file within: what is opened is what lies under the name."""
    manifest = Manifest.read(copied)
    shutil.copy(copied / MODEL, copied.parent / "outside")
    (copied / MODEL).unlink()
    (copied / MODEL).symlink_to(copied.parent / target if target == "outside" else target)
    for read in (manifest.check_file, manifest.read_file):
        with pytest.raises(
            IntegrityError, match=r"can't be read \(it is a symbolic link\); a bundle's files are plain"
        ):
            read(copied, MODEL)


def test_a_bundle_may_lie_behind_a_link(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copied)
    assert Manifest.read(tmp_path / "link").read_file(tmp_path / "link", MODEL) == (copied / MODEL).read_bytes()


def test_a_manifest_that_is_a_link(copied: Path) -> None:
    (copied / "manifest.json").rename(copied.parent / "elsewhere.json")
    (copied / "manifest.json").symlink_to("../elsewhere.json")
    with pytest.raises(BundleError, match=r"manifest\.json can't be read \(it is a symbolic link\); a bundle's files"):
        Manifest.read(copied)


def test_what_may_not_be_read_is_told_as_such(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    manifest = Manifest.read(copied)
    told = r" can't be read \(Permission denied\); let this user read the bundle's folder and files"
    monkeypatch.setattr("kp_runtime.manifest.open_plain", refuse)
    with pytest.raises(IntegrityError, match=MODEL + told):
        manifest.check_file(copied, MODEL)
    monkeypatch.setattr("kp_runtime.manifest.read_plain", refuse)
    with pytest.raises(BundleError, match="manifest.json" + told):
        Manifest.read(copied)


class FailingDisk(io.FileIO):
    """A file that can be opened, and not read, as on a card with a bad sector."""

    def readinto(self, *_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_disk_that_fails_while_a_file_is_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.read(copied)
    monkeypatch.setattr("kp_runtime.manifest.open_plain", lambda path: io.BufferedReader(FailingDisk(path)))
    for read in (manifest.check_file, manifest.read_file):
        with pytest.raises(IntegrityError, match=MODEL + r" can't be read \(Input/output error\); its disk fails: see"):
            read(copied, MODEL)
    with pytest.raises(IntegrityError, match="its disk fails"):  # not: update onnxruntime
        kp_runtime.load(copied)


@pytest.mark.parametrize("name", [MODEL, "manifest.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_neither_pipes_nor_folders_are_read(make: Any, name: str, copied: Path) -> None:
    (copied / name).unlink()
    make(copied / name)
    with pytest.raises(BundleError, match=r"can't be read \(it is no plain file\)"):
        Manifest.read(copied).read_file(copied, MODEL)


def test_a_manifest_of_gigabytes_is_not_read(copied: Path) -> None:
    with open(copied / "manifest.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match=r"can't be read \(it has over 4194304 bytes\)"):
        Manifest.read(copied)


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": ' + "9" * 5000 + "}",
        '{"schema": 9223372036854775808}',
        '{"schema": NaN}',
        '{"schema": 1e999}',
        '{"schema": 1, "spec": ' + "[" * 40 + "]" * 40 + "}",
        '{"schema": "\\ud800"}',
    ],
    ids=["long number", "over 64 bits", "NaN", "infinity", "40 levels", "half a character"],
)
def test_json_that_python_takes_and_we_do_not(text: str) -> None:
    with pytest.raises(BundleError, match="can't be read as JSON"):
        Manifest.from_bytes(text.encode())


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("spec/size", 64.0, "crop size must be"),
        ("spec/size", True, "crop size must be"),
        ("spec/size", 10**4000, "crop size must be"),
        ("spec/size", "64", "crop size must be"),
        ("spec/margin", "1.3", "margin must be"),
        ("spec/margin", True, "margin must be"),
        ("spec/points", 68.0, "points must be 2 to 1000, got 68.0"),
        ("spec/name", 5, "name must be a line"),
        ("spec/name", "x" * 5000, "name must be a line"),
        ("spec/name", "\x1b[2J", "name must be a line"),
        (f"files/{MODEL}/kind", "\x1b[2J", "kind must be a word"),
        ("spec/box", ["x" * 5000], "box must be"),
        (f"files/{MODEL}/sha256", 5, "sha256, bytes and kind must be"),
        (f"files/{MODEL}/bytes", "914", "sha256, bytes and kind must be"),
        (f"files/{MODEL}/kind", None, "sha256, bytes and kind must be"),
        (f"files/{MODEL}/precision", "fp8", "json has the precision 'fp8', which .* by a newer kp; update kp-edge"),
        ("spec/box", "head", "json has the box 'head', which this release does not know: it was made by a newer kp"),
        ("spec/scheme", "wflw98", "json has the scheme 'wflw98', which this release does not know"),
        (f"files/{MODEL}/precision", [], "precision must be"),
        (f"files/{MODEL}/colour", "red", "has the field 'colour', which .*: it was made by a newer kp; update kp-edge"),
        ("spec/turn", 5, "has the field 'turn', which .*: it was made by a newer kp; update kp-edge"),
        ("deployment", {}, "has the field 'deployment', which .*: it was made by a newer kp; update kp-edge"),
        ("spec/" + "x" * 5000, 5, "has the field 'xxx.*…, which"),
        ("spec/\x1b[2J", 5, r"has the field '\\x1b\[2J', which"),
        (f"files/{MODEL}/bytes", True, "sha256, bytes and kind must be"),
        (f"files/{MODEL}/bytes", -1, "bytes must be 0 to"),
        (f"files/{MODEL}/bytes", 1 << 40, "bytes must be 0 to"),
        (f"files/{MODEL}/made", [1], "made and parent_sha256 must be"),
        (f"files/{MODEL}/parent_sha256", 7, "made and parent_sha256 must be"),
        ("training", [], "training must be an object"),
        ("accuracy", None, "accuracy must be an object"),
        ("licence", "MIT", "licence must be an object"),
        ("schema", True, "has no schema number"),
        ("schema", -5, "has no schema number"),
    ],
)
def test_field_of_another_type(where: str, value: object, message: str, bundle: Path) -> None:
    raw = raw_manifest(bundle)
    *parents, last = where.split("/")
    owner = raw
    for parent in parents:
        owner = owner[parent]
    owner[last] = value
    with pytest.raises(BundleError, match=message) as error:
        Manifest.from_json(raw)
    assert len(str(error.value)) < 600
