"""Metrics for Prometheus: what models, detectors, trackers and runs do, by prometheus_client.

Nothing is counted unless a program asks for it: it makes a `Metrics`, wraps what is to be watched, and serves
the registry. `docs/metrics.md` lists the names and units.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.device_backend import DeviceBackend
from kp_runtime.errors import InputError, MissingExtraError
from kp_runtime.frame import Frame
from kp_runtime.timing import StageTimer
from kp_runtime.track import Track, Tracker, TrackerSettings

if TYPE_CHECKING:
    from kp_runtime.detect import Detector
    from kp_runtime.pipeline import Model
    from kp_runtime.results import Keypoints
    from kp_runtime.track import FindFaces, FindPoints

__all__ = ["BUCKETS_S", "Metrics", "address_from_text"]

BUCKETS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0)
"""Upper ends of the buckets of `kp_stage_seconds`: 0.1 ms to 25 s, which an answer of a full service may take."""


class Metrics:
    """Counters, histograms and gauges in a registry of their own. May be shared between threads.

    Attributes:
        registry: a `prometheus_client.CollectorRegistry`: `generate_latest(registry)` is the page.
        timer: goes where a `StageTimer` is taken; each sample joins the histogram of its stage.
        frames: counter of images that are done.
        faces: counter of the faces on them.
        dropped: counter of frames that were left out to keep up.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """

    def __init__(self) -> None:
        client = _client()
        self._client = client
        self.registry = registry = client.CollectorRegistry()
        self.frames = client.Counter("kp_frames", "Images or video frames that are done", registry=registry)
        self.faces = client.Counter("kp_faces", "Faces on them", registry=registry)
        self.dropped = client.Counter("kp_frames_dropped", "Frames of a live source left out", registry=registry)
        self._calls = client.Counter("kp_calls", "Calls of a model", registry=registry)
        self._crops = client.Counter("kp_crops", "Face boxes that a model was asked for", registry=registry)
        self._errors = client.Counter("kp_errors", "Errors by place and kind", ["where", "kind"], registry=registry)
        self._tracks = client.Counter("kp_tracks", "Faces that got a track", registry=registry)
        self._lost = client.Counter("kp_tracks_lost", "Times that a followed face was lost", registry=registry)
        self._queue = client.Gauge("kp_queue_length", "What waits, by queue", ["queue"], registry=registry)
        self._backend = client.Info("kp_backend", "The engine in use, by model", ["model"], registry=registry)
        self._detector = client.Info("kp_detector", "The face detector in use", ["detector"], registry=registry)
        self._seconds = client.Histogram(
            "kp_stage_seconds", "Time of a stage's runs", ["stage"], buckets=BUCKETS_S, registry=registry
        )
        client.ProcessCollector(registry=registry)  # memory, files, start; a registry of one's own has none
        self.timer: StageTimer = _HistogramTimer(self._seconds)

    def model(self, model: Model) -> FindPoints:
        """What calls the model, with its calls, boxes, errors and stage times counted; it has the model's `spec`.

        It takes the arguments of `Model.__call__`. Stages are `model` (the whole call) and, where the engine is on
        the CPU, those of `Model.__call__`; on a GPU, timing them would slow each call down. A caller's own timer
        gets the times of the stages instead.
        """
        from kp_runtime import __version__

        self.errors_may_be("model", "BackendError", "BoxError", "ImageError")
        report = model.backend.report
        self._backend.labels(model.spec.name).info(
            {
                "backend": report.backend,
                "file": report.file,
                "precision": report.precision,
                "sha256": report.sha256 or "",
                "version": __version__,
            }
        )
        return _WatchedModel(self, model)

    def detector(self, detector: Detector) -> FindFaces:
        """A function that calls the detector: stage `detect`, and its errors."""
        self.errors_may_be("detector", "BackendError", "ImageError")
        self._detector.labels(type(detector).__name__).info({"sha256": getattr(detector, "sha256", "")})

        def watched(image: Any, /, **rest: Any) -> NDArray[np.float64]:
            with self.errors("detector"), self.timer("detect"):
                return detector(image, **rest)

        return watched

    def tracker(self, model: Model, detector: Detector, settings: TrackerSettings | None = None) -> Tracker:
        """A `Tracker` with all of it watched: stage `track`, frames, faces, tracks, and how often one was lost."""
        return _WatchedTracker(self, self.model(model), self.detector(detector), settings)

    @contextlib.contextmanager
    def errors(
        self, where: str, kind: Callable[[Exception], str] = lambda error: type(error).__name__
    ) -> Iterator[None]:
        """Counts the error that ends the block, by its kind, and lets it pass."""
        try:
            yield
        except Exception as error:
            self._errors.labels(where, kind(error)).inc()
            raise

    def errors_may_be(self, where: str, *kinds: str) -> None:
        """Shows errors of these kinds as 0 before the first one, which Prometheus' `increase` misses otherwise."""
        for kind in kinds:
            self._errors.labels(where, kind)

    def queues(self, lengths: Mapping[str, Callable[[], int]]) -> None:
        """Shows the length of each queue, asked for when the page is read; a name given again is the new one."""
        for name, length in lengths.items():
            self._queue.labels(name).set_function(length)

    def page(self) -> tuple[bytes, str]:
        """The metrics as Prometheus reads them, and the content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST

    @contextlib.contextmanager
    def served(self, host: str, port: int) -> Iterator[int]:
        """Answers at `http://host:port/metrics` from a thread until the block ends; gives the port, also for port 0.

        Raises:
            InputError: the address can't be used.
        """
        try:
            server, thread = self._client.start_http_server(port, host, self.registry)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            wrong = "port" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else "host"
            raise InputError(f"metrics can't be served at {host}:{port} ({reason}); name another {wrong}") from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _HistogramTimer(StageTimer):
    """Gives each sample to a histogram and keeps none."""

    def __init__(self, seconds: Any) -> None:
        super().__init__()
        self._histogram = seconds

    def __call__(self, stage: str) -> Any:
        return self._histogram.labels(stage).time()


class _WatchedModel:
    """A model that counts."""

    def __init__(self, metrics: Metrics, model: Model) -> None:
        self.spec, self._metrics, self._model = model.spec, metrics, model
        self._stages = None if isinstance(model.backend, DeviceBackend) else metrics.timer

    def __call__(
        self, image: Any, boxes_xyxy: ArrayLike, /, *, timer: StageTimer | None = None, **rest: Any
    ) -> Keypoints:
        metrics = self._metrics
        with metrics.errors("model"), metrics.timer("model"):
            found = self._model(image, boxes_xyxy, timer=timer or self._stages, **rest)
        metrics._calls.inc()
        metrics._crops.inc(len(found))
        return found


class _WatchedTracker(Tracker):
    """A tracker that counts."""

    def __init__(
        self, metrics: Metrics, model: FindPoints, detector: FindFaces, settings: TrackerSettings | None
    ) -> None:
        super().__init__(model, detector, settings)
        self._metrics = metrics

    def __call__(self, image: Frame | NDArray[np.uint8], seconds: float) -> tuple[Track, ...]:
        metrics, faces, lost = self._metrics, self.faces, self.lost
        with metrics.timer("track"):
            tracks = super().__call__(image, seconds)
        metrics.frames.inc()
        metrics.faces.inc(len(tracks))
        metrics._tracks.inc(self.faces - faces)
        metrics._lost.inc(self.lost - lost)
        return tracks


def address_from_text(text: str) -> tuple[str, int]:
    """Host and port of `9100` (this machine alone), `0.0.0.0:9100` (any that reaches it) or `[::1]:9100`.

    Raises:
        InputError: it is no address.
    """
    host, _, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 2**16
    if not is_port or (host.endswith(":") and host != "::"):  # the latter: ::1 is a host alone
        raise InputError(
            f"metrics are served at PORT or HOST:PORT, such as 9100, 0.0.0.0:9100 or [::1]:9100; got {text!r:.100}"
        )
    return host.strip("[]") or "127.0.0.1", int(port)


def _client() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise MissingExtraError("prometheus_client", "metrics", "counting for Prometheus") from error
    return prometheus_client
