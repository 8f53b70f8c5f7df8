"""What people feed the run-time and training: images, boxes, frames, labels, results of the bench.

Built as `fuzz_bundles` says.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fuzz_mutate import hostile_number, mutated_bytes, mutated_document, mutated_json, mutated_text

Case = Callable[[random.Random], object]


def image_case(folder: Path) -> Case:
    """Image files: damaged, and with sizes in their headers that nobody could hold."""
    from kp_runtime.frame import image_from_file

    seeds, path = _images(), folder / "image"

    def case(rng: random.Random) -> None:
        path.write_bytes(_damaged_image(rng, seeds))
        image = image_from_file(path)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.size

    return case


def _images() -> dict[str, bytes]:
    import cv2

    from kp_train.synthetic import drawn_face

    picture = drawn_face(np.random.default_rng(0), (40, 48))[0]
    return {suffix: cv2.imencode(suffix, picture)[1].tobytes() for suffix in (".png", ".jpg", ".bmp", ".webp", ".tiff")}


def _damaged_image(rng: random.Random, seeds: dict[str, bytes]) -> bytes:
    kind = rng.choice(list(seeds))
    data = bytearray(seeds[kind])
    sizes = (0, 1, 5, 255, 4096, 20_000, 65_535, 2**20, 2**31 - 1, 2**32 - 1)
    if rng.random() < 0.25:
        width, height = rng.choice(sizes), rng.choice(sizes)
        if kind == ".png":
            data[16:24] = struct.pack(">II", width, height)
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        elif kind == ".bmp":
            data[18:26] = struct.pack("<II", width, height)
        elif kind == ".jpg":
            at = data.find(b"\xff\xc0")
            data[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
        return bytes(data)
    return mutated_bytes(rng, bytes(data))


def boxes_case(folder: Path) -> Case:
    """Face boxes of any kind, on an image and through a whole model."""
    from kp_runtime import load
    from tests.models import tiny_bundle

    model = load(tiny_bundle(folder / "b"), threads=1)
    image = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    odd = ["abc", None, 5, [[]], [[1, 2, 3]], [[1, 2, 3, 4], [5]], {"a": 1}, [["a", "b", "c", "d"]], [[[1, 2, 3, 4]]],
           np.zeros((0, 4)), np.zeros((3, 0)), np.array([[1 + 2j, 2, 3, 4]]), np.array([[True, False, True, True]]),
           [[10**400, 1, 2, 3]], np.array([["1", "1", "90", "90"]]), [[None] * 4], object()]  # fmt: skip

    def case(rng: random.Random) -> None:
        if rng.random() < 0.1:
            boxes: Any = rng.choice(odd)
        else:
            boxes = [[10.0, 10.0, 90.0, 100.0] for _ in range(rng.choice((1, 1, 2, 5)))]
            for _ in range(rng.choice((1, 2, 4))):
                number = hostile_number(rng) if rng.random() < 0.6 else rng.uniform(-2e4, 2e4)
                rng.choice(boxes)[rng.randrange(4)] = number
        keypoints = model(image, boxes)
        assert keypoints.xy.shape == (len(keypoints.boxes_xyxy), 68, 2)
        assert np.isfinite(keypoints.xy).all()

    return case


def frame_case(folder: Path) -> Case:
    """Frames of any shape, dtype, layout and strides, on the host and as a GPU library describes its own."""
    from kp_runtime import Frame, load
    from kp_runtime.device_frame import DeviceFrame
    from tests.models import tiny_bundle

    model = load(tiny_bundle(folder / "b"), threads=1)
    block = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    layouts = ("bgr", "rgb", "bgra", "rgba", "gray", "nv12", "i420", "yuyv", "", "BGR")
    lengths = (0, 1, 2, 3, 4, 5, 6, 63, 64, 90, 200, 256)

    fitting = {"bgr": (90, 200, 3), "rgba": (64, 63, 4), "gray": (90, 64), "nv12": (96, 200), "i420": (63, 64)}

    def array(rng: random.Random) -> Any:
        shape = [rng.choice(lengths) for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4)))]
        if len(shape) == 3 and rng.random() < 0.8:
            shape[2] = rng.choice((1, 3, 4))
        while np.prod(shape) > block.size:
            shape[rng.randrange(len(shape))] = 2
        found = block[: int(np.prod(shape))].reshape(shape)
        action = rng.randrange(9)
        if action == 0 and found.ndim:
            found = found[tuple(slice(None, None, rng.choice((1, 2, -1))) for _ in shape)]
        elif action == 1:
            found = found.T
        elif action == 2:
            long = rng.choice(((40_000, 90), (90, 40_000), (2**31, 4), (33_000, 33_000)))
            found = np.broadcast_to(np.uint8(7), long if rng.random() < 0.5 else (*long, 3))
        elif action == 3:
            return found.astype(rng.choice((np.int8, np.uint16, np.float32, bool, object)))
        elif action == 4:
            return rng.choice((None, "image", [[1, 2], [3, 4]], b"abc", 5, found.tolist() if found.size < 1000 else 1))
        elif action == 5 and found.size:
            found = np.lib.stride_tricks.as_strided(
                found, found.shape, [0 if rng.random() < 0.5 else s for s in found.strides]
            )
        return found

    def case(rng: random.Random) -> None:
        if rng.random() < 0.3:
            interface = mutated_json(
                rng,
                {"shape": [90, 200, 3], "data": [4096, False], "typestr": "|u1", "strides": [600, 3, 1], "version": 3},
            )
            owner = SimpleNamespace(__cuda_array_interface__=interface)
            frame = DeviceFrame.from_cuda_array_interface(owner, rng.choice(layouts))
            assert min(frame.size_hw) > 0
            assert frame.pitch > 0
            return
        data = array(rng)
        if rng.random() < 0.4:
            layout, shape = rng.choice(list(fitting.items()))
            window = block[: 256 * 256 * 4].reshape(256, 256, 4)[: shape[0], : shape[1], : (*shape, 1)[2]]
            data = Frame(window if len(shape) == 3 else window[:, :, 0], layout, rng.choice(("full", "limited")))
        elif rng.random() < 0.7:
            data = Frame(data, rng.choice(layouts), rng.choice(("full", "limited", "half")))
        keypoints = model(data, [[1, 1, 60.0, 60.0]], layout=rng.choice(("bgr", "rgb", "gray")))
        assert keypoints.xy.shape == (1, 68, 2)
        assert np.isfinite(keypoints.xy).all()

    return case


def bench_case(folder: Path) -> Case:
    """Results of kp bench: read, compared, and drawn."""
    from kp_runtime.bench_compare import compared
    from kp_runtime.bench_page import bench_page
    from kp_runtime.bench_results import (
        Bench,
        BenchSettings,
        ColdStart,
        FileRun,
        NetworkCase,
        PhotoRun,
        Setup,
        json_from_bench,
        results_from_file,
        times_from_turns,
    )  # fmt: skip
    from kp_runtime.machine import machine_from_system

    times = times_from_turns([[0.001, 0.002], [0.0015, 0.003]])
    setup = Setup("b", "a.png", "0" * 64, (40, 48), 1, "Haar", BenchSettings((1,)), machine_from_system())
    file = FileRun(
        "m.onnx", "0" * 64, 9, "fp32", "ort-cpu", 0.1, {"8": {"whole": 1.0}}, ColdStart(3, 9.0, 1.0, 3.0, None)
    )
    bench = Bench(setup, "2026-01-02T03:04:05+00:00", (0.5,), None, (file,), (NetworkCase("m.onnx", 1, 1.0, times),),
                  PhotoRun("m.onnx", times, {"read": times}), {"model.plan": "no GPU"})  # fmt: skip
    document, path = json.loads(json.dumps(json_from_bench(bench))), folder / "bench.json"

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated_document(rng, document))
        read = results_from_file(path)
        if rng.random() < 0.1:
            comparison = compared(bench, read, anyway=rng.random() < 0.8)
            bench_page(read, folder / "bench.html", comparison)

    return case


def tuned_case(folder: Path) -> Case:
    """Settings of kp tune, up to the bundle that they name."""
    from kp_runtime.manifest import Manifest
    from kp_runtime.tuned import Tuned, tuned_conditions, tuned_from_file

    machine = tuned_conditions(SimpleNamespace(name="ort-cpu"))
    tuned = Tuned("bundle", "model.onnx", "0" * 64, "ort-cpu", 2, 8, "by 4", machine)
    document, path = json.loads(json.dumps(vars(tuned))), folder / "tuned.json"

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated_document(rng, document))
        read = tuned_from_file(path)
        Manifest.read(path.parent / read.bundle)

    return case


def csv_case(folder: Path) -> Case:
    """A CSV of 68 points."""
    from kp_train.data import read_source

    text, path = _points_csv(folder), folder / "faces.csv"

    def case(rng: random.Random) -> None:
        data = mutated_text(rng, text, ",,,\n")
        if rng.random() < 0.01:
            data = rng.choice(
                (b"," * 10_000_000, b'"' + b"a" * 200_000, b"a.png" + b",1" * 1_000_000, b"\n" * 1_000_000)
            )
        path.write_bytes(data)
        source = read_source(path)
        assert all(face.xy.shape == (68, 2) and np.isfinite(face.xy).all() for face in source.faces)

    return case


def _points_csv(folder: Path) -> str:
    from kp_train.synthetic import mean_shape

    (folder / "a.png").write_bytes(_images()[".png"])
    numbers = ",".join(f"{v:.2f}" for v in (mean_shape() * 10 + 20).ravel())
    return "image," + ",".join(f"v{i}" for i in range(136)) + f"\na.png,{numbers}\na.png,{numbers}\n"


def labels_case(folder: Path) -> Case:
    """Labels of every format that kp convert reads."""
    from kp_runtime.interchange import faces_from_file, faces_to_file
    from kp_runtime.labelled_face import LabelledFace
    from kp_train.synthetic import mean_shape

    xy = (mean_shape() * 10 + 20).astype(np.float32)
    faces = [LabelledFace(f"{name}.png", xy, np.array([5.0, 5, 40, 40]), (48, 40)) for name in "ab"]
    suffixes = {"coco": "json", "csv": "csv", "parquet": "parquet", "pts": "pts"}
    kinds = list(suffixes)
    paths = {kind: folder / f"labels.{suffix}" for kind, suffix in suffixes.items()}
    for kind, path in paths.items():
        faces_to_file(faces[:1] if kind == "pts" else faces, path, kind)
    seeds = {kind: path.read_bytes() for kind, path in paths.items()}

    def case(rng: random.Random) -> None:
        kind = rng.choice(kinds)
        if kind == "coco":
            data = mutated_document(rng, json.loads(seeds[kind]))
        elif kind == "parquet":
            data = mutated_bytes(rng, seeds[kind])
        else:
            data = mutated_text(rng, seeds[kind].decode(), ",\n" if kind == "csv" else " \n")
        paths[kind].write_bytes(data)
        found = faces_from_file(paths[kind], kind)
        assert all(face.xy.shape == (68, 2) and np.isfinite(face.xy).all() for face in found)
        if rng.random() < 0.2:
            faces_to_file(found, folder / "again.csv", "csv")

    return case


def effect_case(folder: Path) -> Case:
    """An effect of one's own: its TOML and its picture, put on a face."""
    import cv2

    from kp_runtime.effects import picture_from_toml
    from kp_train.synthetic import drawn_face

    image, xy = drawn_face(np.random.default_rng(0), (96, 80))
    picture = cv2.imencode(".png", np.full((12, 16, 4), 128, np.uint8))[1].tobytes()
    names = ("left_eye_0", "right_eye_0", "mouth")
    path, places = folder / "effect.toml", [2.0, 3.0, 13.5, 3.0, 8.0, 11.0]

    def case(rng: random.Random) -> None:
        what, numbers = rng.randrange(3), list(places)
        for _ in range(rng.choice((0, 1, 2)) if what == 0 else 0):
            numbers[rng.randrange(6)] = hostile_number(rng)
        anchors = (f"{name} = [{numbers[2 * i]}, {numbers[2 * i + 1]}]" for i, name in enumerate(names))
        text = "\n".join(('image = "a.png"', f'map = "{rng.choice(("mesh", "similarity"))}"', "[anchors]", *anchors))
        (folder / "a.png").write_bytes(mutated_bytes(rng, picture) if what == 1 else picture)
        path.write_bytes(mutated_text(rng, text, " \n=,") if what == 2 else text.encode())
        drawn = picture_from_toml(path)(image, xy[None])
        assert drawn.shape == image.shape
        assert drawn.dtype == np.uint8

    return case


def pts_case(folder: Path) -> Case:
    """An iBUG .pts file."""
    from kp_train.data import read_source
    from kp_train.synthetic import mean_shape

    points = "\n".join(f"{x:.3f} {y:.3f}" for x, y in mean_shape() * 10 + 20)
    text, path = f"version: 1\nn_points: 68\n{{\n{points}\n}}\n", folder / "a.pts"
    (folder / "a.png").touch()

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated_text(rng, text, " \n"))
        (face,) = read_source(folder).faces
        assert face.xy.shape == (68, 2)
        assert np.isfinite(face.xy).all()

    return case
