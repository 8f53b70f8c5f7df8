"""Maps of the plane from points to points: as a whole by a similarity, or triangle by triangle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kp_runtime.frame import import_cv2

__all__ = ["is_mirrored", "mesh_positions", "similarity_from_points", "triangles_from_points"]


def similarity_from_points(
    from_xy: NDArray[np.float64], to_xy: NDArray[np.float64], *, mirrored: bool = False
) -> NDArray[np.float64]:
    """The similarity map with the least squares between point sets (Umeyama 1991, in closed form for the plane).

    Args:
        from_xy: `(k, 2)`, not all the same.
        to_xy: `(k, 2)`.
        mirrored: among the maps that mirror, instead of those that do not.

    Returns:
        `(2, 3)` float64.
    """
    source, target = _complex(from_xy), _complex(to_xy)
    source = source.conj() if mirrored else source
    turn = _correlation(source, target) / _correlation(source, source)
    shift = target.mean() - turn * source.mean()
    across = -1 if mirrored else 1
    return np.array(
        [[turn.real, -across * turn.imag, shift.real], [turn.imag, across * turn.real, shift.imag]], np.float64
    )


def is_mirrored(from_xy: NDArray[np.float64], to_xy: NDArray[np.float64]) -> bool:
    """Whether a map that mirrors fits the points better than one that does not."""
    source, target = _complex(from_xy), _complex(to_xy)
    return abs(_correlation(source.conj(), target)) > abs(_correlation(source, target))


def triangles_from_points(xy: NDArray[np.float64]) -> NDArray[np.intp]:
    """The Delaunay triangulation of points `(k, 2)`; `(m, 3)` indices."""
    cv2 = import_cv2()
    low = xy.min(axis=0)
    # 1000 long, whatever the unit: OpenCV's rectangle is in integers, and its positions are float32
    scaled = ((xy - low) / np.ptp(xy, axis=0).max() * 1000 + 1).astype(np.float32)
    divided = cv2.Subdiv2D((0, 0, 1003, 1003))
    divided.insert(scaled.tolist())
    corners = divided.getTriangleList().reshape(-1, 3, 1, 2)
    return np.asarray(((corners - scaled) ** 2).sum(axis=-1).argmin(axis=-1), np.intp)


def mesh_positions(
    grid: NDArray[np.float64],
    triangles: NDArray[np.intp],
    image_xy: NDArray[np.float64],
    picture_xy: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Where each pixel of a window `(h, w, 2)` lies in the picture, triangle by triangle; far outside where in none."""
    positions = np.full_like(grid, -1e5)
    height, width = grid.shape[:2]
    for triangle in triangles:
        a, b, c = image_xy[triangle]
        sides = np.column_stack([b - a, c - a])
        if abs(np.linalg.det(sides)) < 1e-9:
            continue  # seen from its edge
        low = np.floor(np.min([a, b, c], axis=0) - grid[0, 0]).clip(0, (width, height)).astype(int)
        high = np.ceil(np.max([a, b, c], axis=0) - grid[0, 0] + 1).clip(0, (width, height)).astype(int)
        window = (slice(low[1], high[1]), slice(low[0], high[0]))
        weights = (grid[window] - a) @ np.linalg.inv(sides).T
        u, v = weights[..., 0], weights[..., 1]
        inside = (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9)
        corner, *others = picture_xy[triangle]
        positions[window][inside] = corner + weights[inside] @ (np.array(others) - corner)
    return positions


def _complex(xy: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Points of the plane as numbers."""
    return np.asarray(xy[:, 0] + 1j * xy[:, 1], np.complex128)


def _correlation(a: NDArray[np.complex128], b: NDArray[np.complex128]) -> complex:
    return complex(np.vdot(a - a.mean(), b - b.mean()))
