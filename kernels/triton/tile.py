"""The mathematics of a tile of logits, shared by every Triton kernel: products, transform, statistics, gradient.

    tile_products -> s [BLOCK_N, BLOCK_V] -> transform -> z -> absorb (per tile) -> join (per part) -> finish (per row)
                                                           -> gradient (dL/ds)

Equation numbers are those of kernels/MATH.md, names those of kernels/README.md. All arithmetic is float32. An argument
that is None (a bias, a softcap, a statistic that nobody asked for) is a compile-time fact: its code is not there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _probe():
    pass


#: Whether these kernels run in Triton's interpreter: TRITON_INTERPRET was set when Triton was imported.
INTERPRETED = tl.constexpr(not isinstance(_probe, triton.runtime.JITFunction))


# ---------------------------------------------------------------------------------------------------------------------
# Functions of one number


@triton.jit
def tanh(x):
    """`tanh(x)` within 16 ulp. Near 0, where `1 - 2 / (e^2x + 1)` cancels, it is a series to x^5, in few registers."""
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    y = x * x
    near = a + a * y * (y * 0.13333334 - 0.33333334)
    magnitude = tl.where(a < 0.1, near, far)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def log1p(x):
    """`log(1 + x)` for x >= -1; near 0 by the series of the inverse hyperbolic tangent, to s^13."""
    s = x / (2.0 + x)
    t = s * s
    series = 1.0 + t * (1.0 / 3.0 + t * (0.2 + t * (1.0 / 7.0 + t * (1.0 / 9.0 + t * (1.0 / 11.0 + t * (1.0 / 13.0))))))
    return tl.where(tl.abs(x) < 0.4, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def log1p_nonnegative(x):
    """`log(1 + x)` for x >= 0. The quotient takes the rounding of 1 + x back."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


# ---------------------------------------------------------------------------------------------------------------------
# Where a tile is


@triton.jit
def grouped(i_program, tiles_n, columns, GROUP_N: tl.constexpr):
    """The (tile of tokens, column of tiles) of a program.

    GROUP_N tiles of tokens share a column before the next column begins. So programs that run together read few rows of
    hidden and of weight, and the L2 cache holds both.
    """
    i_group = i_program // (GROUP_N * columns)
    first = i_group * GROUP_N
    size = tl.minimum(tiles_n - first, GROUP_N)
    i_inside = i_program % (GROUP_N * columns)
    return first + i_inside % size, i_inside // size


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in float32. The interpreter keeps bfloat16 as raw 16-bit integers: upcast there, and there only."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_products(
    p_hidden,
    p_weight,
    p_bias,
    o_n,
    o_v,
    N,
    V,
    H,
    stride_hn,
    stride_hh,
    stride_wv,
    stride_wh,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Raw products s = `hidden[o_n] @ weight[o_v].T + bias[o_v]`, float32 `[BLOCK_N, BLOCK_V]`.

    Rows beyond N and columns beyond V repeat the last one, and the caller masks them. PRECISION is "tf32" or "ieee"
    for float32 inputs. The loop is the whole GEMM.
    """
    o_h = tl.arange(0, BLOCK_H)
    r_n = tl.minimum(o_n, N - 1).to(tl.int64)
    r_v = tl.minimum(o_v, V - 1).to(tl.int64)
    p_x = p_hidden + r_n[:, None] * stride_hn + o_h[None, :].to(tl.int64) * stride_hh  # [BLOCK_N, BLOCK_H]
    p_w = p_weight + r_v[:, None] * stride_wv + o_h[None, :].to(tl.int64) * stride_wh  # [BLOCK_V, BLOCK_H]
    step = tl.full((), BLOCK_H, tl.int64)
    acc = tl.zeros((o_n.shape[0], o_v.shape[0]), dtype=tl.float32)
    for h in range(0, H, BLOCK_H):
        m_h = o_h[None, :] < H - h
        b_x = tl.load(p_x, mask=m_h, other=0.0)
        b_w = tl.load(p_w, mask=m_h, other=0.0)
        acc = dot(b_x, tl.trans(b_w), acc, PRECISION)
        p_x += step * stride_hh
        p_w += step * stride_wh
    return with_bias(acc, p_bias, o_v, V)


@triton.jit
def with_bias(s, p_bias, o_v, V):
    """`s + bias[o_v]`; the bias is contiguous."""
    if p_bias is not None:
        s += tl.load(p_bias + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    return s


# ---------------------------------------------------------------------------------------------------------------------
# Logits


@triton.jit
def transform(s, slope, inner, outer):
    """Eqs. 1 and 2: logits z and their derivative c = dz/ds.

    slope = scale / temperature, inner = scale / softcap, outer = softcap / temperature. Without a softcap
    inner is None, and c is the number slope.
    """
    if inner is None:
        z = s * slope
        c = slope
    else:
        bend = tanh(s * inner)
        z = tl.where(s == float("-inf"), float("-inf"), bend * outer)
        c = (1.0 - bend * bend) * slope
    return z, c


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@triton.jit
def anchor(top):
    """A finite number to subtract from logits: the largest, or 0 if all are -inf."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def absorb(z, top, total, moment, square, MOMENT: tl.constexpr, SQUARE: tl.constexpr):
    """Eqs. 3 and 4: adds the columns of `z [BLOCK_N, BLOCK_V]` to the rows' sums M, A, B, C, `[BLOCK_N]` each.

    A column that does not count is -inf. B changes only with MOMENT, and C only with SQUARE.
    """
    new = tl.maximum(top, tl.max(z, 1))
    shifted = z - anchor(new)[:, None]
    e = tl.exp(shifted)
    shift = tl.where(top == float("-inf"), 0.0, top - anchor(new))  # an empty part has A = 0
    factor = tl.exp(shift)
    if MOMENT:
        moment = factor * (moment + shift * total) + tl.sum(tl.where(z == float("-inf"), 0.0, e * shifted), 1)
    if SQUARE:
        square = factor * factor * square + tl.sum(e * e, 1)
    total = factor * total + tl.sum(e, 1)
    return new, total, moment, square


