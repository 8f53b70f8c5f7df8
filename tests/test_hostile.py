"""What the fuzzer found, each with its smallest input; tests/test_fuzz.py goes on looking."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kp_cli.report import print_bundle
from kp_export.operators import check_operators
from kp_runtime.backend_ort import OrtCpuBackend
from kp_runtime.bench_results import Bench, PhotoRun, Setup, times_from_turns
from kp_runtime.device_frame import DeviceFrame
from kp_runtime.errors import BackendError, BundleError, DataError, ExportError, ImageError, InputError, IntegrityError
from kp_runtime.frame import Frame
from kp_runtime.golden import golden_from_bytes
from kp_runtime.manifest import FileEntry, Manifest, file_entry
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import SafetensorsIO, load_checkpoint
from kp_train.data import read_source
from tests.models import LOST_LIMIT, SIZE, tiny_graph

SPEC = ModelSpec("m", size=SIZE, lost_limit=LOST_LIMIT)


def opened(data: bytes) -> OrtCpuBackend:
    return OrtCpuBackend(Path("model.onnx"), SPEC, 1, read=lambda: data)


def test_a_graph_that_computes_another_shape_than_it_declares() -> None:
    graph = tiny_graph()
    base = next(weight for weight in graph.graph.initializer if weight.name == "base")
    base.dims[0] = 2
    base.raw_data = base.raw_data * 2
    backend = opened(graph.SerializeToString())
    with pytest.raises(BackendError, match=r"ort-cpu gave float32 \(2, 68, 2\) instead of float32 \(1, 68, 2\)"):
        backend.infer(np.zeros((1, 1, SIZE, SIZE), np.uint8))


@pytest.mark.parametrize("place", ["weights.bin", "../weights.bin", "/etc/passwd", "/dev/zero"])
def test_weights_outside_the_model_file_are_not_read(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stand in no manifest, so no hash holds them."""
    graph = tiny_graph()
    weight = graph.graph.initializer[0]
    for folder in (tmp_path, tmp_path / "sub"):
        folder.mkdir(exist_ok=True)
        (folder / "weights.bin").write_bytes(weight.raw_data)
    monkeypatch.chdir(tmp_path / "sub")
    weight.ClearField("raw_data")
    weight.data_location = weight.EXTERNAL
    weight.external_data.add(key="location", value=place)
    with pytest.raises(BackendError, match=r"ONNX Runtime .* can't open"):
        opened(graph.SerializeToString())


def npz(crops: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("crops.npy", crops)
        archive.writestr("keypoints.npy", b"")
    return out.getvalue()


def npy(head: str) -> bytes:
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(head)) + head.encode()


def header(shape: str, descr: str = "'|u1'") -> bytes:
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n")


@pytest.mark.parametrize(
    "data",
    [
        npz(bytes(33 << 20)),
        npz(bytes(33 << 20)).replace(struct.pack("<I", 33 << 20), struct.pack("<I", 100)),
        npz(header("(1000000000000,)")),
        npz(header("(-1,)")),
        npz(header("(1, 1, 64, 64)", "'|O'")),
        npz(header("(1, 1, 64, 64)", "'<U99999999'")),
        npz(npy("[" * 3000)),
        npz(npy("(" * 100_000)),
        npz(b"")[:-10],
        b"",
    ],
    ids=["bomb", "bomb that lies", "a terabyte", "negative", "objects", "long texts", "brackets", "more", "cut", ""],
)  # fmt: skip
def test_golden_crops_that_are_none(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="is no golden crop"):
        golden_from_bytes(data, SPEC)


@pytest.mark.parametrize(("crops", "dtype"), [(17, np.float32), (1, np.int32), (1, np.complex64), (1, "U1")])
def test_golden_crops_of_another_number_or_type(crops: int, dtype: Any) -> None:
    out = io.BytesIO()
    np.savez(out, crops=np.zeros((crops, 1, SIZE, SIZE), np.uint8), keypoints=np.zeros((crops, 68, 2), dtype))
    with pytest.raises(IntegrityError, match="is no golden crop"):
        golden_from_bytes(out.getvalue(), SPEC)


@pytest.mark.parametrize("data", [None, 5, [[1, 2], [3, 4]], "image"])
def test_a_frame_of_no_array(data: Any) -> None:
    with pytest.raises(ImageError, match="a frame's data must be a numpy array, got"):
        Frame(data, "gray")


