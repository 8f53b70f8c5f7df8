"""What TensorRT says while it parses and builds: its messages, its progress, its parser's errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kp_runtime.backend_trt import ERRORS
from kp_runtime.errors import KpError
from kp_runtime.files import write_file

__all__ = ["BuildLog", "build_monitor", "parser_errors"]


class BuildLog:
    """Lines of a build, kept in memory and written to a file when it fails.

    Args:
        title: the first line: what is built, where, with what.
    """

    def __init__(self, title: str) -> None:
        self.lines = [title]
        self._errors: list[str] = []

    def add(self, origin: str, text: str, *, error: bool = False) -> None:
        """Adds a message; the last one that is an error can be asked for."""
        self.lines.append(f"[{origin}] {text}")
        if error:
            self._errors.append(text.strip())

    def tell(self, severity: str, text: str) -> None:
        """Adds what TensorRT's logger is given, unless it is verbose."""
        if severity != "verbose":
            self.add(severity, text, error=severity in ERRORS)

    def last_error(self) -> str:
        """TensorRT's last error, in one line."""
        return " ".join(self._errors[-1].split()) if self._errors else "TensorRT gave no reason"

    def write(self, path: Path) -> str:
        """Writes the log; returns the end of a sentence that says where it is."""
        try:
            write_file(path, "\n".join(self.lines) + "\n")
        except KpError as error:
            return f"the log could not be kept ({error})"
        return f"the log is {path}"


def build_monitor(trt: Any, progress: Callable[[str, float], None] | None) -> Any:
    """A `trt.IProgressMonitor` that tells `progress` each phase and its share done; None without one.

    An exception in `progress`, and Ctrl-C, may not cross TensorRT's own code: they end the build
    and stand in the monitor's `error`.
    """
    if progress is None:
        return None
    tell = progress

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT calls it when phases start, step and end; False from a step ends the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, (step + 1) / max(self._steps.get(phase_name, 1), 1))

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)
            self._tell(phase_name, 1.0)

        def _tell(self, phase: str, share: float) -> bool:
            if self.error is None:
                try:
                    tell(phase, min(share, 1.0))
                except BaseException as error:
                    self.error = error
            return self.error is None

    return Monitor()


def parser_errors(parser: Any, log: BuildLog) -> list[str]:
    """The errors of an `OnnxParser` in its own words, each with its node; at least one."""
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"node {error.node_name() or error.node()} ({error.node_operator()}): " if error.node() >= 0 else ""
        errors.append(f"{node}{error.desc()} [{error.code()}]")
        log.add("parser", errors[-1], error=True)
    return errors or [log.last_error()]
