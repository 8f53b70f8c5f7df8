"""`--cores` and `--threads` of the command."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kp_cli
from kp_runtime.bench_compare import obstacles
from kp_runtime.bench_results import results_from_file
from kp_runtime.cores import usable_cores
from kp_runtime.errors import InputError
from kp_runtime.pipeline import Model

linux = pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen on Linux alone")


@linux
def test_predict_runs_on_the_chosen_core_and_leaves_the_process_as_it_was(
    bundle: Path, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, seen = os.sched_getaffinity(0), []
    predict = Model._predict

    def watched(self: Model, *arguments: Any) -> Any:
        seen.append((os.sched_getaffinity(0), self.backend.threads))
        return predict(self, *arguments)

    monkeypatch.setattr(Model, "_predict", watched)
    core = max(mine)
    command = ["predict", str(astronaut), "--model", str(bundle), "--box", "181,88,269,178", "--out", str(tmp_path)]
    done = CliRunner().invoke(kp_cli.app, [*command, "--cores", str(core)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert seen == [({core}, 1)]
    assert os.sched_getaffinity(0) == mine


@linux
def test_bench_says_on_which_cores_it_ran(bundle: Path, astronaut: Path, tmp_path: Path) -> None:
    core, out = min(os.sched_getaffinity(0)), tmp_path / "new.json"
    command = ["bench", str(bundle), "--photo", str(astronaut), "--batch", "1", "--seconds", "0", "--samples", "1"]
    done = CliRunner().invoke(
        kp_cli.app, [*command, "--cores", str(core), "--threads", "1", "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    setup = results_from_file(out).setup
    assert (setup.settings.cores, setup.settings.threads, setup.machine.cores_usable) == (str(core), 1, 1)
    other = dataclasses.replace(setup, settings=dataclasses.replace(setup.settings, cores=None))
    assert f"cores that were chosen all, then {core}" in obstacles(other, setup)
    older = json.loads(out.read_text())  # written before there was --cores
    del older["setup"]["settings"]["cores"]
    out.write_text(json.dumps(older))
    assert results_from_file(out).setup == other


@linux
@pytest.mark.parametrize("cores", ["9999", "none"])
def test_cores_that_can_not_be_had(cores: str, astronaut: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cores must be"):
        CliRunner().invoke(
            kp_cli.app, ["predict", str(astronaut), "--out", str(tmp_path), "--cores", cores], catch_exceptions=False
        )


@linux
@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_more_threads_than_the_chosen_cores(bundle: Path, astronaut: Path) -> None:
    core = min(os.sched_getaffinity(0))
    command = ["predict", str(astronaut), "--model", str(bundle), "--cores", str(core), "--threads", "2"]
    done = CliRunner().invoke(kp_cli.app, command)
    assert "threads must be 1 to 1" in str(done.exception)


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_the_command_keeps_telemetry_off_unless_it_is_asked_for(
    given: str | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", given or "")
    if given is None:
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    monkeypatch.setattr(kp_cli, "app", lambda: None)
    kp_cli.main()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == kept
