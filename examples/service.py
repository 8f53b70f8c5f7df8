"""Keypoints over HTTP: requests that arrive together share one network call.

What it does    POST an image (JPEG or PNG, as the body) to /keypoints -> JSON with the box and the 68
                keypoints of every face. GET /health runs the network and compares its answer; GET /metrics
                is a page for Prometheus, of this process: start others on ports of their own, not as --workers.
What it needs   pip install 'kp-edge[image,ort,serve,metrics]'; a bundle
How to run      KP_MODEL=BUNDLE uvicorn examples.service:app, or KP_MODEL=BUNDLE python examples/service.py
How to ask      curl --data-binary @photo.jpg http://127.0.0.1:8000/keypoints
Settings        environment variables, see `Settings`; with `uvicorn`, host and port are its own options, and so are
                --no-access-log and --timeout-graceful-shutdown, which the program has set
Errors          {"detail": "one line"}: 400 no image, 408 slow upload, 413 too large or too many faces, 415 neither
                JPEG nor PNG, 503 busy, ending or short of memory (with Retry-After), 500 the engine failed, 501
                metrics without prometheus_client
How it ends     with status 1 where the engine fails or hangs, so that systemd or Docker start it again: see `watch`;
                at SIGTERM when what it has let in is answered, or `body_seconds` and 5 s have passed
What was run    here, on x86-64 CPUs: the tests, in one process and over a socket. Not run: GPU engines
What it gains   calls are shared where the network is what requests wait for. With Haar on two busy cores it is
                not: 64 requests of 8 clients, one face each, made 62 calls
What it leaves  to the proxy in front: TLS, who may ask, how often, connections that never end their headers, and
                uploads that stall, each of which holds one of `max_requests` places for `body_seconds`
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

import kp_runtime
from kp_runtime.backend import Backend
from kp_runtime.cores import check_process, default_threads
from kp_runtime.default_model import MODEL_VARIABLE, default_bundle
from kp_runtime.detect import box_advice
from kp_runtime.detector_by_name import DETECTOR_VARIABLE, detector_name
from kp_runtime.in_order import InOrder
from kp_runtime.manifest import folder_of
from kp_runtime.prometheus import Metrics
from kp_runtime.track import FindFaces

ENGINES_OF_THE_CHECKOUT = Path(__file__).resolve().parents[1] / "engines"
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
"""How a JPEG and a PNG begin."""
PIXELS_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"
"""Where OpenCV reads how many pixels it takes; the error of an image with more names it."""
MOST_FACES = 256
"""On an image: one of 135 KB can show 20,000, which keep the engine for very long."""

SMALL_BYTES = 8 << 20
"""Of an image that waits for the engine without the place of its detector; 32 of 40 megapixels are 4 GB."""


@dataclass(frozen=True)
class Settings:
    """Each field can be set by the environment: `KP_` and its name in capitals."""

    model: str | None = None  # a bundle; None: the installed default model, else the checkout's
    backend: str = "auto"
    public_key: str | None = None  # the PEM file of the key that must have signed the bundle
    detector: str = "auto"  # own=BUNDLE, haar, yunet=FILE; auto: the project's own where it is there, else haar
    max_upload_mib: int = 8
    max_megapixels: int = 40  # a small file can be a huge image
    max_requests: int = 32  # being answered at once; one more is told to come back later
    body_seconds: int = 10  # in which an upload has to arrive
    wait_ms: int = 4  # how long the first request waits for others to share its network call
    batch_faces: int = 8  # so many faces do not wait for more
    host: str = "127.0.0.1"
    port: int = 8000

    @classmethod
    def from_environment(cls) -> Settings:
        """The defaults, replaced by what is set.

        Raises:
            InputError: a number that is none or out of range, or nothing: no host would be all of the machine's.
        """
        given: dict[str, Any] = {}
        for setting in fields(cls):
            name = f"KP_{setting.name.upper()}"
            text = os.environ.get(name)
            if text is None or (not text and name in (MODEL_VARIABLE, DETECTOR_VARIABLE)):  # as kp_runtime takes them
                continue
            if not isinstance(setting.default, int):
                if not text:
                    raise kp_runtime.InputError(f"{name} is set to nothing; give it a value, or do not set it")
                given[setting.name] = text
                continue
            most = 65_535 if setting.name == "port" else 1_000_000
            if not (text.isascii() and text.isdigit() and len(text) < 8 and 0 < int(text) <= most):
                raise kp_runtime.InputError(f"{name} must be a whole number from 1 to {most}, got {text!r:.40}")
            given[setting.name] = int(text)
        return cls(**given)


def say(line: str) -> None:
    """Prints a line on stderr; a log that takes none, as on a full disk, is no reason not to serve."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Seldom:
    """Says at most one line in so many seconds: what fails each request fails many. Used by one thread."""

    def __init__(self, every_s: float = 10) -> None:
        self._every_s, self._next, self._unsaid = every_s, 0.0, 0

    def __call__(self, line: str) -> None:
        """Says the line, or counts it for the next one."""
        if time.monotonic() < self._next:
            self._unsaid += 1
            return
        say(line + f" ({self._unsaid} more errors since the last line)" * bool(self._unsaid))
        self._next, self._unsaid = time.monotonic() + self._every_s, 0


