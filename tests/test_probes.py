"""Questions that processes of their own answer: what crashes, hangs or prints there is an outcome here."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kp_runtime import probes
from kp_runtime.probes import Outcome, ask, outcome_of_command

MEMORY = ", as the system does where memory is short (dmesg tells)"


def python(code: str, seconds: float = 60) -> Outcome:
    return outcome_of_command([sys.executable, "-c", code], seconds)


def test_a_probe_that_crashes_or_hangs() -> None:
    killed = python("import os, sys; print('loading', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)")
    assert killed == Outcome("crashed", f"the process was ended by SIGKILL{MEMORY}: loading")
    crash = python("import os; os.kill(os.getpid(), 11)")
    assert crash.state == "crashed"
    assert crash.text.startswith("the process was ended by SIGSEGV")  # an emulator adds a line of its own
    assert python("raise SystemExit(3)") == Outcome("crashed", "the process ended with status 3 and no answer")
    hang = python("import time; time.sleep(600)", seconds=0.3)
    assert hang == Outcome("hung", "no answer within 0.3 s")
    assert crash.broken
    assert hang.broken


def test_ctrl_c_ends_the_probe_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[subprocess.Popen[bytes]] = []

    def interrupted(process: subprocess.Popen[bytes], *_: object, **__: object) -> None:
        asked.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        python("import time; time.sleep(600)")
    (process,) = asked
    with process:
        assert process.wait(timeout=60) == -signal.SIGKILL


def test_an_answer_before_a_crash_counts_and_noise_does_not() -> None:
    line = probes._MARK + json.dumps(dataclasses.asdict(Outcome("answered", facts={"version": "1"})))
    code = f"import os; print({line!r}, flush=True); print('noise', flush=True); os.kill(os.getpid(), 6)"
    assert python(code) == Outcome("answered", facts={"version": "1"})


@pytest.mark.parametrize(("arguments", "state", "text"), [
    (("module", "no_such_module"), "absent", "No module named 'no_such_module'"),
    (("module", "tests.runtime"), "absent", "No module named"),
    (("backend", "ort-cpu", "nowhere"), "failed", "nowhere is not a bundle"),
    (("backend", "none", "nowhere"), "failed", "there is no backend 'none'"),
    (("nothing",), "failed", "KeyError"),
])  # fmt: skip
def test_probes_in_their_own_process(arguments: tuple[str, ...], state: str, text: str) -> None:
    answer = ask(*arguments, seconds=60)
    assert answer.state == state
    assert text in answer.text
    assert not answer.broken


def test_probes_see_this_house(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_module.py").write_text("raise ImportError('built for\\nnumpy 1')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert ask("module", "broken_module", seconds=60) == Outcome("failed", "ImportError: built for numpy 1")
    answer = ask("onnxruntime", seconds=60)
    assert "CPUExecutionProvider" in answer.facts["providers"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks into the current folder")
def test_probes_do_not_import_from_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("onnxruntime", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('one of the folder')")
    assert "CPUExecutionProvider" in ask("onnxruntime", seconds=60).facts["providers"]
