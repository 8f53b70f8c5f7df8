"""examples/service.py as it is: settings, requests, health, its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import kp_runtime
from kp_export.sign import new_key
from tests.conftest import short_of_memory
from tests.models import LOST_LIMIT, tiny_bundle
from tests.test_examples_batching import until
from tests.tolerances import FP32_PX, assert_close

ROOT = Path(__file__).resolve().parents[1]
DETECTOR_SHA256 = hashlib.sha256((ROOT / "engines" / "face-detector" / "model.fp32.onnx").read_bytes()).hexdigest()
pytestmark = pytest.mark.usefixtures("own_detector")


@pytest.mark.parametrize(
    ("check", "most_s", "said"),
    [
        ("lambda: next(answers)", 60, "error: the GPU is lost; the service ends, to be started again\n"),
        ("threading.Event().wait", 0.99, "Timeout (0:00:01)!\n"),
        ("lambda: 1 / 0", 0.99, "Timeout (0:00:01)!\n"),
    ],
    ids=["fails", "hangs", "is wrong"],
)
def test_a_service_whose_engine_is_gone_ends(service: Any, check: str, most_s: float, said: str) -> None:
    code = f"""
import threading
import examples.service as service

def answer():
    yield from range(3)
    raise service.kp_runtime.BackendError("the GPU is lost")

answers = answer()
threading.Thread(target=service.watch, args=[{check}, 0.01, {most_s}], daemon=True).start()
threading.Event().wait()
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert said in ended.stderr


