"""How fast a machine is: products and passes over memory, measured in a second or two, or given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.exact.chunks import lay_out, row_stride
from ..backends.exact.products import float16_products, logit_dtype, multiply, products_with_head, raw_products
from ..types import statistics_dtype
from .step import Step

#: Operations of a product that is timed, at most, and bytes of a pass.
TIMED_FLOPS = {"cpu": 2**32}
TIMED_FLOPS_ACCELERATOR = 2**40
TIMED_BYTES = {"cpu": 2**27}
TIMED_BYTES_ACCELERATOR = 2**31
#: Tokens of a materialised product that is timed, at most: as many as make a product fast.
TIMED_TOKENS = {"cpu": 512}
TIMED_TOKENS_ACCELERATOR = 8192
#: Seconds that a timing takes, at least: many times as long as the launch of a kernel and a look at the clock.
TIMED_SECONDS = 5e-3
#: Times that each is timed; the median counts.
REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second.

    Args:
        whole: of products with full logits. chunk: of products with a chunk.
        memory: of row operations on full logits, exponentials included. cache: of those on a chunk.
        stream: of additions to a large tensor, which is what a product's own bytes take at least.
    """

    whole: float
    chunk: float
    memory: float
    cache: float
    stream: float
    source: str


def given_rates(tflops: float | None, bandwidth: float | None) -> Rates | None:
    """Rates of another machine: Tflop/s of its products, and GB/s of its memory for all passes. None of neither.

    Raises:
        ValueError: there is only one of them, or one is not positive.
    """
    if tflops is None and bandwidth is None:
        return None
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if value is None or not value > 0:
            raise ValueError(f"{name}: expected a positive number, and both or neither, got {value}")
    assert tflops is not None and bandwidth is not None
    flops, moved = tflops * 1e12, bandwidth * 1e9
    return Rates(flops, flops, moved, moved, moved, "given")


def calibrate(step: Step) -> Rates:
    """Measures the rates here, with products of the step's own widths, on parts of its tokens and vocabulary."""
    device = torch.device(step.device)
    works = (
        _whole_products(step, device),
        _chunk_products(step, device),
        _passes(step, device),
        _chunk_passes(step, device),
        _stream(step, device),
    )
    calls = [_calls_of_a_timing(work, device) for _, work in works]
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for (_, work), count, found in zip(works, calls, seconds, strict=True):
            found.append(_timed(work, count, device) / count)
    whole, chunk, memory, cache, stream = (
        amount / statistics.median(found) for (amount, _), found in zip(works, seconds, strict=True)
    )
    return Rates(whole, chunk, memory, cache, stream, "measured here")


Work = tuple[float, Callable[[], object]]


def _calls_of_a_timing(work: Callable[[], object], device: torch.device) -> int:
    """Calls that take `TIMED_SECONDS` together. The first loads and warms up."""
    _timed(work, 1, device)
    count = 1
    while _timed(work, count, device) < TIMED_SECONDS:
        count *= 2
    return count


def _timed(work: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _entries(step: Step, tokens: int) -> int:
    """Vocabulary entries of a product that is timed."""
    budget = TIMED_FLOPS.get(step.device, TIMED_FLOPS_ACCELERATOR)
    return max(1, min(step.vocabulary, budget // (2 * tokens * step.hidden)))


def _timed_operands(step: Step, tokens: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    entries = _entries(step, tokens)
    shapes = (tokens, step.hidden), (entries, step.hidden)
    hidden, weight = (torch.randn(shape, generator=draw, dtype=step.dtype, device=draw.device) for shape in shapes)
    return hidden, weight


def _whole_products(step: Step, device: torch.device) -> Work:
    """The three products of materialised logits."""
    tokens = min(step.tokens, TIMED_TOKENS.get(step.device, TIMED_TOKENS_ACCELERATOR))
    hidden, weight = _timed_operands(step, tokens, torch.Generator(device).manual_seed(0))

    def work() -> None:
        logits = hidden @ weight.T
        logits @ weight
        logits.T @ hidden

    return 6.0 * weight.numel() * tokens, work


def _chunk_products(step: Step, device: torch.device) -> Work:
    """The three products of a chunk, as the sweep makes them, of random numbers: a GPU multiplies zeros faster."""
    tokens, draw = step.chunk, torch.Generator(device).manual_seed(0)
    hidden, weight = _timed_operands(step, tokens, draw)
    wide, entries = statistics_dtype(step.dtype), len(weight)
    buffer = torch.empty(tokens * row_stride(entries, wide, step.device), dtype=wide, device=device)
    logits = lay_out(buffer, tokens, entries, step.device)
    drawn = torch.empty_like(buffer, dtype=step.operand).normal_(generator=draw)
    matrix = lay_out(drawn, tokens, entries, step.device)
    d_hidden, d_weight = torch.empty_like(hidden, dtype=wide), torch.zeros_like(weight, dtype=wide)
    multiplied = hidden.to(logit_dtype(step.dtype, device, None))

    def work() -> None:
        with float16_products(step.dtype, device):
            raw_products(multiplied, weight, logits)
            products_with_head(matrix, weight, d_hidden)
            multiply(matrix.T, hidden.to(matrix.dtype), out=d_weight, add=True)

    return 6.0 * weight.numel() * tokens, work


def _passes(step: Step, device: torch.device) -> Work:
    """A log-softmax into new memory: one read and one write."""
    rows = max(1, TIMED_BYTES.get(step.device, TIMED_BYTES_ACCELERATOR) // (step.vocabulary * step.size))
    logits = torch.zeros(rows, step.vocabulary, dtype=step.dtype, device=device)
    return 2.0 * logits.nbytes, lambda: logits.log_softmax(-1)


def _chunk_passes(step: Step, device: torch.device) -> Work:
    """Exponentials in the place of a chunk: one read and one write."""
    chunk = torch.zeros(step.chunk, step.vocabulary, dtype=statistics_dtype(step.dtype), device=device)
    return 2.0 * chunk.nbytes, chunk.exp_


def _stream(step: Step, device: torch.device) -> Work:
    """An addition to a large tensor: one read and one write."""
    large = torch.zeros(TIMED_BYTES.get(step.device, TIMED_BYTES_ACCELERATOR) // 4, device=device)
    return 2.0 * large.nbytes, lambda: large.add_(1.0)
