"""Effects: where pictures land, how they are blended, what a hidden face keeps, and what is wrong with a TOML file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_runtime import effects
from kp_runtime.effect_pictures import EFFECTS, open_effect
from kp_runtime.effects import (
    ANCHORS,
    Blur,
    Picture,
    face_outline,
    picture_from_toml,
)
from kp_runtime.errors import ImageError, InputError, MissingExtraError
from kp_runtime.geometry import apply_matrix
from kp_runtime.point_maps import mesh_positions, similarity_from_points, triangles_from_points
from kp_runtime.scheme68 import mean_shape

PICTURES = [name for name in EFFECTS if name != "blur"]
DOCS = Path(__file__).resolve().parents[1] / "docs" / "filters.md"
FACE = mean_shape() * 60 + (100, 120)
EYES = {"left_eye": (10.0, 10.0), "right_eye": (30.0, 10.0), "mouth": (20.0, 30.0)}


def turned(xy: np.ndarray, degrees: float, scale: float, mirror: bool = False) -> np.ndarray:
    turn = np.radians(degrees)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (xy * ((-1, 1) if mirror else (1, 1))) @ matrix.T + (140, 130)


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (240, 280, 3), np.uint8)


@pytest.fixture(scope="module", params=PICTURES)
def picture(request: pytest.FixtureRequest) -> Picture:
    effect = open_effect(request.param)
    assert isinstance(effect, Picture)
    return effect


def opaque(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    bgra = rng.integers(0, 256, (height, width, 4), np.uint8)
    bgra[:, :, 3] = 255
    return bgra


def with_eyes(points: dict[str, tuple[float, float]]) -> np.ndarray:
    """The plain face, moved so that its anchors are exactly there (where they are a similarity of its own)."""
    own = np.array([mean_shape()[list(ANCHORS[name])].mean(axis=0) for name in points])
    return apply_matrix(similarity_from_points(own, np.array(list(points.values()))), mean_shape())


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(("degrees", "scale"), [(0, 60), (35, 40), (-120, 95), (180, 3)])
def test_anchors_land_on_the_face(picture: Picture, degrees: float, scale: float, mirror: bool) -> None:
    face = turned(mean_shape(), degrees, scale, mirror)
    matrix = picture.image_from_picture(face)
    assert np.abs(apply_matrix(matrix, picture.picture_xy) - picture.anchors_of(face)).max() < 0.5
    assert (np.linalg.det(matrix[:, :2]) < 0) == mirror


def test_places_of_numpy() -> None:
    bgra, names = np.zeros((9, 9, 4), np.uint8), ("left_eye", "right_eye", "mouth")
    places = np.array([[2, 2], [7, 2], [4, 8]])
    for numbers in (places, places.astype(np.float32), places.tolist()):
        effect = Picture(bgra, dict(zip(names, numbers, strict=True)))
        assert np.array_equal(effect.picture_xy, places)
    with pytest.raises(InputError, match=r"the anchor mouth must be \[x, y\]"):
        Picture(bgra, dict(zip(names, [[2, 2], [7, 2], [True, 8]], strict=True)))


@pytest.mark.parametrize("mirror", [False, True])
def test_what_is_drawn_is_where_the_anchors_are(mirror: bool) -> None:
    """Dots at the anchors of a picture are found again, by their centres of mass, where the face has these points."""
    places = {
        n: (x * 400, y * 400)
        for n, (x, y) in {"left_eye": (0.2, 0.2), "mouth": (0.5, 0.8), "jaw_16": (0.9, 0.3)}.items()
    }
    bgra = np.zeros((400, 400, 4), np.uint8)
    for i, (x, y) in enumerate(places.values()):
        bgra[round(y) - 6 : round(y) + 7, round(x) - 6 : round(x) + 7, (i, 3)] = 255
    effect = Picture(bgra, places)
    own = np.array(list(places.values()))
    face = turned(mean_shape(), 25, 60, mirror)
    drawn = effect(np.zeros((260, 280, 3), np.uint8), face[None]).astype(float)
    expected = apply_matrix(effect.image_from_picture(face), own)
    for i, (x, y) in enumerate(expected):
        weight = drawn[:, :, i]
        rows, columns = np.indices(weight.shape)
        assert abs((columns * weight).sum() / weight.sum() - x) < 0.5
        assert abs((rows * weight).sum() / weight.sum() - y) < 0.5


def test_the_similarity_has_the_least_squares(rng: np.random.Generator) -> None:
    """Umeyama's own way, by singular values, finds the same map."""
    for mirrored in (False, True):
        source, target = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
        a, b = source - source.mean(axis=0), target - target.mean(axis=0)
        u, d, vt = np.linalg.svd(b.T @ a)
        signs = np.array([1, np.sign(np.linalg.det(u) * np.linalg.det(vt)) * (-1 if mirrored else 1)])
        turn = (d * signs).sum() / (a**2).sum() * (u * signs) @ vt
        matrix = similarity_from_points(source, target, mirrored=mirrored)
        np.testing.assert_allclose(matrix[:, :2], turn, atol=1e-12)
        np.testing.assert_allclose(matrix[:, 2], target.mean(axis=0) - turn @ source.mean(axis=0), atol=1e-12)


