"""INT8 ONNX files from the fp32 one: Q/DQ nodes by onnxruntime's quantiser, in two graphs.

The two engines want different things. ONNX Runtime's CPU kernels are fast with uint8 activations
and quantise the residual sums too. TensorRT takes signed, symmetric types alone (zero point 0),
wants biases in float, and fuses convolution, sum and ReLU into one kernel when what enters a
convolution and the block's shortcut are quantised, and the convolution's own output is not.
Pooling and the head stay in float32 in both.

Weights of the CPU graph have 7 bits. x86 processors without VNNI add pairs of products of uint8
and int8 in 16 bits, which 8-bit weights overflow: the same file would give other keypoints there.

What is tried, in order, is `CHOICES`; the first that is within its limits is kept.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from kp_export.first_convolution import fold_first_convolution, remove_unused, round_first_convolution
from kp_export.parity import Ask, FaceSet, Parity, answers_to
from kp_runtime.errors import DataError, ExportError, ParityError
from kp_runtime.files import write_file
from kp_train.metrics import point_errors

__all__ = [
    "CHOICES",
    "LEAST_FACES",
    "Int8Choice",
    "Int8Report",
    "calibration_stride",
    "check_calibration",
    "int8_from_onnx",
    "search_int8",
]

LEAST_FACES = 32
"""To calibrate on, and to measure the result on."""

WORST_FACE_NME = 0.15
"""A face that the fp32 network misses by more is none, or is labelled otherwise."""
MOST_MISSED = 0.2

_PERCENTILE_PIXELS = 64 * 224**2
"""About as many are shown to percentile at most: 64 faces in crops of 224 px."""


@dataclass(frozen=True)
class Int8Choice:
    """One way to quantise.

    Attributes:
        method: how ranges are found: `minmax`, or `percentile` (99.99% of the values).
        float_layers: how many convolutions from the input on stay in float32.
    """

    method: str
    float_layers: int = 0


CHOICES = (
    Int8Choice("minmax"),
    Int8Choice("percentile"),
    Int8Choice("minmax", float_layers=1),
    Int8Choice("percentile", float_layers=1),
    Int8Choice("percentile", float_layers=5),
)


@dataclass(frozen=True)
class Int8Report:
    """What the search chose and what it left: each try's choice and why it was not kept."""

    choice: Int8Choice
    parity: Parity
    rejected: tuple[str, ...]


def check_calibration(faces: FaceSet, fp32: Ask) -> None:
    """Refuses what are no labelled real faces: too few, no labels, or faces the network does not know.

    Raises:
        DataError: with the number that is wrong.
    """
    if len(faces.names) < LEAST_FACES:
        raise DataError(
            f"int8 is calibrated on {LEAST_FACES} or more faces, {faces.origin} gives {len(faces.names)}; give more "
            "(without --data, half of the people measure the result)"
        )
    if faces.xy_crop is None:
        raise DataError(f"int8 needs faces with labels, {faces.origin} has none: its gate is the accuracy")
    predicted = answers_to(fp32, faces.crops).keypoints
    missed = float((point_errors(predicted, faces.xy_crop).mean(axis=1) > WORST_FACE_NME).mean())
    if missed > MOST_MISSED:
        raise DataError(
            f"{faces.origin} does not look like faces: the fp32 network misses {missed:.0%} of them by an NME of over "
            f"{WORST_FACE_NME:.0%}; calibrate on photos of the kind that the model will see"
        )


def search_int8(
    fp32: Path,
    out: Path,
    *,
    precision: str,
    calibration: FaceSet,
    check: Callable[[Path], Parity],
    step: Callable[[str], None] = lambda text: None,
) -> Int8Report:
    """Quantises in the ways of `CHOICES` until one is within its limits.

    Args:
        fp32: the bundle's fp32 ONNX file.
        out: where the chosen graph goes.
        precision: `int8` (ONNX Runtime on a CPU) or `int8-trt` (TensorRT).
        calibration: the faces whose values set the ranges.
        check: gives a file's parity, on other faces as far as there are; a ParityError where it is over a limit.
        step: told what is tried.

    Raises:
        ParityError: none of the choices is within the limits; names each one's reason.
    """
    rejected: list[str] = []
    for choice in CHOICES:
        step(f"ONNX {precision}, {choice.method}, {choice.float_layers} convolutions in float32")
        int8_from_onnx(fp32, out, precision=precision, calibration=calibration, choice=choice)
        try:
            return Int8Report(choice, check(out), tuple(rejected))
        except ParityError as error:
            rejected.append(f"{choice.method}, {choice.float_layers} in float32: {error}")
    raise ParityError(f"no way to quantise keeps the accuracy of {precision}: " + " | ".join(rejected))


