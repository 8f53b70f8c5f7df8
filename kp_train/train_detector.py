"""Training of the face detector: a plain loop, since the network is trained in under an hour on one core.

What a step sees is decided by the seed and the step's number, and the state is kept every few hundred steps, so a run
that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from kp_runtime.errors import KpError
from kp_runtime.files import write_file
from kp_runtime.manifest import MANIFEST_NAME, DetectorManifest
from kp_runtime.spec import DetectorSpec
from kp_train.checkpoint import (
    CHECKPOINT_NAME,
    LAST_STATE,
    SafetensorsIO,
    check_finite,
    check_start,
    has_begun,
    save_detector,
)
from kp_train.config import DetectorConfig
from kp_train.data import Source
from kp_train.dataset import check_memory, is_stop, start_of_workers
from kp_train.detector_net import LEAST_PX, MOST_PX, STRIDE, DetectorNet, detector_loss
from kp_train.face_windows import Pictures, WindowDataset
from kp_train.run_record import check_known, check_licence, run_record, split_by_person, stored_record

__all__ = ["begun_config", "train_detector"]

VALIDATION_WINDOWS = 256


def train_detector(
    sources: Sequence[Source],
    pictures: Pictures,
    config: DetectorConfig,
    run: Path,
    *,
    name: str = "face-detector",
    licence: Mapping[str, str] | None = None,
    resume: bool = False,
    workers: int = 0,
    threads: int | None = None,
    keep_every: int = 200,
    say: Callable[[str], None] = print,
) -> Path:
    """Trains a detector and writes its checkpoint, the averaged weights of the last step.

    Args:
        sources: labelled faces, mixed by their weights.
        pictures: without a face.
        config: the run's settings.
        run: folder of the run; becomes a bundle with the checkpoint, beside `state/` (to resume).
        name: the detector's name in its contract.
        licence: terms of the `weights`, the `data` and the `code`, for the manifest.
        resume: go on from `run/state/last`; the number of steps may be another one, but no less than are done. A run
            that is finished is left as it is.
        workers: processes that make windows beside this one.
        threads: of PyTorch; its own choice when None.
        keep_every: steps between two states; each is told with the held-out loss.
        say: is told how the run goes.

    Raises:
        DataError: no faces to train or to validate on.
        KpError: `run` holds another run, nothing to resume, the run was interrupted, or the weights are not finite.
    """
    last = run / LAST_STATE
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(config.seed)
    training, held_out = split_by_person(sources, config)
    check_start(run, resume)  # it makes the folder, which data that are refused do not leave behind
    if resume:
        record = stored_record(run, sources, config, free=("steps",)) | {"config": dataclasses.asdict(config)}
        if record.get("pictures_sha256") != pictures.sha256:
            raise KpError(f"the run in {run} began with other pictures without faces; give the same --no-faces")
        if (began := record.get("name", name)) != name:  # a run that an older release began has none
            raise KpError(f"the run in {run} began with --name {began}; give the same one")
        check_licence(run, record, licence or {})
    else:
        start = {"licence": dict(licence)} if licence else {}
        record = {"name": name} | run_record(sources, training, held_out, config, start)
        record["pictures_sha256"] = pictures.sha256
    state = _State(config)
    if resume:
        state.load(SafetensorsIO().load_checkpoint(last))
        if state.step > config.steps:
            raise KpError(f"the run in {run} has done {state.step} steps; give --steps {state.step} or more")
        if (run / MANIFEST_NAME).exists():
            written = DetectorManifest.read(run)
            if written.spec.name != name:
                raise KpError(f"the run in {run} began with --name {written.spec.name}; give the same one")
            if written.training.get("config", {}).get("steps") == config.steps:  # it is written last
                say(f"the run in {run} is finished")
                return run / CHECKPOINT_NAME
    write_file(run / "run.json", json.dumps(record, indent=2) + "\n")

    faces = [face for part in training for face in part]
    weights = [source.weight for source, part in zip(sources, training, strict=True) for _ in part]
    windows = WindowDataset(faces, weights, pictures, config.seed, config.steps * config.batch_size)
    loader = DataLoader(
        windows,
        config.batch_size,
        sampler=range(state.step * config.batch_size, len(windows)),
        num_workers=workers,
        multiprocessing_context=start_of_workers(workers),
    )
    checks = WindowDataset(held_out, [1.0] * len(held_out), pictures, config.seed + 1, VALIDATION_WINDOWS)
    try:
        for batch in loader:
            state.learn(batch)
            if state.step % keep_every == 0 or state.step == config.steps:
                SafetensorsIO().save_checkpoint(state.content(), last)
                say(f"step {state.step}/{config.steps}  held-out loss {state.loss(DataLoader(checks, 64)):.4f}")
    except (KeyboardInterrupt, RuntimeError) as error:
        if is_stop(error):
            place = f"training stopped in step {state.step} of {config.steps}"
            if not has_begun(run):
                raise KpError(f"{place}, before the first state was saved: start it again") from error
            raise KpError(
                f"{place}; the same command with --resume goes on from the state that is kept every {keep_every} steps"
            ) from error
        check_memory(error, config.batch_size)
        raise
    return _write_checkpoint(state.mean_net, run, name, record)


def begun_config(run: Path) -> DetectorConfig:
    """The settings that the run in a folder began with; the default ones where none has begun."""
    try:
        began = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
        check_known(run, began, DetectorConfig)
        return dataclasses.replace(DetectorConfig(), **began)
    except FileNotFoundError:
        return DetectorConfig()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KpError(f"{run / 'run.json'} can't be read ({error}); begin a new run with another --out") from error


class _State:
    """The network, its average, the optimiser, and the number of steps done."""

    def __init__(self, config: DetectorConfig) -> None:
        self.config, self.step = config, 0
        self.net = DetectorNet().to(memory_format=torch.channels_last)
        self.averaged = AveragedModel(self.net, avg_fn=self._mean, use_buffers=True)
        groups = [
            {"params": [p for p in self.net.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)

    @property
    def mean_net(self) -> DetectorNet:
        """The network with averaged weights."""
        net = self.averaged.module
        assert isinstance(net, DetectorNet)
        return net

    def learn(self, batch: Sequence[Tensor]) -> None:
        """One step on a batch of `WindowDataset`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self.net.train()
        loss = self._loss(self.net, batch)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 10.0)
        self.optimizer.step()
        self.averaged.update_parameters(self.net)
        self.step += 1

    @torch.no_grad()
    def loss(self, batches: DataLoader[Any]) -> float:
        """The averaged network's mean loss."""
        self.averaged.eval()
        losses = [float(self._loss(self.mean_net, batch)) for batch in batches]
        return sum(losses) / len(losses)

    def _loss(self, net: DetectorNet, batch: Sequence[Tensor]) -> Tensor:
        windows, boxes, clean = batch
        return detector_loss(net.raw(windows), boxes, clean, doubt=self.step >= self.config.trust)

    def _mean(self, mean: Tensor, value: Tensor, count: Tensor | int) -> Tensor:
        """The moving average with one more value; a short one at first, which forgets the random weights."""
        decay = min(self.config.ema, (1 + int(count)) / (10 + int(count)))
        return mean * decay + value * (1 - decay)

    @property
    def _parts(self) -> dict[str, Any]:
        return {"net": self.net, "averaged": self.averaged, "optimizer": self.optimizer}

    def content(self) -> dict[str, Any]:
        """All of it, for a training state."""
        return {"step": self.step} | {name: part.state_dict() for name, part in self._parts.items()}

    def load(self, content: dict[str, Any]) -> None:
        """Takes a stored state.

        Raises:
            KpError: it is another network's.
        """
        try:
            self.step = int(content["step"])
            for name, part in self._parts.items():
                part.load_state_dict(content[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise KpError(f"the training state is not this network's ({str(error)[:200]}); train again") from error


def _write_checkpoint(net: DetectorNet, run: Path, name: str, record: dict[str, Any]) -> Path:
    check_finite(net, record["config"]["lr"])
    spec = DetectorSpec(name=name, stride=STRIDE, least_px=LEAST_PX, most_px=MOST_PX)
    licence = record["start"].get("licence", {})
    save_detector(run, net, DetectorManifest(spec=spec, training=record, licence=licence))
    return run / CHECKPOINT_NAME