def test_a_mirrored_image_of_a_face_gives_the_mirrored_result(image: np.ndarray) -> None:
    """Points that were mirrored with their image keep their names: the picture is mirrored with them."""
    effect = open_effect("moustache")
    flipped = FACE * (-1, 1) + (image.shape[1] - 1, 0)
    there, here = effect(image[:, ::-1], flipped[None])[:, ::-1], effect(image, FACE[None])
    assert np.abs(there.astype(int) - here).max() <= 8  # OpenCV samples at 1/32 px
    assert (here != image).any(axis=2).sum() > 500


def test_blending_is_exact(image: np.ndarray, rng: np.random.Generator) -> None:
    bgra = rng.integers(0, 256, (40, 44, 4), np.uint8)
    bgra[:10, :, 3], bgra[10:20, :, 3] = 0, 255
    face = with_eyes(places := {n: tuple(mean_shape()[list(ANCHORS[n])].mean(axis=0) * 20 + 20) for n in EYES})
    drawn = Picture(bgra, places)(image, face[None])
    colours, alpha, under = bgra[:, :, :3].astype(float), bgra[:, :, 3:] / 255, image[:40, :44]
    expected = np.floor(colours * alpha + under * (1 - alpha) + 0.5)
    assert np.array_equal(drawn[:40, :44], expected)
    assert np.array_equal(drawn[:10, :44], under[:10])
    assert np.array_equal(drawn[10:20, :44], bgra[10:20, :, :3])
    drawn[:40, :44] = under
    assert np.array_equal(drawn, image)


def test_a_large_picture_is_averaged_when_it_is_made_small() -> None:
    """A pattern finer than the pixels becomes its mean, and does not flicker."""
    bgra = np.zeros((800, 800, 4), np.uint8)
    bgra[:, :, 3] = 255
    bgra[::2, ::2, :3] = 255
    bgra[1::2, 1::2, :3] = 255
    places = {n: tuple(mean_shape()[list(ANCHORS[n])].mean(axis=0) * 300 + 400) for n in EYES}
    drawn = Picture(bgra, places)(np.zeros((200, 200, 3), np.uint8), (mean_shape() * 30 + 100)[None])
    assert abs(drawn[70:130, 70:130].astype(int) - 128).max() <= 1


def test_a_small_picture_s_pixels_lie_in_the_middle_of_those_that_they_are_means_of() -> None:
    places = {n: tuple(mean_shape()[list(ANCHORS[n])].mean(axis=0) * 80 + 40) for n in EYES}
    bgra = np.zeros((80, 80, 4), np.uint8)
    bgra[40:44, 40:44] = 255
    face = (mean_shape() * 80 + 40 - 1.5) / 4 + 100
    drawn = Picture(bgra, places)(np.zeros((140, 140, 3), np.uint8), face[None])
    assert np.argwhere(drawn[:, :, 0]).tolist() == [[110, 110]]