@triton.jit
def join(top1, total1, moment1, square1, top2, total2, moment2, square2):
    """Eq. 4 for two parts of a row."""
    top = tl.maximum(top1, top2)
    shift1 = tl.where(top1 == float("-inf"), 0.0, top1 - anchor(top))
    shift2 = tl.where(top2 == float("-inf"), 0.0, top2 - anchor(top))
    x1 = tl.exp(shift1)
    x2 = tl.exp(shift2)
    moment = x1 * (moment1 + shift1 * total1) + x2 * (moment2 + shift2 * total2)
    return top, x1 * total1 + x2 * total2, moment, x1 * x1 * square1 + x2 * x2 * square2


@triton.jit
def finish(top, total, moment, square, z_t):
    """Eqs. 5 to 8 and 10: logprob, lse, entropy, log_sum_sq and correct of a row.

    The sums are those of all columns but the target's, and z_t is the target's logit. If the target leads, the others'
    small share is never added to its 1, in which it would be lost.
    """
    leads = z_t >= top
    d = tl.where(top == float("-inf"), 0.0, z_t - anchor(top))
    share = total * tl.exp(-tl.maximum(d, 0.0))  # the others' sum, relative to the larger of top and z_t
    own = tl.where(z_t == z_t, tl.exp(tl.minimum(d, 0.0)), z_t)  # the target's term, likewise; a minimum drops a NaN
    x = tl.where(total == 0.0, top - z_t, tl.log(total) - d)  # o - z_t
    logprob = -(tl.maximum(x, 0.0) + log1p_nonnegative(tl.exp(-tl.abs(x))))
    log_total = tl.where(leads, log1p_nonnegative(share), tl.log(total + own))
    lse = tl.maximum(top, z_t) + log_total
    ours = tl.where(own == 0.0, 0.0, own * tl.minimum(d, 0.0))
    moments = tl.exp(-tl.maximum(d, 0.0)) * (moment - tl.maximum(d, 0.0) * total) + ours
    entropy = log_total - moments / (share + own)
    squares = tl.exp(-2.0 * tl.maximum(d, 0.0)) * square + own * own
    log_sum_sq = tl.log(squares) - 2.0 * log_total
    correct = tl.where(leads & (total == total), 1.0, 0.0)
    return logprob, lse, entropy, log_sum_sq, correct


@triton.jit
def store_finished(
    top, total, moment, square, total_logit, z_t, o_n, m_n, V,
    p_logprob, p_lse, p_entropy, p_mean_logit, p_correct, p_log_sum_sq,
):  # fmt: skip
    """Stores eqs. 5 to 10 of the rows `o_n`, if asked for. `total_logit` is the sum of all logits but the target's."""
    logprob, lse, entropy, log_sum_sq, correct = finish(top, total, moment, square, z_t)
    tl.store(p_logprob + o_n, logprob, mask=m_n)
    tl.store(p_lse + o_n, lse, mask=m_n)
    if p_entropy is not None:
        tl.store(p_entropy + o_n, entropy, mask=m_n)
    if p_mean_logit is not None:
        tl.store(p_mean_logit + o_n, (total_logit + z_t) / V, mask=m_n)
    if p_correct is not None:
        tl.store(p_correct + o_n, correct, mask=m_n)
    if p_log_sum_sq is not None:
        tl.store(p_log_sum_sq + o_n, log_sum_sq, mask=m_n)


@triton.jit
def store_block_lse(z, p_block_lse, o_n, i_first, m_n, blocks, BLOCK: tl.constexpr):
    """Stores the logsumexp of every BLOCK columns of `z [BLOCK_N, BLOCK_V]`, from column `i_first` of `[N, blocks]` on.

    The output is contiguous. Columns of z that do not count, such as the target's, are -inf.
    """
    PARTS: tl.constexpr = z.shape[1] // BLOCK
    parts = tl.reshape(z, (z.shape[0], PARTS, BLOCK))
    top = tl.max(parts, 2)
    total = tl.sum(tl.exp(parts - anchor(top)[:, :, None]), 2)
    o_b = i_first + tl.arange(0, PARTS)
    p_out = p_block_lse + o_n[:, None].to(tl.int64) * blocks + o_b[None, :]
    tl.store(p_out, top + tl.log(total), mask=m_n[:, None] & (o_b < blocks)[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Gradient


@triton.jit
def gradient(z, c, p_lse, p_factor, p_entropy_factor, p_mean_factor, o_n, m_n):
    """Eqs. 11 and 13 for j != t: `dL/ds = c (p (factor - entropy_factor log p) + mean_factor)`.

    The factors are `[N]`, and read at the rows `o_n`: factor = b - a - e entropy, entropy_factor = e, mean_factor =
    m / V. The last two may be None.
    """
    lse = tl.load(p_lse + o_n, mask=m_n, other=0.0)
    factor = tl.load(p_factor + o_n, mask=m_n, other=0.0)
    log_p = z - lse[:, None]
    if p_entropy_factor is None:
        g = tl.exp(log_p) * factor[:, None]
    else:
        entropy_factor = tl.load(p_entropy_factor + o_n, mask=m_n, other=0.0)
        g = tl.exp(log_p) * (factor[:, None] - entropy_factor[:, None] * log_p)
        g = tl.where(z == float("-inf"), 0.0, g)
    if p_mean_factor is not None:
        g += tl.load(p_mean_factor + o_n, mask=m_n, other=0.0)[:, None]
    return g * c
