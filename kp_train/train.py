"""Training on Lightning: the module, and `train`, the one entry."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
)
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kp_runtime.errors import DataError, InputError, KpError, reason_of
from kp_runtime.files import sha256_of_file, write_file
from kp_runtime.labelled_face import as_text
from kp_runtime.manifest import MANIFEST_NAME, Manifest
from kp_runtime.scheme68 import POINTS
from kp_runtime.spec import ModelSpec
from kp_train.augment import augment_from_name, mirror_from_pairs
from kp_train.callbacks import EpochLines, FacesPicture, StateKeeper, Together
from kp_train.checkpoint import (
    CHECKPOINT_NAME,
    LAST_STATE,
    SafetensorsIO,
    check_finite,
    check_start,
    has_begun,
    load_checkpoint,
    save_checkpoint,
)
from kp_train.config import TrainConfig, has_bfloat16
from kp_train.data import Face, Source, evenly_spread
from kp_train.dataset import FaceDataset, check_memory, is_stop, same_photos
from kp_train.label_bias import source_biases, with_bias
from kp_train.loaders import Loaders, SourceSampler
from kp_train.metrics import nme_unit
from kp_train.model import KeypointNet, load_backbone_weights
from kp_train.run_record import (
    ancestry,
    check_licence,
    learned_whole,
    least_held_out,
    may_have_seen,
    run_record,
    split_by_person,
    stored_record,
)
from kp_train.teachers import Teachers, load_teachers, reduced

__all__ = ["train"]


class KeypointModule(L.LightningModule):
    """The network with its loss, optimiser and validation measures."""

    def __init__(self, config: TrainConfig, teachers: Teachers) -> None:
        super().__init__()
        self.config = config
        self.teachers = teachers  # no module of this one: they are neither trained nor saved with it
        self.net = KeypointNet(config.size, config.reduce, config.points).to(memory_format=torch.channels_last)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of `(crops, xy_crop)`."""
        crops, xy = batch
        target = self.teachers.target(crops, self.net.encode(xy))
        loss = F.smooth_l1_loss(self.net.raw(reduced(crops, self.net.size)).float(), target, beta=self.config.beta)
        size = len(crops)
        self.log("train_loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and NME of held-out faces; boxes from their keypoints, no augmentation."""
        crops, xy = batch
        raw = self.net.raw(crops)
        loss = F.smooth_l1_loss(raw.float(), self.net.encode(xy), beta=self.config.beta)
        unit = torch.from_numpy(nme_unit(xy.cpu().numpy())).to(xy)
        nme = (self.net.decode(raw.float()) - xy).norm(dim=-1).mean(dim=1) / unit
        values = {"val_loss": loss, "val_nme": nme.mean()}
        self.log_dict(values, prog_bar=True, batch_size=len(crops), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam at a constant rate, or AdamW on a one-cycle schedule (Smith and Topin 2018)."""
        config = self.config
        if config.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=config.lr)
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=config.lr,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=config.warmup,
            final_div_factor=1e3,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    sources: Sequence[Source],
    config: TrainConfig,
    run: Path,
    *,
    name: str = "resnet18-68",
    weights: str = "auto",
    init: Path | None = None,
    teachers: Sequence[Path] = (),
    licence: Mapping[str, str] | None = None,
    resume: bool = False,
    devices: str = "auto",
    accelerator: str = "auto",
    strategy: str = "auto",
    workers: int = 1,
    picture_every: int = 5,
    progress: bool = True,
) -> Path:
    """Trains a network and writes its checkpoint, averaged weights of the best epoch or of the last (`config.keep`).

    Args:
        sources: labelled faces, mixed by their weights.
        config: the run's settings.
        run: folder of the run; becomes a bundle with the checkpoint, beside `state/` (to
            resume), `pictures/` and TensorBoard's curves.
        name: the model's name in its contract.
        weights: where the backbone starts, see `load_backbone_weights`.
        init: a checkpoint to start from instead.
        teachers: models to learn from beside the labels, see `Teachers`.
        licence: terms of the `weights`, the `data` and the `code`, for the manifest. What is learned from other models
            stays under theirs.
        resume: go on from `run/state/last`. Below torchrun a run that has begun always goes on. A run that is
            finished is left as it is, with what was exported and measured since.
        devices: as Lightning takes them: `auto`, a number, a list. torchrun says it by its processes.
        accelerator: `auto`, `cpu`, `gpu`; on Apple silicon `cpu` alone.
        strategy: Lightning's, such as `ddp`.
        workers: processes that make crops, for each device.
        picture_every: epochs between two pictures of held-out faces.
        progress: show a progress bar; without it, a line an epoch.

    Returns:
        The path of the checkpoint, which the first worker writes.

    Raises:
        DataError: no faces to train or to validate on.
        KpError: `run` holds another run, nothing to resume, the workers do not fit together, or the run
            was interrupted (its message says how to go on).
    """
    last = run / LAST_STATE
    elastic = torch.distributed.is_torchelastic_launched()
    resume = resume or (elastic and has_begun(run))
    if init is not None and weights not in ("auto", "none"):
        raise InputError(f"a run begins at --init {init} or at --weights {weights}; leave one out")
    trainer = _trainer(config, run, devices, accelerator, strategy, progress)
    device = trainer.strategy.root_device.type
    if device == "mps":  # pytorch/pytorch#175189: BatchNorm's gradients in channels_last, as here, were silently wrong
        raise InputError("training was not tried on Apple's GPU; give --accelerator cpu")
    on_cpu = device == "cpu"
    if on_cpu and config.precision == "16-mixed":  # Lightning would take bf16-mixed, and the record would not say so
        raise InputError("--precision 16-mixed is for GPUs; on this processor give bf16-mixed or 32-true")
    if on_cpu and config.precision.startswith("bf16") and has_bfloat16() is False and trainer.is_global_zero:
        print(f"this processor has no bfloat16: {config.precision} is far slower on it than 32-true", flush=True)
    L.seed_everything(config.seed, workers=True, verbose=False)
    spec = ModelSpec(
        name, config.size, config.margin, config.box, config.points, "ibug68" if config.points == POINTS else "own"
    )
    taught = load_teachers(teachers, spec)
    mirror = mirror_from_pairs(config.pairs, config.points)
    training, held_out = split_by_person(sources, config)
    sampler = SourceSampler([len(p) for p in training], [s.weight for s in sources], config.seed)
    _check_draws(sampler, sources, training, trainer.world_size)
    check_start(run, resume)  # it makes the folder, which data that are refused do not leave behind
    augment = augment_from_name(config.augment, mirror)
    order = mirror if augment and augment.mirror else None
    train_set = FaceDataset([f for part in training for f in part], spec, augment, detail=taught.size // spec.size)
    val_set = FaceDataset(held_out, spec)

    module = KeypointModule(config, taught)
    if resume:
        record = stored_record(run, sources, config)
        config = dataclasses.replace(config, ema=record["config"].get("ema"))
        _check_resumed(run, record, name, weights, init, taught, trainer.world_size)
        check_licence(run, record, licence or {})
        if (run / MANIFEST_NAME).exists():  # written last
            if trainer.is_global_zero:
                print(f"the run in {run} is finished", flush=True)
            return run / CHECKPOINT_NAME
    else:
        config = config.resolved(config.epochs * max(1, len(sampler) // trainer.world_size // config.batch_size))
        start, before = _start_weights(module.net, train_set, weights, init)
        record = {"name": name, "devices": trainer.world_size}
        record |= run_record(sources, training, held_out, config, start)
        older = ancestry(record)[1:]
        new_to_it = learned_whole(sources, older)  # people whom the start never saw, trained on now or not
        learned_from = zip(teachers, (each["runs"] for each in taught.records), strict=True)
        for model, runs in [(init, older)] * bool(older) + list(learned_from):
            if may_have_seen(runs, sources, config.val_fraction) and trainer.is_global_zero:
                print(f"{model} may have seen people whom this run holds out: their NME flatters it", flush=True)
        if trainer.is_global_zero and (both := same_photos(val_set, train_set)):
            pair = " and ".join(str(face.image) for face in both[0])
            what = f"photos are held out and, by another name, trained on: {len(both)} of {len(held_out)}"
            print(f"{what}, as {pair}; remove one of each, the NME flatters", flush=True)
        if taught.records:
            record["teachers"] = list(taught.records)
        record["start"] |= _licence(start, taught, licence or {})
        if before is not None and _sees_alike(before[1], spec):
            theirs = dataclasses.replace(spec, size=before[1].size)  # crops of another size it may not read yet
            biases = source_biases(before[0], new_to_it, least_held_out(older), theirs, order, older)
            for source, bias in zip(record["sources"], biases, strict=True):
                source["label_bias"] = bias if bias is None else bias.tolist()
        if trainer.is_global_zero:
            shutil.rmtree(last.parent, ignore_errors=True)  # of a run that was killed in its first epoch
            run.mkdir(parents=True, exist_ok=True)
            write_file(run / "run.json", json.dumps(record, indent=2) + "\n")
    noted = [source.get("label_bias") for source in record["sources"]]
    biases = [None if bias is None else np.array(bias) for bias in noted]
    train_set.faces = [f for part, bias in zip(training, biases, strict=True) for f in with_bias(part, bias)]
    if trainer.is_global_zero:
        seen, others = (
            f"{len(faces)} faces of {len({face.person for face in faces})} people"
            for faces in (train_set.faces, held_out)
        )
        count = trainer.world_size
        many = f"; {count} devices, {count * config.batch_size} faces a step" if count > 1 else ""
        decay = f"decay of the weight averaging {config.ema or 0:.4g}"
        print(f"{seen} to train on, {others} held out{many}; {decay}", flush=True)
        _print_biases(sources, biases, "mirrored faces keep to that")
    callbacks: list[Callback] = [FacesPicture(val_set, run / "pictures", picture_every)]
    if config.ema:  # behind the pictures, as it takes its weights out again when validation ends
        # before the network is moved there, and Lightning would leave the averaged one where the network is now
        callbacks.append(EMAWeightAveraging(trainer.strategy.root_device, decay=config.ema))
    trainer.callbacks[:0] = callbacks  # type: ignore[attr-defined]
    data = [(source.sha256, source.weight, source.whole) for source in sources]
    beginning = {"settings": dataclasses.asdict(config), "data": data, "teachers": taught.records, "state": resume}
    together = Together(beginning, resume)
    trainer.callbacks.append(together)  # type: ignore[attr-defined]
    loaders = Loaders(train_set, val_set, sampler, config.batch_size, workers)
    try:
        trainer.fit(module, datamodule=loaders, ckpt_path=str(last) if resume else None)
    except (SystemExit, KeyboardInterrupt, KeyError, RuntimeError) as error:
        if is_stop(error):
            place = f"training stopped in epoch {trainer.current_epoch + 1} of {config.epochs}"
            if not has_begun(run):
                raise KpError(f"{place}, before the first state was saved: start it again") from error
            how = "the same command" if elastic else "the same command with --resume"
            raise KpError(f"{place}; nothing is lost up to the last whole epoch: {how} goes on") from error
        check_memory(error, config.batch_size)
        if trainer.world_size > 1 and any(library in str(error) for library in ("gloo", "NCCL")):
            raise KpError(f"worker {trainer.global_rank} lost touch with another one ({error!s:.120}…)") from error
        if resume and not together.begun:
            raise KpError(
                f"the training state at {last} does not fit this release ({error!s:.200}); go on with the one that "
                "began the run, or begin a new run with another --out"
            ) from error
        raise
    if trainer.is_global_zero:
        state = last if config.keep == "last" else last.with_name("best.state")
        net = _write_checkpoint(state, run, spec, record, together.measured)
        if any("label_bias" not in source for source in record["sources"]):  # nothing could tell before
            what = f"this run's mirrored faces did not keep to that, a run with --init {run} will"
            unseen = least_held_out(ancestry(record))
            _print_biases(sources, source_biases(net, sources, unseen, spec, order), what)
    return run / CHECKPOINT_NAME


def _trainer(
    config: TrainConfig, run: Path, devices: str, accelerator: str, strategy: str, progress: bool
) -> L.Trainer:
    """Lightning's trainer, made first: what it does not understand fails before an image is read."""
    states = (run / LAST_STATE).parent
    best = StateKeeper(states, "best", monitor="val_loss", enable_version_counter=False)
    newest = StateKeeper(states, LAST_STATE.stem, every_n_epochs=1, save_top_k=1, enable_version_counter=False)
    for callback in (best, newest):
        callback.FILE_EXTENSION = LAST_STATE.suffix
    each, nodes = _devices_and_nodes(devices)
    callbacks: list[Callback] = [best, newest, LearningRateMonitor("step")]
    if not progress:
        callbacks.append(EpochLines())
    if config.patience:
        callbacks.append(EarlyStopping("val_loss", patience=config.patience))
    plugins: list[Any] = [SafetensorsIO()]
    try:
        if SLURMEnvironment.detect() and not torch.distributed.is_torchelastic_launched():
            plugins.append(SLURMEnvironment(auto_requeue=False))  # of its own, it saves a state that --resume ignores
        return L.Trainer(
            default_root_dir=run,  # below SLURM, states in it are gone on from unasked: a new run's has none
            accelerator=accelerator,
            devices=each,
            num_nodes=nodes,
            strategy=strategy,
            use_distributed_sampler=False,  # see Loaders
            precision=config.precision,  # type: ignore[arg-type]
            max_epochs=config.epochs,
            callbacks=callbacks,
            logger=TensorBoardLogger(run, name=None, version="curves"),
            plugins=plugins,
            enable_progress_bar=progress,
            enable_model_summary=False,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise KpError(
            f"Lightning refuses accelerator {accelerator}, devices {devices}, strategy {strategy}, "
            f"precision {config.precision}: {reason_of(error)}"
        ) from error


def _devices_and_nodes(devices: str) -> tuple[int | str, int]:
    """Devices of each node, and nodes: torchrun's, where it started this process."""
    if not torch.distributed.is_torchelastic_launched():
        return int(devices) if devices.isdigit() else devices, 1
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if devices not in ("auto", str(here)):
        raise KpError(f"torchrun started {here} processes on this node, one a device; leave out --devices {devices}")
    return here, everywhere // here


def _check_resumed(
    run: Path, record: dict[str, Any], name: str, weights: str, init: Path | None, taught: Teachers, devices: int
) -> None:
    """Refuses to go on under another name, from other weights, with other teachers, or on more or fewer devices."""
    if (began_on := record.get("devices", devices)) != devices:  # a run that an older release began has none
        raise KpError(
            f"the run in {run} began on {began_on} devices, and its schedule counts their steps; give it as many, "
            f"not {devices}"
        )
    began_with = [each["sha256"] for each in record.get("teachers", [])]  # an older release noted no runs of theirs
    if began_with != [each["sha256"] for each in taught.records]:
        raise KpError(f"the run in {run} began with other teachers; give the same ones")
    if (began := record.get("name", name)) != name:
        raise KpError(f"the run in {run} began with --name {began}; give the same one")
    if weights != "auto" and not _began_at(weights, record["start"]):
        raise KpError(f"the run in {run} began at other weights than {weights}; leave --weights out")
    if init is not None:
        _, manifest = load_checkpoint(init)
        if manifest.files[CHECKPOINT_NAME].sha256 != record["start"].get("checkpoint_sha256"):
            raise KpError(f"the run in {run} began at other weights than {init}; leave --init out")


def _began_at(weights: str, start: dict[str, Any]) -> bool:
    """Whether a run's start is of these weights: by their content, or by their name where there is none to compare."""
    if "weights_sha256" in start and Path(weights).is_file():
        return bool(sha256_of_file(Path(weights)) == start["weights_sha256"])
    return bool(as_text(Path(weights).name) == start.get("weights", "none"))


def _check_draws(
    sampler: SourceSampler, sources: Sequence[Source], training: Sequence[Sequence[Face]], workers: int
) -> None:
    """Refuses weights that draw too few faces for all workers, or none of a source's."""
    if len(sampler) < workers:
        raise DataError(
            f"the weights draw {len(sampler)} faces in an epoch for {workers} workers; "
            "give larger ones behind --data, or more faces"
        )
    for source, part, draws in zip(sources, training, sampler.draws, strict=True):
        if not draws:
            raise DataError(
                f"{source.path} has {len(part)} faces to train on, of which the weight {source.weight:g} draws none; "
                "give a larger one, or leave it out"
            )


def _sees_alike(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two models are shown the same of a photo, and answer with the same points."""
    return (one.box, one.margin, one.points) == (other.box, other.margin, other.points)


def _start_weights(
    net: KeypointNet, faces: FaceDataset, weights: str, init: Path | None
) -> tuple[dict[str, Any], tuple[KeypointNet, ModelSpec] | None]:
    """Fills the network; returns what it started from, for the record, and the model of the checkpoint `init`."""
    if init is not None:
        other, manifest = load_checkpoint(init)
        state = other.backbone.state_dict()
        if other.points != net.points:  # its head is of another mark-up
            state = {name: value for name, value in state.items() if not name.startswith("fc.")}
            _start_from_mean(net, faces)
        net.backbone.load_state_dict(state, strict=False)
        sha256 = manifest.files[CHECKPOINT_NAME].sha256
        start = {"checkpoint_sha256": sha256, "points": other.points}
        last, *before = ancestry(manifest.training)
        kept = {"licence": manifest.licence, "training": last, "before": before}
        return start | kept, (other, manifest.spec)
    _start_from_mean(net, faces)
    return load_backbone_weights(net, weights), None


def _licence(start: dict[str, Any], taught: Teachers, given: Mapping[str, str]) -> dict[str, Any]:
    """That of the weights which a run began at and of its teachers, under which what is learned from them stays.

    Else the given one; for the record of the start, which has none where there is none.
    """
    licences = [known for known in (start.get("licence"), *taught.licences) if known]
    if odd := [licence for licence in licences if licence != licences[0]]:
        raise InputError(f"the licences of start and teachers differ: {licences[0]}, {odd[0]}; take models of one")
    if licences and given and given != licences[0]:
        raise InputError(f"what is learned from a model stays under its licence, {licences[0]}; leave --licence out")
    known = licences[0] if licences else dict(given)
    return {"licence": known} if known else {}


def _print_biases(sources: Sequence[Source], biases: Sequence[NDArray[np.float64] | None], what: str) -> None:
    for source, bias in zip(sources, biases, strict=True):
        if bias is not None:
            right = float(bias[:, 0].mean())
            where = f"{abs(right):.2%} of the crop to the {'right' if right > 0 else 'left'} of what they name"
            print(f"{source.path}: labels lie {where}; {what}", flush=True)


def _start_from_mean(net: KeypointNet, faces: FaceDataset) -> None:
    net.start_from_mean(torch.stack([faces[i][1] for i in evenly_spread(len(faces), 256)]).mean(dim=0))


def _write_checkpoint(
    state: Path, run: Path, spec: ModelSpec, record: dict[str, Any], measured: dict[str, float]
) -> KeypointNet:
    """Writes a state's (averaged) weights as the run's checkpoint, and returns the network."""
    content = SafetensorsIO().load_checkpoint(state)
    net = KeypointNet(spec.size, record["config"].get("reduce", 1), spec.points)
    net.load_state_dict({k.removeprefix("net."): v for k, v in content["state_dict"].items()})
    check_finite(net, record["config"]["lr"])
    kept = record["config"].get("keep", "best")  # a run that an older release began has none
    finite = {name: value for name, value in measured.items() if math.isfinite(value)}  # JSON has no other numbers
    record = record | {f"{kept}_epoch": int(content["epoch"]) + 1, "last_epoch_metrics": finite}
    # weights made from others stay under their licence; a run that an older release began does not know it
    save_checkpoint(run, net, Manifest(spec, training=record, licence=record["start"].get("licence", {})))
    return net
