"""What a training run does beside learning: workers that begin alike, pictures of held-out faces, lines for a log."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torchvision.utils import draw_keypoints, make_grid, save_image

from kp_runtime.errors import KpError
from kp_train.data import evenly_spread
from kp_train.dataset import FaceDataset

__all__ = ["EpochLines", "FacesPicture", "StateKeeper", "Together"]

_CELL = 224
"""Smaller crops are shown enlarged to at least so many pixels: points can't be told apart on less."""


class Together(Callback):
    """Sees to it that all workers begin alike, and that a resumed run goes on where it was and ends as it would have.

    Args:
        beginning: what must be the same for all: settings, data, and whether the run goes on.
        resume: whether it does.

    Attributes:
        begun: whether the training has, so that a stored state was taken.
        measured: in the newest epoch, by name.
    """

    def __init__(self, beginning: dict[str, Any], resume: bool) -> None:
        self.beginning, self.resume, self.begun = beginning, resume, False
        self.measured: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares with the first worker."""
        if self.beginning != (first := trainer.strategy.broadcast(self.beginning)):
            odd = ", ".join(key for key in first if first[key] != self.beginning.get(key))
            raise KpError(
                f"worker {trainer.global_rank} begins otherwise than worker 0 ({odd}); give every node the same "
                "command, the same data, and a folder for --out that all nodes share"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the epoch that a resumed run goes on with."""
        self.begun = True
        if torch.distributed.is_torchelastic_launched():
            # torchrun ends the workers that are left when one is lost. Lightning would have them wait for each other
            # first, and so for the lost one.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.resume and trainer.is_global_zero:
            print(f"goes on after epoch {trainer.current_epoch} of {trainer.max_epochs}", flush=True)
        # Lightning keeps how long there was no better epoch, and not that it was too long
        trainer.should_stop |= any(c.wait_count >= c.patience for c in trainer.early_stopping_callbacks)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps what was measured: a run that has no epoch left to go on with measures nothing."""
        checkpoint["measured"] = self.measured = {k: float(v) for k, v in trainer.callback_metrics.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes it from a stored state; one of an earlier release has none.

        The sampler learns of the epoch here: Lightning tells it once it has begun, and by then workers of its loader
        have fetched what they give first.
        """
        self.measured = checkpoint.get("measured", {})
        trainer.datamodule.sampler.set_epoch(checkpoint["epoch"] + 1)  # type: ignore[attr-defined]


class StateKeeper(ModelCheckpoint):
    """Lightning's keeper of states, whose folder may have been moved before a run goes on.

    Lightning's own forgets the best state then, and overwrites it with the next one.
    """

    @property
    def state_key(self) -> str:
        """As Lightning's own, under which runs of earlier releases have stored it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the paths in a stored state for those of the same files in the folder of today."""
        assert self.dirpath is not None

        def here(path: str) -> str:
            return str(Path(str(self.dirpath), Path(path).name)) if path else path

        moved = {key: here(path) for key, path in state_dict.items() if key.endswith("_model_path")}
        kept = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"best_k_models": kept, "dirpath": self.dirpath})


class FacesPicture(Callback):
    """Every few epochs, a sheet of held-out faces with truth (green) and the smaller prediction (red) on top."""

    def __init__(self, faces: FaceDataset, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        items = [faces[i] for i in evenly_spread(len(faces), 32)]
        self.crops = torch.stack([crop for crop, _ in items])
        self.xy = torch.stack([xy for _, xy in items])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws after the validation of every `every`-th epoch, while the averaged weights are in."""
        epoch = trainer.current_epoch + 1
        if not trainer.is_global_zero or epoch % self.every:
            return
        predicted = pl_module.net(self.crops.to(pl_module.device)).cpu()  # type: ignore[operator]
        # those of a run that leaves all measure can't be drawn; it is told of that when it ends
        predicted = predicted.nan_to_num(nan=-9).clamp(-9, 2 * self.crops.shape[-1])
        cells, times = [], -(-_CELL // self.crops.shape[-1])
        crops = self.crops.repeat_interleave(times, 2).repeat_interleave(times, 3)
        truths, guesses = ((xy + 0.5) * times - 0.5 for xy in (self.xy, predicted))
        for crop, truth, guess in zip(crops, truths, guesses, strict=True):
            cell = draw_keypoints(crop.expand(3, -1, -1), truth[None], colors="lime", radius=3)
            cells.append(draw_keypoints(cell, guess[None], colors="red", radius=1))
        sheet = make_grid(torch.stack(cells), nrow=8)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_image(sheet.float() / 255, self.folder / f"faces_epoch_{epoch:03d}.png")
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_image("held-out faces", sheet, epoch)


class EpochLines(Callback):
    """One line an epoch, for logs: what the progress bar shows on a terminal."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the loss of the training faces, and the loss and the NME of the held-out ones."""
        if trainer.is_global_zero:
            names = ("train_loss", "val_loss", "val_nme")
            train_loss, loss, nme = (float(trainer.callback_metrics[name]) for name in names)
            place = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            print(f"{place}  train loss {train_loss:.5f}, held-out loss {loss:.5f}, NME {nme:.2%}", flush=True)
