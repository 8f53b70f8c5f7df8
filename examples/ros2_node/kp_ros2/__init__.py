"""Facial keypoints as a ROS 2 node."""
