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
TIMEOUT = timedelta(seconds=90)


def in_processes(count: int, folder: Path, function: Callable[..., None], *args: Any) -> None:
    """Runs `function(*args)` on `count` ranks of a gloo process group; an exception on any rank is one here."""
    torch.multiprocessing.spawn(_on_rank, args=(count, str(folder / "rendezvous"), function, args), nprocs=count)


def _on_rank(rank: int, count: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all ranks draw the same
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=TIMEOUT)
    function(*args)
    dist.barrier()
    os._exit(0)  # once in many runs a thread of gloo outlives Python's shutdown, and C++ then aborts the process