def test_an_enlarged_picture_fades_out_over_a_pixel_of_its_own() -> None:
    places = {n: tuple(mean_shape()[list(ANCHORS[n])].mean(axis=0) * 2 + 5) for n in EYES}
    effect = Picture(np.full((10, 10, 4), 255, np.uint8), places)
    drawn = effect(
        np.zeros((240, 240, 3), np.uint8), (mean_shape() * 16 + 140)[None]
    )  # pixel x of it lies at 8 x + 100
    for there in np.nonzero(drawn[:, :, 0]):
        assert (there.min(), there.max()) == (100 - 7, 100 + 9 * 8 + 7)


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("place", [(-20, 40), (270, 230), (140, 20), (-900, 40), (1e7, 1e7)])
def test_over_the_edge(image: np.ndarray, name: str, place: tuple[float, float]) -> None:
    """What is drawn over an edge is what is drawn in a larger image there."""
    before = image.copy()
    effect, face = open_effect(name), mean_shape() * 50 + place
    drawn = effect(image, face[None])
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert np.array_equal(image, before)
    if max(map(abs, place)) > 500:
        assert np.array_equal(drawn, image)
        return
    assert (drawn != image).any() or name == "hat"
    if name != "blur":  # whose means are of what the image has
        wide = effect(np.pad(image, ((300, 300), (300, 300), (0, 0))), face[None] + 300)
        assert np.abs(wide[300:-300, 300:-300].astype(int) - drawn).max() <= 8


@pytest.mark.parametrize("name", EFFECTS)
def test_several_faces_no_face_and_a_huge_one(image: np.ndarray, name: str) -> None:
    effect = open_effect(name)
    left, right = mean_shape() * 30 + (60, 130), mean_shape() * 30 + (210, 130)
    both = effect(image, np.stack([left, right]))
    assert np.array_equal(both, effect(effect(image, left[None]), right[None]))
    assert np.array_equal(effect(image, np.zeros((0, 68, 2))), image)
    assert np.array_equal(effect(image, []), image)
    assert effect(image, FACE[None] * 1e4).shape == image.shape
    point = effect(image, np.full((1, 68, 2), 50.0))
    assert (point != image).any(axis=2).sum() <= 4  # a face without size
    assert (effect(image, FACE[None] * 1e-4) != image).any(axis=2).sum() <= 64  # one cell at most
    assert effect(image[:, :, 0], FACE[None]).shape == image.shape


def test_a_large_face_is_drawn_in_tiles(picture: Picture, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = picture(image, FACE[None])
    assert (whole != image).any()
    monkeypatch.setattr(effects, "_TILE", 37)
    assert np.array_equal(picture(image, FACE[None]), whole)


@pytest.mark.parametrize("name", EFFECTS)
def test_what_is_no_image_or_no_face(image: np.ndarray, name: str) -> None:
    effect = open_effect(name)
    with pytest.raises(ImageError, match="must be uint8"):
        effect(image.astype(float), FACE[None])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"finite points \(n, 68, 2\)"):
        effect(image, FACE)
    with pytest.raises(InputError, match="finite points"):
        effect(image, np.full((1, 68, 2), np.nan))


def test_a_mesh_on_its_own_points_gives_the_same_picture(image: np.ndarray, rng: np.random.Generator) -> None:
    bgra = opaque(240, 280, rng)
    names = [name for name, indices in ANCHORS.items() if len(indices) == 1]
    drawn = Picture(bgra, dict(zip(names, FACE.tolist(), strict=True)), "mesh")(image, FACE[None])
    inside = cv2.fillConvexPoly(np.zeros((240, 280), np.uint8), cv2.convexHull(FACE.astype(np.int32)), 1)
    inside = cv2.erode(inside, np.ones((5, 5))) > 0
    assert inside.sum() > 5000
    assert np.array_equal(drawn[inside], bgra[:, :, :3][inside])
    outside = cv2.dilate(inside.astype(np.uint8), np.ones((15, 15))) == 0
    assert np.array_equal(drawn[outside], image[outside])


