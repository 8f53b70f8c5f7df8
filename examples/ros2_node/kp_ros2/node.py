"""A ROS 2 node: images in, the 68 keypoints of every face out.

What it does    takes the newest image of the topic `image`, publishes `keypoints` with the image's header:
                a sensor_msgs/PointCloud2 with a row a face and 68 columns, fields u and v, float32,
                pixels of the image. No face is a message with no row, so each image has its answer. What the
                detector finds and the model calls no face (a lost_score over its lost_limit) is no row
Why this type   it is in every ROS 2, holds all faces of an image in one stamped message, and
                sensor_msgs_py.point_cloud2 reads it. u and v and not x, y, z: pixels are no metres
What it needs   ROS 2 (Humble or newer), and in the Python that it runs with: pip install 'kp-edge[ort]'
How to run      colcon build --packages-select kp_ros2, then
                ros2 run kp_ros2 keypoints --ros-args -p bundle:=BUNDLE -r image:=/camera/image_raw
Parameters      bundle; backend; detector: `own=BUNDLE`, `haar`, `yunet=FILE`, or `auto`; luma_range: of the YUV
                encodings, `limited` as most cameras send, or `full`
What was run    here, the tests against a thin double of rclpy. Not run: ROS itself, colcon
"""

from __future__ import annotations

import sys

import numpy as np
import rclpy
from numpy.typing import NDArray
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, PointCloud2, PointField

import kp_runtime
from kp_runtime.frame import check_layout

PACKED = {
    "bgr8": ("bgr", 3), "rgb8": ("rgb", 3), "bgra8": ("bgra", 4), "rgba8": ("rgba", 4), "mono8": ("gray", 1),
    "8UC1": ("gray", 1), "8UC3": ("bgr", 3),
}  # fmt: skip
"""Encodings with all of a pixel in one place: the layout, and bytes a pixel."""

PLANAR = ("nv12", "nv21", "nv24")
"""Encodings that begin with a plane of luma."""

LUMA_AT = {"yuv422_yuy2": 0, "yuyv": 0, "yuv422": 1, "uyvy": 1}
"""Encodings that alternate luma and colour, with the place of the first luma byte."""


def frame_from_image(message: Image, luma_range: str = "limited") -> kp_runtime.Frame:
    """The message's pixels, not copied but for the luma of alternating encodings.

    Raises:
        ImageError: another encoding, or data that is too short for its size and step.
    """
    encoding, height, width, step = message.encoding, message.height, message.width, message.step
    layout, channels = PACKED.get(encoding, ("gray", 1))
    if encoding in LUMA_AT:
        channels = 2
    elif encoding not in PLANAR and encoding not in PACKED:
        known = ", ".join((*PACKED, *PLANAR, *LUMA_AT))
        raise kp_runtime.ImageError(f"the encoding {encoding!r} is not taken, only {known}; convert the topic first")
    data = np.frombuffer(message.data, np.uint8)
    if not (height > 0 and step >= width * channels > 0 and len(data) >= (height - 1) * step + width * channels):
        raise kp_runtime.ImageError(
            f"a {width} x {height} {encoding} image with rows {step} bytes apart does not lie in {len(data)} bytes; "
            "check the driver's step"
        )
    pixels = np.ndarray((height, width, channels), np.uint8, data, 0, (step, channels, 1))
    if encoding in PACKED:
        return kp_runtime.Frame(pixels, layout)
    return kp_runtime.Frame(np.ascontiguousarray(pixels[:, :, LUMA_AT.get(encoding, 0)]), "gray", luma_range)


def cloud_from_points(xy: NDArray[np.float32], header: object) -> PointCloud2:
    """The message of `(faces, points, 2)`; `header` is the image's."""
    faces, points = xy.shape[:2]
    fields = [PointField(name=name, offset=4 * i, datatype=PointField.FLOAT32, count=1) for i, name in enumerate("uv")]
    return PointCloud2(
        header=header,
        height=faces,
        width=points,
        fields=fields,
        is_bigendian=sys.byteorder == "big",
        point_step=8,
        row_step=8 * points,
        data=np.ascontiguousarray(xy, np.float32).tobytes(),
        is_dense=bool(np.isfinite(xy).all()),
    )


class KeypointsNode(Node):  # type: ignore[misc]
    """See the file's head.

    Raises:
        KpError: the bundle, the detector or the range can't be used.
    """

    def __init__(self) -> None:
        super().__init__("kp_keypoints")
        bundle = self.declare_parameter("bundle", "").value
        backend = self.declare_parameter("backend", "auto").value
        detector = self.declare_parameter("detector", "auto").value
        self._luma_range = self.declare_parameter("luma_range", "limited").value
        check_layout("gray", self._luma_range)
        self._model = kp_runtime.load(bundle or None, backend)
        self._model.check_boxes()
        self._model.warmup()
        self._detector = kp_runtime.load_detector(detector)
        self._publisher = self.create_publisher(PointCloud2, "keypoints", 10)
        # as sensors publish, and the newest image alone: one that waited is old
        newest = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        self._subscription = self.create_subscription(Image, "image", self.on_image, newest)
        report = self._model.backend.report
        self.get_logger().info(f"{report.file} on {report.backend}")

    def on_image(self, message: Image) -> None:
        """Answers one image; one that can't be used is said, at most every five seconds, and left out."""
        try:
            frame = frame_from_image(message, self._luma_range)
            found = self._model(frame, self._detector(frame))
        except kp_runtime.KpError as error:
            self.get_logger().error(str(error), throttle_duration_sec=5)
            return
        scores, limit = found.lost_score, self._model.spec.lost_limit  # None of a model that gives none
        xy = found.xy if scores is None or limit is None else found.xy[scores <= limit]
        self._publisher.publish(cloud_from_points(xy, message.header))


def main() -> None:
    """Runs the node until it is stopped."""
    rclpy.init()
    try:
        rclpy.spin(KeypointsNode())
    except kp_runtime.KpError as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()
