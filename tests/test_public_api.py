from __future__ import annotations

import importlib
import pickle
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kp_runtime
import kp_runtime.errors
from kp_runtime.labelled_face import LabelledFace
from kp_runtime.manifest import DetectorManifest
from kp_runtime.track import Track
from kp_runtime.video_source import VideoFrame

ROOT = Path(kp_runtime.__file__).parents[1]
MODULES = sorted(module.name for module in pkgutil.iter_modules(kp_runtime.__path__, "kp_runtime."))
ERRORS = [name for name in kp_runtime.__all__ if name.endswith("Error")]

BARE = """
import sys

BLOCKED = {
    "cryptography", "cv2", "lightning", "matplotlib", "onnx", "onnxruntime", "PIL", "rich", "safetensors", "skimage",
    "torch", "torchvision", "typer",
}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocker())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not BLOCKED & set(sys.modules)
assert not {"kp_train", "kp_export", "kp_cli"} & set(sys.modules)
"""


def test_all_is_sorted_and_is_what_is_public() -> None:
    public = set(kp_runtime.errors.__all__).union(*kp_runtime._HOME.values())
    assert sorted(kp_runtime.__all__) == kp_runtime.__all__
    assert set(kp_runtime.__all__) == public
    assert {*kp_runtime.__all__, "__version__"} == set(dir(kp_runtime))


def test_what_public_names_take_and_give_is_public() -> None:
    """A program that annotates its own functions needs no other module."""
    inside = {"BoxMap", "Golden", "Photo", "Scratch"}  # what their own modules make, and take back
    private = {
        name
        for module in map(importlib.import_module, MODULES)
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__.startswith("kp_runtime.")
    } - {*kp_runtime.__all__, *inside}
    said = {name: " ".join(_annotations(getattr(kp_runtime, name))) for name in kp_runtime.__all__}
    assert {name: found for name, text in said.items() if (found := private & set(re.findall(r"\w+", text)))} == {}


def _annotations(value: Any) -> Iterator[str]:
    """Those of a function, or of what is public of a class and those that it is made of."""
    yield from map(str, vars(value).get("__annotations__", {}).values())
    for base in value.__mro__ if isinstance(value, type) else ():
        for name, member in vars(base).items():
            if base.__module__.startswith("kp_runtime.") and (name in ("__init__", "__call__") or name[0] != "_"):
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                yield from map(str, getattr(function, "__annotations__", {}).values())


def test_public_names_come_from_their_home() -> None:
    for home, names in kp_runtime._HOME.items():
        module = importlib.import_module(f"kp_runtime.{home}")
        for name in names:
            assert name in module.__all__
            assert getattr(kp_runtime, name) is getattr(module, name)
    with pytest.raises(AttributeError, match="module 'kp_runtime' has no attribute 'lod'"):
        kp_runtime.lod  # noqa: B018


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_passes_between_processes(name: str) -> None:
    """One that can't be read back ends a pool of processes, or leaves it waiting for ever."""
    kind = getattr(kp_runtime, name)
    of = {"MissingExtraError": ("numpy", "image", "drawing"), "NotDrawnError": ("not drawn", "a photo")}
    error = kind(*of.get(name, ("why",)))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_import_costs_no_module_that_is_not_used() -> None:
    code = "import sys, kp_runtime, kp_runtime.errors; assert not {'numpy', 'cv2', 'json'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("name", MODULES)
def test_every_name_in_all_is_there(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [missing for missing in module.__all__ if not hasattr(module, missing)] == []


def test_every_module_imports_with_numpy_alone() -> None:
    assert len(MODULES) >= 15
    done = subprocess.run([sys.executable, "-c", BARE, *MODULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_error_is_a_kp_error() -> None:
    assert len(ERRORS) == 14
    assert all(issubclass(getattr(kp_runtime, name), kp_runtime.KpError) for name in ERRORS)
    assert set(kp_runtime.errors.__all__) - {"KpWarning"} <= set(ERRORS)


def test_every_warning_is_a_kp_warning() -> None:
    """A host silences or raises ours alone by one filter."""
    names = [name for name in kp_runtime.__all__ if name.endswith("Warning")]
    assert len(names) == 4
    assert all(issubclass(getattr(kp_runtime, name), kp_runtime.KpWarning) for name in names)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Track(1, np.zeros(4), np.zeros((68, 2), np.float32), 0.0),
        lambda: VideoFrame(0, 0.0, np.zeros((4, 4, 3), np.uint8)),
        lambda: LabelledFace("a.png", np.zeros((68, 2)), np.zeros(4)),
    ],
)
def test_what_holds_arrays_is_equal_to_itself_alone(made: Callable[[], object]) -> None:
    """Compared by their arrays, lists and sets of them end in an error of numpy's."""
    one, other = made(), made()
    assert [other, one].index(one) == 1
    assert len({one, other}) == 2


def test_what_a_program_holds_is_shown_in_a_line_without_its_content() -> None:
    engines, image = ROOT / "engines", kp_runtime.Frame(np.zeros((96, 128, 3), np.uint8), "bgr")
    timer = kp_runtime.StageTimer()
    with kp_runtime.load(engines / "resnet18-68-lite", threads=1) as model:
        keypoints = model(image, [[0, 0, 90, 90]], timer=timer)
    shown = [model, keypoints, timer, image, kp_runtime.CenterDetector(engines / "face-detector", threads=1)]
    assert [repr(value) for value in shown] == [
        "Model(OrtCpuBackend('resnet18-68-lite', 'model.int8.onnx'), closed)",
        "Keypoints(1 face(s) of 68 points on 128 x 96 px)",
        "StageTimer(crop: 1 sample(s), infer: 1 sample(s), map back: 1 sample(s))",
        "Frame(128 x 96 px, 'bgr', 'full')",
        f"CenterDetector('{engines / 'face-detector'}', 0.6, 0.05)",
    ]
    manifests = [kp_runtime.Manifest.read(engines / "resnet18-68"), DetectorManifest.read(engines / "face-detector")]
    assert [len(repr(manifest)) < 250 for manifest in manifests] == [True, True]
    with pytest.raises(kp_runtime.InputError, match=r"pass to no other process; load\(\) the bundle in each of them"):
        pickle.dumps(model)