def test_a_mesh_follows_each_point() -> None:
    """A dot at a point of the picture is found at that point of a face of another shape."""
    names = [name for name, indices in ANCHORS.items() if len(indices) == 1]
    own, other = mean_shape() * 100 + 150, FACE + np.where(np.arange(68) >= 48, 9, 0)[:, None]
    for point in (30, 48, 57):
        bgra = np.zeros((300, 300, 4), np.uint8)
        x, y = np.rint(own[point]).astype(int)
        bgra[y - 3 : y + 4, x - 3 : x + 4] = 255
        drawn = Picture(bgra, dict(zip(names, own.tolist(), strict=True)), "mesh")(
            np.zeros((240, 240, 3), np.uint8), other[None]
        )
        rows, columns = np.nonzero(drawn[:, :, 0] > 128)
        assert np.hypot(columns.mean() - other[point, 0], rows.mean() - other[point, 1]) < 1.5


@pytest.mark.parametrize("shape", [(4, 12), (12, 4)])
def test_a_mesh_reaches_to_the_far_end_of_a_long_window(shape: tuple[int, int]) -> None:
    grid = np.add(np.stack(np.meshgrid(*map(np.arange, shape[::-1])), axis=-1), (30.0, 20.0))  # a window there
    corners = np.array([grid[0, 0] - 1, grid[0, 0] + (60, -1), grid[0, 0] + (-1, 60)])
    np.testing.assert_allclose(mesh_positions(grid, np.array([[0, 1, 2]]), corners, corners + 5), grid + 5)


def test_the_triangles_cover_the_face_once_and_are_delaunays() -> None:
    xy = mean_shape()
    triangles = triangles_from_points(xy)
    a, b, c = (xy[triangles[:, i]] for i in range(3))
    areas = abs(np.cross(np.pad(b - a, ((0, 0), (0, 1))), np.pad(c - a, ((0, 0), (0, 1))))[:, 2]) / 2
    hull = cv2.contourArea(cv2.convexHull(xy.astype(np.float32)))
    assert areas.sum() == pytest.approx(hull, rel=0.01)
    assert set(triangles.ravel()) == set(range(68))
    for triangle, area in zip(triangles, areas, strict=True):
        if area < 1e-6:
            continue
        p = xy[triangle]
        centre = np.linalg.solve(2 * (p[1:] - p[0]), (p[1:] ** 2).sum(axis=1) - (p[0] ** 2).sum())
        assert (np.hypot(*(xy - centre).T) >= np.hypot(*(p[0] - centre)) - 1e-3).all()


def test_a_hidden_face_keeps_a_few_means_alone(image: np.ndarray) -> None:
    drawn = open_effect("blur")(image, FACE[None])
    inside = (
        cv2.fillConvexPoly(np.zeros(image.shape[:2], np.uint8), np.rint(face_outline(FACE)).astype(np.int32), 1) > 0
    )
    assert all(inside[round(y), round(x)] for x, y in FACE)
    side = FACE.copy()
    side[30] += (90, 0)  # a nose seen from the side, beyond jaw and brows
    assert cv2.pointPolygonTest(face_outline(side).astype(np.float32), side[30].tolist(), False) > 0
    inside = cv2.erode(inside.astype(np.uint8), np.ones((3, 3))) > 0  # the outline was rounded to pixels here
    assert 2 <= len(np.unique(drawn[inside], axis=0)) <= 6 * 6
    assert (drawn[inside] == image[inside]).all(axis=1).mean() < 0.001  # as often as chance has it
    changed = (drawn != image).any(axis=2)
    assert not changed[cv2.dilate(inside.astype(np.uint8), np.ones((5, 5))) == 0].any()


@pytest.mark.parametrize("size_hw", [(120, 400), (400, 120)])
def test_a_face_at_the_far_end_of_a_long_image_is_hidden(size_hw: tuple[int, int], rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (*size_hw, 3), np.uint8)
    y, x = size_hw[0] - 60, size_hw[1] - 60
    hidden = Blur()(image, (mean_shape() * 30 + (x, y))[None])
    middle = hidden[y - 10 : y + 10, x - 10 : x + 10].reshape(-1, 3)
    assert len(np.unique(middle, axis=0)) <= 16  # cells, where noise was


