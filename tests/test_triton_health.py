"""The health check of a Triton server, without one. `test_triton_server.py` has the server."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kp_runtime import triton_health
from kp_runtime.errors import BackendError
from kp_runtime.triton_health import check_triton
from kp_runtime.triton_model import PROBE


@pytest.fixture
def server() -> Iterator[Any]:
    """An HTTP server that answers with `status` and `body`, and keeps what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stats = {"inference_stats": {"success": {"count": next(self.server.answered, None)}}}  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"model_stats": [stats]}).encode())

        def do_POST(self) -> None:
            self.server.asked = self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))  # type: ignore[attr-defined]
            if self.server.hang:  # type: ignore[attr-defined]
                self.server.hang.wait()  # type: ignore[attr-defined]
                return
            self.send_response(self.server.status)  # type: ignore[attr-defined]
            self.end_headers()
            self.wfile.write(self.server.body)  # type: ignore[attr-defined]

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.answered = iter([])  # type: ignore[attr-defined]
        listening.hang = None  # type: ignore[attr-defined]
        listening.url = f"http://127.0.0.1:{listening.server_port}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


def test_health_is_an_inference(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not asked
    server.status, server.body = 200, b'{"outputs": [{"name": "faces", "data": [0]}]}'
    check_triton(server.url, "a b-images")
    assert server.asked[0] == "/v2/models/a%20b-images/infer"
    assert server.asked[1]["inputs"][0]["data"] == [PROBE.decode()] == [triton_health.PROBE]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b'{"error": "unknown\\nmodel"}', "m at http://.* fails: unknown model; restart"),
        (503, b"", "fails: HTTP status 503"),
        (200, b"<html>", "gave no answer of m .*is it a Triton server"),
        (200, b'{"outputs": [{"data": [3]}]}', "answers the probe with"),
        (200, b'{"outputs": ["x"]}', "gave no answer of m"),
    ],
)
def test_a_server_that_is_not_well(
    server: Any, capsys: pytest.CaptureFixture[str], status: int, body: bytes, message: str
) -> None:
    server.status, server.body = status, body
    with pytest.raises(BackendError, match=message):
        check_triton(server.url, "m")
    assert triton_health.main([server.url, "m"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("answered", "is_well"), [([7, 8], True), ([7, 7], False), ([7], False), ([], False)])
def test_a_model_that_answers_others_while_the_probe_waits_is_busy(
    server: Any, answered: list[int], is_well: bool
) -> None:
    server.answered, server.hang = iter(answered), threading.Event()
    with contextlib.nullcontext() if is_well else pytest.raises(BackendError, match=r"no answer of .* within 0.2 s"):
        check_triton(server.url, "m", 0.2)
    server.hang.set()


def test_a_server_that_speaks_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for _ in range(2):  # what it has answered, and the probe
                caller = listening.accept()[0]
                with caller:
                    caller.recv(4096)
                    caller.sendall(b"\0\0\x18\4")

        thread = threading.Thread(target=answer)
        thread.start()
        assert triton_health.main([f"http://127.0.0.1:{listening.getsockname()[1]}", "m"]) == 1
        thread.join()
    err = capsys.readouterr().err
    assert "no answer of http" in err
    assert err.count("\n") == 1


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert triton_health.main(["http://127.0.0.1:9", "m", "--timeout", "5"]) == 1
    assert "no answer of http://127.0.0.1:9 within 5 s ([Errno" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["no url", "127.0.0.1:8000", "", "file:///etc/hostname"])
def test_what_is_no_address_of_a_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert triton_health.main([url, "m"]) == 1
    assert capsys.readouterr().err == (
        f"triton_health: {url!r} is no address of a server; give one such as http://127.0.0.1:8000\n"
    )
