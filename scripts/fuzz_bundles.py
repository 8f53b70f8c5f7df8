"""Bundles and what lies in them: manifests, signatures, golden crops, models, plans, weights, training states.

Each function makes valid files in a folder once and gives a case: it damages them by a random generator,
reads them, and checks what it got. A case raises a `KpError` or returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fuzz_mutate import mutated_bytes, mutated_document

ROOT = Path(__file__).resolve().parents[1]
Case = Callable[[random.Random], object]


def manifest_case(folder: Path) -> Case:
    """manifest.json: parsed, its files compared, shown as kp inspect does, and written again."""
    from kp_cli.report import print_bundle
    from kp_runtime.errors import BundleError
    from kp_runtime.manifest import Manifest
    from tests.models import tiny_bundle

    bundle = tiny_bundle(folder / "b")
    real = json.loads((ROOT / "engines/resnet18-68-lite/manifest.json").read_text(encoding="utf-8"))
    seeds = [json.loads((bundle / "manifest.json").read_text(encoding="utf-8")), real]

    def case(rng: random.Random) -> None:
        manifest = Manifest.from_bytes(mutated_document(rng, rng.choice(seeds)))
        states = {}
        for name in manifest.files:
            assert (bundle / name).parent == bundle
            assert Path(name).name == name
            try:
                assert manifest.check_file(bundle, name).parent == bundle
                states[name] = "ok"
            except BundleError as error:
                states[name] = str(error)
        if rng.random() < 0.1:
            print_bundle(bundle, manifest, states)
            manifest.write(folder / "again")
            again = Manifest.read(folder / "again")
            assert json.dumps(dataclasses.asdict(again)) == json.dumps(dataclasses.asdict(manifest))

    return case


def bundle_case(folder: Path) -> Case:
    """A bundle's folder with files exchanged for others, links, folders, pipes and cut ones."""
    import shutil

    from kp_runtime import load
    from tests.models import tiny_bundle

    whole = tiny_bundle(folder / "whole")
    names = [path.name for path in whole.iterdir()]
    (folder / "outside").write_bytes((whole / "model.fp32.onnx").read_bytes())
    want = load(whole, threads=1).backend.infer(np.zeros((1, 1, 64, 64), np.uint8))

    def case(rng: random.Random) -> None:
        bundle = folder / "b"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(whole, bundle)
        victim = bundle / rng.choice(names)
        data = victim.read_bytes()
        victim.unlink()
        action = rng.randrange(7)
        if action == 0:
            victim.symlink_to(rng.choice(["/dev/zero", "/etc/passwd", "../outside", victim.name, "golden.npz"]))
        elif action == 1:
            os.mkfifo(victim)
        elif action == 2:
            victim.mkdir()
        elif action == 3:
            with open(victim, "wb") as file:
                file.truncate(rng.choice((0, 1, len(data), 1 << 40)))
        elif action in (4, 5):
            victim.write_bytes(mutated_bytes(rng, data))
        model = load(bundle, threads=1)
        assert np.allclose(model.backend.infer(np.zeros((1, 1, 64, 64), np.uint8)), want)

    return case


