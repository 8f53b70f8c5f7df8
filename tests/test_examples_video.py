"""The camera loop and the ROS 2 node: frames as hardware lays them out, the loop on a made-up video."""

from __future__ import annotations

import argparse
import array
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

import kp_runtime
from tests import rclpy_double
from tests.models import tiny_bundle
from tests.rclpy_double import Header, Image

ROOT = Path(__file__).resolve().parents[1]
CAMERA = ROOT / "examples" / "camera_jetson.py"
pytestmark = pytest.mark.usefixtures("own_detector")


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `examples.camera_jetson`."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("examples.camera_jetson")


def padded(picture: np.ndarray, step: int, before: int = 0) -> bytes:
    """The rows of a picture `step` bytes apart, `before` bytes in front; what is between is noise."""
    rows = picture.reshape(len(picture), -1)
    block = np.random.default_rng(1).integers(0, 256, (len(rows), step), dtype=np.uint8)
    block[:, : rows.shape[1]] = rows
    return bytes(before) + block.tobytes()


@pytest.mark.parametrize(("stride", "offset"), [(6, 0), (8, 0), (256, 64)])
def test_the_luma_plane_lies_where_the_buffer_says(
    camera: Any, rng: np.random.Generator, stride: int, offset: int
) -> None:
    picture = rng.integers(0, 256, (4, 6), dtype=np.uint8)
    data = padded(picture, stride, offset)
    plane = camera.luma_plane(data, (4, 6), stride, offset)
    assert np.array_equal(plane, picture)
    assert np.shares_memory(plane, np.frombuffer(data, np.uint8))
    # the last row needs no padding behind it, but every pixel
    shortest = offset + 3 * stride + 6
    assert np.array_equal(camera.luma_plane(data[:shortest], (4, 6), stride, offset), picture)
    for wrong in ((data[: shortest - 1], stride, offset), (data, 5, offset), (data, stride, -1)):
        with pytest.raises(kp_runtime.ImageError, match=r"a 6 x 4 plane with rows .* does not lie in a buffer of"):
            camera.luma_plane(wrong[0], (4, 6), *wrong[1:])


