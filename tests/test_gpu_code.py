"""For which chips a library holds code, in made-up libraries."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from kp_runtime.gpu_code import GpuCode, gpu_code_from_library


def fat_binary(*entries: tuple[int, int]) -> bytes:
    code = b"".join(
        struct.pack("<HHIQ12xI32x", kind, 0x101, 64, 8 + i, capability) + bytes(8 + i)
        for i, (kind, capability) in enumerate(entries)
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(code)) + code


def test_code_of_a_library(tmp_path: Path) -> None:
    magic = struct.pack("<I", 0xBA55ED50)
    library = tmp_path / "library.so"
    noise = np.random.default_rng(0).bytes(999)
    parts = [noise, fat_binary((2, 75), (1, 90)), magic + noise, fat_binary((2, 87)), fat_binary((2, 120))[:-9], magic]
    library.write_bytes(b"".join(parts))
    assert gpu_code_from_library(library) == GpuCode(frozenset({75, 87}), frozenset({90}))
    library.write_bytes(b"")
    assert gpu_code_from_library(library) == GpuCode(frozenset(), frozenset())


@pytest.mark.parametrize(("code", "ptx", "runs", "does_not"), [
    ({80}, set(), {80, 86, 89}, {75, 87, 90, 72}),  # a Jetson runs no desktop's code
    ({87}, set(), {87}, {86, 89, 80}),
    ({75}, {80}, {75, 80, 87, 90, 120}, {72, 70}),
    (set(), set(), set(), {75, 87}),
])  # fmt: skip
def test_which_chips_run_it(code: set[int], ptx: set[int], runs: set[int], does_not: set[int]) -> None:
    found = GpuCode(frozenset(code), frozenset(ptx))
    assert {chip for chip in runs | does_not if found.runs_on(chip)} == runs