def detector_case(folder: Path) -> Case:
    """A face detector's bundle: its manifest, and its files with the manifest made to fit them."""
    import shutil

    from kp_runtime.center_detector import CenterDetector
    from kp_runtime.manifest import DetectorManifest

    shutil.copytree(ROOT / "engines/face-detector", folder / "b")
    page, bundle = folder / "b/manifest.json", folder / "b"
    document = json.loads(page.read_text(encoding="utf-8"))
    names = [name for name, entry in document["files"].items() if entry["kind"] in ("onnx", "golden")]
    whole = {name: (bundle / name).read_bytes() for name in names}
    image = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)

    def case(rng: random.Random) -> None:
        if rng.random() < 0.6:
            page.write_bytes(mutated_document(rng, document))
            DetectorManifest.read(bundle)
            return
        name = rng.choice(names)
        data = mutated_bytes(rng, whole[name])
        try:
            (bundle / name).write_bytes(data)
            entry = document["files"][name] | {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            page.write_text(json.dumps(document | {"files": document["files"] | {name: entry}}), encoding="utf-8")
            boxes = CenterDetector(bundle, threads=1)(image)
            assert boxes.ndim == 2
            assert np.isfinite(boxes).all()
        finally:
            (bundle / name).write_bytes(whole[name])

    return case


def signature_case(folder: Path) -> Case:
    """Signed bundles: damaged signatures, manifests and keys. Only the untouched ones may pass."""
    from kp_export.sign import new_key, sign_bundle
    from kp_runtime.manifest import Manifest
    from tests.models import tiny_bundle

    bundle = tiny_bundle(folder / "b")
    key = new_key(folder / "k.pem").read_bytes()
    signature = sign_bundle(bundle, folder / "k.pem")
    whole = signature.read_bytes(), (bundle / "manifest.json").read_bytes()

    def case(rng: random.Random) -> None:
        kind = rng.randrange(3)
        parts = [*whole, key]
        parts[kind] = mutated_bytes(rng, parts[kind])
        signature.write_bytes(parts[0])
        (bundle / "manifest.json").write_bytes(parts[1])
        Manifest.read(bundle, parts[2])
        assert (parts[0], parts[1]) == whole, "a changed manifest or signature was taken"

    return case


def golden_case(folder: Path) -> Case:
    """golden.npz: damaged archives, and arrays and archives that promise what they do not hold."""
    from kp_runtime.errors import BackendError
    from kp_runtime.golden import check_golden_crop, golden_from_bytes
    from kp_runtime.preprocess_cpu import crops_from_frame
    from kp_runtime.spec import ModelSpec

    spec = ModelSpec("m", size=64, lost_limit=0.5)
    crops = np.zeros((1, 1, 64, 64), np.uint8)
    outputs = {name: np.zeros((1, *shape), np.float32) for name, shape in spec.outputs.items()}
    source = {"image": np.zeros((4, 4, 3), np.uint8), "box_xyxy": np.array([0.0, 1, 2, 3])}
    plain, packed = io.BytesIO(), io.BytesIO()
    np.savez(plain, crops=crops, **outputs, **source)
    np.savez_compressed(packed, crops=crops, **outputs, **source)

    def array(rng: random.Random) -> bytes:
        shape = rng.choice(
            ["(1, 1, 64, 64)", "(10**12,)", f"({10**12},)", "(-1,)", f"({2**62}, {2**62})", "(1,) * 99", "()"]
        )
        descr = rng.choice(
            ["'|u1'", "'<f4'", "'|O'", "'<U99999999'", "'|V0'", "[('a', '<f4')]", "'<M8[s]'", "'<c16'", "5"]
        )
        head = f"{{'descr': {descr}, 'fortran_order': {rng.choice(['True', 'False', '3'])}, 'shape': {shape}}}"
        if rng.random() < 0.1:
            head = rng.choice(("[" * 3000, "(" * 100_000, "9" * 5000, "'" + "a" * 100_000 + "'"))
        data = head.encode() + b"\n"
        return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(data)) + data + rng.choice((b"", crops.tobytes()))

    def archive(crops_npy: bytes, output_npy: bytes, method: int) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as file:
            file.writestr("crops.npy", crops_npy)
            for name in (*outputs, *source):
                file.writestr(f"{name}.npy", output_npy)
        return out.getvalue()

    methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    honest = [archive(bytes(64 << 20), b"", method) for method in methods]
    bombs = honest + [bomb.replace(struct.pack("<I", 64 << 20), struct.pack("<I", 100)) for bomb in honest]

    def case(rng: random.Random) -> None:
        seed = rng.choice((plain, packed)).getvalue()
        data = mutated_bytes(rng, seed)
        if rng.random() < 0.3:
            data = archive(array(rng), array(rng), rng.choice(methods))
        elif rng.random() < 0.02:
            data = rng.choice(bombs)
        golden = golden_from_bytes(data, spec)
        assert golden.crops.shape[1:] == (1, 64, 64)
        assert golden.keypoints.shape == (len(golden.crops), 68, 2)
        assert golden.lost_score is not None
        assert golden.lost_score.shape == (len(golden.crops),)
        with contextlib.suppress(BackendError):  # another crop
            check_golden_crop(golden, spec, crops_from_frame)

    return case


def onnx_case(folder: Path) -> Case:
    """ONNX files, opened by ONNX Runtime and run."""
    from kp_runtime.backend_ort import OrtCpuBackend
    from kp_runtime.spec import ModelSpec
    from tests.models import tiny_graph

    spec, seed = ModelSpec("m", size=64, lost_limit=0.5), tiny_graph(64)
    whole, crops = seed.SerializeToString(), np.full((2, 1, 64, 64), 7, np.uint8)

    def damaged(rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return mutated_bytes(rng, whole)
        model = type(seed).FromString(whole)
        weight, node = rng.choice(model.graph.initializer), rng.choice(model.graph.node)
        action = rng.randrange(7)
        if action == 0:
            weight.dims.append(rng.choice((0, -1, 1, 3, 2**31, 2**62)))
        elif action == 1:
            weight.ClearField("raw_data")
            weight.data_location = 1
            for key, value in (("location", rng.choice(("w.bin", "../w", "/dev/zero", "/etc/passwd", "", "a\0b"))),
                               ("offset", rng.choice(("0", "-1", str(2**62)))), ("length", str(2**40))):  # fmt: skip
                weight.external_data.add(key=key, value=value)
        elif action == 2:
            node.op_type = rng.choice(
                ("Loop", "If", "ConstantOfShape", "Expand", "Range", "Tile", "Gather", "Nope", "")
            )
        elif action == 3:
            node.input.append(rng.choice(("", "crops", "keypoints", "nope")))
        elif action == 4:
            weight.data_type = rng.randrange(-1, 30)
        elif action == 5:
            model.opset_import[0].version = rng.choice((-1, 0, 1, 7, 13, 99, 2**62))
        else:
            weight.raw_data = rng.choice((b"", b"\xff" * len(weight.raw_data), weight.raw_data * 2))
        return model.SerializeToString()

    def case(rng: random.Random) -> None:
        data = damaged(rng)
        answer = OrtCpuBackend(Path("model.onnx"), spec, 1, read=lambda: data).answer(crops)
        for array, shape in zip(answer.outputs(), ((2, 68, 2), (2, 1)), strict=True):
            assert array.shape == shape
            assert array.dtype == np.float32

    return case


def operators_case(folder: Path) -> Case:
    """ONNX files as the check before a TensorRT build reads them."""
    from kp_export.operators import operator_problems
    from tests.models import tiny_graph

    whole, path = tiny_graph(64).SerializeToString(), folder / "model.onnx"

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated_bytes(rng, whole))
        operator_problems(path)

    return case


