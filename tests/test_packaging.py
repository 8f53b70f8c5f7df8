"""What packaging/ says of the service on a board, as far as it can be held to something without a board."""

from __future__ import annotations

import ast
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from wheelhouse import TARGETS

ROOT = Path(__file__).resolve().parents[1]
UNIT = ROOT / "packaging" / "kp-edge.service"
CONTAINERFILES = sorted((ROOT / "packaging").glob("*.Containerfile"))
each_file = pytest.mark.parametrize("file", CONTAINERFILES, ids=[file.stem for file in CONTAINERFILES])
EXPOSURE = 2.0
"""Of 10; 1.7 by systemd 252's count: the GPU's devices, this machine's network and compiling at run time stay open."""


def steps(file: Path) -> list[tuple[str, str]]:
    """Instructions and their words, lines put together and comments left out."""
    text = "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def settings(section: str) -> list[tuple[str, str]]:
    """Names and values of the unit, in order; a name may stand more than once."""
    text = UNIT.read_text().partition(f"[{section}]\n")[2].partition("\n[")[0]
    pairs = [line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, value) for name, value in pairs]


def variables_of_the_service() -> set[str]:
    text = (ROOT / "examples" / "service.py").read_text()
    fields = text.partition("class Settings:")[2].partition("@classmethod")[0]
    return {f"KP_{name.upper()}" for name in re.findall(r"^    (\w+): ", fields, re.M)}


def test_the_errors_on_the_page_are_the_code_s() -> None:
    rows = (ROOT / "docs" / "jetson.md").read_text().partition("## When something fails")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `(.*?)` \|", rows, re.M)
    assert len(quoted) >= 8
    said = "\n".join(texts_of_the_code())
    for line in quoted:
        for part in (part.strip(" ;,()") for part in line.split("…")):
            assert part in said, f"{line!r}: the code does not say {part!r}"


def texts_of_the_code() -> Iterator[str]:
    """Every string in the packages, values in it left out."""
    for package in ("kp_runtime", "kp_export"):
        for path in (ROOT / package).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant):
                    yield str(node.value)


def test_each_target_has_its_container() -> None:
    assert [file.stem for file in CONTAINERFILES] == sorted(TARGETS)


@each_file
def test_a_container_copies_what_is_there(file: Path) -> None:
    copied = [word for name, words in steps(file) if name in ("COPY", "ADD") for word in words.split()[:-1]]
    assert copied.pop(0) == "--chmod=644", "the container's user reads it, whatever the checkout's umask was"
    mounted = re.findall(r"--mount=type=bind,source=([^,\s]+)", file.read_text())
    assert copied == ["examples/service.py"]
    assert mounted == [f"dist/{file.stem}"], "what make wheelhouse fills for this target"
    assert all((ROOT / path).exists() for path in copied)
    assert "dist/$(TARGET)" in (ROOT / "Makefile").read_text()


@each_file
def test_a_container_has_a_pinned_base_and_an_ordinary_user(file: Path) -> None:
    found = steps(file)
    (base,) = [words for name, words in found if name == "FROM"]
    assert re.fullmatch(r"nvcr\.io/nvidia/[\w-]+:[\w.-]+", base)
    assert not base.endswith(":latest")
    names = [name for name, _ in found]
    (user,) = [words for name, words in found if name == "USER"]
    assert user not in ("root", "0")
    assert any(name == "RUN" and re.search(rf"useradd .*\b{user}$", words) for name, words in found)
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")


@each_file
def test_a_container_runs_the_service_on_a_read_only_bundle(file: Path) -> None:
    found = dict(steps(file))
    assert found["CMD"] == '["/opt/kp/bin/python", "/opt/kp/service.py"]'
    set_here = dict(word.split("=", 1) for word in shlex.split(found["ENV"]) if word.startswith("KP_"))
    assert set_here.keys() - {"KP_CACHE"} <= variables_of_the_service()
    assert f":{set_here['KP_MODEL']}:ro" in file.read_text()
    assert "--read-only" in file.read_text()
    assert "--restart unless-stopped" in file.read_text(), "HEALTHCHECK restarts nothing"
    assert "--require-hashes" in file.read_text()
    # where a plan is built the bundle is replaced, which a mount point can't be
    ((folder, bundle),) = re.findall(r"--volume (\S+):\1 [^\n]*\n#[^\n]*/kp plan (\S+)", file.read_text())
    assert str(Path(bundle).parent) == folder


@each_file
def test_a_container_asks_itself_for_its_health(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Docker sets a proxy, which its clients' settings make it do."""
    asked = []

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) == 1 else 500)
            self.end_headers()

    command = json.loads(dict(steps(file))["HEALTHCHECK"].partition(" CMD ")[2])
    assert command[:2] == ["/opt/kp/bin/python", "-c"]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = command[2].replace(":8000/", f":{server.server_port}/")
        ended = [subprocess.run([sys.executable, "-c", code], capture_output=True).returncode for _ in range(2)]
        server.shutdown()
    assert (ended, asked) == ([0, 1], ["/health", "/health"])


def test_the_unit_is_an_ordinary_user_s_and_reads_only() -> None:
    service = settings("Service")
    wanted = {
        ("DynamicUser", "yes"),
        ("ProtectSystem", "strict"),
        ("NoNewPrivileges", "yes"),
        ("Restart", "on-failure"),
    }
    assert wanted <= set(service)
    assert ("StartLimitIntervalSec", "0") in settings("Unit"), "a board's service is not given up"
    (environment,) = [value for name, value in service if name == "Environment"]
    set_here = dict(word.split("=", 1) for word in shlex.split(environment) if word.startswith("KP_"))
    assert set_here.keys() - {"KP_CACHE"} <= variables_of_the_service()
    assert set_here["KP_MODEL"] == "/srv/kp/current/model"
    assert set_here["KP_DETECTOR"] == "own=/srv/kp/current/face-detector", "one link switches all of a release"
    assert not any(name.endswith("Paths") for name, _ in service), "a path that is not there would be no start"
    assert ("DevicePolicy", "closed") in service
    assert ("DeviceAllow", "/dev/nvmap rw") in service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit_and_finds_little_open(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    # verify wants a program that is there
    unit.write_text(UNIT.read_text().replace("/opt/kp/bin/python", sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" in rated.stderr:
        pytest.skip("this systemd-analyze is older than 250 and rates no files")
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", rated.stdout)
    assert float(exposure) <= EXPOSURE
