"""What two processors are compared on: recorded twice here, and bent in each way that must be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kp_runtime.errors import BundleError, InputError
from scripts import graph_levels
from scripts.architectures import BOXES, SIZES, compare, main


@pytest.fixture(scope="module")
def here(bundle: Path, astronaut: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "here.npz"
    assert main(["record", str(out), str(astronaut), str(bundle)]) == 0
    return out


def bent(here: Path, there: Path, name: str, by: float) -> Path:
    """The recording with one number moved."""
    with np.load(here) as recorded:
        results = {key: recorded[key] for key in recorded.files}
    results[name] = results[name].copy()
    results[name].reshape(-1)[5 % results[name].size] += np.array(by).astype(results[name].dtype)
    np.savez(there, **results)
    return there


def test_one_processor_agrees_with_itself(
    here: Path, bundle: Path, astronaut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.npz"
    assert main(["record", str(again), str(astronaut), str(bundle)]) == 0
    assert main(["compare", str(here), str(again)]) == 0
    found = {d.name: d for d in compare(here, again)}
    assert all(d.differing == 0 and d.largest == 0 for d in found.values())
    assert found["crops of 112 px"].values == len(BOXES) * 2 * 112**2
    assert found["keypoints fp32"].values == 3 * 68
    assert {f"grey crops of {size} px" for size in SIZES} | {"grey levels", "Haar's boxes"} <= set(found)
    assert "TOO FAR" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "by", "passes"),
    [
        ("grey levels", 1, False),
        ("crops of 64 px", 1, False),
        ("Haar's boxes", 1e-9, False),
        ("keypoints fp32", 0.009, True),
        ("keypoints fp32", 0.011, False),
        ("keypoints fp32", float("nan"), False),
    ],
)
def test_what_counts_as_too_far(here: Path, tmp_path: Path, name: str, by: float, passes: bool) -> None:
    there = bent(here, tmp_path / "there.npz", name, by)
    assert main(["compare", str(here), str(there)]) == (0 if passes else 1)
    assert [d.name for d in compare(here, there) if d.differing] == [name]


def test_what_is_missing_on_one_side_is_too_far(here: Path, astronaut: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.npz"
    assert main(["record", str(alone), str(astronaut)]) == 0
    assert main(["compare", str(here), str(alone)]) == main(["compare", str(alone), str(here)]) == 1
    assert [d.name for d in compare(here, alone) if not d.is_fine] == ["keypoints fp32"]


def test_a_recording_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / "here.npz"), str(tmp_path / "there.npz")]) == 1
    assert "here.npz can't be read: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no numbers", b"PK\3\4 and cut off"])
def test_a_file_that_is_no_recording(here: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "there.npz").write_bytes(content)
    for comparing in (compare, graph_levels.compare):
        with pytest.raises(InputError, match=r"there\.npz is no recording; make one with: record"):
            comparing(here, tmp_path / "there.npz")


def test_graph_levels_of_a_file_that_a_bundle_lacks(bundle: Path) -> None:
    assert list(graph_levels.sessions(bundle, "fp32")) == [f"fp32, {level}" for level in graph_levels.LEVELS]
    with pytest.raises(BundleError, match=r"has no file model\.int8\.onnx"):
        graph_levels.sessions(bundle, "int8")


def test_a_bundle_that_is_none(astronaut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", str(tmp_path / "out.npz"), str(astronaut), str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
