"""Metrics for Prometheus: what is counted, and the page that shows it."""

from __future__ import annotations

import errno
import hashlib
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import kp_runtime
from kp_runtime.errors import BackendError, BoxError, InputError, MissingExtraError
from kp_runtime.prometheus import BUCKETS_S, Metrics, address_from_text
from kp_runtime.video import run_video
from kp_runtime.video_sink import open_sinks
from kp_runtime.video_source import VideoFrame, open_source

pytest.importorskip("prometheus_client", reason="prometheus_client, which the metrics are made with, is not installed")

ROOT = Path(__file__).resolve().parents[1]
IMAGE = np.full((96, 128, 3), 128, np.uint8)
BOX = [[20.0, 20, 80, 80]]


@pytest.fixture
def model(bundle: Path) -> Any:
    with kp_runtime.load(bundle, threads=1) as opened:
        yield opened


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    found: float | None = metrics.registry.get_sample_value(name, labels)
    return found


def test_a_watched_model_answers_as_the_model(model: Any, bundle: Path) -> None:
    metrics = Metrics()
    watched = metrics.model(model)
    for boxes in (BOX, BOX * 3, []):
        assert (watched(IMAGE, boxes).xy == model(IMAGE, boxes).xy).all()
    assert value(metrics, "kp_calls_total") == 3
    assert value(metrics, "kp_crops_total") == 4
    for stage in ("model", "crop", "infer", "map back"):
        assert value(metrics, "kp_stage_seconds_count", stage=stage) == 3
    whole = value(metrics, "kp_stage_seconds_sum", stage="model") or 0
    assert 0 < sum(value(metrics, "kp_stage_seconds_sum", stage=s) or 0 for s in ("crop", "infer", "map back")) < whole
    report = model.backend.report
    labels = {"backend": "ort-cpu", "file": report.file, "precision": "fp32", "version": kp_runtime.__version__}
    labels["sha256"] = hashlib.sha256((bundle / report.file).read_bytes()).hexdigest()
    assert value(metrics, "kp_backend_info", model="tiny", **labels) == 1


def test_a_callers_timer_and_options_are_the_callers(model: Any) -> None:
    metrics, timer, out = Metrics(), kp_runtime.StageTimer(), np.empty((1, 68, 2), np.float32)
    assert metrics.model(model)(IMAGE[:, :, 0], BOX, timer=timer, out=out).xy is out  # type: ignore[call-arg]
    assert list(timer.seconds) == ["crop", "infer", "map back"]
    assert value(metrics, "kp_stage_seconds_count", stage="infer") is None


def test_errors_are_counted_and_pass(model: Any) -> None:
    metrics = Metrics()
    watched = metrics.model(model)
    assert value(metrics, "kp_errors_total", where="model", kind="BoxError") == 0
    with pytest.raises(BoxError, match="not finite"):
        watched(IMAGE, [[0.0, 0, np.nan, 9]])

    def broken(image: Any) -> Any:
        raise BackendError("no detector")

    detector = metrics.detector(broken)
    assert value(metrics, "kp_errors_total", where="detector", kind="BackendError") == 0
    with pytest.raises(BackendError, match="no detector"):
        detector(IMAGE)
    assert value(metrics, "kp_errors_total", where="model", kind="BoxError") == 1
    assert value(metrics, "kp_errors_total", where="detector", kind="BackendError") == 1
    assert value(metrics, "kp_calls_total") == 0


def test_the_page_tells_whose_boxes_it_counts() -> None:
    metrics, own = Metrics(), ROOT / "engines" / "face-detector"
    metrics.detector(kp_runtime.CenterDetector(own, threads=1))
    sha256 = hashlib.sha256((own / "model.fp32.onnx").read_bytes()).hexdigest()
    assert value(metrics, "kp_detector_info", detector="CenterDetector", sha256=sha256) == 1


def test_buckets_reach_from_a_tenth_of_a_millisecond_to_a_full_services_answer() -> None:
    metrics = Metrics()
    metrics._seconds.labels("x").observe(0.0003)
    counts = [value(metrics, "kp_stage_seconds_bucket", stage="x", le=str(end)) for end in BUCKETS_S]
    assert (BUCKETS_S[0], BUCKETS_S[-1]) == (1e-4, 25.0)
    assert counts == [float(end >= 0.0003) for end in BUCKETS_S]


def test_a_tracker_counts_faces_tracks_and_losses(model: Any) -> None:
    metrics = Metrics()
    xy = np.random.default_rng(0).uniform(20, 80, (68, 2)).astype(np.float32)
    there = True

    def finds(image: Any, boxes: Any, **rest: Any) -> kp_runtime.Keypoints:
        boxes = np.asarray(boxes, np.float64)
        answers, scores = np.stack([xy] * len(boxes)), np.full(len(boxes), 0.1 if there else 0.9, np.float32)
        return kp_runtime.Keypoints(answers, boxes, np.zeros((len(boxes), 2, 3)), (96, 128), scores)

    finds.spec, finds.backend = model.spec, model.backend  # type: ignore[attr-defined]
    tracker = metrics.tracker(finds, lambda image: np.array(BOX) if there else np.empty((0, 4)))  # type: ignore[arg-type]
    for there in (True, True, False, False, True):  # noqa: B007, the functions above look at it
        tracker(IMAGE, 0.0)
    assert value(metrics, "kp_frames_total") == 5
    assert value(metrics, "kp_faces_total") == 3
    assert value(metrics, "kp_tracks_total") == 1
    assert value(metrics, "kp_tracks_lost_total") == tracker.lost == 1
    assert value(metrics, "kp_stage_seconds_count", stage="detect") == tracker.detector_runs
    assert value(metrics, "kp_stage_seconds_count", stage="track") == 5


