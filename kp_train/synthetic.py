"""Drawn faces with known points: for tests, for trying the tools, and for the golden crop.

They teach a network the mechanics, not faces: no accuracy is claimed on them.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kp_runtime.geometry import boxes_from_points
from kp_runtime.scheme68 import CONTOURS, POINTS, mean_shape

__all__ = ["coloured", "drawn_face", "golden_face", "mean_shape", "write_csv_source"]


def drawn_face(
    rng: np.random.Generator, size_hw: tuple[int, int] = (160, 150), turn_deg: float = 15.0
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draws one face of a random shape, place, light and turn (of this standard deviation).

    Returns:
        The image, `(h, w, 3)` uint8 BGR, and its points, `(68, 2)` float32, pixels of the image.
    """
    height, width = size_hw
    shape = mean_shape() * rng.uniform(0.9, 1.1, 2) + rng.normal(0, 0.012, (POINTS, 2))
    shape[48:] *= (rng.uniform(0.8, 1.2), 1.0)
    turn = np.radians(rng.normal(0, turn_deg))
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    scale = min(size_hw) * rng.uniform(0.26, 0.33)
    centre = (np.array([width, height]) - 1) / 2 + rng.normal(0, 0.02, 2) * min(size_hw)
    xy = shape @ rotation.T * scale + centre
    skin, background = rng.uniform(130, 220), rng.uniform(20, 110)
    image = np.full((height, width), background) + rng.normal(0, 4, (height, width))
    canvas = np.clip(image, 0, 255).astype(np.uint8)
    fixed = np.rint(xy * 16).astype(np.int32)

    def fill(indices: tuple[int, ...] | list[int], level: float) -> None:
        cv2.fillPoly(canvas, [fixed[list(indices)]], level, cv2.LINE_AA, 4)

    head = cv2.convexHull(np.concatenate([fixed[:27], fixed[17:27] - (0, int(scale * 6))]))
    cv2.fillPoly(canvas, [head], skin, cv2.LINE_AA, 4)
    for name in ("left_brow", "right_brow", "nose_bridge", "nose_base"):
        cv2.polylines(
            canvas, [fixed[list(CONTOURS[name])]], False, skin * 0.45, max(1, round(scale / 18)), cv2.LINE_AA, 4
        )
    for name, level in (
        ("left_eye", 245.0),
        ("right_eye", 245.0),
        ("outer_lip", skin * 0.6),
        ("inner_lip", skin * 0.25),
    ):
        fill(CONTOURS[name], level)
    for eye in (range(36, 42), range(42, 48)):
        x, y = fixed[list(eye)].mean(axis=0)
        cv2.circle(canvas, (int(x), int(y)), int(scale * 16 * 0.07), 20, -1, cv2.LINE_AA, 4)
    return np.asarray(cv2.cvtColor(canvas, cv2.COLOR_GRAY2BGR), np.uint8), xy.astype(np.float32)


def coloured(luma: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shades of brown, `(h, w, 3)` uint8 BGR, whose luma is `luma`, `(h, w)`; read as RGB they have another one."""
    level = np.arange(256)
    blue, red = (level + sign * (level * (255 - level) // 320) for sign in (-1, 1))
    # OpenCV's BGR2GRAY: the three weights are in 1/32768, their sum is rounded
    green = -((3735 * blue + 9798 * red + 16384 - 32768 * level) // 19235)
    return np.stack([blue, green, red], axis=1).astype(np.uint8)[luma]


def golden_face(size: int, margin: float) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A drawn, coloured face whose crop needs means of blocks, sampling between pixels and repeated edges.

    Its square is over three crops wide, so that blocks of 3 x 3 pixels are averaged, and lies over all four edges.
    Blocks of 2 x 2, which OpenCV may average by another way, are compared by `kp_runtime.geometry` itself.

    Args:
        size: side of the crop in pixels.
        margin: side of the square, in longer sides of the box.

    Returns:
        The image, `(h, w, 3)` uint8 BGR, cut off at the box, and the box, `(4,)` float64.
    """
    side = round(5.15 * size / margin)  # at which the square is 3.2 crops wide
    image, xy = drawn_face(np.random.default_rng(68), (side, side))
    box = boxes_from_points(xy)
    x0, y0, x1, y1 = (int(edge) for edge in box)
    return coloured(image[y0 : y1 + 2, x0 : x1 + 2, 0]), box - (x0, y0, x0, y0)


def write_csv_source(folder: Path, people: int, each: int = 2, seed: int = 0, turn_deg: float = 15.0) -> Path:
    """Writes drawn faces in the CSV layout: `training_frames_keypoints.csv` and `training/`.

    Returns:
        The CSV's path.
    """
    rng = np.random.default_rng(seed)
    images = folder / "training"
    images.mkdir(parents=True, exist_ok=True)
    lines = ["," + ",".join(map(str, range(2 * POINTS)))]
    for person in range(people):
        for number in range(each):
            image, xy = drawn_face(rng, turn_deg=turn_deg)
            name = f"person{person}_{number}.png"
            cv2.imwrite(str(images / name), image)
            lines.append(name + "," + ",".join(f"{value:.2f}" for value in xy.ravel()))
    path = folder / "training_frames_keypoints.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
