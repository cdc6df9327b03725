"""The approximate backward on listed (token, block) pairs: routing, gradient, and two products with it.

A block is PAIR_BLOCK vocabulary entries, below BLOCK; a span is PAIR_SPAN tokens, below SPAN.

    mass[i, b] = exp(block_lse[i, b] - lse[i])         the block's share of p, the target's left out
    kept where magnitude[i] mass[i, b] >= threshold     (a product of 0 never, a NaN always)
    tail[i, b] = mass[i, b] where not kept, else 0

    tokens                    the list: block 0's tokens in order, then block 1's, ...; with room for every pair
    starts[b spans + s]       where the list has block b's tokens of span s, [SPAN s, SPAN (s + 1)); the end comes last

    listed_gradient_kernel    G[r] = dL/ds of listed pair r, [BLOCK], rounded once; 0 at the target   2 R BLOCK H flops
    d_weight_kernel           d_weight[v] += sum_r G[r, v] hidden[token r]                            2 R BLOCK H
    d_hidden_kernel           d_hidden[token r] += sum_v G[r, v] weight[v], by float32 atomics        2 R BLOCK H
    ordered_d_hidden_kernel   the same sum, block after block: the same bits every time               2 U BLOCK H

R is the number of listed pairs. U counts all tokens of a span for each block that lists one of them.

A call takes some of the blocks. G has room for every token in each of these, so the host never waits for the device to
say how many pairs there are. Programs beyond a list's end stop at once.

Three terms are added elsewhere: the correction for pairs left out, the target's entry, and the mean logit's part.
Traffic and numerics: kernels/triton/README.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import PAIR_BLOCK, PAIR_SPAN
from . import configs
from .tile import dot, gradient, tile_products, transform

#: The most programs along a block's list. Most lists are short, and a program without work is not free.
LIST_PROGRAMS = 8
#: Blocks of a program of `route_kernel`, which reads 128 bytes of each token.
ROUTE_BLOCKS = 32

# ---------------------------------------------------------------------------------------------------------------------
# Device: routing


@triton.jit(do_not_specialize=["N", "blocks"])
def route_kernel(
    p_block_lse,  # [N, blocks]
    p_lse,  # [N]; so is the next
    p_magnitude,
    p_threshold,  # [1]
    p_tail,  # [N, blocks]; this and the next are None in the second run
    p_counts,  # [blocks, spans] pairs kept
    p_starts,  # [blocks, spans]; this and the next are None in the first run
    p_tokens,  # [N blocks]
    N,
    blocks,
    SPAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The pairs of a span of tokens and BLOCK_B blocks. It runs twice: to store the tail and counts, then to list."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    i_span = tl.program_id(1)
    o_n = i_span * SPAN + tl.arange(0, SPAN)
    m_n = o_n < N
    m_b = o_b < blocks
    mask = m_n[:, None] & m_b[None, :]  # [SPAN, BLOCK_B]
    o_pair = o_n[:, None].to(tl.int64) * blocks + o_b[None, :]
    block_lse = tl.load(p_block_lse + o_pair, mask=mask, other=float("-inf"))
    lse = tl.load(p_lse + o_n, mask=m_n, other=0.0)
    magnitude = tl.load(p_magnitude + o_n, mask=m_n, other=0.0)
    mass = tl.exp(block_lse - lse[:, None])
    weight = magnitude[:, None] * mass
    kept = mask & (weight != 0.0) & ((weight < tl.load(p_threshold)) == 0)
    o_span = o_b * tl.cdiv(N, SPAN) + i_span
    if p_tail is not None:
        tl.store(p_tail + o_pair, tl.where(kept, 0.0, mass), mask=mask)
        tl.store(p_counts + o_span, tl.sum(kept.to(tl.int32), 0), mask=m_b)
    if p_tokens is not None:
        start = tl.load(p_starts + o_span, mask=m_b, other=0)
        place = start[None, :] + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(p_tokens + place, tl.broadcast_to(o_n[:, None], (SPAN, BLOCK_B)), mask=kept)


@triton.jit(do_not_specialize=["first", "spans"])
def place_kernel(p_starts, p_tokens, p_place, first, spans, SPAN: tl.constexpr):
    """Writes each listed pair's row of G into `place [count, spans SPAN]`. Other entries are not written."""
    i_block = tl.program_id(1)
    p_start = p_starts + (first + i_block) * spans + tl.program_id(0)
    o_r = tl.load(p_start) + tl.arange(0, SPAN)
    m_r = o_r < tl.load(p_start + 1)
    o_n = tl.load(p_tokens + o_r, mask=m_r, other=0)
    p_out = p_place + i_block.to(tl.int64) * spans * SPAN + o_n
    tl.store(p_out, o_r - tl.load(p_starts + first * spans), mask=m_r)


