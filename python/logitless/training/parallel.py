"""Data parallelism: several processes, each with a copy of the model and its share of every step's rows.

Started by `torchrun` or `accelerate launch`, which set RANK, LOCAL_RANK and WORLD_SIZE; a single process otherwise.
DDP averages gradients over processes, while the loss is divided by the global count, so it is multiplied by the number
of processes before its backward pass.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

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

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()


def start(use_cpu: bool) -> World:
    """Joins the processes that the launcher started, if any, and picks this one's device."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    on_gpu = torch.cuda.is_available() and not use_cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return World(rank, size, device)


def stop(world: World) -> None:
    """Leaves the group of processes that `start` joined."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
