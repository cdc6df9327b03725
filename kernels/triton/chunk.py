"""Row operations on a chunk of raw products `[n, V]` from a GEMM: statistics, and the gradient in their place.

Statistics read the chunk once. The gradient reads and writes it once. Together they make a single pass
(`backends/exact/sweep.py`).

A program owns its rows. The gradient may be narrower than the products and still take their place: all threads read a
block of a row before any of them writes, and the gradient lies at or before the products it is made of.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import OUTPUTS, LogitTransform, TokenStats
from . import configs
from .logprobs import RowFactors, bends, joined
from .tile import absorb, gradient, store_block_lse, store_finished, transform, with_bias


@triton.jit
def load_raw(p_raw, o_n, o_v, mask, stride_n, stride_v):
    """Raw products, float32 `[BLOCK_N, BLOCK_V]`, and 0 where the mask is false."""
    o_raw = o_n[:, None].to(tl.int64) * stride_n + o_v[None, :].to(tl.int64) * stride_v
    return tl.load(p_raw + o_raw, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_target_raw(p_raw, p_bias, o_n, target, m_n, stride_n, stride_v):
    """The raw product of each row's target with its bias, float32 `[BLOCK_N]`."""
    o_raw = o_n.to(tl.int64) * stride_n + target.to(tl.int64) * stride_v
    s = tl.load(p_raw + o_raw, mask=m_n, other=0.0).to(tl.float32)
    if p_bias is not None:
        s += tl.load(p_bias + target, mask=m_n, other=0.0).to(tl.float32)
    return s


@triton.jit(do_not_specialize=["N"])
def measure_kernel(
    p_raw,
    p_bias,
    p_targets,
    p_logprob,
    p_lse,
    p_entropy,
    p_mean_logit,
    p_correct,
    p_log_sum_sq,
    p_block_lse,
    N,
    V,
    stride_n,
    stride_v,
    slope,
    inner,
    outer,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Eqs. 1 to 10 of whole rows."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    target = tl.load(p_targets + o_n, mask=m_n, other=0).to(tl.int32)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    sum_z = tl.zeros((BLOCK_N,), tl.float32)
    for v in range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        m_v = (o_v < V)[None, :]
        s = load_raw(p_raw, o_n, o_v, m_v & m_n[:, None], stride_n, stride_v)
        z, _ = transform(with_bias(s, p_bias, o_v, V), slope, inner, outer)
        absent = (o_v[None, :] == target[:, None]) | (m_v == 0)
        if p_mean_logit is not None:
            sum_z += tl.sum(tl.where(absent, 0.0, z), 1)
        z = tl.where(absent, float("-inf"), z)
        if p_block_lse is not None:
            store_block_lse(z, p_block_lse, o_n, v // BLOCK, m_n, tl.cdiv(V, BLOCK), BLOCK)
        top, total, moment, square = absorb(
            z, top, total, moment, square, p_entropy is not None, p_log_sum_sq is not None
        )  # fmt: skip
    z_t, _ = transform(load_target_raw(p_raw, p_bias, o_n, target, m_n, stride_n, stride_v), slope, inner, outer)
    store_finished(
        top, total, moment, square, sum_z, z_t, o_n, m_n, V,
        p_logprob, p_lse, p_entropy, p_mean_logit, p_correct, p_log_sum_sq,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def gradient_in_place_kernel(
    p_raw,
    p_bias,
    p_targets,
    p_lse,
    p_factor,
    p_entropy_factor,
    p_mean_factor,
    p_gradient,  # where p_raw is, or elsewhere
    N,
    V,
    stride_n,
    stride_v,
    stride_gn,
    stride_gv,
    slope,
    inner,
    outer,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Eqs. 11 and 13 of whole rows; 0 at the target."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    target = tl.load(p_targets + o_n, mask=m_n, other=0).to(tl.int32)
    for v in range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        mask = (o_v < V)[None, :] & m_n[:, None]
        s = load_raw(p_raw, o_n, o_v, mask, stride_n, stride_v)
        tl.debug_barrier()  # the whole block is read before any thread writes over it
        z, c = transform(with_bias(s, p_bias, o_v, V), slope, inner, outer)
        g = gradient(z, c, p_lse, p_factor, p_entropy_factor, p_mean_factor, o_n, m_n)
        g = tl.where(o_v[None, :] == target[:, None], 0.0, g)
        p_out = p_gradient + o_n[:, None].to(tl.int64) * stride_gn + o_v[None, :].to(tl.int64) * stride_gv
        tl.store(p_out, g.to(p_gradient.dtype.element_ty), mask=mask)


def measure_chunk(
    raw: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    transform: LogitTransform,
    outputs: tuple[str, ...],
    block: int | None = None,
) -> tuple[TokenStats, Tensor | None]:
    """Statistics of raw products `[n, V]` of any floating dtype and strides, which are not changed.

    `outputs`, `block` and the results are those of `logprobs.fused_forward`.
    """
    count, vocabulary = raw.shape
    config = configs.row(raw.device)
    part = min(block or config.BLOCK_V, config.BLOCK_V)
    wanted = {"logprob", "lse", *outputs}
    stats = TokenStats(**{name: raw.new_empty(count, dtype=torch.float32) for name in OUTPUTS if name in wanted})
    parts = None if block is None else raw.new_empty(count, triton.cdiv(vocabulary, part), dtype=torch.float32)
    if count:
        with configs.on_device(raw):
            measure_kernel[(triton.cdiv(count, config.BLOCK_N),)](
                raw, bias, targets, *stats[: len(OUTPUTS)], parts, count, vocabulary, *raw.stride(), *bends(transform),
                BLOCK=part, **config.blocks,
            )  # fmt: skip
    return stats, joined(parts, part, block)


def gradient_(
    raw: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: RowFactors,
    *,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> Tensor:
    """Turns raw products `[n, V]` into `dL/ds` in `dtype`, in the products' memory; 0 at the target.

    A narrower dtype takes the first part of every row, so each row must be contiguous. If rows are not (a CPU's chunks
    are vocabulary-major), the result has memory of its own.
    """
    out = raw if dtype == raw.dtype else narrowed(raw, dtype)
    config = configs.row(raw.device)
    if len(raw):
        with configs.on_device(raw):
            gradient_in_place_kernel[(triton.cdiv(len(raw), config.BLOCK_N),)](
                raw, bias, targets, *rows, out, *raw.shape, *raw.stride(), *out.stride(), *bends(transform),
                **config.blocks,
            )  # fmt: skip
    return out


def narrowed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of another dtype in the place of the raw products, or in memory of its own if their rows are strided."""
    if raw.stride(1) == 1 and dtype.itemsize < raw.dtype.itemsize:
        return raw.view(dtype)[:, : raw.shape[1]]
    return torch.empty_like(raw, dtype=dtype)