def int8_from_onnx(fp32: Path, out: Path, *, precision: str, calibration: FaceSet, choice: Int8Choice) -> None:
    """Writes one quantised graph; the same inputs give the same bytes.

    Args:
        fp32: the fp32 ONNX file.
        out: where to write.
        precision: `int8` or `int8-trt`.
        calibration: the faces whose values set the ranges.
        choice: how.

    Raises:
        ExportError: the quantiser fails or the graph is not valid.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    cpu = precision == "int8"
    percentile = choice.method == "percentile"
    method = CalibrationMethod.Percentile if percentile else CalibrationMethod.MinMax
    options: dict[str, Any] = {"WeightSymmetric": True} | ({"CalibPercentile": 99.99} if percentile else {})
    if not cpu:
        options |= {"ActivationSymmetric": True, "QuantizeBias": False}
    crops = calibration.crops[:: calibration_stride(choice, calibration.crops)]
    model = onnx.load(fp32)
    nodes = list(model.graph.node)
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    # grey levels over 255: a brighter face than those of the calibration is not clipped
    image = {"rmin": np.float32(0), "rmax": np.float32(1)}
    options["TensorQuantOverrides"] = {convolutions[0].input[0]: [image]}
    pooling = next(i for i, node in enumerate(nodes) if node.op_type == "ReduceMean")
    head = [node.name for node in nodes[pooling:]]
    with _temporary_folder() as folder, _quiet():
        quantised = folder / "int8.onnx"
        try:
            quantize_static(
                str(fp32),
                str(quantised),
                _Reader(crops, alike=percentile),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Relu", "MaxPool", "Add"] if cpu else ["Conv"],
                per_channel=True,
                reduce_range=cpu,
                activation_type=QuantType.QUInt8 if cpu else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=head + [node.name for node in convolutions[: choice.float_layers]],
                calibrate_method=method,
                extra_options=options,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ExportError(f"onnxruntime's quantiser fails on {fp32.name}: {error}") from error
        result = onnx.load(quantised)
    if cpu:
        round_first_convolution(result, model, crops)  # its weights have 7 bits, others 8
        fold_first_convolution(result)
    else:
        _unquantise_sums(result)
    _finish(result, model, precision)
    write_file(out, result.SerializeToString(deterministic=True))


def calibration_stride(choice: Int8Choice, crops: NDArray[np.uint8]) -> int:
    """1 where all calibration faces are used, n where each n-th is: percentile keeps all activations in memory.

    Those of a face are 23 MB in a crop of 224 px, so that each fourth is used, and of larger crops fewer.
    """
    return max(4, math.ceil(crops.size / _PERCENTILE_PIXELS)) if choice.method == "percentile" else 1


class _Reader:
    """Calibration crops in batches, as onnxruntime asks for them; its percentile wants them `alike` in size."""

    def __init__(self, crops: NDArray[np.uint8], alike: bool) -> None:
        size = next(size for size in range(32, 0, -1) if len(crops) % size == 0) if alike else 32
        self._batches: Iterator[dict[str, NDArray[np.uint8]]] = (
            {"crops": crops[i : i + size]} for i in range(0, len(crops), size)
        )

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._batches, None)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """For what the quantiser writes; where that does not fit, the error is not of the bundle's folder."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        raise ExportError(
            f"can't write the quantiser's temporary files: {error.strerror or error}; make room, or name another "
            "folder in TMPDIR"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the quantiser: it prints its histograms and logs advice that does not fit here."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _unquantise_sums(model: Any) -> None:
    """Takes away the Q/DQ pairs behind convolutions, but for the shortcuts that are convolutions (1 x 1).

    A block then sums an unquantised convolution and a quantised shortcut: the form that TensorRT
    fuses into one int8 kernel (TensorRT developer guide, "Q/DQ placement recommendations").
    """
    graph = model.graph
    weights = {item.name: item.dims for item in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    for quantise in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        conv = makers.get(quantise.input[0])
        if conv is None or conv.op_type != "Conv":
            continue
        weight = makers[conv.input[1]].input[0] if conv.input[1] in makers else conv.input[1]
        if list(weights[weight][2:]) == [1, 1]:
            continue
        dequantise = readers[quantise.output[0]]
        for node in graph.node:
            node.input[:] = [quantise.input[0] if name == dequantise.output[0] else name for name in node.input]
    remove_unused(graph)


def _finish(result: Any, fp32: Any, precision: str) -> None:
    """Gives the quantised graph the fp32 file's metadata, and checks it."""
    del result.metadata_props[:]
    metadata = {item.key: item.value for item in fp32.metadata_props} | {"kp.precision": precision}
    onnx.helper.set_model_props(result, metadata)
    result.producer_name, result.producer_version = fp32.producer_name, ""
    result.ir_version = fp32.ir_version
    # the quantiser declares its own domains even where no node is of them
    used = {node.domain for node in result.graph.node}
    kept = [entry for entry in result.opset_import if entry.domain in used]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    try:
        onnx.checker.check_model(result, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the quantised graph is not valid ONNX: {error}") from error
