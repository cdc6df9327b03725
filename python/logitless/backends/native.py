"""The compiled CPU library (kernels/cpu): where it can be used, its dense products, and its work among threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..kernels.cpu.library import Library

Part = TypeVar("Part")
Result = TypeVar("Result")

#: A thread's part has a multiple of this many tokens, or rows: whole panels of every set of instructions.
TOKEN_STEP = 32
#: Below this many columns, and this many multiplications, PyTorch's product of float32 is the better one.
FEWEST_COLUMNS, FEWEST_MULTIPLICATIONS = 16, 2**22
#: Elements up to which PyTorch wakes no other thread (`at::internal::GRAIN_SIZE`).
SERIAL_ELEMENTS = 2**15


def why_not(device: torch.device) -> str | None:
    """None, or the reason why the library cannot take tensors of this device."""
    from ..kernels.cpu import library

    if device.type != "cpu":
        return f"it takes tensors on a CPU, got {device}"
    path = library.location()
    if path is None:
        return "its library is not built: install logitless where there is a C++ compiler (LOGITLESS_CPU=require)"
    try:
        loaded = library.load(path)
    except (OSError, AttributeError) as error:
        return f"its library cannot be loaded: {error}"
    return "the processor lacks AVX2, FMA or F16C" if loaded.set is None else None


def usable(device: torch.device) -> bool:
    """Whether the library takes tensors of this device."""
    return why_not(device) is None


usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def loaded() -> Library:
    """The library, where it is usable."""
    from ..kernels.cpu import library

    path = library.location()
    assert path is not None
    return library.load(path)


def unit_stride(matrix: Tensor) -> Tensor:
    """The matrix, or a copy whose columns are side by side, as the library takes them."""
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)  # a single entry is `contiguous` with any strides


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library makes the products of a head of this dtype, and PyTorch none between its other work.

    PyTorch's threads go on waiting for milliseconds after a product, each on a core that the library's threads want.
    """
    if not usable(device):
        return False
    return loaded().multiplies_bfloat16 if dtype == torch.bfloat16 else loaded().leads


def undisturbed(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Runs of rows of a matrix on which PyTorch works by itself, where the library's products come before and after.

    Its other threads would still be waiting on their cores for the next such operation while the library multiplies.
    """
    alone = multiplies(dtype, device)
    step = max(1, SERIAL_ELEMENTS // max(1, width)) if alone else max(1, rows)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def in_threads(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """The results of a function of the library for each part, on as many threads as PyTorch takes."""
    parts, threads = list(parts), torch.get_num_threads()
    if len(parts) < 2 or threads < 2:
        return [work(part) for part in parts]
    if len(parts) > threads:
        return list(_pool(threads).map(work, parts))
    others = _pool(threads).map(work, parts[1:])  # begun already
    return [work(parts[0]), *others]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="logitless")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


def shares_of(count: int, step: int = 1) -> list[slice]:
    """`count` cut into a run for each thread, of multiples of `step`."""
    each = -(-count // (torch.get_num_threads() * step)) * step
    return [slice(start, min(start + each, count)) for start in range(0, count, max(1, each))]


def multiply_float32(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> bool:
    """`out = a @ b` or `out += a @ b` by the library; False, and nothing done, where PyTorch is to do it."""
    if not _multiplies(a, b, out):
        return False
    library = loaded()
    if len(a) >= b.shape[1]:
        parts = [(a[rows], b, out[rows]) for rows in shares_of(len(a), TOKEN_STEP)]
    else:
        parts = [(a, b[:, columns], out[:, columns]) for columns in shares_of(b.shape[1], TOKEN_STEP)]
    in_threads(lambda part: library.product(*part, add=add), parts)
    return True


def _multiplies(a: Tensor, b: Tensor, out: Tensor) -> bool:
    if out.dtype != torch.float32 or a.dtype != b.dtype or out.stride(1) != 1 or not out.numel() or not a.numel():
        return False
    if a.dtype == torch.bfloat16:
        return usable(a.device) and loaded().takes_bfloat16(a, b)
    many = min(len(a), b.shape[1]) >= FEWEST_COLUMNS and len(a) * a.shape[1] * b.shape[1] >= FEWEST_MULTIPLICATIONS
    return a.dtype == torch.float32 and many and usable(a.device) and loaded().leads
