from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kp_runtime.bench import Bench, run_bench
from kp_runtime.errors import ImageError, InputError
from kp_runtime.spec import Manifest
from kp_runtime.timing import TimeSummary


def astronaut_box(image: object, layout: str = "bgr") -> np.ndarray:
    return np.array([[181.0, 88.0, 269.0, 178.0]])


def nothing(image: object, layout: str = "bgr") -> np.ndarray:
    return np.empty((0, 4))


@pytest.fixture(scope="module")
def bench(bundle: Path, astronaut: Path) -> Bench:
    return run_bench(bundle, astronaut, astronaut_box, batches=(1, 3), seconds=0, threads=1)


def check_summary(summary: TimeSummary) -> None:
    assert summary.samples >= 10
    assert 0 < summary.p50_ms <= summary.p95_ms <= summary.p99_ms <= summary.max_ms
    assert 0 < summary.mean_ms <= summary.max_ms


def test_every_stage_is_measured(bench: Bench) -> None:
    assert list(bench.stages) == ["read", "detect", "crop", "infer", "map back"]
    assert (bench.faces, bench.threads) == (1, 1)
    for summary in bench.stages.values():
        check_summary(summary)


def test_every_batch_is_measured(bench: Bench, bundle: Path) -> None:
    sha256 = Manifest.read(bundle).files["model.fp32.onnx"].sha256
    assert [(n.file, n.sha256, n.batch) for n in bench.network] == [("model.fp32.onnx", sha256, b) for b in (1, 3)]
    for network in bench.network:
        check_summary(network.time)
        assert network.ms_a_face == network.time.p50_ms / network.batch


def test_result_is_one_json_document(bench: Bench) -> None:
    raw = json.loads(json.dumps(asdict(bench)))
    assert raw["machine"]["cores"] == os.cpu_count()
    assert raw["stages"]["infer"]["samples"] == bench.stages["infer"].samples


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": (1, 0)}, "batch sizes must be 1 or more, got 1, 0"),
        ({"threads": 0}, "threads must be 1 to .* the cores of this machine; got 0"),
        ({"threads": (os.cpu_count() or 1) + 1}, "threads must be 1 to"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], message: str, bundle: Path, astronaut: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_bench(bundle, astronaut, astronaut_box, **arguments)


def test_photo_without_a_face(bundle: Path, astronaut: Path) -> None:
    with pytest.raises(ImageError, match=r"no face was found on .*astronaut\.png; bench on a photo with one"):
        run_bench(bundle, astronaut, nothing, seconds=0, threads=1)
