"""Row operations of a divergence on chunks of raw products of both heads: values, and the gradients in place.

A program owns some rows, of the model's products and of the reference's. It walks them two or three times: for both
normalisers, for the sums of v, u and w, and to write the gradients. So no sum over the vocabulary is needed between
programs. `backends/exact/divergence.py` derives the elementwise functions v, u and w.

The GEMMs are cuBLAS's. Tiles of both heads in registers would save the chunk's way through memory, which for values is
24 bytes an entry (two floats written, and read twice). But every kind needs the normalisers before its sums, so all
kinds but the KLs would multiply twice. At H = 4096 two products are 16384 flops an entry, and take longer than 24 bytes
do: 20 ps against 7 ps at 800 Tflop/s and 3.3 TB/s. Both figures are assumed, neither is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, assert_never

import triton
import triton.language as tl
from torch import Tensor

from ...types import DivergenceOptions
from . import configs
from .chunk import load_raw, narrowed
from .logprobs import bends
from .tile import absorb, anchor, log1p, transform, with_bias

if TYPE_CHECKING:
    from ...backends.interface import RawSide

# ---------------------------------------------------------------------------------------------------------------------
# Functions of one number


@triton.jit
def expm1(x):
    """`exp(x) - 1`. Near 0, where the difference cancels, it is the series to x^9."""
    tail = 1.0 + x * (1.0 / 7.0) * (1.0 + x * (1.0 / 8.0) * (1.0 + x * (1.0 / 9.0)))
    series = 1.0 + x * 0.25 * (1.0 + x * 0.2 * (1.0 + x * (1.0 / 6.0) * tail))
    near = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * series))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0)


@triton.jit
def log_mixture(weight, r):
    """`log(weight exp(r) + 1 - weight)`."""
    # tl.where keeps a NaN, which a minimum would drop
    return log1p(weight * expm1(tl.where(r > 80.0, 80.0, r))) + tl.where(r > 80.0, r - 80.0, 0.0)


@triton.jit
def times(probability, x):
    """`probability * x`, and 0 at probability 0, where x may be infinite."""
    return tl.where(probability == 0.0, 0.0, probability * x)


# ---------------------------------------------------------------------------------------------------------------------
# The kinds


@triton.jit
def summands(log_p, log_q, x, scale, FORM: tl.constexpr):
    """v, u and w of an entry, for the reference's P and the model's Q; x is the parameter of the form."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    r = tl.where(log_p == log_q, 0.0, log_p - log_q)
    if FORM == "reverse_kl":
        e = times(q, r)
        v = -e
        u = -e
        w = -q
    elif FORM == "power":
        exponent = x * r
        far = tl.exp(x * log_p + (1.0 - x) * log_q) - q
        e = tl.where(exponent > 30.0, far, q * expm1(exponent)) * (scale / x)
        v = e / (x - 1.0)
        u = -e
        w = (scale * q + x * e) / (x - 1.0)
    elif FORM == "symmetric_kl":
        e = times(q, r) * x
        w = times(p, r) * (1.0 - x)
        v = w - e
        u = (x - 1.0) * p - e
        w -= x * q
    elif FORM == "js":
        u = times(q, log_mixture(x, r)) * ((x - 1.0) * scale)
        w = times(p, log_mixture(1.0 - x, -r)) * (-x * scale)
        v = u + w
    elif FORM == "skew_forward_kl":
        mixture = log_mixture(1.0 - x, -r)
        v = -times(p, mixture)
        u = (x - 1.0) * p * tl.exp(-log_mixture(x, r))
        w = -times(p, mixture + x * tl.exp(-mixture))
    elif FORM == "total_variation":
        half_sign = tl.where(r > 0.0, 0.5, tl.where(r < 0.0, -0.5, 0.0))
        v = tl.abs(p - q) * 0.5
        u = -q * half_sign
        w = p * half_sign
    else:
        tl.static_assert(FORM == "cross_entropy")
        v = -times(p, log_q)
        u = -p
        w = v
    return v, u, w


class Form(NamedTuple):
    """A kind of divergence, in the form that the kernel computes."""

    name: str
    exchanged: bool  # P and Q change places
    x: float = 0.0
    scale: float = 1.0


