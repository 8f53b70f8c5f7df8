"""What the benchmarks' command lines share: arguments, tables, the last line, and errors in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kp_cli.report import one_line_errors
from kp_runtime.cores import default_threads
from kp_runtime.errors import InputError

__all__ = [
    "check_batches",
    "markdown_table",
    "parser",
    "run",
    "with_made_part",
]


def parser(description: str | None, *, bundle: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that all have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if bundle:
        made.add_argument("--bundle", type=Path, required=True, help="the bundle's folder, made by kp export")
        made.add_argument(
            "--threads", type=int, default=default_threads(), help="of every engine; all cores when left out"
        )
    made.add_argument("--out", type=Path, help="results file; one in benchmarks/results/ when left out")
    return made


def check_batches(batches: Sequence[int], crops: int | None = None) -> None:
    """Fails where there are none, one of no face, or one of more than there are crops.

    Raises:
        InputError: so it is.
    """
    if not batches or min(batches) < 1:
        raise InputError(f"batch sizes must be 1 or more, got {', '.join(map(str, batches)) or 'none'}")
    if crops is not None and max(batches) > crops:
        raise InputError(f"a batch of {max(batches)} needs as many crops, got {crops}")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def with_made_part(text: str, begin: str, end: str, made: str) -> str:
    """A page whose part between two markers is made anew.

    Raises:
        InputError: the page lacks the markers.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise InputError(f"the page needs the lines {begin} and {end}, in this order; put them back")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark; errors become one line on stderr and exit status 1."""
    with one_line_errors("benchmarks"):
        main()
