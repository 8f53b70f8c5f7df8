"""A real Triton on this CPU, from the wheel nvidia-pytriton, which has the python backend alone: `make test-triton`.

It serves the images model of a repository that `kp export --triton` wrote. The crops' models are read with Triton's own
schema of configs; their backends are not in the wheel.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import kp_runtime
from kp_export.triton import write_repository
from kp_runtime.errors import BackendError
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.triton_health import check_triton
from tests.tolerances import FP32_PX, assert_close

WHY = "a Triton server from the wheel nvidia-pytriton is not in this environment; make test-triton makes one with it"
pytriton = pytest.importorskip("pytriton", reason=WHY)
http_client = pytest.importorskip("tritonclient.http", reason=WHY)
grpc_client = pytest.importorskip("tritonclient.grpc", reason=WHY)

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "engines" / "resnet18-68-lite"
DETECTOR = ROOT / "engines" / "face-detector"
MODEL = "resnet18-68-lite-images"
HOME = Path(pytriton.__file__).parent / "tritonserver"


@dataclass
class Server:
    """A Triton that runs, and its clients."""

    process: subprocess.Popen[bytes]
    http: Any
    grpc: Any
    url: str
    repository: Path
    bundle: Path

    def ask(self, protocol: str, pictures: list[bytes]) -> dict[str, np.ndarray]:
        """The output tensors of a request of so many pictures."""
        client, module = (self.http, http_client) if protocol == "http" else (self.grpc, grpc_client)
        given = module.InferInput("image", [len(pictures), 1], "BYTES")
        given.set_data_from_numpy(np.array(pictures, object)[:, None])
        answer = client.infer(MODEL, [given])
        return {name: answer.as_numpy(name) for name in ("faces", "boxes", "keypoints", "lost_score")}

    def counts(self) -> tuple[int, int]:
        """Images that were answered, and calls of the model for them."""
        (stats,) = self.http.get_inference_statistics(MODEL)["model_stats"]
        return int(stats["inference_count"]), int(stats["execution_count"])


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [each.getsockname()[1] for each in sockets]


def backends(folder: Path) -> Path:
    """A folder with the python backend and this Python's stub."""
    shutil.copytree(HOME / "backends" / "python", folder / "python")
    version = ".".join(map(str, sys.version_info[:2]))
    stub = HOME / "python_backend_stubs" / version / "triton_python_backend_stub"
    target = folder / "python" / stub.name
    target.unlink(missing_ok=True)
    target.symlink_to(stub)
    return folder


@contextlib.contextmanager
def serving(
    repository: Path, place: Path, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], int, int, Path]]:
    """A server with the images model: its process, HTTP and gRPC port, and log. It is killed at the end."""
    http, grpc = free_ports(2)
    log = place / "triton.log"
    words = [
        f"--model-repository={repository}", f"--backend-directory={backends(place / 'backends')}",
        "--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--allow-metrics=false", "--model-control-mode=explicit", f"--load-model={MODEL}",
        "--exit-timeout-secs=5", f"--backend-config=python,shm-region-prefix-name={place.name}-{os.getpid()}-",
    ]  # fmt: skip
    # the stub takes the packages of the first Python on PATH, and that Python's own library where it is a shared one
    paths = {
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
    }
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [HOME / "bin" / "tritonserver", *words],
            env=os.environ | paths | environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        try:
            yield process, http, grpc, log
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for left in Path("/dev/shm").glob(f"{place.name}-{os.getpid()}-*"):  # a killed process frees none
                left.unlink()


