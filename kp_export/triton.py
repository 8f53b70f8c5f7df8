"""`kp export --triton`: a bundle -> models in a repository of NVIDIA Triton.

    REPO/<name>-images/               encoded images -> boxes and keypoints, by kp_runtime in the python backend
    REPO/<name>-crops-onnx/           crops -> keypoints, by the onnxruntime backend
    REPO/<name>-crops-sm87-trt10.3.0/ the same by the tensorrt backend, one for each GPU and TensorRT with a plan

A model that is new comes whole, with its config.pbtxt; one that is there gets another version folder, and its
config.pbtxt stays as it is. Both appear by one rename. docs/triton.md tells what is in them.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kp_export.pack import pack_bundle
from kp_export.staging import locked, mend
from kp_runtime.backend_by_name import CPU_ORDER, ORDER, best_first
from kp_runtime.errors import BundleError, ExportError
from kp_runtime.files import sync
from kp_runtime.golden import GOLDEN_NAME
from kp_runtime.manifest import FileEntry, Manifest
from kp_runtime.spec import ModelSpec
from kp_runtime.triton_model import DETECTOR_FOLDER, PROBE

__all__ = ["TritonModel", "TritonReport", "pbtxt", "write_repository"]

CONFIG_NAME = "config.pbtxt"
_MOST_CROPS, _MOST_IMAGES = 32, 8
_CROPS_DELAY_US, _IMAGES_DELAY_US = 2000, 5000
_MODEL_PY = '''"""Written by kp export --triton; the model itself is kp_runtime.triton_model."""

try:
    from kp_runtime.triton_model import TritonPythonModel  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the Python that Triton runs can't import kp_runtime ({error}); "
        "install it there: pip install 'kp-edge[image,ort]' 'numpy<2'"
    ) from None
'''


class Word(str):
    """A value that stands in a config.pbtxt without quotes, such as `TYPE_FP32`."""


@dataclass(frozen=True)
class TritonModel:
    """A model of the repository.

    Attributes:
        name: its folder's name, by which clients ask for it.
        version: the newest one.
        is_new: whether this export wrote it; false where the newest version holds the same already.
        file: the bundle's file that runs; None where the engine is chosen when it opens.
    """

    name: str
    version: int
    is_new: bool
    file: str | None


@dataclass(frozen=True)
class TritonReport:
    """What was written, and what was left out and why."""

    repository: Path
    models: tuple[TritonModel, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Wanted:
    """A model to write: how it is called, its config, what fills its version and, beside that, its folder."""

    name: str
    config: dict[str, Any]
    file: str | None
    fill: Callable[[Path], object]
    beside: Mapping[str, bytes]


def write_repository(bundle: Path, repository: Path, detector: Path | None = None) -> TritonReport:
    """Writes a bundle's models into a Triton model repository; other models in it stay untouched.

    Args:
        bundle: the bundle's folder.
        repository: the folder that Triton's `--model-repository` names; made where it is missing.
        detector: bundle of the face detector that goes along; without one the model looks for it where it runs.

    Raises:
        BundleError: a bundle can't be used.
        ExportError: the bundle lacks a file that is needed, a model of the same name has another contract, or the
            repository can't be written.
    """
    bundle, repository = bundle.resolve(), repository.resolve()
    mend(bundle)
    manifest = Manifest.read(bundle)
    wanted, left_out = _wanted(bundle, manifest, detector)
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with locked(repository / ".kp-export.lock", repository):
            for each in wanted:  # before anything is written
                _check_contract(repository / each.name, each.config)
            for stays in (_other_kind, _other_licence):
                left_out += tuple(reason for each in wanted if (reason := stays(repository / each.name, each)))
            models = tuple(_add(repository / each.name, each) for each in wanted)
    except OSError as error:
        raise ExportError(
            f"can't write the model repository {repository}: {error.strerror or error}; what was there is whole; "
            "name a folder that can be written"
        ) from error
    return TritonReport(repository, models, left_out)


def _wanted(bundle: Path, manifest: Manifest, detector: Path | None) -> tuple[list[_Wanted], tuple[str, ...]]:
    """The models that a bundle gives, and why not others."""
    runnable = {name: entry for name, entry in manifest.files.items() if entry.kind in ("onnx", "plan")}
    if not runnable:
        make = f"kp export {shlex.quote(str(bundle))}"
        raise ExportError(f"{bundle} holds no ONNX file and no plan for Triton; make one first: {make}")
    if manifest.spec.box == "frame":
        raise ExportError(f"{bundle} sees whole frames, not faces; there is no Triton model of such")
    if GOLDEN_NAME not in manifest.files:
        raise ExportError(
            f"{bundle} has no {GOLDEN_NAME}, which the health check runs; kp export of its checkpoint makes it"
        )
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", manifest.spec.name).lstrip(".") or "model"
    if stem != manifest.spec.name:  # other names may end in the same one
        stem += f"-{hashlib.sha256(manifest.spec.name.encode(errors='replace')).hexdigest()[:8]}"
    wanted = [_images(stem, bundle, manifest, detector)]
    left_out = []
    onnx = {str(entry.precision): name for name, entry in runnable.items() if entry.kind == "onnx"}
    best = next((onnx[precision] for precision in CPU_ORDER if precision in onnx), None)
    if best:
        wanted.append(_onnx(stem, bundle, manifest, best))
        if onnx.get("fp16", best) != best:
            pack = f"kp pack {shlex.quote(str(bundle))} --precision fp16 --out SLIM"
            left_out.append(f"{onnx['fp16']}: {wanted[-1].name} runs {best}; for a GPU export a bundle of it: {pack}")
    else:
        left_out.append("no model of the onnxruntime backend: the bundle has no ONNX file for it")
    plans, skipped = _plans(stem, bundle, manifest)
    return wanted + plans, (*left_out, *skipped)


def _images(stem: str, bundle: Path, manifest: Manifest, detector: Path | None) -> _Wanted:
    """Encoded images -> keypoints in the python backend."""
    precisions = sorted({str(e.precision) for e in manifest.files.values() if e.kind in ("onnx", "plan")})
    config = {
        "name": f"{stem}-images",
        "backend": "python",
        "max_batch_size": _MOST_IMAGES,
        "input": [{"name": "image", "data_type": Word("TYPE_STRING"), "dims": [1]}],
        "output": [
            {"name": "faces", "data_type": Word("TYPE_INT32"), "dims": [1]},
            {"name": "boxes", "data_type": Word("TYPE_FP32"), "dims": [-1, 4]},
            *(
                {"name": name, "data_type": Word("TYPE_FP32"), "dims": [-1, *shape]}
                for name, shape in manifest.spec.outputs.items()
            ),
        ],
        **_common(Word("KIND_CPU"), _IMAGES_DELAY_US),
        "model_warmup": [
            _warmup("probe", 1, "image", {"data_type": Word("TYPE_STRING"), "dims": [1], "input_data_file": "probe"})
        ],
        "parameters": _parameters(
            f"image -> {_given(manifest.spec)} a face", backend="auto", detector="auto", threads=""
        ),
    }

    def fill(version: Path) -> None:
        pack_bundle(bundle, version / "bundle", precisions)
        if detector is not None:
            pack_bundle(detector, version / DETECTOR_FOLDER, ["fp32"])
        (version / "model.py").write_text(_MODEL_PY, encoding="utf-8")

    probe = len(PROBE).to_bytes(4, "little") + PROBE  # as Triton keeps a string
    return _Wanted(config["name"], config, None, fill, {"warmup/probe": probe})


def _onnx(stem: str, bundle: Path, manifest: Manifest, file: str) -> _Wanted:
    """Crops -> keypoints in the onnxruntime backend; an int8 file is for the CPU."""
    kind = Word("KIND_CPU" if manifest.files[file].precision == "int8" else "KIND_AUTO")
    config = _crops_config(f"{stem}-crops-onnx", "onnxruntime", "model.onnx", manifest, _MOST_CROPS, kind)
    return _crops(bundle, manifest, file, config)


def _plans(stem: str, bundle: Path, manifest: Manifest) -> tuple[list[_Wanted], list[str]]:
    """Crops -> keypoints in the tensorrt backend: the best plan for each GPU and TensorRT.

    One that the server loads as it is goes before a version-compatible one, which it loads by a flag alone.
    """
    order = ORDER["tensorrt"]
    plans = {name: str(entry.precision) for name, entry in manifest.files.items() if entry.kind == "plan"}
    wanted: dict[str, _Wanted] = {}
    left_out = []
    for file, precision in plans.items():
        if precision not in order:
            left_out.append(f"{file}: no plan can have precision {precision}, only {', '.join(order)}")
    for file in sorted(best_first(plans, order), key=lambda name: ".newer." in name):
        least, most, where, is_for_dla = _plan_facts(bundle, file, manifest.files[file])
        name = f"{stem}-crops-{where}"
        if is_for_dla:
            left_out.append(f"{file}: it runs on a DLA core, and Triton loads plans for the GPU")
        elif least > 1:
            left_out.append(f"{file}: it takes {least} faces or more, and Triton's batches may be smaller")
        elif name in wanted:
            left_out.append(f"{file}: {wanted[name].file} is for the same GPU and TensorRT")
        else:
            config = _crops_config(name, "tensorrt", "model.plan", manifest, most, Word("KIND_GPU"))
            wanted[name] = _crops(bundle, manifest, file, config)
            if ".newer." in file:
                left_out.append(
                    f"a plan without --version-compatible, as the bundle has none for {name}: the server loads {file} "
                    "by --backend-config=tensorrt,version-compatible=true alone"
                )
    return list(wanted.values()), left_out


def _plan_facts(bundle: Path, file: str, entry: FileEntry) -> tuple[int, int, str, bool]:
    """Fewest and most faces of a plan, where it runs, `sm87-trt10.3.0`, and whether on a DLA core there."""
    made = entry.made
    try:
        least, _, most = (int(size) for size in made["profile"])
        numbers = re.findall(r"\d+", f"{made['compute_capability']}")
        where = f"sm{''.join(numbers)}-trt{re.sub('[^0-9.]', '', made['tensorrt'].partition('.post')[0])}"
        return least, most, where, made.get("options", {}).get("dla_core") is not None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{bundle}: the manifest lacks what {file} was made for ({error}); build it again") from error


def _crops(bundle: Path, manifest: Manifest, file: str, config: dict[str, Any]) -> _Wanted:
    """A model whose version is one file of the bundle."""

    def fill(version: Path) -> None:
        (version / config["default_model_filename"]).write_bytes(manifest.read_file(bundle, file))

    return _Wanted(config["name"], config, file, fill, {})


def _crops_config(name: str, backend: str, file: str, manifest: Manifest, most: int, kind: Word) -> dict[str, Any]:
    spec, size = manifest.spec, manifest.spec.size
    # the images model has the whole manifest
    licence = {"kp_weights_licence": str(manifest.licence["weights"])} if "weights" in manifest.licence else {}
    crop = {"data_type": Word("TYPE_UINT8"), "dims": [1, size, size]}
    return {
        "name": name,
        "backend": backend,
        "default_model_filename": file,
        "max_batch_size": most,
        "input": [{"name": "crops", **crop}],
        "output": [
            {"name": name, "data_type": Word("TYPE_FP32"), "dims": list(shape)} for name, shape in spec.outputs.items()
        ],
        **_common(kind, _CROPS_DELAY_US),
        "model_warmup": [
            _warmup(f"{n} crops", n, "crops", {**crop, "zero_data": True}) for n in sorted({1, min(8, most), most})
        ],
        "parameters": _parameters(f"crops of {size} px -> {_given(spec)}", **licence),
    }


def _given(spec: ModelSpec) -> str:
    return f"{spec.points} keypoints" + ("" if spec.lost_limit is None else " and a lost score")


def _common(kind: Word, delay_us: int) -> dict[str, Any]:
    """What all models have: instances, batching of requests that come together, the newest version alone."""
    return {
        "instance_group": [{"count": 1, "kind": kind}],
        "dynamic_batching": {"max_queue_delay_microseconds": delay_us},
        "version_policy": {"latest": {"num_versions": 1}},
    }


def _warmup(name: str, batch: int, tensor: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "batch_size": batch, "inputs": [{"key": tensor, "value": value}]}


def _parameters(contract: str, **settings: str) -> list[dict[str, Any]]:
    """The contract, by which a later export knows the model, and what else is said or may be set."""
    texts = {"kp_contract": contract, **settings}
    return [{"key": key, "value": {"string_value": text}} for key, text in texts.items()]


def pbtxt(message: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format: a mapping is a message, a list of mappings a repeated one."""
    lines = []
    for key, value in message.items():
        for each in value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]:
            if isinstance(each, Mapping):
                lines.append(f"{indent}{key} {{\n{pbtxt(each, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(each)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    return json.dumps(value)  # numbers, true, lists of numbers, and quoted ASCII text are the same in both


def _config_text(folder: Path) -> str:
    """Of a model that is there already; empty where it has none."""
    path = folder / CONFIG_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _check_contract(folder: Path, config: dict[str, Any]) -> None:
    """Refuses to add a version to a model that takes or gives something else, or more at once."""
    if not folder.exists():
        return
    contract = next(p["value"]["string_value"] for p in config["parameters"] if p["key"] == "kp_contract")
    text = _config_text(folder)
    if json.dumps(contract) not in text:
        raise ExportError(
            f"{folder} is there and is not a model of {contract!r}: its clients would get something else; "
            "remove it, or name another repository"
        )
    takes, most = re.search(r"^max_batch_size: *(\d+)", text, re.MULTILINE), config["max_batch_size"]
    if config["backend"] == "tensorrt" and takes and int(takes[1]) > most:
        raise ExportError(
            f"{folder} takes {takes[1]} crops at once, and the plan {most}, which Triton refuses to load; build "
            f"it with --max-batch {takes[1]}, or remove the folder"
        )


def _other_kind(folder: Path, wanted: _Wanted) -> str | None:
    """What to say where a model's config.pbtxt, which stays as it is, has the processor of another precision."""
    path, text = folder / CONFIG_NAME, _config_text(folder)
    kind = str(wanted.config["instance_group"][0]["kind"])
    other = {"KIND_CPU": "KIND_AUTO", "KIND_AUTO": "KIND_CPU"}.get(kind)
    if other is None or not re.search(rf"\bkind: *{other}\b", text):
        return None
    told = f"it says {other}, {wanted.file} is for {kind}; change that line"
    return f"the processor in {path}, which stays as it is: {told}"


def _other_licence(folder: Path, wanted: _Wanted) -> str | None:
    """What to say where a model's config.pbtxt, which stays as it is, has another licence than the new weights."""
    path, text = folder / CONFIG_NAME, _config_text(folder)
    name, parameters = "kp_weights_licence", wanted.config["parameters"]
    licence = next((each["value"]["string_value"] for each in parameters if each["key"] == name), None)
    if not text or (json.dumps(licence) in text if licence is not None else name not in text):
        return None
    told = f"{wanted.file} is under {licence!r}, which {name} does not say" if licence else f"{wanted.file} has none"
    return f"the licence in {path}, which stays as it is: {told}; change it there"


def _add(folder: Path, wanted: _Wanted) -> TritonModel:
    """Adds a version to a model, or the whole model, by one rename."""
    is_there = folder.exists()
    # with the repository's name: another one's export may be at work beside it
    stage = folder / ".new" if is_there else _beside(folder.parent) / f".{folder.parent.name}.{folder.name}.new"
    versions = [int(path.name) for path in folder.glob("[1-9]*") if path.name.isdigit()]
    newest = max(versions, default=0)
    shutil.rmtree(stage, ignore_errors=True)  # of an export that was killed
    try:
        version = stage if is_there else stage / "1"
        version.mkdir(parents=True)
        wanted.fill(version)
        if newest and _same(version, folder / str(newest)):
            return TritonModel(wanted.name, newest, False, wanted.file)
        for name, data in {} if is_there else {CONFIG_NAME: pbtxt(wanted.config).encode(), **wanted.beside}.items():
            (stage / name).parent.mkdir(exist_ok=True)
            (stage / name).write_bytes(data)
        _sync(stage)
        os.replace(stage, folder / str(newest + 1) if is_there else folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return TritonModel(wanted.name, newest + 1, True, wanted.file)


def _beside(repository: Path) -> Path:
    """Where a new model is made: a server that starts takes any folder in the repository for a model."""
    parent = repository.parent
    is_one_disk = parent.stat().st_dev == repository.stat().st_dev
    return parent if is_one_disk and os.access(parent, os.W_OK) else repository


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    names = [{str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} for root in (one, other)]
    names[1] = {name for name in names[1] if "__pycache__" not in name}
    _, different, unreadable = filecmp.cmpfiles(one, other, names[0], shallow=False)
    return names[0] == names[1] and not different and not unreadable


def _sync(folder: Path) -> None:
    """Waits until all files are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
