"""What a worker sees in an epoch: its share of the draws, and of the held-out faces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from kp_train.dataset import FaceDataset, start_of_workers

__all__ = ["Loaders", "SourceSampler", "held_out_batches"]


class SourceSampler(Sampler[tuple[int, int]]):
    """Draws each source's faces `weight` times an epoch: whole passes, then a random part.

    Yields `(index, seed)`. The order and the seeds of the augmentation are functions of the run's
    seed and the epoch, so a resumed run sees the crops that an uninterrupted one would have seen.
    Of several workers each takes every `ranks`-th draw: a step of all sees what a step of one
    worker with a batch of that size sees.

    Args:
        counts: faces of each source.
        weights: how often a source's faces are drawn in an epoch.
        seed: of the run.
        rank: this worker's number.
        ranks: how many there are; all get as many draws, so up to `ranks - 1` are left out.
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float], seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self.counts, self.weights, self.seed, self.epoch = counts, weights, seed, 0
        self.draws = [round(n * w) for n, w in zip(counts, weights, strict=True)]
        self.rank, self.ranks = rank, ranks

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells the epoch before it begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.draws) // self.ranks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        drawn, start = [], 0
        for count, weight, draws in zip(self.counts, self.weights, self.draws, strict=True):
            passes = math.ceil(weight)
            order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
            drawn.append(order[:draws] + start)
            start += count
        indices = torch.cat(drawn)
        indices = indices[torch.randperm(len(indices), generator=generator)]
        seeds = torch.randint(1 << 62, indices.shape, generator=generator)
        mine = slice(self.rank, len(self) * self.ranks, self.ranks)
        yield from zip(indices[mine].tolist(), seeds[mine].tolist(), strict=True)


def held_out_batches(count: int, batch_size: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """A worker's share of the held-out faces in batches.

    All workers have the same number of batches, because each one waits for the others'; shares differ by
    one face at most, so a batch may be one face over `batch_size`. Fewer faces than workers: each takes all.
    """
    if count < ranks:
        rank, ranks = 0, 1
    batches = min(math.ceil(count / (ranks * batch_size)), count // ranks)
    return [part.tolist() for part in np.array_split(np.arange(rank, count, ranks), batches)]


class Loaders(L.LightningDataModule):
    """Each worker's share of both data sets; made when Lightning knows the workers."""

    def __init__(
        self, train_set: FaceDataset, val_set: FaceDataset, sampler: SourceSampler, batch_size: int, workers: int
    ) -> None:
        super().__init__()
        self.train_set, self.val_set, self.sampler = train_set, val_set, sampler
        self.batch_size, self.workers = batch_size, workers

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Faces as the sampler draws them."""
        self.sampler.rank, self.sampler.ranks = self._place()
        return DataLoader(
            self.train_set,
            self.batch_size,
            sampler=self.sampler,
            drop_last=len(self.sampler) >= self.batch_size,
            num_workers=self.workers,
            multiprocessing_context=start_of_workers(self.workers),
            persistent_workers=self.workers > 0,
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Held-out faces, each once over all workers."""
        batches = held_out_batches(len(self.val_set), self.batch_size, *self._place())
        return DataLoader(self.val_set, batch_sampler=batches, num_workers=0)

    def _place(self) -> tuple[int, int]:
        assert self.trainer is not None  # Lightning has set it
        return self.trainer.global_rank, self.trainer.world_size