def test_nobody_is_followed_where_nobody_is(
    camera: Any, astronaut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A face, then an empty room in which the detector goes on to see one."""
    photo = cv2.imread(str(astronaut), cv2.IMREAD_GRAYSCALE)
    (box,) = kp_runtime.load_detector()(photo)
    frames, detected = [photo] * 20 + [np.full_like(photo, 128)] * 60, []

    def detector(frame: kp_runtime.Frame) -> np.ndarray:
        detected.append(now[0])
        return box[None]

    def sample_of(index: int) -> SimpleNamespace:
        now[0] = index
        return SimpleNamespace(get_buffer=lambda: SimpleNamespace(pts=2**64 - 1 if index == 7 else index * 10**8))

    now = [0]
    monkeypatch.setattr(camera, "Camera", lambda pipeline: map(sample_of, range(len(frames))))
    luma = lambda sample: nullcontext(kp_runtime.Frame(frames[now[0]], "gray"))  # noqa: E731
    monkeypatch.setattr(camera, "frame_of", luma)
    monkeypatch.setattr(kp_runtime, "load_detector", lambda name: detector)
    lite = ROOT / "engines" / "resnet18-68-lite"
    camera.run(argparse.Namespace(pipeline="", bundle=lite, backend="ort-cpu", detector="", detect_every=15, drawn=""))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[face["track"] for face in line["faces"]] for line in lines] == [[1]] * 20 + [[]] * 60
    assert [line["time_s"] for line in lines[6:9]] == [0.6, None, 0.8]
    assert set(lines[0]) == {"time_s", "unix_s", "height", "width", "faces"}
    assert lines[0]["unix_s"] > 1.7e9
    face = lines[0]["faces"][0]
    assert {name: np.shape(value) for name, value in face.items()} == {
        "track": (), "box_xyxy": (4,), "keypoints_xy": (68, 2), "lost_score": (),
    }  # fmt: skip
    # new faces are looked for on every 15th frame, and in the empty room on every fifth
    assert detected == [0, 15, *range(20, 80, 5)]


def test_a_video_of_frames_that_change_their_size_ends_with_an_error(camera: Any, tmp_path: Path) -> None:
    video = camera.VideoFile(str(tmp_path / "drawn.avi"))
    video.write(kp_runtime.Frame(np.zeros((64, 96), np.uint8), "gray"), ())
    with pytest.raises(kp_runtime.ImageError, match="frames change from 96 x 64 to 48 x 32 px, and a video has one"):
        video.write(kp_runtime.Frame(np.zeros((32, 48), np.uint8), "gray"), ())
    video.close()
    assert cv2.VideoCapture(str(tmp_path / "drawn.avi")).read()[0]


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_a_video_whose_name_is_no_text_is_an_error(camera: Any, tmp_path: Path) -> None:
    """At such a text OpenCV ends the process."""
    video = camera.VideoFile(str(tmp_path / os.fsdecode(b"caf\xe9.avi")))
    with pytest.raises(kp_runtime.InputError, match="its name is no text in UTF-8, which OpenCV needs; rename it"):
        video.write(kp_runtime.Frame(np.zeros((64, 64), np.uint8), "gray"), ())


def run_camera(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, CAMERA, *words]
    return subprocess.run([str(w) for w in command], cwd=ROOT, capture_output=True, text=True, timeout=120)


needs_gi = pytest.mark.skipif(
    importlib.util.find_spec("gi") is None, reason="PyGObject (python3-gi) is not in this Python"
)


@needs_gi
def test_the_loop_on_a_made_up_video(astronaut: Path, tmp_path: Path) -> None:
    """A face that moves 4 px a frame, in rows of 402 pixels, which GStreamer pads to 404 bytes."""
    photo = cv2.imread(str(astronaut))[:300]
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.png"), photo[:, 40 - 4 * i :][:, :402])
    pipeline = (
        f"multifilesrc location={tmp_path}/%d.png caps=image/png,framerate=10/1 ! pngdec ! videoconvert ! "
        "video/x-raw,format=NV12 ! appsink name=frames sync=false"
    )
    bundle, drawn = ROOT / "engines" / "resnet18-68-lite", tmp_path / "drawn.avi"
    ended = run_camera(bundle, "--pipeline", pipeline, "--detect-every", 4, "--backend", "ort-cpu", "--drawn", drawn)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [round(line["time_s"], 3) for line in lines] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert all((line["height"], line["width"], len(line["faces"])) == (300, 402, 1) for line in lines)
    xy = np.array([line["faces"][0]["keypoints_xy"] for line in lines])
    # what the library says of the pictures, which have not been through NV12
    model, detector = kp_runtime.load(bundle, "ort-cpu"), kp_runtime.load_detector()
    tracker = kp_runtime.Tracker(model, detector, kp_runtime.TrackerSettings(detect_every=4))
    for i, line in enumerate(lines):
        (track,) = tracker(cv2.imread(str(tmp_path / f"{i}.png")), i / 10)
        assert np.linalg.norm(xy[i] - track.xy, axis=-1).max() < 1
        assert line["faces"][0]["track"] == track.id
    moved = (xy - xy[0]).mean(axis=1)
    assert np.abs(moved - [[4 * i, 0] for i in range(6)]).max() < 3
    video = cv2.VideoCapture(str(drawn))
    assert [video.read()[0] for _ in range(7)] == [True] * 6 + [False]


@needs_gi
@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("videotestsrc ! fakesink", "the pipeline has no element named frames"),
        ("nonsense ! appsink name=frames", 'the pipeline can\'t be built: no element "nonsense"'),
        ("videotestsrc ! video/x-raw,format=RGB ! appsink name=frames", "the frames are RGB, wanted is one of NV12"),
        (
            "filesrc location=/nowhere ! appsink name=frames",
            "the pipeline can't be started: filesrc0: Resource not found",
        ),
    ],
)
def test_pipelines_that_fail_end_with_one_line(bundle: Path, pipeline: str, message: str) -> None:
    ended = run_camera(bundle, "--pipeline", pipeline)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in ended.stderr


@needs_gi
def test_a_buffer_with_video_meta(rng: np.random.Generator) -> None:
    """Hardware says in GstVideoMeta where the planes of this very buffer lie."""
    data = rng.integers(0, 256, 64 + 512 * 12, dtype=np.uint8)
    program = """
import sys, gi
for name in ("Gst", "GstApp", "GstVideo"):
    gi.require_version(name, "1.0")
from gi.repository import Gst, GstVideo
from examples.camera_jetson import frame_of
Gst.init(None)
buffer = Gst.Buffer.new_wrapped(sys.stdin.buffer.read())
video = GstVideo.VideoFrameFlags.NONE, GstVideo.VideoFormat.NV12
GstVideo.buffer_add_video_meta_full(buffer, *video, 100, 8, 2, [64, 64 + 512 * 8, 0, 0], [512, 512, 0, 0])
for colorimetry in ("bt709", "1:4:0:0"):
    caps = f"video/x-raw,format=NV12,width=100,height=8,framerate=30/1,colorimetry={colorimetry}"
    with frame_of(Gst.Sample.new(buffer, Gst.Caps.from_string(caps), None, None)) as frame:
        print(frame.range, frame.data.tobytes().hex())
"""
    ended = subprocess.run([sys.executable, "-c", program], input=data.tobytes(), cwd=ROOT, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    luma = data[64 : 64 + 512 * 8].reshape(8, 512)[:, :100].tobytes().hex()
    assert ended.stdout.decode().splitlines() == [f"limited {luma}", f"full {luma}"]


def test_without_gstreamer_the_error_says_what_to_install(bundle: Path) -> None:
    if importlib.util.find_spec("gi") is not None:
        pytest.skip("this Python has PyGObject")
    ended = run_camera(bundle)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: GStreamer can't be used from this Python (No module named 'gi'); run: apt")
    assert ended.stderr.count("\n") == 1


@pytest.fixture
def ros(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node's module, on the double of rclpy."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "ros2_node")
    rclpy_double.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "kp_ros2.node", raising=False)
    return importlib.import_module("kp_ros2.node")


def message_of(encoding: str, picture: np.ndarray, **fields: Any) -> Image:
    step = picture[0].size + 5
    height = fields.pop("height", len(picture))
    return Image(
        Header("then", "camera"), height, picture.shape[1], encoding, 0, step,
        array.array("B", padded(picture, step)), **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "layout", "shape"),
    [
        ("bgr8", "bgr", (4, 6, 3)), ("rgb8", "rgb", (4, 6, 3)), ("bgra8", "bgra", (4, 6, 4)),
        ("rgba8", "rgba", (4, 6, 4)), ("mono8", "gray", (4, 6, 1)),
    ],
)  # fmt: skip
def test_packed_encodings(
    ros: Any, rng: np.random.Generator, encoding: str, layout: str, shape: tuple[int, ...]
) -> None:
    picture = rng.integers(0, 256, shape, dtype=np.uint8)
    frame = ros.frame_from_image(message_of(encoding, picture))
    assert (frame.layout, frame.range, frame.size_hw) == (layout, "full", (4, 6))
    assert np.array_equal(frame.data, picture)
    assert frame.data.base is not None  # not copied


@pytest.mark.parametrize("luma_range", ["limited", "full"])
def test_yuv_encodings_give_their_luma(ros: Any, rng: np.random.Generator, luma_range: str) -> None:
    luma = rng.integers(0, 256, (4, 6), dtype=np.uint8)
    colour = rng.integers(0, 256, (4, 6), dtype=np.uint8)
    messages = [
        message_of("nv12", np.concatenate([luma, colour[:2]]), height=4),
        message_of("nv24", np.concatenate([luma, colour, colour]), height=4),
        message_of("yuv422_yuy2", np.stack([luma, colour], axis=-1)),
        message_of("yuyv", np.stack([luma, colour], axis=-1)),
        message_of("yuv422", np.stack([colour, luma], axis=-1)),
        message_of("uyvy", np.stack([colour, luma], axis=-1)),
    ]
    for message in messages:
        frame = ros.frame_from_image(message, luma_range)
        assert (frame.layout, frame.range) == ("gray", luma_range)
        assert np.array_equal(frame.data, luma), message.encoding


def test_images_that_are_not_taken(ros: Any) -> None:
    picture = np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(kp_runtime.ImageError, match="the encoding '16UC1' is not taken, only bgr8, rgb8"):
        ros.frame_from_image(message_of("16UC1", picture))
    for changed in ({"step": 17}, {"height": 5}, {"height": 0}, {"width": 8}, {"data": array.array("B")}):
        message = message_of("bgr8", picture)
        vars(message).update(changed)
        with pytest.raises(kp_runtime.ImageError, match=r"bgr8 image with rows \d+ bytes apart does not lie in"):
            ros.frame_from_image(message)


def test_the_node_answers_each_image(ros: Any, bundle: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rclpy_double.Node, "given", {"bundle": str(bundle), "backend": "ort-cpu"})
    node = ros.KeypointsNode()
    ((kind, topic, callback, qos),) = node.subscriptions_made
    assert (kind, topic) == (Image, "image")
    assert (qos.depth, qos.reliability) == (1, rclpy_double.ReliabilityPolicy.BEST_EFFORT)
    (publisher,) = node.publishers_made
    assert publisher.topic == "keypoints"
    image = cv2.imread(str(astronaut))
    callback(message_of("bgr8", image))
    callback(message_of("bgr8", np.zeros_like(image)))
    callback(message_of("bayer_rggb8", image))
    cloud, nobody = publisher.published
    assert cloud.header == nobody.header == Header("then", "camera")
    assert [(field.name, field.offset, field.datatype, field.count) for field in cloud.fields] == [
        ("u", 0, 7, 1), ("v", 4, 7, 1),
    ]  # fmt: skip
    wanted = kp_runtime.load(bundle)(image, kp_runtime.load_detector()(image)).xy
    assert (cloud.height, cloud.width, cloud.point_step, cloud.row_step) == (len(wanted), 68, 8, 544)
    assert np.array_equal(np.frombuffer(cloud.data, np.float32).reshape(-1, 68, 2), wanted)
    assert (nobody.height, nobody.width, nobody.data) == (0, 68, b"")
    assert [kind for kind, _ in node.get_logger().lines] == ["info", "error"]
    assert "the encoding 'bayer_rggb8' is not taken" in node.get_logger().lines[1][1]


def test_what_the_model_calls_no_face_is_no_row(ros: Any, astronaut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = cv2.imread(str(astronaut))
    (box,) = kp_runtime.load_detector()(image)
    boxes = np.array([[300, 400, 400, 500], box])
    monkeypatch.setattr(kp_runtime, "load_detector", lambda name: lambda frame: boxes)
    lite = str(ROOT / "engines" / "resnet18-68-lite")
    monkeypatch.setattr(rclpy_double.Node, "given", {"bundle": lite, "backend": "ort-cpu"})
    node = ros.KeypointsNode()
    node.on_image(message_of("bgr8", image))
    node.on_image(message_of("bgr8", np.full_like(image, 128)))
    cloud, nobody = node.publishers_made[0].published
    assert (cloud.height, nobody.height, nobody.data) == (1, 0, b"")
    wanted = kp_runtime.load(lite, "ort-cpu")(image, boxes).xy[1]
    assert np.array_equal(np.frombuffer(cloud.data, np.float32).reshape(68, 2), wanted)


def test_no_model_of_whole_frames_is_taken(
    ros: Any, camera: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle(tmp_path / "tiny", margin=1.0, box="frame")
    monkeypatch.setattr(camera, "Camera", lambda pipeline: [])
    monkeypatch.setattr(rclpy_double.Node, "given", {"bundle": str(bundle)})
    with pytest.raises(kp_runtime.InputError, match="tiny sees whole frames, not face boxes"):
        camera.run(argparse.Namespace(pipeline="", bundle=bundle, backend="ort-cpu"))
    with pytest.raises(kp_runtime.InputError, match="tiny sees whole frames, not face boxes"):
        ros.KeypointsNode()


def test_the_program_ends_cleanly(ros: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(node: Any) -> None:
        raise rclpy_double.ExternalShutdownException

    calls = rclpy_double.install(monkeypatch, stopped)
    monkeypatch.delitem(sys.modules, "kp_ros2.node")
    node = importlib.import_module("kp_ros2.node")
    monkeypatch.setattr(rclpy_double.Node, "given", {"bundle": str(bundle)})
    node.main()
    assert calls == ["init", "spin", "shutdown"]
    monkeypatch.setattr(rclpy_double.Node, "given", {"bundle": "nowhere"})
    with pytest.raises(SystemExit, match=r"^error: nowhere is not a bundle"):
        node.main()
    assert calls[3:] == ["init", "shutdown"]


def test_a_wrong_range_ends_the_node_at_its_start(ros: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rclpy_double.Node, "given", {"bundle": str(bundle), "luma_range": "ful"})
    with pytest.raises(SystemExit, match=r"^error: the range must be 'full' or 'limited', got 'ful'$"):
        ros.main()
