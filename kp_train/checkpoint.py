"""Weights and training states on disk: safetensors and JSON, never a pickle.

A checkpoint is a bundle that holds `checkpoint.safetensors` alone: the weights, with matrices as
fp16 where asked and vectors (batch norm, biases) always as fp32, and `manifest.json` for the
rest. A training state, for resuming, is a folder with `tensors.safetensors` and `tree.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from kp_runtime.errors import BundleError, IntegrityError, KpError
from kp_runtime.files import make_folder, write_file, writing
from kp_runtime.manifest import MANIFEST_NAME, DetectorManifest, Manifest, file_entry
from kp_train.detector_net import DetectorNet
from kp_train.model import KeypointNet

__all__ = [
    "CHECKPOINT_NAME",
    "LAST_STATE",
    "SafetensorsIO",
    "check_finite",
    "check_no_bundle",
    "check_start",
    "has_begun",
    "load_checkpoint",
    "load_detector",
    "save_checkpoint",
    "save_detector",
]

CHECKPOINT_NAME = "checkpoint.safetensors"


def save_checkpoint(bundle: Path, net: KeypointNet, manifest: Manifest, *, half: bool = True) -> None:
    """Writes the weights and the manifest, whose `files` become this one file.

    Args:
        bundle: folder, made when it is not there.
        net: the network; its weights are copied, not changed.
        manifest: the contract and provenance to store.
        half: store matrices as fp16; what is loaded back is then rounded to fp16.
    """
    _save_weights(bundle, net.backbone, manifest, half)


def save_detector(bundle: Path, net: DetectorNet, manifest: DetectorManifest) -> None:
    """Writes a face detector's weights, matrices as fp16, and its manifest, as `save_checkpoint`."""
    _save_weights(bundle, net, manifest, half=True)


def _save_weights(bundle: Path, net: nn.Module, manifest: Manifest, half: bool) -> None:
    tensors = _stored(net, half)
    bundle.mkdir(parents=True, exist_ok=True)
    _save_tensors(tensors, bundle / CHECKPOINT_NAME, {"spec": json.dumps(dataclasses.asdict(manifest.spec))})
    entry = file_entry(bundle / CHECKPOINT_NAME, "checkpoint", precision="fp16" if half else "fp32")
    manifest.with_files({CHECKPOINT_NAME: entry}).write(bundle)


