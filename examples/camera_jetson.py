"""Keypoints of a live camera: GStreamer frames, their luma plane as it is, one JSON line a frame.

What it does    takes the newest NV12 frame, follows the faces by kp_runtime.Tracker, as `kp run` does, prints a
                JSON line, and with `--drawn` writes a video. A face that is lost is in no line. A frame that comes
                while one is worked on is dropped and not counted; a gap in time_s shows it
The lines       time_s (the frame's time in the pipeline, null where it has none), unix_s (the machine's clock when
                the frame was taken), height, width, faces: track (the face's number), box_xyxy (where its points
                were looked for), keypoints_xy (smoothed), lost_score
What it needs   pip install 'kp-edge[image]' and an engine (on a Jetson: TensorRT and 'kp-edge[cuda12]');
                apt install python3-gi gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0, and a Python
                that sees them: python3 -m venv --system-site-packages
How to run      python examples/camera_jetson.py BUNDLE --backend tensorrt
                A PC with a webcam: --pipeline "v4l2src ! videoconvert ! video/x-raw,format=NV12 !
                appsink name=frames drop=true max-buffers=1 sync=false"
What was run    here, on an x86-64 CPU with GStreamer 1.22: a made-up video from files, the CPU engine.
                Not run: a Jetson, its camera elements (nvarguscamerasrc, nvvidconv), TensorRT
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import kp_runtime
from kp_runtime.frame import cv2_name
from kp_runtime.video import draw_tracks

# nvvidconv copies from the camera's memory to the CPU's; appsink keeps the newest frame alone
JETSON_CAMERA = (
    "nvarguscamerasrc ! video/x-raw(memory:NVMM),format=NV12,width=1920,height=1080,framerate=30/1 ! "
    "nvvidconv ! video/x-raw,format=NV12 ! appsink name=frames drop=true max-buffers=1 sync=false"
)
LUMA_FIRST = ("NV12", "NV21", "I420", "YV12", "GRAY8")
"""GStreamer's formats whose first plane is luma, a byte a pixel."""


def luma_plane(data: Any, size_hw: tuple[int, int], stride: int, offset: int = 0) -> NDArray[np.uint8]:
    """The luma plane in a buffer, `(h, w)` uint8, not copied.

    Args:
        data: the buffer's bytes.
        size_hw: the picture's height and width in pixels.
        stride: bytes from one row to the next; hardware pads rows.
        offset: where the plane begins.

    Raises:
        ImageError: the plane does not lie in the buffer.
    """
    height, width = size_hw
    if stride < width or offset < 0 or offset + (height - 1) * stride + width > len(data):
        raise kp_runtime.ImageError(
            f"a {width} x {height} plane with rows {stride} bytes apart from byte {offset} on does not lie in a "
            f"buffer of {len(data)} bytes; check the caps before appsink"
        )
    return np.ndarray(size_hw, np.uint8, data, offset, (stride, 1))


@contextlib.contextmanager
def frame_of(sample: Any) -> Iterator[kp_runtime.Frame]:
    """A sample's luma plane; valid within the block alone, as the camera uses the memory again."""
    from gi.repository import Gst, GstVideo

    info = GstVideo.VideoInfo.new_from_caps(sample.get_caps())
    if info.finfo.name not in LUMA_FIRST:
        raise kp_runtime.ImageError(
            f"the frames are {info.finfo.name}, wanted is one of {', '.join(LUMA_FIRST)}; put "
            "videoconvert ! video/x-raw,format=NV12 (on a Jetson nvvidconv) before appsink"
        )
    buffer = sample.get_buffer()
    # what the producer says of this very buffer, else what the caps say of all
    layout = GstVideo.buffer_get_video_meta(buffer) or info
    is_full = info.colorimetry.range == getattr(GstVideo.VideoColorRange, "0_255")
    ok, mapped = buffer.map(Gst.MapFlags.READ)
    if not ok:
        raise kp_runtime.ImageError("the frame can't be read by the CPU; put nvvidconv ! video/x-raw before appsink")
    try:
        plane = luma_plane(mapped.data, (info.height, info.width), layout.stride[0], layout.offset[0])
        yield kp_runtime.Frame(plane, "gray", "full" if is_full else "limited")
    finally:
        buffer.unmap(mapped)