def form(options: DivergenceOptions) -> Form:
    """The kernel's form of a kind of divergence in `backends.exact.divergence.KINDS`."""
    match options.kind:
        case "js" if options.mixture not in (0, 1):
            w = options.mixture
            return Form("js", False, w, 1 / (w * (1 - w)) if options.normalized else 1.0)
        case "symmetric_kl" if options.mixture not in (0, 1):
            return Form("symmetric_kl", False, options.mixture)
        case "js" | "symmetric_kl":
            return _power(1 - options.mixture)
        case "skew_forward_kl" | "skew_reverse_kl" if options.skew != 0:
            return Form("skew_forward_kl", options.kind == "skew_reverse_kl", options.skew)
        case "forward_kl" | "skew_forward_kl":
            return _power(1.0)
        case "reverse_kl" | "skew_reverse_kl":
            return _power(0.0)
        case "total_variation" | "cross_entropy":
            return Form(options.kind, False)
        case "squared_hellinger":
            return _power(0.5, 0.25)
        case "pearson_chi2":
            return _power(-1.0, 2.0)
        case "neyman_chi2":
            return _power(2.0, 2.0)
        case "alpha":
            return _power(options.alpha)
    assert_never(options.kind)


def _power(a: float, scale: float = 1.0) -> Form:
    if a > 0.5:
        return _power(1 - a, scale)._replace(exchanged=True)
    return Form("reverse_kl", False) if abs(a) < 1e-12 else Form("power", False, a, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@triton.jit
def load_logits(p_raw, p_bias, o_n, o_v, N, V, stride_n, stride_v, slope, inner, outer):
    """Logits `[BLOCK_N, BLOCK_V]`, -inf beyond V, and their derivative for the raw products."""
    m_v = (o_v < V)[None, :]
    s = load_raw(p_raw, o_n, o_v, m_v & (o_n < N)[:, None], stride_n, stride_v)
    z, c = transform(with_bias(s, p_bias, o_v, V), slope, inner, outer)
    return tl.where(m_v, z, float("-inf")), c


@triton.jit
def normalizer(
    p_raw, p_bias, o_n, N, V, stride_n, stride_v, slope, inner, outer, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Each row's largest logit, and the logarithm of its sum of exponentials less that logit."""
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    unused = tl.zeros((BLOCK_N,), tl.float32)
    for v in range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        z, _ = load_logits(p_raw, p_bias, o_n, o_v, N, V, stride_n, stride_v, slope, inner, outer)
        top, total, _, _ = absorb(z, top, total, unused, unused, False, False)
    return anchor(top), tl.log(total)


@triton.jit
def store_gradient(p_gradient, share, log_probability, total, upstream, c, o_n, o_v, N, V, stride_n, stride_v):
    """Stores `upstream (share - probability total) c`, the gradient of one side."""
    g = (share - tl.exp(log_probability) * total[:, None]) * upstream[:, None] * c
    p_out = p_gradient + o_n[:, None].to(tl.int64) * stride_n + o_v[None, :].to(tl.int64) * stride_v
    tl.store(p_out, g.to(p_gradient.dtype.element_ty), mask=(o_v < V)[None, :] & (o_n < N)[:, None])


@triton.jit(do_not_specialize=["N"])
def divergence_kernel(
    p_raw_q,
    p_bias_q,
    p_gradient_q,  # where p_raw_q is, or elsewhere; None: not needed
    p_raw_p,
    p_bias_p,
    p_gradient_p,
    p_upstream,
    p_value,
    N,
    V,
    stride_qn,
    stride_qv,
    stride_gqn,
    stride_gqv,
    stride_pn,
    stride_pv,
    stride_gpn,
    stride_gpv,
    slope_q,
    inner_q,
    outer_q,
    slope_p,
    inner_p,
    outer_p,
    x,
    scale,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Values and gradients of whole rows for the model Q and the reference P."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    top_q, total_q = normalizer(
        p_raw_q, p_bias_q, o_n, N, V, stride_qn, stride_qv, slope_q, inner_q, outer_q, BLOCK_N, BLOCK_V
    )
    top_p, total_p = normalizer(
        p_raw_p, p_bias_p, o_n, N, V, stride_pn, stride_pv, slope_p, inner_p, outer_p, BLOCK_N, BLOCK_V
    )

    # The sums of v, u and w.
    sum_v = tl.zeros((BLOCK_N,), tl.float32)
    sum_u = tl.zeros((BLOCK_N,), tl.float32)
    sum_w = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, V, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        z_q, _ = load_logits(p_raw_q, p_bias_q, o_n, o_v, N, V, stride_qn, stride_qv, slope_q, inner_q, outer_q)
        z_p, _ = load_logits(p_raw_p, p_bias_p, o_n, o_v, N, V, stride_pn, stride_pv, slope_p, inner_p, outer_p)
        log_q = (z_q - top_q[:, None]) - total_q[:, None]
        log_p = (z_p - top_p[:, None]) - total_p[:, None]
        v, u, w = summands(log_p, log_q, x, scale, FORM)
        sum_v += tl.sum(v, 1)
        sum_u += tl.sum(u, 1)
        sum_w += tl.sum(w, 1)
    tl.store(p_value + o_n, sum_v, mask=o_n < N)

    # The gradients, u - q sum u and w - p sum w.
    if p_upstream is not None:
        upstream = tl.load(p_upstream + o_n, mask=o_n < N, other=0.0)
        for start in range(0, V, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            z_q, c_q = load_logits(p_raw_q, p_bias_q, o_n, o_v, N, V, stride_qn, stride_qv, slope_q, inner_q, outer_q)
            z_p, c_p = load_logits(p_raw_p, p_bias_p, o_n, o_v, N, V, stride_pn, stride_pv, slope_p, inner_p, outer_p)
            tl.debug_barrier()  # the whole block is read before any thread writes over it
            log_q = (z_q - top_q[:, None]) - total_q[:, None]
            log_p = (z_p - top_p[:, None]) - total_p[:, None]
            v, u, w = summands(log_p, log_q, x, scale, FORM)
            if p_gradient_q is not None:
                store_gradient(p_gradient_q, u, log_q, sum_u, upstream, c_q, o_n, o_v, N, V, stride_gqn, stride_gqv)
            if p_gradient_p is not None:
                store_gradient(p_gradient_p, w, log_p, sum_w, upstream, c_p, o_n, o_v, N, V, stride_gpn, stride_gpv)


def divergence_rows(
    model: RawSide, ref: RawSide, options: DivergenceOptions, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values, and the gradients of both sides, from float32 raw products of any strides.

    With `upstream` None there are no gradients. This is a `backends.interface.DivergenceEngine`.
    """
    chosen = form(options)
    if chosen.exchanged:
        value, ref_gradient, gradient = _launch(ref, model, chosen, upstream)
    else:
        value, gradient, ref_gradient = _launch(model, ref, chosen, upstream)
    return value, gradient, ref_gradient


def _launch(
    model: RawSide, ref: RawSide, chosen: Form, upstream: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    count, vocabulary = model.raw.shape
    value = model.raw.new_empty(count)
    gradients = [None if upstream is None else _place(side) for side in (model, ref)]
    tensors: list[Tensor | None] = []
    strides: list[int] = []
    for side, gradient in zip((model, ref), gradients, strict=True):
        bias = side.head.bias
        tensors += [side.raw, None if bias is None else bias.contiguous(), gradient]
        strides += [*side.raw.stride(), *(side.raw if gradient is None else gradient).stride()]
    config = configs.row_pair(model.raw.device)
    with configs.on_device(model.raw):
        divergence_kernel[(triton.cdiv(count, config.BLOCK_N),)](
            *tensors, None if upstream is None else upstream.contiguous(), value, count, vocabulary, *strides,
            *bends(model.head.transform), *bends(ref.head.transform), chosen.x, chosen.scale,
            FORM=chosen.name, **config.blocks,
        )  # fmt: skip
    return value, gradients[0], gradients[1]


def _place(side: RawSide) -> Tensor | None:
    """The memory of a side's gradient, or None if the side needs none."""
    if side.operand is None:
        return None
    return side.raw if side.operand == side.raw.dtype else narrowed(side.raw, side.operand)
