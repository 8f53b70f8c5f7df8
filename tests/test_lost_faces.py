"""`scripts/lost_faces.py`: its arithmetic by known answers. The measurement itself needs the data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kp_runtime.geometry import boxes_from_points, crop_from_luma, matrices_from_boxes
from kp_runtime.spec import Manifest, ModelSpec
from kp_train.checkpoint import load_checkpoint, save_checkpoint
from kp_train.model import KeypointNet
from kp_train.synthetic import drawn_face
from scripts.lost_faces import LastLayer, View, auc, fitted


def test_a_score_that_tells_nothing_and_one_that_tells_all() -> None:
    assert auc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 0
    assert auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5


def test_a_linear_map_is_found_and_a_strong_pull_leaves_nothing_of_it() -> None:
    rng = np.random.default_rng(0)
    inputs, truth = rng.normal(size=(200, 13)), rng.normal(size=13)
    np.testing.assert_allclose(fitted(inputs, inputs @ truth, 1e-9), truth, atol=1e-6)
    assert np.abs(fitted(inputs, inputs @ truth, 1e9)).max() < 1e-6


def test_what_the_last_layer_sees_gives_what_the_network_answers(tmp_path: Path) -> None:
    """Points of the image are those of the crop, moved there; inputs times weights are the points of the crop."""
    torch.manual_seed(0)
    spec = ModelSpec("x", size=64)
    save_checkpoint(tmp_path / "bundle", KeypointNet(64), Manifest(spec))
    net, _ = load_checkpoint(tmp_path / "bundle")
    image, xy = drawn_face(np.random.default_rng(1), (300, 260))
    luma, box = np.ascontiguousarray(image[:, :, 0]), boxes_from_points(xy)
    inputs, points = LastLayer(tmp_path / "bundle")([View(luma, box, "face", xy)])
    matrix = matrices_from_boxes(box[None], 64, spec.margin)[0]
    with torch.no_grad():
        answer = net(torch.from_numpy(crop_from_luma(luma, matrix, 64))[None, None])[0].numpy()
    np.testing.assert_allclose(points[0] @ matrix[:, :2].T + matrix[:, 2], answer, atol=1e-3)
    row = torch.cat([net.backbone.fc.weight, net.backbone.fc.bias[:, None]], dim=1).detach().double()
    again = net.decode(torch.from_numpy(inputs) @ row.T)[0].numpy()
    np.testing.assert_allclose(again, answer, atol=1e-3)
