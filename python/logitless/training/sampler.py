"""The order of a run's data: which units each optimizer step reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampler:
    """Units (items or packs) of each optimizer step, a pure function of the step, so that a run can resume.

    Args:
        units: how many there are.
        batch_size: units per micro-batch.
        accumulation: micro-batches per step and process.
        seed: of the order, which is another one in every epoch.
        rank, world: this process and how many there are; each reads every `world`-th micro-batch.
    """

    units: int
    batch_size: int
    accumulation: int
    seed: int
    rank: int = 0
    world: int = 1

    @property
    def units_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left, however few."""
        return -(-self.units // self.units_per_step)

    def order(self, epoch: int) -> list[int]:
        """The units of an epoch in the order in which they are read."""
        return list(_order(self.units, self.seed, epoch))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Unit indices of each micro-batch that this process reads in optimizer step `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.units, self.seed, epoch)
        units = list(order[within * self.units_per_step : (within + 1) * self.units_per_step])
        batches = [units[i : i + self.batch_size] for i in range(0, len(units), self.batch_size)]
        # every process must run equally often, or the others wait for it: the epoch's last step borrows from its start
        missing = -len(batches) % self.world
        batches += [list(order[i * self.batch_size : (i + 1) * self.batch_size]) for i in range(missing)]
        return batches[self.rank :: self.world]


@functools.lru_cache(maxsize=2)
def _order(units: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of range(units); kept, since every step of an epoch asks for it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(units, generator=generator).tolist())