def plan_case(folder: Path) -> Case:
    """A plan's entry in the manifest, up to where TensorRT would be asked; and the inspector's JSON."""
    from kp_export.plan_options import PlanOptions
    from kp_export.precision_receipt import receipt_from_inspector
    from kp_runtime.backend_trt import plan_mismatch
    from kp_runtime.manifest import FileEntry, Manifest

    made = {
        "compute_capability": "8.7", "tensorrt": "10.3.0.30", "cuda": "12.6", "gpu": "Orin", "seconds": 3.0,
        "options": dataclasses.asdict(PlanOptions()), "rebuild": "kp plan BUNDLE --precision fp16",
    }  # fmt: skip
    entry = dataclasses.asdict(FileEntry("0" * 64, 5, "plan", "fp16", None, made))
    manifest = {"schema": 1, "spec": {"name": "m"}, "files": {"model.plan": entry}}
    tensor = {"Name": "a", "Location": "Device", "Dimensions": [1, 64, 56, 56], "Format/Datatype": "Half"}
    layer = {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor],
             "Weights": {"Type": "Half", "Count": 4096}}  # fmt: skip
    inspector = {"Layers": [layer, {**layer, "Name": "b", "LayerType": "Reformat"}], "Bindings": ["crops"]}
    machines = [SimpleNamespace(arch=arch, cuda=cuda) for arch in ("sm_87", "sm_90") for cuda in ("12.6", "13.0")]
    runtimes = [
        SimpleNamespace(__name__=n, __version__=v)
        for n in ("tensorrt", "tensorrt_lean")
        for v in ("10.3.0.30", "11.4.0")
    ]

    def case(rng: random.Random) -> None:
        if rng.random() < 0.5:
            receipt_from_inspector(mutated_document(rng, inspector).decode(errors="replace"), 8)
            return
        for made_plan in Manifest.from_bytes(mutated_document(rng, manifest)).files.values():
            reason = plan_mismatch(made_plan, rng.choice(machines), rng.choice(runtimes))
            assert reason is None or (isinstance(reason, str) and len(reason) < 3000)

    return case


def state_case(folder: Path) -> Case:
    """A training state: a tree in JSON and its tensors."""
    import torch

    from kp_train.checkpoint import SafetensorsIO

    state = {"epoch": 3, "state_dict": {"a": torch.zeros(2, 3), "b": torch.ones(1, 2, 2, 2)}, "list": [1, (2.5, None)]}
    SafetensorsIO().save_checkpoint(state, folder / "s")
    tree, tensors = folder / "s" / "tree.json", folder / "s" / "tensors.safetensors"
    document, whole = json.loads(tree.read_text()), tensors.read_bytes()

    def case(rng: random.Random) -> None:
        which = rng.random()
        tree.write_bytes(mutated_document(rng, document) if which < 0.6 else json.dumps(document).encode())
        tensors.write_bytes(mutated_bytes(rng, whole) if which > 0.5 else whole)
        assert isinstance(SafetensorsIO().load_checkpoint(folder / "s"), dict)

    return case


def checkpoint_case(folder: Path) -> Case:
    """A checkpoint whose hash holds: damaged weights, and a damaged manifest beside good ones."""
    import torch

    from kp_runtime.manifest import Manifest, file_entry
    from kp_runtime.spec import ModelSpec
    from kp_train.checkpoint import CHECKPOINT_NAME, load_checkpoint, save_checkpoint
    from kp_train.model import KeypointNet

    save_checkpoint(
        folder / "b", KeypointNet(64), Manifest(ModelSpec("m", size=64), training={"config": {"reduce": 1}})
    )
    file, page = folder / "b" / CHECKPOINT_NAME, folder / "b" / "manifest.json"
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    document = json.loads(page.read_text())

    def case(rng: random.Random) -> None:
        if rng.random() < 0.3:
            page.write_bytes(mutated_document(rng, document))
            file.write_bytes(whole)
        else:
            file.write_bytes(mutated_bytes(rng, whole[:head]) + (whole[head:] if rng.random() < 0.2 else b""))
            entry = dataclasses.asdict(file_entry(file, "checkpoint"))
            page.write_text(json.dumps(document | {"files": {CHECKPOINT_NAME: entry}}))
        net, manifest = load_checkpoint(folder / "b")
        with torch.inference_mode():
            assert net(torch.zeros(1, 1, manifest.spec.size, manifest.spec.size, dtype=torch.uint8)).shape == (1, 68, 2)

    return case
