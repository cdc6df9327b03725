"""Everything that the benchmarks take from below logitless's public names, in one place.

Kernels are measured one by one, which is not public.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from logitless import Head, TokenStats, backends
from logitless.backends import cuda
from logitless.backends.approximate.select import SHARE as TAIL_SHARE
from logitless.backends.approximate.select import TAIL_BLOCK
from logitless.backends.exact import sweep
from logitless.backends.exact.products import multiply
from logitless.backends.interface import Problem as _Problem
from logitless.backends.interface import RowEngine, Upstream
from logitless.bench.problem import Inputs
from logitless.training.files import write_text

__all__ = ["TAIL_BLOCK", "TAIL_SHARE", "multiply", "write_text"]

BACKENDS = tuple(backends.BACKENDS)


def convert_gguf(file: Any, work: Any) -> Path:
    """A GGUF file as a folder that Transformers loads. What it needs is imported when it is called."""
    from logitless.training.model import convert_gguf as convert

    return convert(file, work)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels one by one


def unsupported(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend does not run there; None where it does."""
    return backends.BACKENDS[backend].supports(device, dtype)


def fused_kernel(inputs: Inputs) -> str | None:
    """Name of the fused CUDA forward that takes these tensors."""
    return cuda.fused_kernel(inputs.hidden, inputs.weight)


def fused_forward(kernel: str, inputs: Inputs) -> TokenStats:
    """One fused CUDA forward."""
    return cuda._fused_forward(kernel, _problem(inputs), ("logprob", "lse"), None)


def forward_by_chunks(inputs: Inputs) -> TokenStats:
    """The CUDA row kernels over chunks of cuBLAS's logits."""
    return sweep.forward(cuda.CUDA.rows, _problem(inputs), (), False).stats


def forward(backend: str, inputs: Inputs) -> TokenStats:
    """A backend's own forward."""
    return backends.BACKENDS[backend].forward(_problem(inputs), (), False).stats


def _problem(inputs: Inputs) -> _Problem:
    return _Problem(inputs.hidden, Head(inputs.weight), inputs.targets, chunk_bytes=inputs.problem.chunk_bytes)


def projects(inputs: Inputs) -> bool:
    """Whether one CUDA kernel stores a chunk's logits and measures them."""
    return bool(cuda.projecting_kernel(inputs.hidden, inputs.weight, torch.float32))


def project(inputs: Inputs, logits: Tensor) -> TokenStats:
    """Stores a chunk's logits and measures them in one CUDA kernel."""
    head, outputs = Head(inputs.weight), ("logprob", "lse")
    tile = cuda.CUDA.rows.project(inputs.hidden, logits, head, inputs.targets, outputs, None)
    assert tile is not None
    return tile.stats


def configurations() -> Sequence[str]:
    """Hopper's fused forwards that the CUDA library was built with."""
    return cuda._library().configurations()


@contextmanager
def configuration(number: int) -> Iterator[None]:
    """Chooses one of `configurations` meanwhile."""
    with mock.patch.object(cuda, "CONFIGURATION", number):
        yield


def _head_of(logits: Tensor) -> Head:
    """A head of the logits' vocabulary and no bias; its weight is not read."""
    return Head(logits.new_empty(logits.shape[1], 0))


class Rows:
    """A backend's row operations on a chunk of float32 logits, which a gradient overwrites."""

    def __init__(self, backend: str) -> None:
        self.engine: RowEngine = backends.BACKENDS[backend].rows

    def measure(self, logits: Tensor, targets: Tensor, outputs: tuple[str, ...]) -> TokenStats:
        return self.engine.measure(logits, _head_of(logits), targets, outputs, None).stats

    def recall(self, logits: Tensor, targets: Tensor, stats: TokenStats) -> tuple[Any, Upstream]:
        """Arguments of `gradient`: the tile whose statistics are known, and an upstream gradient of ones."""
        tile = self.engine.recall(logits, _head_of(logits), targets, stats)
        return tile, Upstream(logprob=torch.ones(len(logits), device=logits.device))

    def gradient(self, tile: Any, upstream: Upstream, dtype: torch.dtype) -> Any:
        """`dL/ds`, its rows not scaled yet where the engine leaves that to others: see `scaled`."""
        return self.engine.gradient(tile, _head_of(tile.logits), upstream, dtype)

    @staticmethod
    def scaled(gradient: Any, rows: Tensor) -> Tensor:
        """Some rows of a gradient in float64."""
        matrix = gradient.matrix[rows].double()
        return matrix if gradient.row_scale is None else matrix * gradient.row_scale[rows, None]
