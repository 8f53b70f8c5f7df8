"""The page of `kp verify`: numbers, verdicts and the worst faces in one HTML file without links.

Everything that stands in the page is inside it: styles, and pictures as data URIs. All text from
outside (names of files, faces and models, reasons) is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kp_export.parity import LIMITS, Limit
from kp_export.verify import FileVerdict, Verification
from kp_runtime.html_page import clean, wide_table, write_page
from kp_runtime.scheme68 import regions_of

__all__ = ["verification_page"]

CELL = 320
WORST = 12
_SHIFT = 4  # OpenCV's drawing takes positions in sixteenths of a pixel
_GREEN, _RED, _RING, _EDGE = (80, 220, 40), (40, 40, 255), (60, 220, 255), (0, 0, 0)

_STYLE = """
:root { --good: #17693a; --bad: #b3261e; --open: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --good: #6fd197; --bad: #ff8f85; --open: #f0bd5b } }
body { max-width: 1400px } h2 { margin: 2.2rem 0 .4rem } th, td { padding: .3rem .6rem } th { white-space: normal }
.passed { color: var(--good) } .failed { color: var(--bad) } .not-run { color: var(--open) }
:is(.passed, .failed, .not-run) { font-weight: 600 }
.faces { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 1rem }
figure { margin: 0 } img { width: 100%; height: auto; display: block; border-radius: 4px }
"""


def verification_page(verification: Verification, path: Path) -> Path:
    """Writes the page: hashes, the table, and for each file that ran its worst faces drawn.

    PyTorch's points are green, the file's own smaller ones red on top; the worst is ringed.
    """
    name = f"{verification.bundle.resolve().name}: verification"
    body = [_header(verification), _hashes(verification), _table(verification), _reasons(verification)]
    body += [_worst_faces(verification, file) for file in verification.files]
    return write_page(path, name, _STYLE, body)


def _header(verification: Verification) -> str:
    spec, faces = verification.spec, verification.faces
    contract = (
        f"{spec.name}: {spec.points} points ({spec.scheme}), {spec.size} px crops, "
        f"margin {spec.margin:g}, boxes {spec.box}"
    )
    word = "passed" if verification.passed else "failed"
    not_run = sum(file.verdict == "not run" for file in verification.files)
    rest = f", <span class=not-run>{not_run} of {len(verification.files)} files not run</span>" if not_run else ""
    return (
        f"<h1>{clean(verification.bundle.resolve().name)} <span class={word}>{word}</span>{rest}</h1>\n"
        f"<p>{clean(contract)}</p>\n"
        f"<p>Each file beside the checkpoint in PyTorch on {len(faces.names)} faces: {clean(faces.origin)}</p>\n"
    )


def _hashes(verification: Verification) -> str:
    rows = [("PyTorch's checkpoint", verification.checkpoint_sha256)]
    rows += [(file.file, file.entry.sha256) for file in verification.files]
    cells = [
        f"<tr><th scope=row>{clean(name)}</th><td class='text hash'>{clean(digest)}</td></tr>" for name, digest in rows
    ]
    head = "<th scope=col>file</th><th scope=col class=text>sha256</th>"
    return wide_table("What ran, by sha256", f"<tr>{head}</tr>{''.join(cells)}")


def _table(verification: Verification) -> str:
    regions = tuple(regions_of(verification.spec.points))
    columns = (
        "mean px",
        "p50 px",
        "p99 px",
        "max px",
        "NME distance %",
        "NME rise, points",
        "lost score",
        *(f"{r} px" for r in regions),
    )
    start = f"<th scope=col>file</th>{_cells('th scope=col class=text', ('verdict', 'precision'))}"
    head = f"<tr>{start}{_cells('th scope=col', ('faces', *columns))}</tr>"
    precisions = dict.fromkeys(file.parity.precision for file in verification.files if file.parity)
    limits = "; ".join(f"{name}: {_limit(LIMITS[name])}" for name in precisions)
    heading = "Distance to PyTorch, in pixels of the crop"
    rows = "".join(_row(file, regions) for file in verification.files)
    return f"<h2>{heading}</h2>\n{wide_table(heading, head + rows)}" + (
        f"<p class=soft>Limits, pixels for a crop of 224 px: {clean(limits)}.</p>\n" if limits else ""
    )


def _row(file: FileVerdict, regions: Sequence[str]) -> str:
    measured, count = file.parity, 7 + len(regions)
    numbers: Sequence[str] = [""] * count
    if measured is not None:
        values = (measured.mean_px, measured.p50_px, measured.p99_px, measured.max_px, measured.nme)
        rise = "no labels" if measured.rise is None else f"{round(measured.rise, 5) + 0.0:+.5f}"
        score = "none" if measured.score is None else f"{measured.score:.5f}"
        numbers = [
            *(f"{v:.5f}" for v in values),
            rise,
            score,
            *(f"{measured.regions_px[name]:.5f}" for name in regions),
        ]
    verdict = f"<td class='text {file.verdict.replace(' ', '-')}'>{file.verdict}</td>"
    precision = f"<td class=text>{clean(file.entry.precision or '')}</td>"
    faces = measured.faces if measured else ""
    return f"<tr><th scope=row>{clean(file.file)}</th>{verdict}{precision}<td>{faces}</td>{_cells('td', numbers)}</tr>"


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{clean(text)}</{tag.split()[0]}>" for text in texts)


def _limit(limit: Limit) -> str:
    bounds = [("worst point", limit.max_px, "px"), ("99th percentile", limit.p99_px, "px")]
    parts = [f"{what} {most:g} {unit}" for what, most, unit in bounds if math.isfinite(most)]
    return ", ".join([*parts, f"rise of the NME {limit.rise:g} percentage points", f"lost score {limit.score:g}"])


def _reasons(verification: Verification) -> str:
    lines = []
    for file in verification.files:
        if file.reason:
            name = f"<span class={file.verdict.replace(' ', '-')}>{clean(file.file)}</span>"
            lines.append(f"<p>{name} {clean(file.reason.removeprefix(f'{file.file} '))}</p>\n")
    return "".join(lines)


def _worst_faces(verification: Verification, file: FileVerdict) -> str:
    if file.keypoints is None or file.parity is None:
        return ""
    distance = np.linalg.norm(file.keypoints.astype(np.float64) - verification.reference, axis=-1)
    distance = np.where(np.isfinite(distance), distance, np.inf)
    left_out = len(distance) - file.parity.faces
    order = (left_out + np.argsort(-distance[left_out:].max(axis=1), kind="stable")[:WORST]).tolist()
    figures = []
    for rank, i in enumerate(order, 1):
        point = int(distance[i].argmax())
        picture = _picture(verification.faces.crops[i, 0], verification.reference[i], file.keypoints[i], point)
        seen = f"worst face {rank} of {file.file}: crop with both sets of points, point {point + 1} ringed"
        figures.append(
            f'<figure><img alt="{clean(seen)}" src="data:image/jpeg;base64,{picture}">'
            f"<figcaption>point {point + 1}: {distance[i, point]:.5f} px<br>mean: {distance[i].mean():.5f} px<br>"
            f"{clean(verification.faces.names[i])}</figcaption></figure>\n"
        )
    legend = "PyTorch green, the file red on top of it, the worst point ringed (numbered from 1, as iBUG does)"
    return (
        f"<h2>{clean(file.file)}: the {len(order)} worst faces</h2>\n<p class=soft>{legend}</p>\n"
        f"<div class=faces>\n{''.join(figures)}</div>\n"
    )


def _picture(crop: NDArray[np.uint8], wanted: NDArray[np.float32], got: NDArray[np.float32], worst: int) -> str:
    """An enlarged crop with both sets of points, as base64 of a JPEG."""
    scale = CELL / crop.shape[0]
    enlarged = cv2.resize(crop, (CELL, CELL), interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    canvas = np.asarray(cv2.cvtColor(enlarged, cv2.COLOR_GRAY2BGR), np.uint8)
    for xy, color, radius in ((wanted, _GREEN, 4.4), (got, _RED, 2.0)):
        for shade, size in ((_EDGE, radius + 1), (color, radius)):  # edged, to be seen on every grey
            for point in xy:
                _circle(canvas, point, scale, shade, size, -1)
    ringed = got[worst] if np.isfinite(got[worst]).all() else wanted[worst]
    _circle(canvas, ringed, scale, _RING, 9, 2)
    # without 4:4:4 the colours of such small dots run
    options = [cv2.IMWRITE_JPEG_QUALITY, 88, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return base64.b64encode(cv2.imencode(".jpg", canvas, options)[1].tobytes()).decode("ascii")


def _circle(
    canvas: NDArray[np.uint8],
    xy: NDArray[np.float32],
    scale: float,
    color: tuple[int, int, int],
    radius: float,
    thickness: int,
) -> None:
    """A circle at a point of the crop; nothing for a point that is not finite."""
    if not np.isfinite(xy).all():
        return
    # an integer is a pixel's centre in the crop and in the enlarged one
    centre = ((xy.astype(np.float64) + 0.5) * scale - 0.5) * 2**_SHIFT
    x, y = np.clip(np.rint(centre), -(2**20), 2**20).astype(int).tolist()
    cv2.circle(canvas, (x, y), round(radius * 2**_SHIFT), color, thickness, cv2.LINE_AA, _SHIFT)
