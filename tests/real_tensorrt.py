"""The names in TensorRT's real Python bindings, read off wheels that run without a GPU.

The binding wheels on PyPI hold the real module; the libraries that it links to are replaced by
three tiny ones, compiled here, whose functions return null. That is enough to import it and to
read every name and signature, and not enough to run anything.

    python -m tests.real_tensorrt      writes tests/data/tensorrt_api_<version>.json anew

This file needs the standard library alone: it runs itself in a process of its own to import them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "tensorrt"
WHEELS = {"10.3.0": "tensorrt-cu12-bindings==10.3.0", "11.4.0": "tensorrt-cu13-bindings==11.4.0.106"}

CLASSES = (
    "Builder", "EngineInspector", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer",
    "ILogger", "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache", "Logger",
    "OnnxParser", "ParserError", "Runtime",
)  # fmt: skip
ENUMS = (
    "BuilderFlag", "DataType", "DeviceType", "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel",
    "LayerInformationFormat", "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParserFlag",
    "ProfilingVerbosity", "TensorFormat", "TensorIOMode", "TensorLocation",
)  # fmt: skip

STUBS = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins",
)  # fmt: skip


class UnavailableError(Exception):
    """The real bindings can't be had here; the message says why."""


def committed_listing(version: str) -> dict[str, Any]:
    """The names as they are committed."""
    path = ROOT / "tests" / "data" / f"tensorrt_api_{version}.json"
    listing: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return listing


def real_listing(version: str) -> dict[str, Any]:
    """The names as the real bindings print them now.

    Raises:
        UnavailableError: no download, no compiler, no wheel for this Python, or it does not import.
    """
    folder = CACHE / version
    try:
        if not (folder / "ready").exists():
            _prepare(version, folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"the bindings of {version} can't be fetched: {error}") from error
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "LD_LIBRARY_PATH": str(folder / "stubs")}
    dump = [sys.executable, str(Path(__file__).resolve()), "dump"]
    done = subprocess.run(dump, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise UnavailableError(f"the bindings of {version} do not import: {_last_line(done.stderr)}")
    listing: dict[str, Any] = json.loads(done.stdout)
    return listing


def _prepare(version: str, folder: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise UnavailableError("no C compiler for the stub libraries")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "stubs").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
        pip += ["--timeout", "15", "--dest", downloads, WHEELS[version]]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or not wheels:
            raise UnavailableError(f"no download of {WHEELS[version]} for this Python: {_last_line(done.stderr)}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(folder / "site")
    source = folder / "stubs" / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS), encoding="utf-8")
    for name in STUBS:
        library = folder / "stubs" / f"lib{name}.so.{version.split('.')[0]}"
        done = subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], capture_output=True)
        if done.returncode:
            raise UnavailableError(f"the stub library {library.name} does not compile")
    (folder / "ready").touch()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1].strip() if lines else "no message"


def _dump() -> dict[str, Any]:
    """Reads the module that is imported here: top-level names, enum members, members and their signatures.

    A method is a list of its signatures, such as `["network, config -> IHostMemory"]`, `?` after an argument
    that may be left out; a property is an empty list.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorrt_bindings as trt
    return {
        "version": trt.__version__,
        "names": sorted(name for name in dir(trt) if _is_public(trt, name)),
        "enums": {name: list(getattr(trt, name).__members__) for name in ENUMS},
        "classes": {name: _members(getattr(trt, name)) for name in CLASSES},
    }


def _is_public(module: Any, name: str) -> bool:
    return name == "__version__" or not (name.startswith("_") or isinstance(getattr(module, name), ModuleType))


def _members(owner: Any) -> dict[str, list[str]]:
    names = ["__init__", *(name for name in dir(owner) if not name.startswith("_"))]
    return {name: _signatures(name, getattr(owner, name)) for name in names}


def _signatures(name: str, member: Any) -> list[str]:
    if not callable(member) or isinstance(member, type):
        return []
    found = re.findall(rf"(?:^|\d\. ){name}\((.*)\) -> ([^\n]*)", member.__doc__ or "", re.MULTILINE)
    return [
        f"{', '.join(_arguments(text))} -> {_short(returns)}".strip() for text, returns in found if "*args" not in text
    ]


def _arguments(text: str) -> list[str]:
    """Names of the arguments without `self`; commas inside brackets do not separate."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<{") - (letter in "])>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    named = [part.strip() for part in parts if ":" in part and part.strip().split(":")[0] != "self"]
    return [part.split(":")[0] + ("?" if "=" in part else "") for part in named]


def _short(returns: str) -> str:
    last = re.split(r"\.|::", returns.strip())[-1]
    return {"IParserError": "ParserError"}.get(last, last)


def _text(listing: dict[str, Any]) -> str:
    """JSON with a line for each class and enum."""
    lines = [f'  "version": {json.dumps(listing["version"])}', f'  "names": {json.dumps(listing["names"])}']
    for part in ("enums", "classes"):
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in listing[part].items())
        lines.append(f'  "{part}": {{\n{rows}\n  }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["dump"]:
        print(json.dumps(_dump()))
    else:
        for one in WHEELS:
            target = ROOT / "tests" / "data" / f"tensorrt_api_{one}.json"
            target.write_text(_text(real_listing(one)), encoding="utf-8")
            print(target)
