"""Which entries of a gradient carry probability, and the rest by blocks of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..interface import Problem
from .order import inverse

#: Vocabulary entries in a block of the tail. 64 takes 2% off the error and four times the memory.
TAIL_BLOCK = 256
#: `tail_tolerance` is the mass below which a whole block of 64 could be left out; an entry is held to an eighth of
#: it. At this ratio both rules have about the same error (docs/tail-corrected.md), and entries are a tenth of the work.
SHARE = 8
#: A kept entry costs some nine times what it costs in the GEMMs, and 8 bytes until the backward: at this share a third
#: of the products' time and a sixteenth of the logits' memory.
MOST_KEPT = 1 / 32
#: More than this share of a gradient is never put back as means.
MOST_LEFT = 1 / 4


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of the vocabulary


def block_count(vocabulary: int, width: int) -> int:
    """How many blocks a vocabulary has; the last may be short."""
    return -(-vocabulary // width)


def shares(block: Tensor, count: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[V]`: the part of its block's tail that an entry gets. A masked one, of probability 0, gets none.

    `block [V]` int: the block of each entry, of `count`.
    """
    takes = torch.ones(len(block), dtype=dtype, device=block.device)
    if bias is not None:
        takes = takes.masked_fill_(bias.isneginf(), 0)
    members = takes.new_zeros(count).index_add_(0, block, takes)
    return takes.div_(members.clamp_(min=1).index_select(0, block))


class TailBlocks(NamedTuple):
    """Which entries a block of the tail has. An order changes nothing else: no copy of the head is made for it."""

    order: Tensor | None  # [V] int64: the entries, block after block; None: as they stand in the head
    block: Tensor  # [V] int32: the block of each entry


def tail_blocks(problem: Problem) -> TailBlocks:
    """The blocks of a problem's vocabulary order."""
    order, weight = problem.vocabulary_order, problem.head.weight
    place = torch.arange(len(weight), device=weight.device) if order is None else inverse(order)
    return TailBlocks(order, (place // TAIL_BLOCK).int())


# ---------------------------------------------------------------------------------------------------------------------
# A matrix in two parts


class Split(NamedTuple):
    """`[n, V]`: entries one by one, and per block what is spread over it."""

    token: Tensor  # [K] int32
    column: Tensor  # [K] int32
    value: Tensor  # [K]
    tail: Tensor  # [n, blocks] sums of what is left


def _by_block(matrix: Tensor, order: Tensor | None) -> Tensor:
    """Sums over blocks of the vocabulary, `[n, V]` to `[n, blocks]`, along the memory of a vocabulary-major chunk."""
    vocabulary_major = matrix.stride(0) == 1
    if order is not None and vocabulary_major:
        return F.embedding_bag(
            order, matrix.T, torch.arange(0, len(order), TAIL_BLOCK, device=order.device), mode="sum"
        ).T
    if order is not None:
        matrix = matrix.index_select(1, order)
    x, dim = (matrix.T, 0) if vocabulary_major else (matrix, 1)
    whole = x.shape[dim] // TAIL_BLOCK
    sums = x.narrow(dim, 0, whole * TAIL_BLOCK).unflatten(dim, (whole, TAIL_BLOCK)).sum(dim + 1)
    rest = x.narrow(dim, whole * TAIL_BLOCK, x.shape[dim] - whole * TAIL_BLOCK).sum(dim, keepdim=True)
    sums = torch.cat([sums, rest], dim) if x.shape[dim] % TAIL_BLOCK else sums
    return sums.T if vocabulary_major else sums


def _positions(mask: Tensor) -> Tensor:
    """Where a contiguous mask is set, flat. Eight entries at a time: most eights of a mask like these are empty."""
    flat = mask.view(-1)
    if len(flat) % 8:
        return flat.nonzero()[:, 0]
    eights = flat.view(torch.int64)
    set_eights = eights.nonzero()[:, 0]
    which, byte = eights.index_select(0, set_eights).view(torch.bool).view(-1, 8).nonzero().unbind(1)
    return set_eights.index_select(0, which) * 8 + byte


def split_entries(matrix: Tensor, threshold: Tensor, where: TailBlocks, *, signed: bool) -> Split | None:
    """Entries of at least `threshold [n]` in absolute value, and the rest by block; None where too many are kept."""
    size = matrix.abs() if signed else matrix
    vocabulary_major = matrix.stride(0) == 1
    mask = torch.ge(size.T, threshold) if vocabulary_major else torch.ge(size, threshold[:, None])
    if mask.count_nonzero() > MOST_KEPT * mask.numel():
        return None
    position = _positions(mask)
    slow, fast = position // mask.shape[1], position % mask.shape[1]
    token, column = (fast, slow) if vocabulary_major else (slow, fast)
    value = (matrix.T if vocabulary_major else matrix).reshape(-1).index_select(0, position)
    tail = _by_block(matrix, where.order)
    return Split(token.int(), column.int(), value, without(tail, token, where.block.index_select(0, column), value))


def without(tail: Tensor, token: Tensor, block: Tensor, value: Tensor) -> Tensor:
    """Block sums less those entries."""
    kept = torch.zeros_like(tail, memory_format=torch.contiguous_format)
    kept.view(-1).index_add_(0, token.long() * tail.shape[1] + block, value)
    return tail - kept


def bag(table: Tensor, row: Tensor, group: Tensor, value: Tensor, groups: int) -> Tensor:
    """`out[k] = sum_(group = k) value table[row]`, for `group` in order."""
    offsets = torch.searchsorted(group, torch.arange(groups, dtype=group.dtype, device=group.device), out_int32=True)
    return F.embedding_bag(row, table, offsets, mode="sum", per_sample_weights=value)


def rows_left(matrix: Tensor, split: Split, *, signed: bool) -> Tensor:
    """`[n]`: the L1 norm of what is left of each row; rounding may take it below 0."""
    if not signed:
        return split.tail.sum(-1).clamp(min=0)
    kept = torch.zeros(len(matrix), dtype=matrix.dtype, device=matrix.device)
    kept.index_add_(0, split.token, split.value.abs())
    return (matrix.abs().sum(-1) - kept).clamp(min=0)
