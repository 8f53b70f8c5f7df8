"""A thin double of rclpy and sensor_msgs: what examples/ros2_node uses of them, as strict about types.

Written from the interfaces' definitions of ROS 2 Humble; nothing of ROS runs in it.
"""

from __future__ import annotations

import array
import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any, ClassVar

import pytest


@dataclass
class Header:
    """std_msgs/Header."""

    stamp: Any = None
    frame_id: str = ""


@dataclass
class Image:
    """sensor_msgs/Image."""

    header: Header = field(default_factory=Header)
    height: int = 0
    width: int = 0
    encoding: str = ""
    is_bigendian: int = 0
    step: int = 0
    data: array.array[int] = field(default_factory=lambda: array.array("B"))


class _Message:
    """rclpy's messages take keywords of their own fields alone, and check each one's type."""

    types: ClassVar[dict[str, type | tuple[type, ...]]]

    def __init__(self, **given: Any) -> None:
        for name, value in given.items():
            assert isinstance(value, self.types[name]), f"{name} is {type(value)}"
            setattr(self, name, value)


class PointField(_Message):
    """sensor_msgs/PointField."""

    FLOAT32 = 7
    types: ClassVar = {"name": str, "offset": int, "datatype": int, "count": int}


class PointCloud2(_Message):
    """sensor_msgs/PointCloud2."""

    types: ClassVar = {
        "header": Header, "height": int, "width": int, "fields": list, "is_bigendian": bool, "point_step": int,
        "row_step": int, "data": (bytes, array.array), "is_dense": bool,
    }  # fmt: skip


class ReliabilityPolicy(Enum):
    """rclpy.qos.ReliabilityPolicy."""

    RELIABLE = 1
    BEST_EFFORT = 2


@dataclass
class QoSProfile:
    """rclpy.qos.QoSProfile, which asks for a depth."""

    depth: int
    reliability: ReliabilityPolicy = ReliabilityPolicy.RELIABLE


@dataclass
class Parameter:
    """rclpy.parameter.Parameter."""

    value: Any


class Logger:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def info(self, message: str) -> None:
        self.lines.append(("info", message))

    def error(self, message: str, throttle_duration_sec: float) -> None:
        self.lines.append(("error", message))


class Publisher:
    """Keeps what was published."""

    def __init__(self, kind: type, topic: str) -> None:
        self.kind, self.topic, self.published = kind, topic, list[Any]()

    def publish(self, message: Any) -> None:
        assert isinstance(message, self.kind)
        self.published.append(message)


class Node:
    """rclpy.node.Node; `given` are the parameters of the command line."""

    given: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str) -> None:
        self.name, self._logger = name, Logger()
        self.publishers_made: list[Publisher] = []
        self.subscriptions_made: list[tuple[type, str, Any, QoSProfile | int]] = []

    def declare_parameter(self, name: str, value: Any) -> Parameter:
        return Parameter(self.given.get(name, value))

    def create_publisher(self, kind: type, topic: str, qos: QoSProfile | int) -> Publisher:
        self.publishers_made.append(Publisher(kind, topic))
        return self.publishers_made[-1]

    def create_subscription(self, kind: type, topic: str, callback: Any, qos: QoSProfile | int) -> object:
        self.subscriptions_made.append((kind, topic, callback, qos))
        return object()

    def get_logger(self) -> Logger:
        return self._logger


class ExternalShutdownException(Exception):  # noqa: N818  as rclpy calls it
    """rclpy.executors.ExternalShutdownException."""


def install(monkeypatch: pytest.MonkeyPatch, spin: Any = None) -> list[str]:
    """Puts the double in the real modules' place; returns the calls of rclpy's own functions as they come."""
    calls: list[str] = []

    def spinning(node: Node) -> None:
        calls.append("spin")
        if spin is not None:
            spin(node)

    contents: dict[str, dict[str, Any]] = {
        "rclpy": {
            "init": lambda: calls.append("init"), "spin": spinning, "try_shutdown": lambda: calls.append("shutdown"),
        },
        "rclpy.node": {"Node": Node},
        "rclpy.qos": {"QoSProfile": QoSProfile, "ReliabilityPolicy": ReliabilityPolicy},
        "rclpy.executors": {"ExternalShutdownException": ExternalShutdownException},
        "sensor_msgs": {},
        "sensor_msgs.msg": {"Image": Image, "PointCloud2": PointCloud2, "PointField": PointField},
    }  # fmt: skip
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    return calls
