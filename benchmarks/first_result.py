"""What a fresh process does on its way to a first result; `start.py` runs this file in many.

    python -m benchmarks.first_result import
    python -m benchmarks.first_result kp BUNDLE_FILE THREADS
    python -m benchmarks.first_result ort BUNDLE_FILE THREADS SIZE

Prints one JSON object. Nothing is imported at the top that a measured import would find ready.
"""

from __future__ import annotations

import json
import sys
import time

__all__: list[str] = []


def import_alone() -> dict[str, float]:
    """Time of `import numpy`, and of `import kp_runtime` after it."""
    start = time.perf_counter()
    import numpy  # noqa: F401

    between = time.perf_counter()
    import kp_runtime  # noqa: F401

    end = time.perf_counter()
    return {"import numpy": between - start, "import kp_runtime after numpy": end - between}


def with_kp(file: str, threads: int) -> dict[str, float]:
    """From a fresh process with numpy to the keypoints of one face, through `kp_runtime`."""
    import numpy as np

    start = time.perf_counter()
    import kp_runtime

    imported = time.perf_counter()
    model = kp_runtime.load(file, "ort-cpu", threads=threads)
    loaded = time.perf_counter()
    frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    ready = time.perf_counter()
    model(frame, [[200, 120, 400, 330]])
    end = time.perf_counter()
    return _steps(start, imported, loaded, end - (ready - loaded))


def with_ort(file: str, threads: int, size: int) -> dict[str, float]:
    """The same with ONNX Runtime alone: import, session, first run on a crop."""
    import numpy as np

    start = time.perf_counter()
    import onnxruntime

    imported = time.perf_counter()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    crops = np.random.default_rng(0).integers(0, 256, (1, 1, size, size), dtype=np.uint8)
    ready = time.perf_counter()
    session.run(None, {"crops": crops})
    end = time.perf_counter()
    return _steps(start, imported, loaded, end - (ready - loaded))


def _steps(start: float, imported: float, loaded: float, end: float) -> dict[str, float]:
    """Seconds of each step and of all."""
    return {"import": imported - start, "load": loaded - imported, "first result": end - loaded, "all": end - start}


def _peak_mib() -> float | None:
    """The process's largest resident memory, from Linux; None elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:")), None)
    except OSError:
        return None


def main() -> None:
    """Does what the first argument says."""
    what, *rest = sys.argv[1:]
    if what == "import":
        steps = import_alone()
    elif what == "kp":
        steps = with_kp(rest[0], int(rest[1]))
    else:
        steps = with_ort(rest[0], int(rest[1]), int(rest[2]))
    print(json.dumps({"seconds": steps, "peak_mib": _peak_mib()}))


if __name__ == "__main__":
    main()
