"""Statistics of tokens from tiles of logits that never leave the chip, and the tile of gradients for a backward.

Forward: a program owns a tile of tokens and a split of the vocabulary. It walks the split's tiles and stores the sums
of eq. 3 for each row. `merge_kernel` joins the splits. Backward: `gradient_kernel` computes a tile again and writes its
`dL/ds`, rounded once, for the two products, which are cuBLAS's (kernels/triton/README.md says why).
No kernel here adds into memory that another program writes: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import OUTPUTS, LogitTransform, TokenStats
from . import configs
from .tile import absorb, gradient, grouped, join, store_block_lse, store_finished, tile_products, transform

# ---------------------------------------------------------------------------------------------------------------------
# Device


@triton.jit(do_not_specialize=["N", "V", "splits", "tiles_per_split"])
def forward_kernel(
    p_hidden,
    p_weight,
    p_bias,
    p_targets,
    p_top,  # [splits, N]; so are the next four, or None
    p_total,
    p_moment,
    p_square,
    p_sum,
    p_target_logit,  # [N]
    p_block_lse,  # [N, blocks] or None
    N,
    V,
    H,
    splits,
    tiles_per_split,
    stride_hn,
    stride_hh,
    stride_wv,
    stride_wh,
    slope,
    inner,
    outer,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eqs. 1 and 3 of a tile of tokens over a split of the vocabulary."""
    i_n, i_split = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), splits, GROUP_N)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    target = tl.load(p_targets + o_n, mask=m_n, other=-1).to(tl.int32)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    sum_z = tl.zeros((BLOCK_N,), tl.float32)
    z_t = tl.zeros((BLOCK_N,), tl.float32)
    first = i_split * tiles_per_split
    stop = tl.minimum(first + tiles_per_split, tl.cdiv(V, BLOCK_V))
    for i_v in range(first, stop):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        s = tile_products(
            p_hidden, p_weight, p_bias, o_n, o_v, N, V, H, stride_hn, stride_hh, stride_wv, stride_wh,
            BLOCK_H, PRECISION,
        )  # fmt: skip
        z, _ = transform(s, slope, inner, outer)
        m_v = (o_v < V)[None, :]
        here = o_v[None, :] == target[:, None]
        z_t += tl.sum(tl.where(here, z, 0.0), 1)
        if p_sum is not None:
            sum_z += tl.sum(tl.where(here | (m_v == 0), 0.0, z), 1)
        z = tl.where(here | (m_v == 0), float("-inf"), z)
        if p_block_lse is not None:
            store_block_lse(z, p_block_lse, o_n, i_v * (BLOCK_V // BLOCK), m_n, tl.cdiv(V, BLOCK), BLOCK)
        top, total, moment, square = absorb(
            z, top, total, moment, square, p_moment is not None, p_square is not None
        )  # fmt: skip
    o_out = i_split.to(tl.int64) * N + o_n
    tl.store(p_top + o_out, top, mask=m_n)
    tl.store(p_total + o_out, total, mask=m_n)
    if p_moment is not None:
        tl.store(p_moment + o_out, moment, mask=m_n)
    if p_square is not None:
        tl.store(p_square + o_out, square, mask=m_n)
    if p_sum is not None:
        tl.store(p_sum + o_out, sum_z, mask=m_n)
    ours = (target >= first * BLOCK_V) & (target < stop * BLOCK_V)
    tl.store(p_target_logit + o_n, z_t, mask=m_n & ours)


@triton.jit(do_not_specialize=["N", "V", "splits"])
def merge_kernel(
    p_top,
    p_total,
    p_moment,
    p_square,
    p_sum,
    p_target_logit,
    p_logprob,
    p_lse,
    p_entropy,
    p_mean_logit,
    p_correct,
    p_log_sum_sq,
    N,
    V,
    splits,
    BLOCK_N: tl.constexpr,
):
    """Eqs. 4 to 10 of rows from the sums of their splits, in the order of the vocabulary."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    sum_z = tl.zeros((BLOCK_N,), tl.float32)
    zero = tl.zeros((BLOCK_N,), tl.float32)
    for i_split in range(splits):
        o_in = tl.full((), 1, tl.int64) * i_split * N + o_n
        moment2 = zero
        square2 = zero
        if p_moment is not None:
            moment2 = tl.load(p_moment + o_in, mask=m_n, other=0.0)
        if p_square is not None:
            square2 = tl.load(p_square + o_in, mask=m_n, other=0.0)
        if p_sum is not None:
            sum_z += tl.load(p_sum + o_in, mask=m_n, other=0.0)
        top2 = tl.load(p_top + o_in, mask=m_n, other=0.0)
        total2 = tl.load(p_total + o_in, mask=m_n, other=1.0)
        top, total, moment, square = join(top, total, moment, square, top2, total2, moment2, square2)
    z_t = tl.load(p_target_logit + o_n, mask=m_n, other=0.0)
    store_finished(
        top, total, moment, square, sum_z, z_t, o_n, m_n, V,
        p_logprob, p_lse, p_entropy, p_mean_logit, p_correct, p_log_sum_sq,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "V", "first_v"])
def gradient_kernel(
    p_hidden,
    p_weight,
    p_bias,
    p_targets,
    p_lse,  # [N], as the next three
    p_factor,
    p_entropy_factor,
    p_mean_factor,
    p_gradient,  # [N, width] with width a multiple of BLOCK_V
    p_column_sum,  # [tiles of tokens, width] or None
    N,
    V,
    H,
    first_v,
    stride_hn,
    stride_hh,
    stride_wv,
    stride_wh,
    width,
    slope,
    inner,
    outer,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Eqs. 11 and 13 of a tile: tokens by the V columns from `first_v` on, where weight and bias begin.

    The target's entry is 0. So are columns beyond V, because a store without a mask on columns is a wide one.
    """
    i_n, i_v = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP_N)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_n = o_n < N
    s = tile_products(
        p_hidden, p_weight, p_bias, o_n, o_v, N, V, H, stride_hn, stride_hh, stride_wv, stride_wh, BLOCK_H, PRECISION
    )
    z, c = transform(s, slope, inner, outer)
    target = (tl.load(p_targets + o_n, mask=m_n, other=-1) - first_v).to(tl.int32)
    g = gradient(z, c, p_lse, p_factor, p_entropy_factor, p_mean_factor, o_n, m_n)
    absent = (o_v >= V)[None, :] | (m_n == 0)[:, None] | (o_v[None, :] == target[:, None])
    g = tl.where(absent, 0.0, g)
    p_out = p_gradient + o_n[:, None].to(tl.int64) * width + o_v[None, :]
    tl.store(p_out, g.to(p_gradient.dtype.element_ty), mask=m_n[:, None])
    if p_column_sum is not None:
        tl.store(p_column_sum + i_n.to(tl.int64) * width + o_v, tl.sum(g, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Host


class RowFactors(NamedTuple):
    """The factors of the gradient of rows of logits, `[N]` float32 each (see `tile.gradient`)."""

    lse: Tensor
    factor: Tensor
    entropy_factor: Tensor | None
    mean_factor: Tensor | None  # only under a softcap: without one, two products add the part of m / V


def bends(transform: LogitTransform) -> tuple[float, float | None, float | None]:
    """(slope, inner, outer) of `tile.transform`."""
    if transform.softcap is None:
        return transform.slope, None, None
    return transform.slope, transform.logit_scale / transform.softcap, transform.softcap / transform.temperature


def fused_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform,
    outputs: tuple[str, ...],
    block: int | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Statistics of tokens, and with `block` the logsumexps of the vocabulary's blocks.

    Args:
        hidden, weight: `[N, H]`, `[V, H]`, any strides. bias: `[V]` or None, contiguous. targets: `[N]`.
        outputs: names of the statistics. logprob and lse are always there.
        block: a power of two, or None.

    Returns:
        The statistics, and float32 `[N, ceil(V / block)]` or None. A block's logsumexp leaves the target's entry out,
        so it is -inf for a block of nothing else.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    rich = transform.softcap is not None or block is not None or bool({"entropy", "log_sum_sq"} & set(outputs))
    config = configs.tile(hidden, rich=rich)
    part = min(block or config.BLOCK_V, config.BLOCK_V)  # a block wider than a tile is joined from its parts
    wanted = {"logprob", "lse", *outputs}
    stats = TokenStats(**{name: _floats(hidden, tokens) for name in OUTPUTS if name in wanted})
    part_lse = None if block is None else _floats(hidden, tokens, triton.cdiv(vocabulary, part))
    if not tokens:
        return stats, joined(part_lse, part, block)
    tiles_n = triton.cdiv(tokens, config.BLOCK_N)
    splits, each = configs.split(tiles_n, triton.cdiv(vocabulary, config.BLOCK_V), configs.processors(hidden.device))
    needed = (True, True, "entropy" in wanted, "log_sum_sq" in wanted, "mean_logit" in wanted)
    parts = [_floats(hidden, splits, tokens) if need else None for need in needed]
    target_logit = _floats(hidden, tokens)
    with configs.on_device(hidden):
        forward_kernel[(tiles_n * splits,)](
            hidden, weight, bias, targets, *parts, target_logit, part_lse,
            tokens, vocabulary, hidden.shape[1], splits, each, *hidden.stride(), *weight.stride(), *bends(transform),
            BLOCK=part, PRECISION=configs.precision(hidden.dtype), **config.blocks,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(tokens, 128),)](
            *parts, target_logit, *stats[: len(OUTPUTS)], tokens, vocabulary, splits, BLOCK_N=128, **configs.FUSED
        )  # fmt: skip
    return stats, joined(part_lse, part, block)


def joined(part_lse: Tensor | None, part: int, block: int | None) -> Tensor | None:
    """Logsumexps of blocks from those of their parts, `[N, parts]`. If a part is a whole block, nothing is done."""
    if part_lse is None or block is None or block == part:
        return part_lse
    ragged = -part_lse.shape[1] % (block // part)
    whole = torch.nn.functional.pad(part_lse, (0, ragged), value=-torch.inf)
    return whole.unflatten(1, (-1, block // part)).logsumexp(-1)


def gradient_config(hidden: Tensor, rows: RowFactors, transform: LogitTransform) -> configs.TileConfig:
    """The tile of `gradient_tile`."""
    return configs.tile(hidden, rich=transform.softcap is not None or rows.entropy_factor is not None)


def gradient_tile(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: RowFactors,
    first_v: int,
    out: Tensor,
    *,
    transform: LogitTransform,
    config: configs.TileConfig,
    column_sum: Tensor | None = None,
) -> None:
    """Writes `out [N, width] = dL/ds` for `weight [V, H]`, the vocabulary from `first_v` on; 0 at a target.

    Args:
        config: the tile, from `gradient_config`.
        out: contiguous, any floating dtype. Its width is a multiple of BLOCK_V, and columns beyond V become 0.
        column_sum: `[ceil(N / BLOCK_N), width]` float32, or None. It receives the columns' sums over each tile of
            tokens, before `out` is rounded.
    """
    tokens, part = hidden.shape[0], weight.shape[0]
    assert out.shape[1] % config.BLOCK_V == 0 and part <= out.shape[1]
    grid = (triton.cdiv(tokens, config.BLOCK_N) * triton.cdiv(part, config.BLOCK_V),)
    with configs.on_device(hidden):
        gradient_kernel[grid](
            hidden, weight, bias, targets, *rows, out, column_sum,
            tokens, part, hidden.shape[1], first_v, *hidden.stride(), *weight.stride(), out.shape[1],
            *bends(transform), PRECISION=configs.precision(hidden.dtype), **config.blocks,
        )  # fmt: skip


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
