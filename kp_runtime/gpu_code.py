"""Which GPUs a shared library carries machine code for, read from its fat binaries. Needs no GPU.

A fat binary is a header and entries, each PTX or machine code for one compute capability. The layout
is not documented by NVIDIA; it was found by reading libraries whose capabilities are known, and what
does not look like it is passed over. `docs/doctor.md` says on which libraries it was tried.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["TEGRA", "GpuCode", "gpu_code_from_library"]

TEGRA = frozenset({53, 62, 72, 87, 101, 110})
"""Capabilities of Jetsons and their kin, times ten: they run no machine code of another one (CUDA C++
Programming Guide, Binary Compatibility)."""

_MAGIC = 0xBA55ED50
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of the header, bytes of the entries
_ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of the header, bytes of the code, capability
_PTX, _MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class GpuCode:
    """Compute capabilities times ten, such as 87.

    Attributes:
        machine_code: those with machine code.
        ptx: those with PTX, which the driver compiles for newer GPUs.
    """

    machine_code: frozenset[int]
    ptx: frozenset[int]

    def runs_on(self, capability: int) -> bool:
        """Whether a GPU of this capability (times ten) can run the code."""
        return any(ptx <= capability for ptx in self.ptx) or any(
            code == capability
            or (code // 10 == capability // 10 and code < capability and not {code, capability} & TEGRA)
            for code in self.machine_code
        )


def gpu_code_from_library(path: str | os.PathLike[str]) -> GpuCode:
    """Reads a library; one without fat binaries has no code for any GPU.

    Raises:
        OSError: the file can't be read.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # can't be mapped
            return GpuCode(frozenset(), frozenset())
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = set(_entries(data))
    by_kind = [
        frozenset(capability for kind, capability in found if kind == wanted) for wanted in (_MACHINE_CODE, _PTX)
    ]
    return GpuCode(*by_kind)


def _entries(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Kind and capability of all entries of all fat binaries."""
    magic = struct.pack("<I", _MAGIC)
    at = data.find(magic)
    while at >= 0:
        end = at + len(magic)
        if at + _HEADER.size <= len(data):
            _, version, header, size = _HEADER.unpack_from(data, at)
            if version == 1 and header == _HEADER.size and at + header + size <= len(data):
                end = at + header + size
                yield from _entries_between(data, at + header, end)
        at = data.find(magic, end)


def _entries_between(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int]]:
    while at + _ENTRY.size <= end:
        kind, _, header, size, capability = _ENTRY.unpack_from(data, at)
        if header < _ENTRY.size or at + header + size > end:
            return
        yield kind, capability
        at += header + size
