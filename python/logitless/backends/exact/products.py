"""The products of a sweep: which dtypes they have, and operands of another dtype converted by parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import native

#: Entries of the vocabulary in a part of the head that is converted: on a CPU it stays in a core's cache.
CONVERTED_ENTRIES = {"cpu": 512}
CONVERTED_ENTRIES_ACCELERATOR = 8192

#: Bytes of a product that is made apart, because it cannot be written in the dtype of where it goes.
PART_BYTES = {"cpu": 2**18}
PART_BYTES_ACCELERATOR = 64 * 2**20

#: Whether torch.addmm adds half-precision products to a float32 sum; torch 2.9 refuses (pytorch/pytorch#167931).
ADDS_NARROW_PRODUCTS = torch.__version__ >= "2.10"


def spans(count: int, tokens: int) -> Iterator[slice]:
    """Runs of `tokens` tokens, the last perhaps shorter."""
    return (slice(start, min(start + tokens, count)) for start in range(0, count, tokens))


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes


def logit_dtype(dtype: torch.dtype, device: torch.device, chunk_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to multiply logits in: the operands' own if the product is float32 all the same, else float32.

    A GPU multiplies half-precision operands into a float32 product, and so does the CPU library with bfloat16 units.
    PyTorch's product on a CPU is rounded to the operands' dtype, so it gets float32 operands, unless bfloat16 logits
    were asked for and the processor has units for them.
    """
    if dtype not in (torch.bfloat16, torch.float16) or device.type != "cpu":
        return dtype
    if dtype == chunk_dtype and has_bfloat16_units():
        return dtype
    return dtype if dtype == torch.bfloat16 and native.multiplies(dtype, device) else torch.float32


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a chunk's gradient and of what it is multiplied with. float16 cannot hold a row's small
    exponentials; a CPU without bfloat16 units multiplies bfloat16 in float32."""
    if dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16 and device.type == "cpu" and not has_bfloat16_units():
        return torch.float32
    return dtype


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def float16_products(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """For float16 operands on a GPU, makes float32 products tf32's: of 11 bits, as float16 has, and float32's range.

    So hidden states and head enter them exactly, and a gradient, which float16 has no room for, is rounded as finely
    as float16 would round it. In full float32 these products take a GPU many times as long.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if dtype != torch.float16 or device.type != "cuda" or before == "tf32":  # perhaps by a wider setting
        yield
        return
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# ---------------------------------------------------------------------------------------------------------------------
# Products


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`, with `out` in its own dtype whatever the operands'."""
    widens = a.is_cuda and out.dtype == torch.float32
    if a.device.type == "cpu" and native.multiply_float32(a, b, out, add=add):
        return
    if a.dtype == out.dtype and add:
        out.addmm_(a, b)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif widens and add and ADDS_NARROW_PRODUCTS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif widens and not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        for rows, part in _parts_of_product(a, b, out):
            write = out[rows].add_ if add else out[rows].copy_
            write(part)


def _parts_of_product(a: Tensor, b: Tensor, out: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `a @ b`, some at a time: float32 on a GPU, in the operands' dtype on a CPU."""
    wide = a.is_cuda and a.itemsize == 2
    row_bytes = out.shape[1] * (4 if wide else a.itemsize)
    budget = PART_BYTES.get(a.device.type, PART_BYTES_ACCELERATOR)
    for rows in spans(len(out), max(1, budget // max(1, row_bytes))):
        yield rows, torch.mm(a[rows], b, out_dtype=torch.float32) if wide else torch.mm(a[rows], b)


def parts_in(dtype: torch.dtype, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of the head's rows in that dtype: all of them where it is theirs, else converted into one scratch."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    entries = min(len(weight), CONVERTED_ENTRIES.get(weight.device.type, CONVERTED_ENTRIES_ACCELERATOR))
    scratch = torch.empty(entries, weight.shape[1], dtype=dtype, device=weight.device)
    for columns in spans(len(weight), entries):
        yield columns, scratch[: columns.stop - columns.start].copy_(weight[columns])


def mean_row(weight: Tensor, logit_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`mean_j w_j weight_j`, `[H]`, for the weights `[V]` of the logits in that dtype; None: 1 for each."""
    parts = parts_in(dtype, weight)
    sums = [part.sum(0) if logit_weight is None else logit_weight[columns] @ part for columns, part in parts]
    return torch.stack(sums).sum(0) / len(weight)


def raw_products(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """Raw products `[n, V]` into `out`, in either layout, multiplied in the dtype of `hidden`."""
    vocabulary_major = out.stride(0) == 1
    for columns, part in _rows_to_multiply(hidden.dtype, weight, out.dtype):
        if vocabulary_major:
            multiply(part, native.unit_stride(hidden).T, out=out.T[columns])
        else:
            multiply(hidden, part.T, out=out[:, columns])
    return out


def _rows_to_multiply(dtype: torch.dtype, weight: Tensor, out: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`parts_in`; parts, too, where a CPU's product of bfloat16 with a float32 result wants columns side by side."""
    if dtype == torch.bfloat16 and out == torch.float32 and weight.device.type == "cpu" and weight.stride(1) != 1:
        for columns in spans(len(weight), CONVERTED_ENTRIES["cpu"]):
            yield columns, native.unit_stride(weight[columns])
    else:
        yield from parts_in(dtype, weight)


def products_with_head(matrix: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out = matrix @ weight`, multiplied in the dtype of `matrix`."""
    for columns, part in parts_in(matrix.dtype, weight):
        multiply(matrix[:, columns], part, out=out, add=columns.start > 0)
