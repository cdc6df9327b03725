"""Data parallelism: several processes, each with its share of every step's rows.

Started by `torchrun` or `accelerate launch`, which set RANK, LOCAL_RANK and WORLD_SIZE; a single process otherwise.
How the processes hold the model is a strategy of `sharding`. All of these average gradients over processes, while the
loss is divided by the global count, so it is multiplied by the number of processes before its backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from logitless.training.sharding import Copies, strategy_of_launch

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    strategy: Copies = field(default_factory=Copies)  # how it holds the model

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def gather(self, tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The tensors of every process, on the CPU, in the order of their ranks."""
        if self.size == 1:
            return [tensors]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, {name: tensor.cpu() for name, tensor in tensors.items()})
        return gathered

    def share(self, batches: Sequence[_Item]) -> list[tuple[_Item, bool]]:
        """This process's batches, as many as every process has: one that has fewer reads the first, uncounted.

        Sharded weights are put together by all processes at once, so that all must run the model equally often.
        """
        own = [(batch, True) for batch in batches[self.rank :: self.size]]
        return own + [(batches[0], False)] * (-(-len(batches) // self.size) - len(own))

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()


def start(use_cpu: bool) -> World:
    """Joins the processes that the launcher started, if any, and picks this one's device.

    Raises:
        InputError: the launcher asks for a way of sharding that is not served.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    on_gpu = torch.cuda.is_available() and not use_cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    strategy = strategy_of_launch(use_cpu)
    if (size > 1 or strategy.shards) and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return World(rank, size, device, strategy)


def stop(world: World) -> None:
    """Leaves the group of processes that `start` joined."""
    world.strategy.leave()
    if (world.size > 1 or world.strategy.shards) and dist.is_initialized():
        dist.destroy_process_group()