def test_a_hidden_face_can_not_be_told_from_others_with_the_same_means(rng: np.random.Generator) -> None:
    """Many images give the very same result, so nothing leads from it back to one of them."""
    image, face = rng.integers(0, 256, (240, 240, 3), np.uint8), mean_shape() * 60 + 120
    hidden = Blur(1)(image, face[None])
    changed = (hidden != image).any(axis=2)
    rows, columns = np.nonzero(changed)
    window = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    other = image.copy()
    other[window] = rng.permutation(image[window].reshape(-1, 3)).reshape(image[window].shape)
    assert (other != image).any(axis=2).mean() > 0.2
    assert np.array_equal(Blur(1)(other, face[None])[changed], hidden[changed])


@pytest.mark.parametrize("place", [(3, 3), (-3, 20), (38, 59), (20, 20)])
def test_a_tiny_face_is_hidden_too(rng: np.random.Generator, place: tuple[float, float]) -> None:
    """No cell is so small that its mean is a pixel, not even of a face that is mostly outside."""
    image = rng.integers(0, 256, (60, 40, 3), np.uint8)
    drawn = Blur()(image, (mean_shape() * 3 + place)[None])
    changed = (drawn != image).any(axis=2)
    assert changed.any()
    assert len(np.unique(drawn[changed], axis=0)) == 1


def test_hiding_takes_a_cell_or_more() -> None:
    with pytest.raises(InputError, match="one cell or more, got 0"):
        Blur(0)


def test_there_is_no_such_effect() -> None:
    with pytest.raises(
        InputError, match="no effect 'nose'; choose from sunglasses, hat, moustache, mesh, blur, or name a"
    ):
        open_effect("nose")
    with pytest.raises(InputError, match="an effect must be a path, as text or of pathlib; got NoneType"):
        open_effect(None)  # type: ignore[arg-type]


def write_effect(folder: Path, text: str, channels: int = 4, depth: type = np.uint8) -> Path:
    cv2.imwrite(str(folder / "nose.png"), np.full((40, 40, channels), 200, depth))
    (folder / "my.toml").write_text(text, encoding="utf-8")
    return folder / "my.toml"


THREE = "left_eye = [1, 2]\nright_eye = [30, 2]\nmouth = [15, 30]\n"