# ---------------------------------------------------------------------------------------------------------------------
# Device: gradient and products


@triton.jit
def list_bounds(p_starts, first, i_block, spans):
    """The list's begin and end for a block, and its begin for the call's first block, which is row 0 of G."""
    p_start = p_starts + (first + i_block) * spans
    return tl.load(p_start), tl.load(p_start + spans), tl.load(p_starts + first * spans)


@triton.jit
def load_rows(p, o_row, o_column, mask, stride_row, stride_column):
    """The `[rows, columns]` of a matrix, and 0 where the mask is false."""
    o = o_row[:, None].to(tl.int64) * stride_row + o_column[None, :].to(tl.int64) * stride_column
    return tl.load(p + o, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["N", "V", "first", "spans"])
def listed_gradient_kernel(
    p_hidden,
    p_weight,
    p_bias,
    p_targets,
    p_lse,  # [N]; so is the next
    p_factor,
    p_starts,
    p_tokens,
    p_gradient,  # [rows, BLOCK]
    N,
    V,
    H,
    first,
    spans,
    stride_hn,
    stride_hh,
    stride_wv,
    stride_wh,
    slope,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eqs. 11 and 13 for BLOCK_N listed tokens by BLOCK_V columns of their block; 0 at the target and beyond V."""
    PARTS: tl.constexpr = BLOCK // BLOCK_V
    i_block = tl.program_id(1)
    start, stop, origin = list_bounds(p_starts, first, i_block, spans)
    i_r = start + tl.program_id(0) // PARTS * BLOCK_N
    if i_r >= stop:
        return
    o_r = i_r + tl.arange(0, BLOCK_N)
    m_r = o_r < stop
    o_n = tl.load(p_tokens + o_r, mask=m_r, other=0)
    o_c = tl.program_id(0) % PARTS * BLOCK_V + tl.arange(0, BLOCK_V)
    o_v = (first + i_block) * BLOCK + o_c
    s = tile_products(
        p_hidden, p_weight, p_bias, o_n, o_v, N, V, H, stride_hn, stride_hh, stride_wv, stride_wh, BLOCK_H, PRECISION
    )
    z, c = transform(s, slope, None, None)
    g = gradient(z, c, p_lse, p_factor, None, None, o_n, m_r)
    target = tl.load(p_targets + o_n, mask=m_r, other=-1).to(tl.int32)
    g = tl.where((o_v >= V)[None, :] | (o_v[None, :] == target[:, None]), 0.0, g)
    p_out = p_gradient + (o_r - origin)[:, None].to(tl.int64) * BLOCK + o_c[None, :]
    tl.store(p_out, g.to(p_gradient.dtype.element_ty), mask=m_r[:, None])


@triton.jit(do_not_specialize=["V", "first", "spans"])
def d_weight_kernel(
    p_gradient,
    p_hidden,
    p_starts,
    p_tokens,
    p_out,  # [V, H] float32
    V,
    H,
    first,
    spans,
    stride_hn,
    stride_hh,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds a block's listed tokens into a tile `[BLOCK_V, BLOCK_H]` of d_weight, which only this program writes."""
    PARTS: tl.constexpr = BLOCK // BLOCK_V
    i_block = tl.program_id(1) // PARTS
    start, stop, origin = list_bounds(p_starts, first, i_block, spans)
    if start == stop:
        return
    o_c = tl.program_id(1) % PARTS * BLOCK_V + tl.arange(0, BLOCK_V)
    o_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = (o_h < H)[None, :]
    acc = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    o_r = start + tl.arange(0, BLOCK_N)
    o_n = tl.load(p_tokens + o_r, mask=o_r < stop, other=0)
    for _ in range(start, stop, BLOCK_N):
        m_r = o_r < stop
        b_g = load_rows(p_gradient, o_c, o_r - origin, m_r[None, :], 1, BLOCK)  # [BLOCK_V, BLOCK_N]
        b_x = load_rows(p_hidden, o_n, o_h, m_r[:, None] & m_h, stride_hn, stride_hh)  # [BLOCK_N, BLOCK_H]
        acc = dot(b_g, b_x, acc, PRECISION)
        o_r += BLOCK_N
        o_n = tl.load(p_tokens + o_r, mask=o_r < stop, other=0)  # a step ahead, so that rows are copied ahead
    o_v = (first + i_block) * BLOCK + o_c
    p_sum = p_out + o_v[:, None].to(tl.int64) * H + o_h[None, :]
    m_out = (o_v < V)[:, None] & m_h
    tl.store(p_sum, tl.load(p_sum, mask=m_out, other=0.0) + acc, mask=m_out)


@triton.jit(do_not_specialize=["V", "first", "spans"])
def d_hidden_kernel(
    p_gradient,
    p_weight,
    p_starts,
    p_tokens,
    p_out,  # [N, H] float32
    V,
    H,
    first,
    spans,
    stride_wv,
    stride_wh,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums a block for tiles `[BLOCK_N, BLOCK_H]` of listed tokens, and adds them into d_hidden by atomics.

    A program takes every `num_programs(0)`-th tile of the list. Columns go slowest over the grid, so that the sums in
    use at one time fit the L2 cache.
    """
    i_block = tl.program_id(1)
    start, stop, origin = list_bounds(p_starts, first, i_block, spans)
    o_h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = (o_h < H)[None, :]
    for i_r in range(start + tl.program_id(0) * BLOCK_N, stop, tl.num_programs(0) * BLOCK_N):
        o_r = i_r + tl.arange(0, BLOCK_N)
        m_r = o_r < stop
        acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for c in range(0, BLOCK, BLOCK_V):
            o_c = c + tl.arange(0, BLOCK_V)
            o_v = (first + i_block) * BLOCK + o_c
            b_g = load_rows(p_gradient, o_r - origin, o_c, m_r[:, None], BLOCK, 1)  # [BLOCK_N, BLOCK_V]
            b_w = load_rows(p_weight, o_v, o_h, (o_v < V)[:, None] & m_h, stride_wv, stride_wh)  # [BLOCK_V, BLOCK_H]
            acc = dot(b_g, b_w, acc, PRECISION)
        o_n = tl.load(p_tokens + o_r, mask=m_r, other=0)
        p_sum = p_out + o_n[:, None].to(tl.int64) * H + o_h[None, :]
        tl.atomic_add(p_sum, acc, mask=m_r[:, None] & m_h, sem="relaxed")


@triton.jit(do_not_specialize=["N", "V", "first", "count", "spans"])
def ordered_d_hidden_kernel(
    p_gradient,
    p_weight,
    p_place,  # [count, spans SPAN] rows of G, -1 where not listed
    p_alive,  # [spans, count] blocks of the call that list a token of the span, in order
    p_alive_count,  # [spans]
    p_out,  # [N, H] float32
    N,
    V,
    H,
    first,
    count,
    spans,
    stride_wv,
    stride_wh,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums a span's blocks in order into a tile `[BLOCK_N, BLOCK_H]` of d_hidden, which only this program writes."""
    PARTS: tl.constexpr = BLOCK // BLOCK_V
    i_n = tl.program_id(1) * BLOCK_N
    i_span = i_n // SPAN
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = (o_h < H)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    p_block = p_alive + i_span * count
    stop = tl.load(p_alive_count + i_span) * PARTS
    i_block = tl.load(p_block, mask=stop > 0, other=0)
    o_r = tl.load(p_place + i_block.to(tl.int64) * spans * SPAN + o_n)
    for k in range(stop):
        o_c = k % PARTS * BLOCK_V + tl.arange(0, BLOCK_V)
        o_v = (first + i_block) * BLOCK + o_c
        b_g = load_rows(p_gradient, o_r, o_c, (o_r >= 0)[:, None], BLOCK, 1)  # [BLOCK_N, BLOCK_V]
        b_w = load_rows(p_weight, o_v, o_h, (o_v < V)[:, None] & m_h, stride_wv, stride_wh)  # [BLOCK_V, BLOCK_H]
        acc = dot(b_g, b_w, acc, PRECISION)
        i_block = tl.load(p_block + (k + 1) // PARTS, mask=k + 1 < stop, other=0)  # a step ahead, as in d_weight
        o_r = tl.load(p_place + i_block.to(tl.int64) * spans * SPAN + o_n)
    p_sum = p_out + o_n[:, None].to(tl.int64) * H + o_h[None, :]
    m_out = (o_n < N)[:, None] & m_h
    tl.store(p_sum, tl.load(p_sum, mask=m_out, other=0.0) + acc, mask=m_out)


# ---------------------------------------------------------------------------------------------------------------------
# Host


def route(block_lse: Tensor, lse: Tensor, magnitude: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The list of pairs that carry at least the threshold, and the mass of the others. The host does not wait.

    Args:
        block_lse, lse, magnitude, threshold: float32 and contiguous, `[N, blocks]`, `[N]`, `[N]`, `[1]`.

    Returns:
        `starts [blocks spans + 1]` and `tokens [N blocks]`, int32, and `tail [N, blocks]`, float32.

    Raises:
        ValueError: N blocks is 2^31 or more, which an int32 place cannot hold.
    """
    count, blocks = block_lse.shape
    if count * blocks >= 2**31:
        raise ValueError(
            f"hidden: a tail-corrected backward takes at most {(2**31 - 1) // blocks} tokens that count of a "
            f"vocabulary of {blocks} blocks of {PAIR_BLOCK}, got {count}"
        )
    spans = triton.cdiv(count, PAIR_SPAN)
    tail = torch.empty_like(block_lse)
    starts = torch.zeros(blocks * spans + 1, dtype=torch.int32, device=lse.device)
    counts = torch.empty(blocks * spans, dtype=torch.int32, device=lse.device)
    tokens = torch.empty(count * blocks, dtype=torch.int32, device=lse.device)
    inputs, sizes = (block_lse, lse, magnitude, threshold), (count, blocks, PAIR_SPAN, ROUTE_BLOCKS)
    grid = (triton.cdiv(blocks, ROUTE_BLOCKS), spans)
    with configs.on_device(lse):
        route_kernel[grid](*inputs, tail, counts, None, None, *sizes, **configs.FUSED)
        torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
        route_kernel[grid](*inputs, None, None, starts, tokens, *sizes, **configs.FUSED)
    return starts, tokens, tail


def listed_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    factor: Tensor,
    starts: Tensor,
    tokens: Tensor,
    first: int,
    count: int,
    out: Tensor,
    *,
    slope: float,
) -> None:
    """Writes `out[r] = factor slope p` for the listed pairs of blocks `[first, first + count)`; 0 at a target.

    Args:
        hidden, weight: `[N, H]`, `[V, H]`, any strides. bias: `[V]` or None, contiguous. targets: `[N]` int64.
        lse, factor: `[N]` float32. p is `e^(z - lse)`; factor is lse's upstream gradient less logprob's.
        starts, tokens: the list, from `route`.
        out: `[N count, PAIR_BLOCK]`. Row 0 is the first pair of block `first`. Columns beyond V are 0. Rows beyond the
            list are not written.
        slope: dz/ds.
    """
    config = configs.tile(hidden, rich=True)
    config = replace(config, BLOCK_V=min(config.BLOCK_V, PAIR_BLOCK))
    grid = (triton.cdiv(hidden.shape[0], config.BLOCK_N) * (PAIR_BLOCK // config.BLOCK_V), count)
    with configs.on_device(hidden):
        listed_gradient_kernel[grid](
            hidden, weight, bias, targets, lse, factor, starts, tokens, out, hidden.shape[0], *weight.shape, first,
            triton.cdiv(hidden.shape[0], PAIR_SPAN), *hidden.stride(), *weight.stride(), slope,
            BLOCK=PAIR_BLOCK, PRECISION=configs.precision(hidden.dtype), **config.ungrouped,
        )  # fmt: skip


def add_weight(g: Tensor, hidden: Tensor, starts: Tensor, tokens: Tensor, first: int, count: int, out: Tensor) -> None:
    """`out [V, H] += g^T hidden` over the pairs of blocks `[first, first + count)`; `out` is float32, contiguous."""
    config, spans = configs.listed_tile(hidden, "d_weight"), triton.cdiv(hidden.shape[0], PAIR_SPAN)
    grid = (triton.cdiv(hidden.shape[1], config.BLOCK_H), count * (PAIR_BLOCK // config.BLOCK_V))
    with configs.on_device(hidden):
        d_weight_kernel[grid](
            g, hidden, starts, tokens, out, *out.shape, first, spans, *hidden.stride(),
            BLOCK=PAIR_BLOCK, PRECISION=configs.precision(hidden.dtype), **config.ungrouped,
        )  # fmt: skip


def add_hidden(
    g: Tensor, weight: Tensor, starts: Tensor, tokens: Tensor, first: int, count: int, out: Tensor, *, ordered: bool
) -> None:
    """`out [N, H] += g weight` over the pairs of blocks `[first, first + count)`; `out` is float32, contiguous.

    With `ordered` the sum is in the order of the blocks: the same bits every time, for more work. Otherwise atomics add
    in any order.
    """
    config = configs.listed_tile(weight, "ordered" if ordered else "d_hidden")
    spans, tiles_h = triton.cdiv(len(out), PAIR_SPAN), triton.cdiv(out.shape[1], config.BLOCK_H)
    options = {"BLOCK": PAIR_BLOCK, "PRECISION": configs.precision(weight.dtype), **config.ungrouped}
    tiles_n = triton.cdiv(len(out), config.BLOCK_N)
    with configs.on_device(weight):
        if not ordered:
            d_hidden_kernel[min(tiles_n, LIST_PROGRAMS), count, tiles_h](
                g, weight, starts, tokens, out, *weight.shape, first, spans, *weight.stride(), **options
            )
            return
        place = torch.full((count, spans * PAIR_SPAN), -1, dtype=torch.int32, device=out.device)
        place_kernel[spans, count](starts, tokens, place, first, spans, SPAN=PAIR_SPAN, **configs.FUSED)
        ordered_d_hidden_kernel[tiles_h, tiles_n](
            g, weight, place, *_alive(starts, first, count, spans), out, len(out), *weight.shape, first, count, spans,
            *weight.stride(), SPAN=PAIR_SPAN, **options,
        )  # fmt: skip


def _alive(starts: Tensor, first: int, count: int, spans: int) -> tuple[Tensor, Tensor]:
    """The blocks that list a token of each span, `[spans, count]` int32, and their number, `[spans]`.

    A row has these blocks in order, counted from `first`, and then the other blocks.
    """
    pairs = starts[first * spans : (first + count) * spans + 1].diff().view(count, spans).T
    alive = (pairs > 0).to(torch.int32).contiguous()
    return alive.argsort(descending=True, stable=True).to(torch.int32), alive.sum(1, dtype=torch.int32)
