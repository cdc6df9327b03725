"""Kernels on a chunk of logits, which cuBLAS has made: their traffic over their time, beside that of a copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from logitless import backends
from logitless.backends import sweep
from logitless.backends.problem import Upstream
from logitless.types import LogitTransform, Options, TokenStats

from .gpu_cells import Cell
from .gpu_measure import SECONDS, Machine, Row, Tell, attempt, turns
from .report import Json


def measure_rows(cell: Cell, machine: Machine, deadline: float, skip: Json, tell: Tell) -> Json:
    """What every backend's row engine makes of a chunk of logits, and a copy as large: bytes over seconds."""
    head = LogitTransform()
    inputs = cell.inputs(machine.device)
    tokens = sweep.chunk_tokens(inputs.hidden, inputs.weight, Options(chunk_bytes=cell.problem.chunk_bytes))
    hidden, targets = inputs.hidden[:tokens], inputs.targets[:tokens]
    raw = (hidden @ inputs.weight.T).float()
    kernels = [_copy(raw)]
    for name in backends.BACKENDS:
        kernels += _row_kernels(name, raw, inputs.weight, targets, sweep.RowHead(None, head))
    for _, row, _ in kernels:
        row.failure = row.failure or skip.get(row.provider)

    def found(complete: bool = False) -> Json:
        about = {"problem": f"{len(raw)} x {raw.shape[1]} logits", "complete": complete}
        return {**about, "rows": [asdict(row) for _, row, _ in kernels]}

    stop = min(deadline, time.monotonic() + SECONDS)
    for turn in turns(stop):
        for prepare, row, kernel in kernels:
            if row.runs:
                tell(row.provider, found())
                attempt(row, partial(_time_kernel, prepare, row, kernel, machine, keep=turn > 0), machine)
    return found(complete=True)


#: What comes before a kernel and is not timed, its row, and the kernel.
Kernel = tuple[Callable[[], Any], Row, Callable[[Any], object]]


def _copy(raw: Tensor) -> Kernel:
    target = torch.empty_like(raw)
    return lambda: None, Row("copy", "floor", bytes=2 * raw.nbytes), lambda _: target.copy_(raw)


def _row_kernels(name: str, raw: Tensor, weight: Tensor, targets: Tensor, head: sweep.RowHead) -> Iterator[Kernel]:
    """Statistics of float32 logits (one read), and their bfloat16 gradient in their place (one read, half a write)."""
    backend = backends.BACKENDS[name]
    failure = backend.supports(weight.device, weight.dtype)
    engine: sweep.RowEngine = backend.ENGINE
    outputs = ("logprob", "lse", "entropy")

    def prepare() -> Tensor:
        return raw.clone()

    def recall() -> tuple[sweep.Tile, Upstream]:
        buffer = raw.clone()
        lse = buffer.logsumexp(-1)
        stats = TokenStats(logprob=buffer.gather(1, targets[:, None])[:, 0] - lse, lse=lse)
        return engine.recall(buffer, head, targets, stats), Upstream(logprob=torch.ones_like(lse))

    rows = [Row(f"{name}, {what}", "logitless", failure=failure) for what in ("statistics", "gradient")]
    rows[0].bytes, rows[1].bytes = raw.nbytes, raw.nbytes * 3 // 2
    yield prepare, rows[0], lambda logits: engine.measure(logits, head, targets, outputs, None)
    yield recall, rows[1], lambda given: engine.gradient(given[0], head, given[1], torch.bfloat16)


def _time_kernel(
    prepare: Callable[[], Any], row: Row, kernel: Callable[[Any], object], machine: Machine, *, keep: bool
) -> None:
    """The first turn loads and compiles, and is not kept."""
    given = prepare()
    machine.flush()
    start = machine.mark()
    kernel(given)
    seconds = machine.seconds(start, machine.mark())
    if keep:
        row.both.append(seconds)