def _stored(net: nn.Module, half: bool) -> dict[str, Tensor]:
    """Weights and batch norm's statistics as they are written."""
    return {
        name: (value.half() if half and value.ndim > 1 else value.float()).contiguous().cpu()
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def load_checkpoint(path: Path) -> tuple[KeypointNet, Manifest]:
    """Reads a checkpoint: a bundle's folder or the `checkpoint.safetensors` in it.

    Returns:
        The network in evaluation mode, float32, on the CPU; and the bundle's manifest.

    Raises:
        BundleError: no bundle there, or the weights are of another network.
        IntegrityError: the file is cut off or not the one in the manifest.
    """
    bundle = path if path.is_dir() else path.parent
    if not path.exists():
        raise BundleError(f"there is no checkpoint at {path}; give a bundle's folder or its {CHECKPOINT_NAME}")
    if not path.is_dir() and path.name != CHECKPOINT_NAME:
        raise BundleError(f"{path} is no checkpoint: a checkpoint is a bundle's folder or its {CHECKPOINT_NAME}")
    manifest = Manifest.read(bundle)
    if CHECKPOINT_NAME not in manifest.files:
        raise BundleError(
            f"the bundle {bundle} has no file {CHECKPOINT_NAME}: take the one that it was packed from, or pack with "
            f"--checkpoint; kp eval {shlex.quote(str(bundle))}/FILE measures a model file without it"
        )
    file = manifest.check_file(bundle, CHECKPOINT_NAME)
    config = manifest.training.get("config", {})
    reduce = config.get("reduce", 1) if isinstance(config, dict) else None
    if type(reduce) is not int or reduce < 1 or manifest.spec.size % reduce:
        raise BundleError(f"{bundle}: the manifest's training config needs a reduce that divides the crop's size")
    scores = manifest.spec.lost_limit is not None
    net = KeypointNet(manifest.spec.size, reduce, manifest.spec.points, scores=scores)
    more = " and a lost score" if scores else ""
    _load_weights(net.backbone, file, f"a one-channel ResNet-18 with {2 * net.points} outputs{more}")
    return net.eval(), manifest


def load_detector(bundle: Path) -> tuple[DetectorNet, DetectorManifest]:
    """Reads a face detector's checkpoint from its bundle's folder.

    Returns:
        The network in evaluation mode, float32, on the CPU; and the bundle's manifest.

    Raises:
        BundleError: no detector's bundle there, or the weights are of another network.
        IntegrityError: the file is cut off or not the one in the manifest.
    """
    manifest = DetectorManifest.read(bundle)
    net = DetectorNet()
    _load_weights(net, manifest.check_file(bundle, CHECKPOINT_NAME), "this release's face detector")
    return net.eval(), manifest


def _load_weights(net: nn.Module, file: Path, what: str) -> None:
    try:
        tensors = {name: value.float() for name, value in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{file} is cut off or no safetensors file ({error})") from error
    wanted = {k: v.shape for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = {k: v.shape for k, v in tensors.items()}
    if found != wanted:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise BundleError(
            f"{file} holds another network: {len(odd)} tensors differ from {what}, "
            f"the first is {odd[0]} ({_shape(found, odd[0])} instead of {_shape(wanted, odd[0])})"
        )
    net.load_state_dict(tensors, strict=False)


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return "x".join(map(str, shapes[name])) if name in shapes else "nothing"


def _save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with writing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)  # of more than one entry the order, and so the bytes, is by chance
            temporary.chmod(0o644)  # safetensors writes for the owner alone
        except SafetensorError as error:  # what a full disk is to safetensors
            raise OSError(str(error)) from error


LAST_STATE = Path("state", "last.state")
"""The training state that a run goes on from, in the run's folder."""


def has_begun(run: Path) -> bool:
    """Whether a run has a state to go on from; one that was killed while it wrote has the one before."""
    last = run / LAST_STATE
    return last.exists() or last.with_name(f"{last.name}.old").exists()


def check_start(run: Path, resume: bool) -> None:
    """Checks that a run can begin in this folder, or go on where `resume`.

    Raises:
        KpError: nothing to resume, or another run is there.
    """
    begun = has_begun(run)
    if resume and not begun:
        raise KpError(f"there is nothing to resume in {run}: it has no {LAST_STATE}; leave out --resume")
    if not resume and begun:
        raise KpError(f"{run} already holds a run; add --resume to go on with it, or name another folder with --out")
    if not resume:
        check_no_bundle(run)


def check_no_bundle(out: Path) -> None:
    """Checks that a folder can take a new bundle: none is there, and it can be written.

    Weights alone are no bundle where a write that was killed before the manifest left them.

    Raises:
        KpError: a bundle is there, packed or not; or the folder can't be made.
    """
    if (out / MANIFEST_NAME).exists() or ((out / CHECKPOINT_NAME).exists() and not _is_ours(out / CHECKPOINT_NAME)):
        raise KpError(f"{out} already holds a bundle; name another folder with --out")
    make_folder(out)


def _is_ours(weights: Path) -> bool:
    try:
        with safe_open(weights, "pt") as tensors:
            return "spec" in (tensors.metadata() or {})
    except (SafetensorError, OSError):
        return False


def check_finite(net: nn.Module, lr: float) -> None:
    """Checks what a run ended with, as it would be stored: matrices as fp16.

    Raises:
        KpError: a weight, or a statistic of batch norm, is infinite or not a number; the advice names the run's
            learning rate.
    """
    if not all(bool(torch.isfinite(value).all()) for value in _stored(net, half=True).values()):
        raise KpError(f"the trained weights are not finite; lower --lr (was {lr:g}) and train again")


class SafetensorsIO(CheckpointIO):
    """Lightning's training states as a folder of safetensors and JSON."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the state beside its place, then moves it there; the old one stays until then."""
        target = Path(path)
        fresh, old = target.with_name(target.name + ".new"), target.with_name(target.name + ".old")
        tensors: dict[str, Tensor] = {}
        tree = _pack(checkpoint, tensors)
        if old.exists() and not target.exists():
            os.replace(old, target)  # a run that was killed between the two moves below
        for stale in (fresh, old):
            shutil.rmtree(stale, ignore_errors=True)
        write_file(fresh / "tree.json", json.dumps(tree))
        _save_tensors(tensors, fresh / "tensors.safetensors", {"format": "pt"})
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
        shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a state; a run killed between the two moves has it under the name `.old`."""
        target = Path(path)
        if not target.exists():
            target = target.with_name(target.name + ".old")
        try:
            tree = json.loads((target / "tree.json").read_text(encoding="utf-8"))
            # read, not mapped: an optimiser keeps these tensors, and NFS the folder of a file that is mapped
            state = _unpack(tree, load((target / "tensors.safetensors").read_bytes()))
        except (OSError, ValueError, SafetensorError) as error:
            raise BundleError(f"there is no training state to resume from at {path}: {str(error)[:200]}") from error
        except (KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
            raise BundleError(f"the training state at {path} is damaged ({error!r:.200}); train again") from error
        if not isinstance(state, dict):
            raise BundleError(f"the training state at {path} is damaged: it is no tree of values; train again")
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a state's folder."""
        shutil.rmtree(path, ignore_errors=True)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree of dicts, lists, tuples, numbers and tensors as JSON; tensors go into `tensors`."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key, "channels_last": value.ndim == 4 and not value.is_contiguous()}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a training state can't hold a {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, inner), *_ = value.items()
    if kind == "tensor":  # a fused optimiser walks the memory: its moments must lie as their weights do
        return tensors[inner].to(memory_format=torch.channels_last) if value["channels_last"] else tensors[inner]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in inner}
    items = [_unpack(item, tensors) for item in inner]
    return tuple(items) if kind == "tuple" else items