def test_the_example_of_the_page_works(tmp_path: Path, image: np.ndarray) -> None:
    (text,) = re.findall(r"my\.toml <<END\n(.*?)END\n", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert 'image = "nose.png"' in text
    path = write_effect(tmp_path, text)
    effect = open_effect(path)
    assert (effect(image, FACE[None]) != image).any()


def test_a_toml_file_may_begin_with_a_mark(tmp_path: Path) -> None:
    path = write_effect(tmp_path, f'\ufeffimage = "nose.png"\n[anchors]\n{THREE}')
    assert len(picture_from_toml(path).anchors) == 3


def test_a_mesh_by_toml(tmp_path: Path) -> None:
    effect = picture_from_toml(write_effect(tmp_path, f'image = "nose.png"\nmap = "mesh"\n[anchors]\n{THREE}'))
    black = np.zeros((240, 240, 3), np.uint8)
    area = (effect(black, FACE[None]) > 0).any(axis=2).sum()
    a, b, c = effect.anchors_of(FACE)
    assert area == pytest.approx(abs(np.linalg.det(np.array([b - a, c - a]))) / 2, rel=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image = ", "my.toml is no TOML file"),
        ('image = "nose.png"\nsize = 3\n', "unknown key 'size'; an effect has image"),
        ("[anchors]\n" + THREE, "my.toml lacks image"),
        ('image = "nose.png"\n', "my.toml lacks anchors"),
        ('image = "gone.png"\n[anchors]\n' + THREE, "gone.png can't be read: No such file"),
        ('image = "my.toml"\n[anchors]\n' + THREE, "my.toml is no picture that OpenCV can decode"),
        ('image = "nose.png"\nmap = "cubic"\n[anchors]\n' + THREE, "placed by similarity or mesh, got 'cubic'"),
        ('image = "nose.png"\n[anchors]\near = [1, 2]\n', "no point 'ear'; name one such as left_eye_0"),
        ('image = "nose.png"\n[anchors]\neyes = [1]\n', r"the anchor eyes must be \[x, y\].*got \[1\]"),
        ('image = "nose.png"\n[anchors]\neyes = [nan, 1]\n', r"the anchor eyes must be \[x, y\]"),
        (f'image = "nose.png"\n[anchors]\neyes = [1, 1{"0" * 400}]\n', r"the anchor eyes must be \[x, y\]"),
        (f'image = "nose.png"\nanchors = {"[" * 9000}', "my.toml is no TOML file"),
        (
            'image = "\\u0000"\n[anchors]\n' + THREE,
            r"can't be read: (embedded null byte|open: embedded null character)",
        ),
        (f'image = "nose.png"\n[anchors]\neyes = [0x{"f" * 6000}, 1]\n', "my.toml is no TOML file"),
        ('image = "nose.png"\n[anchors]\neyes = "12"\n', r"the anchor eyes must be \[x, y\]"),
        ('image = "nose.png"\n[anchors]\neyes = [1, 2]\nmouth = [1, 30]\n', "has 2 anchors; a picture needs three"),
        ('image = "nose.png"\n[anchors]\n', "has 0 anchors; a picture needs three"),
        (
            'image = "nose.png"\n[anchors]\nleft_eye = [1, 1]\nright_eye = [20, 20]\nmouth = [30, 30]\n',
            "anchors lie on one line",
        ),
        (
            'image = "nose.png"\n[anchors]\nnose_bridge_0 = [1, 1]\nnose_bridge_1 = [20, 2]\nnose_bridge_2 = [3, 30]\n',
            "anchors lie on one line",
        ),
    ],
)
def test_toml_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_effect(write_effect(tmp_path, text))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "LONG = 1\n",
        'image = "LONG"\n[anchors]\n' + THREE,
        'image = "nose.png"\nmap = "LONG"\n[anchors]\n' + THREE,
        'image = "nose.png"\n[anchors]\nLONG = [1, 2]\n',
        'image = "nose.png"\n[anchors]\neyes = ["LONG", 2]\n',
    ],
)
def test_what_a_toml_file_says_is_not_told_at_length(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError) as caught:
        open_effect(write_effect(tmp_path, text.replace("LONG", "k" * 9000)))
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(("channels", "depth"), [(3, np.uint8), (1, np.uint8), (4, np.uint16)])
def test_a_picture_without_opacity(tmp_path: Path, channels: int, depth: type) -> None:
    path = write_effect(tmp_path, 'image = "nose.png"\n[anchors]\n' + THREE, channels, depth)
    with pytest.raises(
        ImageError, match=r"nose.png must have four channels of 8 bits.*save it as PNG with transparency"
    ):
        open_effect(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.toml can't be read: No such file"):
        open_effect(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b'image = "\xe9.png"')
    with pytest.raises(InputError, match=r"latin.toml is no TOML file"):
        open_effect(tmp_path / "latin.toml")
    with pytest.raises(ImageError, match=r"^/dev/zero can't be read: it is no plain file"):
        open_effect(write_effect(tmp_path, 'image = "/dev/zero"\n[anchors]\n' + THREE))


def test_a_picture_that_is_too_large() -> None:
    with pytest.raises(ImageError, match=r"is 5000 x 1 pixels; at most 4096 a side"):
        Picture(np.zeros((1, 5000, 4), np.uint8), EYES)


def test_python_3_10_without_tomli_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_effect(tmp_path, 'image = "nose.png"\n[anchors]\n' + THREE)
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(MissingExtraError, match=r"needs the package tomli.*pip install 'kp-edge\[effects\]'"):
        open_effect(path)


def test_a_face_is_hidden_to_the_height_of_its_forehead_and_a_tenth_more() -> None:
    outline, brows, below_nose = face_outline(FACE), FACE[17:27], FACE[31:36]
    forehead = brows + brows.mean(axis=0) - below_nose.mean(axis=0)
    assert forehead[:, 1].max() < brows[:, 1].min()
    whole = np.concatenate([FACE, forehead])
    low, high = whole.min(axis=0), whole.max(axis=0)
    np.testing.assert_allclose(outline.min(axis=0), low - 0.05 * (high - low), rtol=1e-6)
    np.testing.assert_allclose(outline.max(axis=0), high + 0.05 * (high - low), rtol=1e-6)