@dataclass
class Batch:
    """Crops that wait for the same network call, and where each caller's answer goes."""

    jobs: list[tuple[NDArray[np.uint8], Future[list[NDArray[np.float32]]]]] = field(default_factory=list)

    @property
    def faces(self) -> int:
        """How many crops wait."""
        return sum(len(crops) for crops, _ in self.jobs)

    def run(self, backend: Backend) -> None:
        """One network call for all; its error is everyone's."""
        try:
            answer = backend.answer(np.concatenate([crops for crops, _ in self.jobs]))
        except Exception as error:
            for _, future in self.jobs:
                future.set_exception(error)
            return
        start = 0
        for crops, future in self.jobs:
            future.set_result([array[start : start + len(crops)] for array in answer.outputs()])
            start += len(crops)


class BatchingBackend(Backend):
    """A backend that runs the crops of several threads in one call of another backend.

    The first thread to come waits `wait_s` for others, or until `enough` faces are there, and while
    a call is running; then it runs all that have come. A `Model` on it is used as any other, so a
    request's keypoints are those of `model(image, boxes)`. All calls are made by one thread: on a GPU
    each thread that calls an engine gets a context of its own, with memory for the largest batch.
    """

    def __init__(self, backend: Backend, wait_s: float, enough: int) -> None:
        super().__init__(backend.spec)
        self.name, self.report, self.golden = backend.name, backend.report, backend.golden
        self.calls = self.faces = 0
        self._backend, self._wait_s, self._enough = backend, wait_s, enough
        self._arrival = threading.Condition()
        self._one = InOrder(1, most=64)
        self._batch = Batch()

    @property
    def waiting(self) -> int:
        """How many crops wait."""
        return self._batch.faces

    def _run(self, crops: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        check_process(self._process)
        answer: Future[list[NDArray[np.float32]]] = Future()
        with self._arrival:
            self._batch.jobs.append((crops, answer))
            leads = len(self._batch.jobs) == 1
            self._arrival.notify()
        if leads:
            with self._arrival:
                self._arrival.wait_for(lambda: self._batch.faces >= self._enough, self._wait_s)
            self._one.submit(self._call).result()
        return answer.result()

    def _call(self) -> None:
        """Runs what waits by the time that the engine's thread is free."""
        with self._arrival:
            batch, self._batch = self._batch, Batch()
        self.calls, self.faces = self.calls + 1, self.faces + batch.faces
        batch.run(self._backend)

    def begin(self, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Makes calls of up to `enough` faces find everything ready; the keypoints of a crop."""
        self._one.submit(lambda: self._backend.warmup(self._enough)).result()
        return self.alone(crop)

    def alone(self, crop: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The keypoints of a crop, which waits for no other: what fails a call of many is no error of its own."""
        keypoints: NDArray[np.float32] = self._one.submit(lambda: self._backend.infer(crop)).result()
        return keypoints


class Service:
    """Image bytes to keypoints; `answer` is called from many threads at once."""

    def __init__(self, settings: Settings) -> None:
        bundle = settings.model or default_bundle(ENGINES_OF_THE_CHECKOUT / "resnet18-68")
        model = kp_runtime.load(bundle, settings.backend, public_key=settings.public_key)
        model.check_boxes()
        report = model.backend.report
        rejected = f"; rejected: {' | '.join(report.rejected)}" * bool(report.rejected)
        where = os.path.realpath(folder_of(Path(bundle)) / report.file)  # which release a link leads to
        say(f"kp {kp_runtime.__version__}: {report.backend} runs {where}, sha256 {report.sha256}{rejected}")
        if advice := box_advice(model.spec):
            say(advice)
        model.close()  # its engine alone is used
        self.batching = BatchingBackend(model.backend, settings.wait_ms / 1000, settings.batch_faces)
        self.metrics = metrics_or_none()
        shared = kp_runtime.Model(self.batching)
        self._model = self.metrics.model(shared) if self.metrics else shared
        # as many as there are cores: the others wait here, with their bytes still compressed
        self._detectors: queue.LifoQueue[FindFaces] = queue.LifoQueue()
        named = detector_name(
            settings.detector, checkout=ENGINES_OF_THE_CHECKOUT / "face-detector", public_key=settings.public_key
        )
        for _ in range(default_threads()):
            detector = kp_runtime.load_detector(named, threads=1, public_key=settings.public_key)
            self._detectors.put(self.metrics.detector(detector) if self.metrics else detector)
        kind, _, path = named.partition("=")
        self._faces_by = {"detector": kind, "detector_sha256": getattr(detector, "sha256", None)}
        say(f"faces by {kind}" + f" {os.path.realpath(path)}, sha256 {self._faces_by['detector_sha256']}" * bool(path))
        size = model.spec.size
        self._crop = np.random.default_rng(68).integers(0, 256, (1, 1, size, size), dtype=np.uint8)
        self._expected = self.batching.begin(self._crop)  # load() has just compared the golden crop

    def answer(self, data: bytes) -> dict[str, Any]:
        """The keypoints of all faces, as `Keypoints.to_json`."""
        with contextlib.ExitStack() as place:
            detector = self._detectors.get()
            place.callback(self._detectors.put, detector)
            image = kp_runtime.image_from_bytes(data)
            boxes = np.asarray(detector(image))
            if len(boxes) > MOST_FACES:
                raise HTTPException(413, f"an image may have {MOST_FACES} faces; send a part of it")
            if image.nbytes <= SMALL_BYTES:
                place.close()
            found = self._model(image, boxes)
        if self.metrics:
            self.metrics.frames.inc()
            self.metrics.faces.inc(len(found))
        return found.to_json()

    def check(self) -> dict[str, Any]:
        """Runs the network; what runs, and how many faces shared how many calls.

        Raises:
            BackendError: it no longer gives the answer that it gave at the start.
        """
        error = float(np.abs(self.batching.alone(self._crop) - self._expected).max())
        if not error < 0.5:
            raise kp_runtime.BackendError(f"a keypoint is {error:.3f} px from where it was at the start; restart")
        report = self.batching.report
        return {
            "status": "ok",
            "backend": report.backend,
            "file": report.file,
            "sha256": report.sha256,
            "kp": kp_runtime.__version__,
            "rejected": report.rejected,
            **self._faces_by,
            "lost_limit": self.batching.spec.lost_limit,
            "calls": self.batching.calls,
            "faces": self.batching.faces,
        }


def watch(check: Callable[[], object], every_s: float = 30, most_s: float = 120) -> None:
    """Runs a check again and again; where it fails or does not return, this process ends, with status 1.

    One that has lost its GPU does not get it back, and behind an engine that hangs every request waits for ever. The
    clock is none of Python's threads, so it goes on whatever hangs; it prints where each thread stands.
    """
    while True:
        faulthandler.dump_traceback_later(every_s + most_s, exit=True)
        time.sleep(every_s)
        try:
            check()
        except kp_runtime.KpError as error:
            say(f"error: {error}; the service ends, to be started again")
            os._exit(1)


def metrics_or_none() -> Metrics | None:
    """What is counted, or nothing where prometheus_client is not installed; /metrics then says so."""
    try:
        return Metrics()
    except kp_runtime.MissingExtraError:
        return None


class Door:
    """Lets so many requests in at once. Used by the event loop's one thread."""

    def __init__(self, most: int) -> None:
        self._most, self.inside = most, 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Holds a place, or refuses at once: waiting would only make the queue longer."""
        if self.inside >= self._most:
            busy = f"busy: {self._most} requests are being answered; try again in a second"
            raise HTTPException(503, busy, {"Retry-After": "1"})
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def kind_of(error: Exception) -> str:
    """An error's name in the metrics."""
    return str(error.status_code) if isinstance(error, HTTPException) else type(error).__name__


async def body_of(request: Request, settings: Settings) -> bytes:
    """The whole upload, which is never larger in memory than it may be."""

    async def read() -> bytes:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > settings.max_upload_mib << 20:
                raise HTTPException(413, f"an image may have {settings.max_upload_mib} MiB; send a smaller one")
        return bytes(data)

    try:
        return await asyncio.wait_for(read(), settings.body_seconds)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, f"the image did not arrive within {settings.body_seconds} s") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the upload was cut off") from error


def create_app(settings: Settings) -> FastAPI:
    """The web application, with its model loaded.

    Raises:
        KpError: the model or the detector can't be used.
    """
    # OpenCV reads it once, when it is imported
    os.environ[PIXELS_VARIABLE] = str(settings.max_megapixels * 1_000_000)
    service, door = Service(settings), Door(settings.max_requests)
    threads = ThreadPoolExecutor(settings.max_requests, "request")  # who is let in never waits for a thread
    app = FastAPI(openapi_url=None)  # what it has is told above: no pages of FastAPI's own
    checking: asyncio.Task[dict[str, Any]] | None = None
    seldom = Seldom()
    app.state.settings, app.state.service = settings, service
    metrics = service.metrics
    stage: Callable[[str], Any] = metrics.timer if metrics else contextlib.nullcontext
    if metrics:
        metrics.errors_may_be("request", "400", "408", "413", "415", "503", "BackendError", "ImageError", "MemoryError")
        metrics.queues({"requests": lambda: door.inside, "crops": lambda: service.batching.waiting})

    @app.post("/keypoints")
    async def keypoints(request: Request) -> JSONResponse:
        with metrics.errors("request", kind_of) if metrics else contextlib.nullcontext(), door.entered():
            data = await body_of(request, settings)
            if not data.startswith(MAGIC):
                raise HTTPException(415, "the body is neither a JPEG nor a PNG; send the image's bytes as they are")
            try:
                with stage("answer"):  # with the waits for a thread, a detector and the engine, not for the upload
                    found = await asyncio.get_running_loop().run_in_executor(threads, service.answer, data)
                return JSONResponse(found)
            except asyncio.CancelledError as error:  # uvicorn waits no longer
                raise HTTPException(503, "the service ends; try again in a second", {"Retry-After": "1"}) from error

    @app.get("/health")
    async def health() -> JSONResponse:
        nonlocal checking
        if checking is None or checking.done():  # who asks meanwhile gets the same answer
            checking = asyncio.create_task(asyncio.to_thread(service.check))
        return JSONResponse(await asyncio.shield(checking))

    @app.get("/metrics")
    def page() -> Response:
        if metrics is None:
            raise HTTPException(501, "there are no metrics without prometheus_client: pip install 'kp-edge[metrics]'")
        text, kind = metrics.page()
        return Response(text, media_type=kind)

    @app.exception_handler(kp_runtime.KpError)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        if PIXELS_VARIABLE in str(error):
            most = f"an image may have {settings.max_megapixels} megapixels; send a smaller one"
            return JSONResponse({"detail": most}, 413)
        if isinstance(error, kp_runtime.ImageError):
            return JSONResponse({"detail": str(error)}, 400)
        seldom(f"error: {error}")  # whoever asked may tell nobody
        return JSONResponse({"detail": str(error)}, 500)

    @app.exception_handler(MemoryError)
    async def too_little(_: Request, error: Exception) -> JSONResponse:
        detail = "there is too little memory now; try again in a second, or send a smaller image"
        seldom(f"error: {detail}")
        return JSONResponse({"detail": detail}, 503, {"Retry-After": "1"})

    return app


def give_memory_back() -> None:
    """Makes blocks of 1 MiB and more go back to the system once they are free; glibc would leave each thread some."""
    with contextlib.suppress(AttributeError, TypeError):  # other systems' libraries have no mallopt
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD in its malloc.h


@functools.cache
def app_or_exit() -> FastAPI:
    """The application with the environment's settings, watched; an error is one line and exit status 1."""
    give_memory_back()
    try:
        app = create_app(Settings.from_environment())
    except kp_runtime.KpError as error:
        sys.exit(f"error: {error}")
    threading.Thread(target=watch, args=[app.state.service.check], daemon=True).start()
    return app


def __getattr__(name: str) -> FastAPI:
    """`app`, made when uvicorn asks for it; who only imports this file loads no model."""
    if name == "app":
        return app_or_exit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    app = app_or_exit()
    settings = app.state.settings
    # a line a request would be most of a board's journal; what is asked, /metrics counts
    uvicorn.run(
        app, host=settings.host, port=settings.port, access_log=False,
        timeout_graceful_shutdown=settings.body_seconds + 5,
    )  # fmt: skip