class Camera:
    """The samples of a GStreamer pipeline with an `appsink name=frames`.

    Raises:
        KpError: GStreamer is missing, or the pipeline can't be built, started, or stops with an error.
    """

    def __init__(self, pipeline: str, patience_s: float = 5) -> None:
        try:
            import gi

            gi.require_version("Gst", "1.0")
            gi.require_version("GstApp", "1.0")
            gi.require_version("GstVideo", "1.0")
            from gi.repository import GLib, Gst, GstApp  # noqa: F401  GstApp gives appsink its methods
        except (ImportError, ValueError) as error:
            raise kp_runtime.BackendError(
                f"GStreamer can't be used from this Python ({error}); run: apt install python3-gi "
                "gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0, in a venv made with --system-site-packages"
            ) from error
        Gst.init(None)
        self._gst, self._patience_s = Gst, patience_s
        try:
            self._pipeline = Gst.parse_launch(pipeline)
        except GLib.Error as error:
            raise kp_runtime.InputError(f"the pipeline can't be built: {error.message}") from error
        found = self._pipeline.get_by_name("frames") if isinstance(self._pipeline, Gst.Bin) else None
        if found is None:
            raise kp_runtime.InputError("the pipeline has no element named frames; end it with: appsink name=frames")
        self._sink = found

    def __iter__(self) -> Iterator[Any]:
        """Samples until the stream ends."""
        gst = self._gst
        try:
            if self._pipeline.set_state(gst.State.PLAYING) == gst.StateChangeReturn.FAILURE:
                raise kp_runtime.InputError(f"the pipeline can't be started: {self._error()}")
            while True:
                sample = self._sink.try_pull_sample(int(self._patience_s * gst.SECOND))
                if sample is not None:
                    yield sample
                elif reason := self._error():
                    raise kp_runtime.InputError(f"the pipeline stopped: {reason}")
                elif self._sink.props.eos:
                    return
                else:
                    raise kp_runtime.InputError(f"no frame came for {self._patience_s:g} s; is the camera connected?")
        finally:
            self._pipeline.set_state(gst.State.NULL)

    def _error(self) -> str | None:
        message = self._pipeline.get_bus().pop_filtered(self._gst.MessageType.ERROR)
        return None if message is None else f"{message.src.get_name()}: {message.parse_error()[0].message}"


class VideoFile:
    """Frames with their faces drawn, as a Motion JPEG `.avi`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._size_hw = (0, 0)
        self._writer: Any = None

    def write(self, frame: kp_runtime.Frame, tracks: Sequence[kp_runtime.Track]) -> None:
        """Adds a frame; the first one sets the size, and OpenCV would leave out those of another."""
        import cv2

        height, width = frame.size_hw
        if self._writer is None:
            name, self._size_hw = cv2_name(self._path), frame.size_hw
            self._writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*"MJPG"), 30, (width, height))
            if not self._writer.isOpened():
                raise kp_runtime.InputError(f"{self._path} can't be written as a video; give a path that ends in .avi")
        if frame.size_hw != self._size_hw:
            raise kp_runtime.ImageError(
                f"the frames change from {self._size_hw[1]} x {self._size_hw[0]} to {width} x {height} px, and a video "
                f"has one size; {self._path} ends there, start again with another --drawn"
            )
        self._writer.write(draw_tracks(frame, tracks))

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.release()


def json_of(track: kp_runtime.Track) -> dict[str, Any]:
    """A face as plain data, pixels to a thousandth."""
    return {
        "track": track.id,
        "box_xyxy": np.round(track.box_xyxy, 3).tolist(),
        "keypoints_xy": np.round(track.xy.astype(np.float64), 3).tolist(),
        "lost_score": round(track.lost_score, 3),
    }


def run(options: argparse.Namespace) -> None:
    """Frame after frame, until the stream ends or the program is stopped."""
    camera = Camera(options.pipeline)
    model = kp_runtime.load(options.bundle, options.backend)
    model.check_boxes()
    model.warmup()
    report = model.backend.report
    print(f"{report.file} on {report.backend}", file=sys.stderr)
    detector = kp_runtime.load_detector(options.detector)
    tracker = kp_runtime.Tracker(model, detector, kp_runtime.TrackerSettings(detect_every=options.detect_every))
    video = VideoFile(options.drawn) if options.drawn else None
    began = 0.0
    try:
        for sample in camera:
            unix_s, nanoseconds = time.time(), sample.get_buffer().pts  # since the pipeline started, or all bits set
            time_s = nanoseconds / 1e9 if nanoseconds < 2**64 - 1 else None
            if time_s is not None:
                began = time.monotonic() - time_s
            with frame_of(sample) as frame:
                tracks = tracker(frame, time.monotonic() - began if time_s is None else time_s)
                if video:
                    video.write(frame, tracks)
            height, width = frame.size_hw
            line = {"time_s": time_s, "unix_s": round(unix_s, 3), "height": height, "width": width}
            print(json.dumps({**line, "faces": [json_of(track) for track in tracks]}), flush=True)
    finally:
        if video:
            video.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", help="folder of the model's bundle")
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, ort-cpu, ...")
    parser.add_argument("--pipeline", default=JETSON_CAMERA, help="GStreamer's, with an appsink name=frames")
    often = "frames from detection to detection; while a face is lost or none is there, 5 if N is more"
    parser.add_argument("--detect-every", type=int, default=15, metavar="N", help=often)
    parser.add_argument("--detector", default="auto", metavar="NAME", help="own=BUNDLE, haar, yunet=FILE or auto")
    parser.add_argument("--drawn", metavar="FILE", help="write a video with the points drawn, an .avi")
    options = parser.parse_args()
    if options.detect_every < 1:
        parser.error("--detect-every must be 1 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the camera is let go
    try:
        run(options)
    except kp_runtime.KpError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # whoever read the lines has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