def test_a_run_shows_its_steps_and_queues(model: Any, tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for i in range(5):
        cv2.imwrite(str(tmp_path / "frames" / f"{i}.png"), IMAGE)
    metrics = Metrics()
    source = open_source(str(tmp_path / "frames"), rate=25)
    seen: list[set[str]] = []
    run_video(
        source,
        metrics.tracker(model, lambda image: np.array(BOX)),  # type: ignore[arg-type]
        open_sinks(["avi"], tmp_path, "run", rate=25, size_hw=source.size_hw, live=False),
        step=lambda frames: seen.append({q for q in ("read", "tracked", "drawn") if 0 <= length(metrics, q) <= 4}),
        metrics=metrics,
    )
    assert seen == [{"read", "tracked", "drawn"}] * 5
    counts = {s: value(metrics, "kp_stage_seconds_count", stage=s) for s in ("read", "track", "draw", "write")}
    assert counts == {"read": 6, "track": 5, "draw": 5, "write": 5}
    assert value(metrics, "kp_frames_dropped_total") == 0


def length(metrics: Metrics, queue: str) -> float:
    found = value(metrics, "kp_queue_length", queue=queue)
    return -1 if found is None else found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process is counted on Linux alone")
def test_what_the_docs_ask_prometheus_for_is_on_the_page(model: Any) -> None:
    metrics = Metrics()
    metrics.tracker(model, lambda image: np.empty((0, 4)))(IMAGE, 0.0)  # type: ignore[arg-type]
    asked = "".join(re.findall("```promql\n(.*?)```", (ROOT / "docs" / "metrics.md").read_text(), re.DOTALL))
    names = set(re.findall(r"\b(?:kp|process)_\w+", asked))
    assert len(names) > 8
    assert names <= {sample.name for family in metrics.registry.collect() for sample in family.samples}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prometheus_client reads /proc")
def test_the_page_tells_the_process_memory_and_start() -> None:
    metrics = Metrics()
    assert (value(metrics, "process_resident_memory_bytes") or 0) > 2**20
    assert (value(metrics, "process_open_fds") or 0) > 0
    assert (value(metrics, "process_start_time_seconds") or 0) > 0


def test_the_page_is_served_and_taken_away_again() -> None:
    metrics = Metrics()
    metrics.frames.inc(7)
    with metrics.served("127.0.0.1", 0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            assert "kp_frames_total 7.0" in answer.read().decode().splitlines()
        taken = f"metrics can't be served at 127.0.0.1:{port} .*name another port"
        with pytest.raises(InputError, match=taken), Metrics().served("127.0.0.1", port):
            raise AssertionError
    with socket.socket() as free:  # nobody listens any more
        assert free.connect_ex(("127.0.0.1", port)) != 0


def test_a_host_that_is_none() -> None:
    for host in ("no.such.host.invalid", "192.0.2.1"):  # the second one is of no machine (RFC 5737)
        message = rf"metrics can't be served at {re.escape(host)}:9100 .*name another host"
        with pytest.raises(InputError, match=message), Metrics().served(host, 9100):
            raise AssertionError


def test_a_port_that_only_root_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    metrics = Metrics()
    monkeypatch.setattr(metrics._client, "start_http_server", refused)
    message = r"at 0\.0\.0\.0:80 \(Permission denied\); name another port"
    with pytest.raises(InputError, match=message), metrics.served("0.0.0.0", 80):
        raise AssertionError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:9100", ("::1", 9100)),
        (":::9100", ("::", 9100)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert address_from_text(text) == address


@pytest.mark.parametrize("text", ["", "x", "host:", "65536", "70000", "-1", "9100:host", "9" * 5000, "::1", "fe80::1"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(InputError, match="metrics are served at PORT or HOST:PORT"):
        address_from_text(text)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(
        MissingExtraError, match=r"needs the package prometheus_client.*pip install 'kp-edge\[metrics\]'"
    ):
        Metrics()


def test_what_runs_drop_adds_up() -> None:
    class Camera:
        name = stem = "made up"
        live, rate, count, size_hw = True, 30.0, None, (96, 128)

        def __iter__(self) -> Iterator[VideoFrame]:
            yield from (VideoFrame(i, i / 30, IMAGE) for i in range(20))

    def slow(image: Any, seconds: float) -> tuple[()]:
        time.sleep(0.02)
        return ()

    slow.faces = slow.detector_runs = 0  # type: ignore[attr-defined]
    metrics = Metrics()
    assert value(metrics, "kp_frames_dropped_total") == 0
    runs = [run_video(Camera(), slow, [], metrics=metrics).dropped for _ in range(2)]  # type: ignore[arg-type]
    assert min(runs) > 0
    assert value(metrics, "kp_frames_dropped_total") == sum(runs)


def test_a_host_that_can_not_be() -> None:
    with pytest.raises(InputError, match=r"metrics can't be served at a\.\.b:0"), Metrics().served("a..b", 0):
        raise AssertionError