@pytest.mark.parametrize(
    "change",
    [
        {"strides": "abc"},
        {"strides": [600]},
        {"strides": 5},
        {"shape": [1.5, 2, 3]},
        {"shape": ["a"]},
        {"data": [None]},
    ],
)
def test_a_device_array_that_describes_itself_wrongly(change: dict[str, Any]) -> None:
    interface = {"shape": (90, 200, 3), "data": (4096, False), "typestr": "|u1", "strides": (600, 3, 1), "version": 3}
    with pytest.raises(ImageError, match=r"has no usable __cuda_array_interface__|must be uint8") as error:
        DeviceFrame.from_cuda_array_interface(SimpleNamespace(__cuda_array_interface__=interface | change), "bgr")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "tree",
    [{}, 5, None, {"dict": True}, {"dict": [[1]]}, {"tensor": "9"}, {"tensor": "0"}, {"list": 3},
     {"tensor": "0", "channels_last": True}, {"tensor": "a" * 100_000},
     {"dict": [[{"list": []}, 1]]}],
)  # fmt: skip
def test_a_damaged_training_state(tree: Any, tmp_path: Path) -> None:
    SafetensorsIO().save_checkpoint({"a": torch.zeros(2)}, tmp_path / "s")
    (tmp_path / "s" / "tree.json").write_text(json.dumps(tree))
    with pytest.raises(BundleError, match=r"the training state at .* is damaged|there is no training state"):
        SafetensorsIO().load_checkpoint(tmp_path / "s")


@pytest.mark.parametrize(
    "config", [[], 5, {"reduce": 0}, {"reduce": 7}, {"reduce": "1"}, {"reduce": True}, {"reduce": 1e9}]
)
def test_a_checkpoint_of_an_odd_configuration(config: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"")
    files = {"checkpoint.safetensors": file_entry(tmp_path / "checkpoint.safetensors", "checkpoint")}
    Manifest(SPEC, files, training={"config": config}).write(tmp_path)
    with pytest.raises(BundleError, match="training config needs a reduce that divides the crop's size"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"training": {"sources": 5}}, {"training": {"sources": [5]}}, {"accuracy": {"set": 5}},
        {"accuracy": {"set": {"nme": "low", "failures": 0, "faces": 1}}},
    ],
)  # fmt: skip
def test_a_manifest_that_can_not_be_shown(fields: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"the manifest can't be shown as text .* use --json"):
        print_bundle("b", Manifest(SPEC, **fields), {})


def test_a_manifest_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    training = {"sources": [{"name": "\x1b[2J\u202e"}], "git_revision": "\x07"}
    files = {"model.onnx": FileEntry("[/red]" * 9, 1, "[/red]", made={"layers": {"\x1b[31m\x1b]0;": 3}})}
    print_bundle("b", Manifest(SPEC, files, training=training), {"model.onnx": "ok"})
    out = capsys.readouterr().out
    assert "[/red]" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_names_in_a_graph_that_are_no_text() -> None:
    data = tiny_graph().SerializeToString().replace(b"keypoints", b"keypo\xff\xffts")
    with pytest.raises(BackendError, match="names its inputs or outputs in bytes that are no text"):
        opened(data)


def test_a_tensor_of_a_type_that_onnx_does_not_have(tmp_path: Path) -> None:
    graph = tiny_graph()
    graph.graph.value_info.add(name="x").type.tensor_type.elem_type = 33
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(ExportError, match=r"m\.onnx"):
        check_operators(tmp_path / "m.onnx")


def test_results_of_a_bench_that_lack_what_is_drawn() -> None:
    anything: Any = None
    times = times_from_turns([[0.001]])
    with pytest.raises(InputError, match="a photo's run must have stages"):
        PhotoRun("m.onnx", times, {})
    with pytest.raises(InputError, match="a photo's size must be its height and width"):
        Setup("b", "a.png", "0", (480,), 1, "Haar", anything, anything)
    with pytest.raises(InputError, match="a load average must have numbers, or be null"):
        Bench(anything, "", (), None, (), (), anything, {})


def test_messages_stay_short(tmp_path: Path) -> None:
    (tmp_path / "a.pts").write_text("version: 1\nn_points: 68\n{\n" + "a" * 100_000 + "\n}\n")
    (tmp_path / "a.csv").write_text("b" * 100_000 + ".png" + ",1" * 3 + "\n")
    (tmp_path / "b.csv").write_text("c.png," + "a" * 100_000 + ",1" * 135 + "\n")
    (tmp_path / "c.csv").write_text("d" * 100_000 + ".png" + ",1,2" * 68 + "\n")
    for path in (tmp_path, *tmp_path.glob("*.csv")):
        with pytest.raises(DataError) as error:
            read_source(path)
        assert len(str(error.value)) < 1000