def test_the_service_watches_its_engine(service: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: queue.Queue[Any] = queue.Queue()
    monkeypatch.setattr(service, "watch", watched.put)
    monkeypatch.setenv("KP_MODEL", str(bundle))
    assert service.app.state.service.check == watched.get(timeout=30)
    service.app_or_exit.cache_clear()


def test_settings_from_the_environment(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KP_DETECTOR", "face.onnx")
    monkeypatch.setenv("KP_PORT", "8001")
    settings = service.Settings.from_environment()
    assert (settings.detector, settings.port, settings.wait_ms) == ("face.onnx", 8001, 4)
    for wrong in ("0", "-1", "4.5", "x", "", "²", "65536", "9" * 5000):
        monkeypatch.setenv("KP_PORT", wrong)
        with pytest.raises(kp_runtime.InputError, match=r"^KP_PORT must be a whole number from 1 to 65535"):
            service.Settings.from_environment()


def test_settings_that_are_empty(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KP_MODEL", "")
    monkeypatch.setenv("KP_DETECTOR", "")
    assert service.Settings.from_environment() == service.Settings()
    for name in ("KP_HOST", "KP_PUBLIC_KEY", "KP_BACKEND"):  # no host: every address of the machine
        with monkeypatch.context() as also:
            also.setenv(name, "")
            with pytest.raises(kp_runtime.InputError, match=f"^{name} is set to nothing"):
                service.Settings.from_environment()


@contextlib.asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[Any]:
    """An HTTP client of an application in this process."""
    import httpx

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


def test_the_service_in_one_process(service: Any, bundle: Path, astronaut: Path) -> None:
    image = kp_runtime.image_from_file(astronaut)
    wanted = kp_runtime.load(bundle)(image, kp_runtime.load_detector()(image)).to_json()
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    plain = cv2.imencode(".png", np.zeros((40, 30), np.uint8))[1].tobytes()
    bmp = cv2.imencode(".bmp", image)[1].tobytes()
    app = service.create_app(service.Settings(model=str(bundle), max_upload_mib=1, max_requests=1))
    report = app.state.service.batching.report
    sha256 = hashlib.sha256((bundle / "model.fp32.onnx").read_bytes()).hexdigest()

    async def talk() -> None:
        async with client_of(app) as client:

            async def ask(content: bytes) -> tuple[int, Any]:
                answer = await client.post("/keypoints", content=content)
                return answer.status_code, answer.json()

            assert len(wanted["faces"]) == 1
            assert await ask(astronaut.read_bytes()) == (200, wanted)
            assert (await ask(jpeg))[0] == 200
            assert await ask(plain) == (200, {"height": 40, "width": 30, "faces": []})
            cut_off = "the image is cut off: the end of the image is missing; copy or download it again"
            assert await ask(jpeg[:-100]) == (400, {"detail": cut_off})
            neither = {"detail": "the body is neither a JPEG nor a PNG; send the image's bytes as they are"}
            assert [await ask(b""), await ask(bmp[:999])] == [(415, neither)] * 2
            too_large = {"detail": "an image may have 1 MiB; send a smaller one"}
            assert await ask(jpeg + bytes(1 << 20)) == (413, too_large)

            health = await client.get("/health")
            assert health.json() == {
                "status": "ok", "backend": "ort-cpu", "file": "model.fp32.onnx", "rejected": list(report.rejected),
                "lost_limit": LOST_LIMIT, "calls": 2, "faces": 2, "sha256": sha256, "kp": kp_runtime.__version__,
                "detector": "own", "detector_sha256": DETECTOR_SHA256,
            }  # fmt: skip
            assert report.rejected[-1] == "int8: not in the bundle"
            app.state.service._expected += 1
            health = await client.get("/health")
            assert health.status_code == 500
            assert "1.000 px from where it was at the start" in health.json()["detail"]

    asyncio.run(talk())


def test_metrics_of_the_service(service: Any, bundle: Path, astronaut: Path) -> None:
    pytest.importorskip(
        "prometheus_client", reason="prometheus_client, which the metrics are made with, is not installed"
    )
    app = service.create_app(service.Settings(model=str(bundle)))

    async def talk() -> list[str]:
        async with client_of(app) as client:
            jpeg = cv2.imencode(".jpg", cv2.imread(str(astronaut)))[1].tobytes()
            for content in (jpeg, jpeg, jpeg[:-100], b"text"):
                await client.post("/keypoints", content=content)
            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain")
            return answer.text.splitlines()

    assert set(asyncio.run(talk())) >= {
        "kp_frames_total 2.0",
        "kp_faces_total 2.0",
        'kp_stage_seconds_count{stage="answer"} 3.0',
        'kp_stage_seconds_count{stage="detect"} 2.0',
        'kp_errors_total{kind="ImageError",where="request"} 1.0',
        'kp_errors_total{kind="415",where="request"} 1.0',
        'kp_errors_total{kind="503",where="request"} 0.0',
        'kp_queue_length{queue="requests"} 0.0',
        'kp_queue_length{queue="crops"} 0.0',
    }


def test_without_prometheus_the_service_answers_and_says_what_is_missing(
    service: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    app = service.create_app(service.Settings(model=str(bundle)))
    plain = cv2.imencode(".png", np.zeros((40, 30), np.uint8))[1].tobytes()

    async def talk() -> None:
        async with client_of(app) as client:
            assert (await client.post("/keypoints", content=plain)).status_code == 200
            answer = await client.get("/metrics")
            detail = "there are no metrics without prometheus_client: pip install 'kp-edge[metrics]'"
            assert (answer.status_code, answer.json()) == (501, {"detail": detail})

    asyncio.run(talk())


def test_a_key_asks_for_a_signature(service: Any, bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="cryptography, which checks signatures, is not installed")
    settings = service.Settings(model=str(bundle), public_key=str(new_key(tmp_path / "release.pem")))
    with pytest.raises(kp_runtime.SignatureError, match="is not signed, and a public key was given"):
        service.create_app(settings)


def test_the_service_takes_no_model_of_whole_frames(service: Any, tmp_path: Path) -> None:
    with pytest.raises(
        kp_runtime.InputError, match="tiny sees whole frames, not face boxes; give a model that takes boxes"
    ):
        service.Service(service.Settings(model=str(tiny_bundle(tmp_path / "tiny", margin=1.0, box="frame"))))


def test_the_service_says_at_its_start_what_runs_and_whose_boxes_it_takes(
    service: Any,
    bundle: Path,
    own_detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    current = tmp_path / "current"
    current.symlink_to(bundle)  # the line names the release behind it
    report = service.Service(service.Settings(model=str(current))).batching.report
    rejected, file = " | ".join(report.rejected), bundle.resolve() / "model.fp32.onnx"
    runs = f"kp {kp_runtime.__version__}: ort-cpu runs {file}, sha256 {report.sha256}; rejected: {rejected}\n"
    assert "tensorrt: this machine has no NVIDIA driver" in rejected or "holds no TensorRT plan" in rejected
    own = f"faces by own {own_detector}, sha256 {DETECTOR_SHA256}\n"
    assert capsys.readouterr().err == runs + own
    monkeypatch.setattr(service, "box_advice", lambda spec: f"boxes of {spec.name}")
    service.Service(service.Settings(model=str(bundle)))
    assert capsys.readouterr().err == f"{runs}boxes of tiny\n{own}"


def test_what_fails_requests_is_in_the_log_and_does_not_fill_it(
    service: Any, bundle: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: object) -> None:
        raise kp_runtime.BackendError("the GPU is lost")

    app = service.create_app(service.Settings(model=str(bundle)))
    monkeypatch.setattr(app.state.service, "_model", lost)
    capsys.readouterr()

    async def talk() -> list[int]:
        async with client_of(app) as client:
            sent = [await client.post("/keypoints", content=astronaut.read_bytes()) for _ in range(3)]
            return [answer.status_code for answer in sent]

    assert asyncio.run(talk()) == [500] * 3
    assert capsys.readouterr().err == "error: the GPU is lost\n"
    seldom = service.Seldom(every_s=600)
    for line in "abc":
        seldom(line)
    seldom._next = 0.0
    seldom("d")
    assert capsys.readouterr().err == "a\nd (2 more errors since the last line)\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
def test_a_service_starts_where_its_log_is_on_a_full_disk(
    service: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        assert service.Service(service.Settings(model=str(bundle))).check()["status"] == "ok"


def test_a_full_service_says_so_at_once(service: Any, bundle: Path) -> None:
    app = service.create_app(service.Settings(model=str(bundle), max_requests=2))
    plain = cv2.imencode(".png", np.zeros((40, 30), np.uint8))[1].tobytes()
    leave, inside = threading.Event(), []
    answer = app.state.service.answer

    def slow(data: bytes) -> Any:
        inside.append(data)
        assert leave.wait(30)
        return answer(data)

    app.state.service.answer = slow

    async def talk() -> None:
        async with client_of(app) as client:
            let_in = [asyncio.create_task(client.post("/keypoints", content=plain)) for _ in range(2)]
            await asyncio.to_thread(until, lambda: len(inside) == 2)
            refused = await client.post("/keypoints", content=plain)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json() == {"detail": "busy: 2 requests are being answered; try again in a second"}
            leave.set()
            answers = [*await asyncio.gather(*let_in), await client.post("/keypoints", content=plain)]
            assert [answer.status_code for answer in answers] == [200] * 3

    asyncio.run(talk())


def test_too_many_faces_are_refused_before_the_engine_sees_them(
    service: Any, bundle: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MOST_FACES", 0)
    app = service.create_app(service.Settings(model=str(bundle)))

    async def talk() -> None:
        async with client_of(app) as client:
            answer = await client.post("/keypoints", content=astronaut.read_bytes())
            detail = "an image may have 0 faces; send a part of it"
            assert (answer.status_code, answer.json()) == (413, {"detail": detail})

    asyncio.run(talk())
    assert app.state.service.batching.calls == 0


@pytest.mark.parametrize("small_bytes", [8 << 20, 0])
def test_a_large_image_keeps_its_place_until_it_is_answered(
    small_bytes: int, service: Any, bundle: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a slow engine all that were let in would lie in memory, decoded."""
    monkeypatch.setattr(service, "default_threads", lambda: 1)
    monkeypatch.setattr(service, "SMALL_BYTES", small_bytes)
    running, leave = service.Service(service.Settings(model=str(bundle))), threading.Event()
    running.batching._one.submit(leave.wait)
    with ThreadPoolExecutor(1) as threads:
        try:
            asked = threads.submit(running.answer, astronaut.read_bytes())
            until(lambda: running.batching.waiting == 1)
            assert running._detectors.empty() == (small_bytes == 0)
        finally:
            leave.set()
        assert len(asked.result()["faces"]) == 1
    assert not running._detectors.empty()


def test_too_little_memory_for_an_image_is_no_fault_of_the_image(
    service: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = service.create_app(service.Settings(model=str(bundle)))
    plain = cv2.imencode(".png", np.zeros((40, 30), np.uint8))[1].tobytes()
    short_of_memory(monkeypatch)

    async def talk() -> None:
        async with client_of(app) as client:
            answer = await client.post("/keypoints", content=plain)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            detail = "there is too little memory now; try again in a second, or send a smaller image"
            assert answer.json() == {"detail": detail}

    asyncio.run(talk())


LARGE_BLOCKS = """
import threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import examples.service as service

def resident_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

service.give_memory_back()
together = threading.Barrier(8)

def work(_):
    together.wait(30)
    for mib in (16, 12):
        np.ones(mib << 20, np.uint8)

with ThreadPoolExecutor(8) as threads:
    before = resident_kib()
    list(threads.map(work, range(8)))
    print((resident_kib() - before) >> 10)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the system's C library has no mallopt")
def test_what_images_took_goes_back_to_the_system(service: Any) -> None:
    done = subprocess.run([sys.executable, "-c", LARGE_BLOCKS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert int(done.stdout or "99") < 12, f"of 8 threads, MiB: {done.stdout}{done.stderr}"


def test_health_checks_that_come_together_are_one(service: Any, bundle: Path) -> None:
    app = service.create_app(service.Settings(model=str(bundle)))
    leave, begun = threading.Event(), []
    check = app.state.service.check

    def slow() -> Any:
        begun.append(1)
        assert leave.wait(30)
        return check()

    app.state.service.check = slow

    async def talk() -> None:
        async with client_of(app) as client:
            asked = [asyncio.create_task(client.get("/health")) for _ in range(3)]
            await asyncio.to_thread(until, lambda: bool(begun))
            await asyncio.sleep(0.1)
            leave.set()
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 3
            assert len(begun) == 1
            assert (await client.get("/health")).status_code == 200
            assert len(begun) == 2

    asyncio.run(talk())


def test_a_slow_upload_gives_its_place_back(service: Any, bundle: Path) -> None:
    app = service.create_app(service.Settings(model=str(bundle), max_requests=1, body_seconds=1))

    async def never_ends() -> AsyncIterator[bytes]:
        yield b"\xff\xd8\xff"
        await asyncio.Event().wait()

    async def talk() -> None:
        async with client_of(app) as client:
            late = await client.post("/keypoints", content=never_ends())
            assert (late.status_code, late.json()) == (408, {"detail": "the image did not arrive within 1 s"})
            assert (await client.post("/keypoints", content=b"")).status_code == 415

    asyncio.run(talk())


@contextlib.contextmanager
def serving(*words: str, **environment: str) -> Iterator[str]:
    """`python WORDS`, a server of its own; gives its address and ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, *words] + (["--port", port] if "-m" in words else [])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("KP_", "OPENCV_"))}
    given = inherited | {"KP_PORT": port} | environment
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=given, stdout=pipe, stderr=pipe, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            log = []
            for line in server.stderr:
                log.append(line)
                if "running on" in line:
                    break
            else:
                pytest.fail("the server did not start: " + "".join(log))
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            requests = server.stdout.read()
    assert server.returncode in (0, -signal.SIGTERM)
    assert bool(requests) == ("-m" in words), "the program has no log of requests, uvicorn has one"


def ask(url: str, data: bytes | None = None) -> tuple[int, dict[str, Any]]:
    """POSTs data, or GETs; status and JSON."""
    try:
        with urllib.request.urlopen(url, data, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, json.load(refusal)


@pytest.mark.parametrize("words", [("examples/service.py",), ("-m", "uvicorn", "examples.service:app")])
def test_requests_over_a_socket_share_one_call(
    service: Any, bundle: Path, astronaut: Path, words: tuple[str, ...]
) -> None:
    image = kp_runtime.image_from_file(astronaut)[:256, 80:336]
    photos = [np.roll(image, 9 * i, axis=1) for i in range(6)]
    model, detector = kp_runtime.load(bundle), kp_runtime.load_detector()
    wanted = [model(photo, detector(photo)) for photo in photos]
    together = sum(map(len, wanted))
    bomb = cv2.imencode(".png", np.zeros((2000, 2000), np.uint8))[1].tobytes()
    # nobody is patient for a minute: the call begins because all faces are there
    settings = {"KP_WAIT_MS": "60000", "KP_BATCH_FACES": str(together), "KP_MAX_MEGAPIXELS": "3"}
    with serving(*words, KP_MODEL=str(bundle), **settings) as url, ThreadPoolExecutor(8) as threads:
        uploads = [cv2.imencode(".png", photo)[1].tobytes() for photo in photos]
        posted = [threads.submit(ask, f"{url}/keypoints", upload) for upload in uploads]
        assert threads.submit(ask, f"{url}/health").result()[0] == 200  # which waits for none of them
        answers = [answer.result() for answer in posted]
        status, health = ask(f"{url}/health")
        too_large = ask(f"{url}/keypoints", bomb)
    assert (status, health["calls"], health["faces"]) == (200, 1, together)
    assert min(map(len, wanted)) >= 1
    for (status, answer), keypoints in zip(answers, wanted, strict=True):
        assert status == 200
        assert_close([f["keypoints_xy"] for f in answer["faces"]], keypoints.xy, FP32_PX, "over the socket")
    assert too_large == (413, {"detail": "an image may have 3 megapixels; send a smaller one"})


def test_a_service_that_is_ended_waits_for_no_request_for_ever(service: Any, bundle: Path, astronaut: Path) -> None:
    pytest.importorskip(
        "prometheus_client", reason="prometheus_client, which the metrics are made with, is not installed"
    )

    def waits(url: str) -> bool:
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as page:
            return b'kp_queue_length{queue="crops"} 1.0' in page.read()

    settings = {"KP_WAIT_MS": "50000", "KP_BODY_SECONDS": "1"}  # the one face waits for others
    with ThreadPoolExecutor(1) as thread:
        with serving("examples/service.py", KP_MODEL=str(bundle), **settings) as url:
            posted = thread.submit(ask, f"{url}/keypoints", astronaut.read_bytes())
            until(lambda: waits(url))
        assert posted.result() == (503, {"detail": "the service ends; try again in a second"})


@pytest.mark.parametrize("words", [("examples/service.py",), ("-m", "uvicorn", "examples.service:app")])
def test_a_service_without_its_model_ends_with_one_line(service: Any, words: tuple[str, ...]) -> None:
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"KP_MODEL": "nowhere"}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: nowhere is not a bundle")
    assert ended.stderr.count("\n") == 1
