"""What ONNX Runtime's graph optimisations do to a bundle's keypoints on two processors, and to the time.

    python -m scripts.graph_levels record OUT.npz PHOTO BUNDLE    on each processor
    python -m scripts.graph_levels compare HERE.npz THERE.npz
    python -m scripts.graph_levels time PHOTO BUNDLE              times in turns, as ratios to the default

The levels are ONNX Runtime's `GraphOptimizationLevel`; `all` is its default and the run-time's. All
run on one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from kp_cli.report import one_line_errors
from kp_runtime.files import writing
from kp_runtime.frame import as_frame, image_from_file
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.manifest import Manifest
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.timing import measure_in_turns, ratio_of_medians, summary_from_turns
from scripts.architectures import BOXES, recording

LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
PRECISIONS = ("int8", "fp32")


def sessions(bundle: Path, precision: str) -> dict[str, Any]:
    """A session for each level, named `int8, basic`."""
    found, model = {}, str(Manifest.read(bundle).check_file(bundle, f"model.{precision}.onnx"))
    for name, level in LEVELS.items():
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # idle threads of one level would take the next one's core
        found[f"{precision}, {name}"] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return found


def photo_crops(photo: Path, bundle: Path) -> NDArray[np.uint8]:
    """`(4, 1, size, size)`: the first boxes of `architectures`; a crop takes seconds under emulation."""
    spec, frame = Manifest.read(bundle).spec, as_frame(image_from_file(photo))
    return crops_from_frame(frame, matrices_from_boxes(BOXES[:4], spec.size, spec.margin), spec.size)


def record(out: Path, photo: Path, bundle: Path) -> None:
    """Keypoints of each level."""
    crops, results = photo_crops(photo, bundle), {}
    for precision in PRECISIONS:
        for name, session in sessions(bundle, precision).items():
            results[name] = np.concatenate([session.run(None, {"crops": crop[None]})[0] for crop in crops])
    with writing(out) as temporary, open(temporary, "wb") as file:
        np.savez(file, **results)  # type: ignore[arg-type]


def compare(here: Path, there: Path) -> None:
    """Prints how many points differ between the processors, and by how much."""
    one, other = recording(here), recording(there)
    print(f"{'':16} {'points':>7} {'differ':>7} {'largest px':>11} {'moved by the level, px':>23}")
    for name in [name for name in one if name in other]:
        apart = np.linalg.norm(one[name].astype(float) - other[name], axis=-1)
        level = np.linalg.norm(one[name].astype(float) - one[name.split(",")[0] + ", all"], axis=-1)
        print(f"{name:16} {apart.size:7} {(apart != 0).sum():7} {apart.max():11.3g} {level.max():23.3g}")


def measure(photo: Path, bundle: Path) -> None:
    """Prints the median of a single crop at each level and its ratio to the default."""
    crop = photo_crops(photo, bundle)[:1]
    for precision in PRECISIONS:
        cases = {
            name: (lambda s=session: s.run(None, {"crops": crop}))
            for name, session in sessions(bundle, precision).items()
        }
        turns = measure_in_turns(cases, seconds=4, samples=100)
        for name in cases:
            ratio = ratio_of_medians(turns[name], turns[f"{precision}, all"])
            median = summary_from_turns(turns[name]).p50_ms
            print(f"{name:16} {median:8.2f} ms  x {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})", flush=True)


def main() -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run, files in (
        ("record", record, ("out", "photo", "bundle")),
        ("compare", compare, ("here", "there")),
        ("time", measure, ("photo", "bundle")),
    ):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        for file in files:
            command.add_argument(file, type=Path)
    args = vars(parser.parse_args())
    args.pop("run")(**args)


if __name__ == "__main__":
    with one_line_errors("graph_levels"):
        main()