def until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5),
        ):
            return
        time.sleep(0.2)
    raise AssertionError(f"Triton is not ready after two minutes: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("triton")
    bundle = Path(shutil.copytree(BUNDLE, place / "bundle"))
    repository = write_repository(bundle, place / "models", DETECTOR).repository
    with serving(repository, place) as (process, http, grpc, log):
        until_ready(process, http, log)
        urls = f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        clients = http_client.InferenceServerClient(urls[0], concurrency=16), grpc_client.InferenceServerClient(urls[1])
        yield Server(process, *clients, f"http://{urls[0]}", repository, bundle)
        for client in clients:
            client.close()


@pytest.fixture(scope="module")
def pictures(astronaut: Path) -> list[bytes]:
    """Eight pictures: one face, two faces, none, one again, …"""
    one = kp_runtime.image_from_file(astronaut)
    kinds = [one, np.hstack([one, one[:, ::-1]]), np.zeros((40, 30, 3), np.uint8), one[20:300, 100:400]]
    return [cv2.imencode(".jpg", kinds[i % 4])[1].tobytes() for i in range(8)]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_answers_are_those_of_kp_runtime(server: Server, pictures: list[bytes], protocol: str, batch: int) -> None:
    model, detector = kp_runtime.load(server.bundle), kp_runtime.CenterDetector(DETECTOR)
    found = server.ask(protocol, pictures[:batch])
    wanted = [model(image, detector(image)) for image in map(kp_runtime.image_from_bytes, pictures[:batch])]
    counts = [len(each) for each in wanted]
    assert counts == [1, 2, 0, 1, 1, 2, 0, 1][:batch]
    assert found["faces"].tolist() == [[n] for n in counts]
    assert found["keypoints"].shape == (batch, max(counts), 68, 2)
    assert found["boxes"].shape == (batch, max(counts), 4)
    assert found["lost_score"].shape == (batch, max(counts), 1)
    for i, each in enumerate(wanted):
        assert_close(found["keypoints"][i, : len(each)], each.xy, FP32_PX, f"keypoints of image {i}")
        assert_close(found["boxes"][i, : len(each)], each.boxes_xyxy, FP32_PX, f"boxes of image {i}")
        assert each.lost_score is not None
        assert_close(found["lost_score"][i, : len(each), 0], each.lost_score, 1e-5, f"lost scores of image {i}")
        assert np.isnan(found["keypoints"][i, len(each) :]).all()
        assert np.isnan(found["boxes"][i, len(each) :]).all()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_image_without_a_face_is_no_error(server: Server, pictures: list[bytes], protocol: str) -> None:
    found = server.ask(protocol, [pictures[2]])
    assert found["faces"].tolist() == [[0]]
    assert found["boxes"].shape == (1, 0, 4)
    assert found["keypoints"].shape == (1, 0, 68, 2)
    assert found["lost_score"].shape == (1, 0, 1)


def test_requests_that_come_together_share_calls(server: Server, pictures: list[bytes]) -> None:
    alone = server.ask("http", pictures[:1])
    before = server.counts()
    with contextlib.ExitStack() as stack:
        start = threading.Barrier(16)
        answers: list[Any] = [None] * 16

        def ask(i: int) -> None:
            client = stack.enter_context(http_client.InferenceServerClient(server.url.removeprefix("http://")))
            given = http_client.InferInput("image", [1, 1], "BYTES")
            given.set_data_from_numpy(np.array([[pictures[0]]], object))
            start.wait(60)
            answers[i] = client.infer(MODEL, [given]).as_numpy("keypoints")

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    images, calls = (now - then for now, then in zip(server.counts(), before, strict=True))
    assert images == 16
    assert calls < images
    for answer in answers:
        assert_close(answer, alone["keypoints"], FP32_PX, "a shared call against one alone")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_bad_image_is_one_line_and_the_next_is_answered(server: Server, pictures: list[bytes], protocol: str) -> None:
    with pytest.raises(Exception, match="image 1 ") as told:
        server.ask(protocol, [pictures[0], b"no picture"])
    assert "Traceback" not in str(told.value)
    assert "\n" not in str(told.value).strip()
    with pytest.raises(Exception, match="image 0 is cut off"):
        server.ask(protocol, [pictures[0][:-200]])
    assert server.ask(protocol, pictures[:1])["faces"].tolist() == [[1]]


def test_an_image_of_too_many_pixels_is_refused(server: Server) -> None:
    huge = cv2.imencode(".png", np.zeros((6400, 6400), np.uint8))[1].tobytes()
    with pytest.raises(Exception, match="image 0 has more pixels than are taken; OPENCV_IO_MAX_IMAGE_PIXELS sets it"):
        server.ask("http", [huge])


def test_a_wrong_shape_or_type_is_refused(server: Server, pictures: list[bytes]) -> None:
    three = http_client.InferInput("image", [1, 3], "BYTES")
    three.set_data_from_numpy(np.array([pictures[:3]], object))
    with pytest.raises(Exception, match=r"unexpected shape for input 'image'"):
        server.http.infer(MODEL, [three])
    numbers = http_client.InferInput("image", [1, 1], "UINT8")
    numbers.set_data_from_numpy(np.zeros((1, 1), np.uint8))
    with pytest.raises(Exception, match=r"data-type|datatype"):
        server.http.infer(MODEL, [numbers])
    with pytest.raises(Exception, match=r"batch-size must be <= 8|batch size"):
        server.ask("http", pictures + pictures[:1])


def test_the_programs_of_the_page_run(server: Server, pictures: list[bytes], tmp_path: Path) -> None:
    """What docs/triton.md shows and tests/test_docs.py can't run."""
    page = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
    blocks = re.findall(r'^```(\w+) title="Needs a Triton server"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "sh"]
    (tmp_path / "photo.jpg").write_bytes(pictures[0])
    path = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    said = []
    for language, text in blocks:
        start = ["python3", "-c"] if language == "python" else ["bash", "-euc"]
        done = subprocess.run(
            [*start, text.replace("http://127.0.0.1:8000", server.url).replace("127.0.0.1:8000", server.url[7:])],
            cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said == ["[[1]] (1, 1, 68, 2)\n", ""]


def test_every_config_is_one_of_tritons_schema(server: Server) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    for path in sorted(server.repository.glob("*/config.pbtxt")):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        assert config.name == path.parent.name
        assert config.version_policy.latest.num_versions == 1
        assert config.dynamic_batching.max_queue_delay_microseconds > 0
        assert config.model_warmup[0].batch_size == 1


def test_a_dead_process_is_seen_by_the_health_check_alone(server: Server) -> None:
    assert server.http.is_server_ready()
    check_triton(server.url, MODEL)
    for stub in stubs_of(server.process.pid):
        os.kill(stub, signal.SIGKILL)
    for _ in range(100):
        if not stubs_of(server.process.pid):
            break
        time.sleep(0.1)
    with pytest.raises(BackendError, match=f"{MODEL} at http://.* fails: .*restart the server"):
        check_triton(server.url, MODEL, 30)
    assert server.http.is_server_ready()
    assert server.http.is_model_ready(MODEL)
    assert not stubs_of(server.process.pid)
    server.http.unload_model(MODEL)
    server.http.load_model(MODEL)
    check_triton(server.url, MODEL)


def test_a_flood_is_no_illness(server: Server, pictures: list[bytes]) -> None:
    given = http_client.InferInput("image", [8, 1], "BYTES")
    given.set_data_from_numpy(np.array(pictures, object)[:, None])
    body, length = http_client.InferenceServerClient.generate_request_body([given])
    start, flood = time.monotonic(), []
    server.ask("http", pictures)
    seconds = 8 * (time.monotonic() - start)  # answers some of the flood, not all
    for _ in range(40):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=300)
        connection.request("POST", f"/v2/models/{MODEL}/infer", body, {"Inference-Header-Content-Length": str(length)})
        flood.append(connection)
    check_triton(server.url, MODEL, seconds)
    for connection in flood:
        assert connection.getresponse().status == 200
        connection.close()


def test_a_new_version_is_served_when_it_is_loaded(server: Server, pictures: list[bytes]) -> None:
    assert check_triton(server.url, MODEL) is None
    before = server.ask("http", pictures[:1])
    golden = np.load(server.bundle / "golden.npz")
    np.savez(server.bundle / "golden.npz", **golden)
    manifest = Manifest.read(server.bundle)
    manifest.files["golden.npz"] = file_entry(server.bundle / "golden.npz", "golden")
    manifest.write(server.bundle)
    versions = {
        model.name: model.version for model in write_repository(server.bundle, server.repository, DETECTOR).models
    }
    assert versions[MODEL] == 2
    server.http.load_model(MODEL)
    assert [stats["version"] for stats in server.http.get_inference_statistics(MODEL)["model_stats"]] == ["2"]
    assert_close(server.ask("http", pictures[:1])["keypoints"], before["keypoints"], FP32_PX, "version 2 against 1")


def test_numpy_2_is_refused(tmp_path: Path) -> None:
    other = os.environ.get("KP_NUMPY_2", "")
    if not other:
        pytest.skip("KP_NUMPY_2 names no environment with numpy 2; make test-triton does")
    repository = write_repository(BUNDLE, tmp_path / "models").repository
    with serving(repository, tmp_path, PATH=f"{other}/bin:{os.environ['PATH']}") as (process, _, _, log):
        assert process.wait(120) == 1
    assert re.search(
        r"load failed .*numpy 2\S+ is installed, .*wrong numbers without an error; .*numpy<2", log.read_text()
    )


def stubs_of(server: int) -> list[int]:
    """The processes of models below the server's that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if name.startswith("triton_python") and int(parent) == server and state != "Z":
                found.append(int(path.parent.name))
    return found
