"""How colcon installs the node."""

from setuptools import setup

setup(
    name="kp_ros2",
    version="0.1.0",
    packages=["kp_ros2"],
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/kp_ros2"]),
        ("share/kp_ros2", ["package.xml"]),
    ],
    entry_points={"console_scripts": ["keypoints = kp_ros2.node:main"]},
)
