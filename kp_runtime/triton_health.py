"""Asks a Triton server for a real inference: `python -m kp_runtime.triton_health http://127.0.0.1:8000 MODEL`.

The server's own health stays "ready" when a model's process has died. This sends what an images model of
`kp export --triton` takes as a probe (`triton_model.PROBE`): the network runs the golden crop and compares. A model
that answers others while the probe waits in its queue is busy, not ill. Exit status 0, or 1 and one line. Needs Python
alone.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from kp_runtime.errors import BackendError, InputError, KpError

__all__ = ["check_triton", "main"]

PROBE = "kp-health"
"""As `triton_model.PROBE`, which needs numpy to be imported."""


def check_triton(url: str, model: str, seconds: float = 10.0) -> None:
    """Returns when the model gave the right answer, or, where that takes too long, has answered others meanwhile.

    Args:
        url: where the server answers HTTP, such as `http://127.0.0.1:8000`.
        model: the name of an images model, such as `resnet18-68-images`.
        seconds: the longest wait for the answer.

    Raises:
        InputError: `url` is no address of HTTP.
        BackendError: the server is not there, nobody is answered in time, it does not know the model, or the model
            fails.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url!r:.200} is no address of a server; give one such as http://127.0.0.1:8000")
    place = f"{url.rstrip('/')}/v2/models/{urllib.parse.quote(model, safe='')}"
    before = _answered(place)
    image = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [PROBE]}
    request = urllib.request.Request(
        f"{place}/infer",
        json.dumps({"inputs": [image], "outputs": [{"name": "faces"}]}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with _open(request, seconds) as answer:
            (output,) = json.load(answer)["outputs"]
            data = output["data"]
    except urllib.error.HTTPError as error:
        raise BackendError(f"{model} at {url} fails: {_reason(error)}; restart the server") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError) and before < _answered(place):
            return  # the probe stands in the queue behind them
        raise BackendError(f"no answer of {url} within {seconds:g} s ({reason}); start the server") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"{url} gave no answer of {model} ({error!r}); is it a Triton server?") from error
    if data != [0]:
        raise BackendError(f"{model} at {url} answers the probe with {output}; is it a model of kp export --triton?")


def _open(request: urllib.request.Request | str, seconds: float) -> Any:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy's health is another matter
    return direct.open(request, timeout=seconds)


def _answered(place: str) -> float:
    """How many requests a model has answered; NaN, which is neither less nor more, where the server does not say."""
    try:
        with _open(f"{place}/stats", 2) as answer:
            return float(sum(each["inference_stats"]["success"]["count"] for each in json.load(answer)["model_stats"]))
    except (OSError, http.client.HTTPException, KeyError, TypeError, ValueError):
        return float("nan")


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says of an error."""
    with error:
        text = error.read(2000).decode(errors="replace")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        text = str(json.loads(text)["error"])
    return " ".join(text.split())[:300] or f"HTTP status {error.code}"


def main(words: list[str] | None = None) -> int:
    """The command: 0, or 1 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m kp_runtime.triton_health", description="A real inference.")
    parser.add_argument("url", help="where the server answers HTTP, such as http://127.0.0.1:8000")
    parser.add_argument("model", help="an images model of kp export --triton")
    parser.add_argument("--timeout", type=float, default=10.0, help="longest wait in seconds (10)")
    given = parser.parse_args(words)
    try:
        check_triton(given.url, given.model, given.timeout)
    except (KpError, ValueError) as error:
        print(f"triton_health: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
