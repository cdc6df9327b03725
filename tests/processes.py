"""Tests in several processes: gloo on this machine, one function on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: A rank that waits for a message which another never sends fails after this.
TIMEOUT = timedelta(seconds=120)


def in_processes(count: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of `function(*args)` on `count` ranks of gloo's world; an exception on any rank is one here."""
    torch.multiprocessing.spawn(_on_rank, args=(count, str(folder), function, args), nprocs=count)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _on_rank(rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all ranks draw the same
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count, timeout=TIMEOUT)
    torch.save(function(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # once in many runs a thread of gloo outlives Python's shutdown, and C++ then aborts the process
