"""A short run of scripts/fuzz.py, and that it can find something."""

from __future__ import annotations

import random
from pathlib import Path

import fuzz
import fuzz_targets
import pytest
from fuzz_mutate import mutated_bytes, mutated_document, mutated_text

LIGHT = [name for name, target in fuzz_targets.TARGETS.items() if not target.slow_start]


def test_every_reader_ends_in_a_typed_error_or_a_right_answer(capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for name in LIGHT for word in ("--target", name)]
    status = fuzz.main([*words, "--cases", "500", "--seed", "68"])
    out = capsys.readouterr().out
    assert status == 0, out
    assert len(out.splitlines()) == len(LIGHT)


@pytest.mark.parametrize("name", ["csv", "pts", "state"])
def test_training_s_readers_too(name: str, tmp_path: Path) -> None:
    """In this process, which has torch already."""
    case = fuzz_targets.TARGETS[name].prepare(tmp_path)
    outcomes = [fuzz.outcome_of(case, random.Random(seed)) for seed in range(30)]
    assert [outcome for outcome in outcomes if outcome.startswith("!")] == []
    assert set(outcomes) & {"DataError", "BundleError"}


BROKEN = """
import atexit, ctypes, os, signal, sys, time
sys.path.insert(0, {scripts!r})
import fuzz, fuzz_targets

def prepare(folder):
    def case(rng):
        number = next(cases)
        if number == 1:
            raise ZeroDivisionError("one")
        if number == 3:
            ctypes.string_at(0)
        if number == 5:
            signal.setitimer(signal.ITIMER_PROF, 0.05)  # not to wait for the whole bound
            while True:
                pass
        if number == 6:
            bytearray(2 << 30)
        if number == 8:
            atexit.register(os.abort)
    return case

cases = iter(range({first}, 100))
fuzz_targets.TARGETS["broken"] = fuzz_targets.Target(prepare, 1)
fuzz.main(sys.argv[1:])
"""


def test_a_header_that_promises_more_pixels_than_the_memory_holds_is_no_finding() -> None:
    results = {"image": fuzz.Result()}
    fuzz._run_child([["image", 60, 61]], 777, results)
    assert results["image"].outcomes == {"ImageError": 1}


def test_what_breaks_the_property_is_found_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception, a segfault, a hang, too much memory and a crash behind the last case; the others still run."""
    script, scripts = tmp_path / "broken.py", str(Path(fuzz.__file__).parent)
    run_child = fuzz._run_child

    def run(spans: list[list], seed: int, results: dict[str, fuzz.Result]) -> list[list]:  # type: ignore[type-arg]
        script.write_text(BROKEN.format(scripts=scripts, first=spans[0][1]))
        return run_child(spans, seed, results)

    monkeypatch.setitem(fuzz_targets.TARGETS, "broken", fuzz_targets.Target(lambda folder: lambda rng: None, 1))
    monkeypatch.setattr(fuzz, "_run_child", run)
    monkeypatch.setattr(fuzz, "__file__", str(script))
    result = fuzz.fuzz(["broken"], 9, 0)["broken"]
    assert result.cases == 9
    assert result.outcomes == {"value": 5, "ZeroDivisionError": 1, "crash, SIGSEGV": 1, "hang": 1, "MemoryError": 1}
    *of_cases, last = result.findings
    assert [finding.split()[1] for finding in of_cases] == ["1:", "3:", "5:", "6:"]
    assert last.startswith("crash at the end, after case 8: SIGABRT")


def test_a_case_is_the_same_each_time() -> None:
    def made(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutated_bytes(rng, b"abc" * 9), mutated_text(rng, "1,2,3", ","), mutated_document(rng, {"a": [1, "b"]})]

    assert made(5) == made(5)
    assert made(5) != made(6)
