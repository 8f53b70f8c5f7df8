"""Two results of `kp bench` compared: what differs in times, and what refuses it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from kp_runtime.bench_compare import check_alike, compared, obstacles
from kp_runtime.bench_results import Bench, times_from_turns
from kp_runtime.errors import InputError
from tests.bench_run import QUICK, steady


@pytest.mark.parametrize(("factor", "verdict"), [(2.0, "slower"), (0.5, "faster"), (1.0, "not distinguishable")])
def test_a_case_is_compared_with_itself(bench: Bench, factor: float, verdict: str) -> None:
    found = compared(steady(bench), steady(bench, factor))
    verdicts = {case.case: case.verdict for case in found.cases}
    assert verdicts.pop("model.fp32.onnx, batch 1") == verdict
    assert set(verdicts.values()) == {"not distinguishable"}
    (case,) = [case for case in found.cases if case.case == "model.fp32.onnx, batch 1"]
    assert case.ratio.value == pytest.approx(factor)
    assert case.new_ms / case.old_ms == pytest.approx(factor)
    assert case.ratio.low <= case.ratio.value <= case.ratio.high
    assert (found.obstacles, found.alone) == ((), ())
    assert "not interleaved" in found.notes[-1]


def test_a_case_of_few_turns_is_said(bench: Bench) -> None:
    many = steady(bench)
    first, *others = many.network

    def cut(turns: int) -> Bench:
        few = times_from_turns([list(turn) for turn in first.times.turns_ms[:turns]])
        return dataclasses.replace(many, network=(dataclasses.replace(first, times=few), *others))

    for pair in ((cut(5), many), (many, cut(5))):
        told = [note for note in compared(*pair).notes if "under 6 turns" in note]
        assert len(told) == 1
        assert "model.fp32.onnx, batch 1;" in told[0]
        assert "batch 4" not in told[0]
    assert not any("turns" in note for note in compared(cut(6), many).notes)
    assert not any("turns" in note for note in compared(many, many).notes)


def test_another_gpu_is_refused(bench: Bench) -> None:
    setups = [dataclasses.replace(bench.setup, gpu=gpu) for gpu in (None, "Orin (sm_87)", "AGX Orin (sm_87)")]
    assert obstacles(setups[0], setups[1]) == ["GPU not known, then Orin (sm_87)"]
    assert obstacles(setups[1], setups[2]) == ["GPU Orin (sm_87), then AGX Orin (sm_87)"]
    assert obstacles(setups[2], setups[2]) == []


def with_plans(bench: Bench, *names: str) -> Bench:
    files = tuple(dataclasses.replace(bench.files[0], file=name, sha256=name[::-1]) for name in names)
    network = tuple(dataclasses.replace(bench.network[0], file=name) for name in names)
    return dataclasses.replace(bench, files=files, network=network)


def test_a_plan_is_compared_with_the_one_before_an_update_of_tensorrt(bench: Bench) -> None:
    old, new, built = (f"model.fp16.sm87.trt{version}.dla0.plan" for version in ("10.3.0", "10.16.1", "10.16.1.post1"))
    found = compared(with_plans(steady(bench), old), with_plans(steady(bench), new))
    assert found.alone == ()
    assert found.cases[-1].case == "model.fp16.sm87.dla0.plan, batch 1"
    assert any(note.startswith("sha256 of model.fp16.sm87.dla0.plan ") for note in found.notes)
    both = with_plans(steady(bench), old, built)
    assert [*both.named_files()] == [old, built], "each by its own name where one result has both"
    assert compared(both, both).cases[-1].case == f"{built}, batch 1"


def with_machine(bench: Bench, **fields: Any) -> Bench:
    machine = dataclasses.replace(bench.setup.machine, **fields)
    return dataclasses.replace(bench, setup=dataclasses.replace(bench.setup, machine=machine))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cpu": "other"}, "CPU .*, then other"),
        ({"cores": 999}, "cores .*, then 999"),
        ({"cores_usable": 998}, "cores that the process may use .*, then 998"),
        ({"cpu_quota": 0.5}, "CPU quota .*, then 0.5"),
        ({"architecture": "riscv64"}, "architecture .*, then riscv64"),
        ({"governor": "odd"}, "governor .*, then odd"),
        ({"mhz_least": 1510.0, "mhz_most": 1510.4}, "CPU clock .*, then 1510 to 1510 MHz"),
        ({"device": "odd board"}, "device .*, then odd board"),
        ({"instructions": ("i8mm", "amx_int8")}, "instructions .*, then amx_int8 i8mm"),
    ],
)
def test_another_machine_is_refused(bench: Bench, fields: dict[str, Any], message: str) -> None:
    old, other = steady(bench), steady(with_machine(bench, **fields))
    with pytest.raises(InputError, match=message + ".*measure both alike, or add --compare-anyway"):
        compared(old, other)
    found = compared(old, other, anyway=True)
    assert len(found.obstacles) == 1
    assert len(found.cases) == 8


def test_another_power_mode_is_refused(bench: Bench) -> None:
    from kp_runtime.machine import Jetson

    old, new = (Jetson("R36", mode, None, None, None, None) for mode in ("MAXN 0", "15W 1"))
    found = obstacles(with_machine(bench, jetson=old).setup, with_machine(bench, jetson=new).setup)
    assert found == ["power mode MAXN 0, then 15W 1"]
    old, new = (Jetson("R36", None, status, None, None, None) for status in ("pmode:0000", "pmode:0001"))
    found = obstacles(with_machine(bench, jetson=old).setup, with_machine(bench, jetson=new).setup)
    assert found == ["power mode pmode:0000, then pmode:0001"], "where nvpmodel does not answer"
    old, new = (Jetson("R36", None, None, now, least, 1020.0) for now, least in ((306.0, 306.0), (1020.0, 1020.0)))
    found = obstacles(with_machine(bench, jetson=old).setup, with_machine(bench, jetson=new).setup)
    assert found == ["GPU clock 306 to 1020 MHz, then 1020 to 1020 MHz"], "what jetson_clocks changes"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"settings": dataclasses.replace(QUICK, threads=None)}, "threads 1, then of the engine's choice"),
        ({"photo_sha256": "0" * 64}, "photo's sha256 88431cd.*, then 0000"),
        ({"faces": 2}, "faces 1, then 2"),
    ],
)
def test_other_settings_are_refused(bench: Bench, fields: dict[str, Any], message: str) -> None:
    setup = dataclasses.replace(bench.setup, **fields)
    with pytest.raises(InputError, match=message):
        check_alike(bench.setup, setup)


def test_what_one_compares_is_told_not_refused(bench: Bench) -> None:
    new = with_machine(bench, versions=bench.setup.machine.versions | {"onnxruntime": "99"})
    file = dataclasses.replace(bench.files[0], sha256="f" * 64, backend="other")
    new = dataclasses.replace(new, files=(file,), network=steady(bench).network[:1], load_before=None)
    old = dataclasses.replace(steady(bench), load_before=(0.5, 0.4, 0.3))
    found = compared(old, new)
    notes = "\n".join(found.notes)
    assert ", then 99" in notes
    assert f"sha256 of model.fp32.onnx {bench.files[0].sha256[:12]}, then ffffffffffff" in notes
    assert "engine of model.fp32.onnx ort-cpu, then other" in notes
    assert "before the old run 0.50, before the new not known" in notes
    assert found.alone == ("only in the old results: model.fp32.onnx, batch 3",)
    assert compared(new, old).alone == ("only in the new results: model.fp32.onnx, batch 3",)
    versions = bench.setup.machine.versions | {"a library": "2"}
    other = with_machine(bench, system="an OS", kernel="7.0", versions=versions)
    setup, photo = (
        dataclasses.replace(other.setup, detector="a detector"),
        dataclasses.replace(bench.photo, file="x.plan"),
    )
    notes = "\n".join(compared(bench, dataclasses.replace(other, setup=setup, photo=photo)).notes)
    for told in (
        "system .*, then an OS", "kernel .*, then 7.0", "detector astronaut_box, then a detector",
        "the photo's model file model.fp32.onnx, then x.plan", "a library not known, then 2",
    ):  # fmt: skip
        assert re.search(f"^{told}$", notes, re.MULTILINE), told
