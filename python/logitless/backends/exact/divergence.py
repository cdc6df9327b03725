"""Divergences between two full next-token distributions, P the reference's and Q the model's, over chunks of tokens.

A chunk's logits of both sides come from one GEMM each; rows are whole, so a chunk's values and gradients are known
while they are at hand. In numbers of `2 N H V` flops (H the side's own): the values 1 per side; with the gradients in
the same sweep 1 more per gradient asked for (hidden states, head). Memory: the two chunks of logits, temporaries of
about the size of one, and the accumulators of the gradients.

Every divergence is a sum over the vocabulary of `v(log p_j, log q_j)`, and its gradients for the logits are

    dD / d z_q,j = u_j - q_j sum_k u_k      with u_j = q_j dv/dq_j
    dD / d z_p,j = w_j - p_j sum_k w_k      with w_j = p_j dv/dp_j

where terms of u proportional to q (of w, to p) cancel and are left out. So a kind is three elementwise functions, and
exchanging P and Q exchanges two of them. With the log-ratio r = log p - log q and the log-mixture relative to Q

    d(w, r) = log((w P + (1-w) Q) / Q) = log1p(w expm1(r))

the family `alpha` is `e_j = q_j expm1(a r_j) / a`, `v = -e / (1-a)`, `u = -e`, `w = -(q + a e) / (1-a)`: reverse KL at
a = 0 (e = q r), forward KL at 1, 4 squared Hellinger at 1/2, half of Pearson's chi2 at -1 and of Neyman's at 2. Above
1/2 it is taken with P and Q exchanged and 1 - a, so that it is right to rounding up to the ends and no limit is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...parallel import gathered, summed
from ...types import DivergenceOptions, Options, statistics_dtype
from ..interface import (
    DivergenceEngine,
    DivergenceProblem,
    DivergenceResult,
    Gradients,
    Needs,
    RawSide,
    Side,
    empty_gradients,
)
from .chunks import chunk_tokens, equal_chunks, in_dtype, lay_out, row_stride
from .denormals import drop_denormals_, exponential
from .products import (
    float16_products,
    logit_dtype,
    multiply,
    operand_dtype,
    products_with_head,
    raw_products,
    spans,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# ---------------------------------------------------------------------------------------------------------------------
# The kinds


class Rows(NamedTuple):
    """Some rows of both distributions, `[n, V]` each."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    log_ratio: Tensor  # log p - log q; 0 where both are 0

    def exchanged(self) -> Rows:
        return Rows(self.q, self.p, self.log_q, self.log_p, -self.log_ratio)


class Terms(NamedTuple):
    """A divergence of some rows: its values, and u and w of the header, computed when somebody asks."""

    value: Tensor  # [n]
    model: Callable[[], Tensor]  # [n, V] u
    ref: Callable[[], Tensor]  # [n, V] w

    def exchanged(self) -> Terms:
        return Terms(self.value, self.ref, self.model)


def terms(x: Rows, options: DivergenceOptions) -> Terms:
    """The terms of the kind that `options` names, for a group of rows."""
    return KINDS[options.kind](x, options)


def _alpha(x: Rows, a: float, scale: float = 1.0) -> Terms:
    """`scale (1 - sum p^a q^(1-a)) / (a (1-a))`, continued at both ends."""
    if a > 0.5:
        return _alpha(x.exchanged(), 1 - a, scale).exchanged()
    a = 0.0 if abs(a) < 1e-12 else a  # where a r would leave float32's range
    e = _deformed(x, a).mul_(scale)

    def ref() -> Tensor:
        return -scale * x.q if a == 0 else (scale * x.q + a * e) / (a - 1)  # not 0 * e: reverse KL may be infinite

    return Terms(e.sum(-1) / (a - 1), lambda: -e, ref)


def _deformed(x: Rows, a: float) -> Tensor:
    """`q (exp(a r) - 1) / a`; `q r` at a = 0."""
    if a == 0:
        return _times(x.q, x.log_ratio)
    exponent = x.log_ratio * a
    near = x.q * torch.expm1(exponent)
    # Where the power is large, q may have underflowed while q exp(a r) has not.
    far = exponential(a * x.log_p + (1 - a) * x.log_q, inplace=True).sub_(x.q)
    return torch.where(exponent > 30, far, near).div_(a)


def _symmetric(x: Rows, mixture: float) -> Terms:
    """`(1-w) KL(P|Q) + w KL(Q|P)`."""
    if mixture in (0, 1):
        return _alpha(x, 1 - mixture)
    forward = _times(x.p, x.log_ratio).mul_(1 - mixture)
    reverse = _times(x.q, x.log_ratio).mul_(mixture)
    return Terms(
        forward.sum(-1) - reverse.sum(-1),
        lambda: (mixture - 1) * x.p - reverse,
        lambda: forward - mixture * x.q,
    )


def _js(x: Rows, mixture: float, normalized: bool) -> Terms:
    """`w KL(P|M) + (1-w) KL(Q|M)`, over `w (1-w)` where normalised."""
    if mixture in (0, 1):
        return _alpha(x, 1 - mixture)
    scale = 1 / (mixture * (1 - mixture)) if normalized else 1.0
    model = _times(x.q, _log_mixture(mixture, x.log_ratio)).mul_((mixture - 1) * scale)
    ref = _times(x.p, _log_mixture(1 - mixture, -x.log_ratio)).mul_(-mixture * scale)
    return Terms(model.sum(-1) + ref.sum(-1), lambda: model, lambda: ref)


def _skew(x: Rows, skew: float) -> Terms:
    """`KL(P|M)`, `M = (1-skew) Q + skew P`."""
    if skew == 0:
        return _alpha(x, 1.0)
    log_mixture = _log_mixture(1 - skew, -x.log_ratio)  # log(M / P)
    return Terms(
        -_times(x.p, log_mixture).sum(-1),
        lambda: (skew - 1) * x.p * torch.exp(-_log_mixture(skew, x.log_ratio)),  # P Q / M
        lambda: -_times(x.p, log_mixture + skew * torch.exp(-log_mixture)),
    )


def _total_variation(x: Rows) -> Terms:
    """`sum |p - q| / 2`; the gradient takes sign(0) = 0."""
    half_sign = x.log_ratio.sign() / 2
    return Terms((x.p - x.q).abs_().sum(-1) / 2, lambda: -x.q * half_sign, lambda: x.p * half_sign)


def _cross_entropy(x: Rows) -> Terms:
    """`-sum p log q`."""
    surprise = -_times(x.p, x.log_q)
    return Terms(surprise.sum(-1), lambda: -x.p, lambda: surprise)


def _log_mixture(weight: float, log_ratio: Tensor) -> Tensor:
    """`log(weight exp(r) + 1 - weight)`, to the last digit for small r and small weights, without overflow."""
    bent = torch.expm1(log_ratio.clamp(max=80.0)).mul_(weight).log1p_()
    return bent.add_(torch.relu(log_ratio - 80.0))


def _times(probability: Tensor, x: Tensor) -> Tensor:
    """`probability * x`, and 0 at probability 0, where x may be infinite."""
    return (probability * x).masked_fill_(probability == 0, 0.0)


#: One line for each name of `DivergenceKind`.
KINDS: dict[str, Callable[[Rows, DivergenceOptions], Terms]] = {
    "forward_kl": lambda x, _: _alpha(x, 1.0),
    "reverse_kl": lambda x, _: _alpha(x, 0.0),
    "symmetric_kl": lambda x, o: _symmetric(x, o.mixture),
    "js": lambda x, o: _js(x, o.mixture, o.normalized),
    "skew_forward_kl": lambda x, o: _skew(x, o.skew),
    "skew_reverse_kl": lambda x, o: _skew(x.exchanged(), o.skew).exchanged(),
    "total_variation": lambda x, _: _total_variation(x),
    "squared_hellinger": lambda x, _: _alpha(x, 0.5, scale=0.25),
    "pearson_chi2": lambda x, _: _alpha(x, -1.0, scale=2.0),
    "neyman_chi2": lambda x, _: _alpha(x, 2.0, scale=2.0),
    "alpha": lambda x, o: _alpha(x, o.alpha),
    "cross_entropy": lambda x, _: _cross_entropy(x),
}

# ---------------------------------------------------------------------------------------------------------------------
# Rows of a chunk, in PyTorch


#: PyTorch's temporaries are made for this share of a chunk's rows at a time: then they take one more chunk in all.
ROW_GROUPS = 8


def torch_divergence_rows(
    model: RawSide,
    ref: RawSide,
    options: DivergenceOptions,
    upstream: Tensor | None,
    *,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The `DivergenceEngine` of PyTorch operations.

    With a `group`, whose processes share the vocabulary, the sums over the vocabulary are over all of them.
    """
    count, sides = len(model.raw), (model, ref)
    values = []
    for rows in spans(count, -(-count // ROW_GROUPS)):
        parts = [side._replace(raw=side.raw[rows]) for side in sides]
        values.append(_of_rows(parts[0], parts[1], options, None if upstream is None else upstream[rows], group))
    gradients = [None if upstream is None or side.operand is None else side.raw.to(side.operand) for side in sides]
    return torch.cat(values), gradients[0], gradients[1]


def _of_rows(
    model: RawSide,
    ref: RawSide,
    options: DivergenceOptions,
    upstream: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    """The values of some rows; their gradients take the raw products' place."""
    (log_q, slope_q), (log_p, slope_p) = _log_softmax(model, group), _log_softmax(ref, group)
    log_ratio = log_p - log_q
    if model.head.bias is not None or ref.head.bias is not None:
        log_ratio.masked_fill_(log_p.isneginf() & log_q.isneginf(), 0.0)
    x = Rows(exponential(log_p), exponential(log_q), log_p, log_q, log_ratio)
    result = terms(x, options)
    if upstream is not None:
        for side, share, probability, slope in (
            (model, result.model, x.q, slope_q),
            (ref, result.ref, x.p, slope_p),
        ):
            if side.operand is not None:
                side.raw.copy_(_logit_gradient(share(), probability, upstream, slope, group))
    return _over_vocabulary(result.value, group)


def _over_vocabulary(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A sum over this process's vocabulary entries, summed over those of all."""
    return x if group is None else summed(x, group)


def _log_softmax(side: RawSide, group: ProcessGroup | None) -> tuple[Tensor, Tensor | float]:
    """Log-probabilities, and `d logit / d raw product`. A dense copy: rows of a vocabulary-major chunk are not."""
    bias, transform = side.head.bias, side.head.transform
    z = side.raw.clone() if bias is None else side.raw + bias
    derivative = transform.apply_(z, may_be_masked=bias is not None)
    top = z.amax(-1, keepdim=True)
    if group is not None:
        top = gathered(top.clamp_(min=torch.finfo(z.dtype).min), group).amax(0)  # not -inf, where all is masked here
    z.sub_(top)
    z.sub_(_over_vocabulary(exponential(z).sum(-1, keepdim=True), group).log_())
    return z, transform.slope if derivative is None else derivative


def _logit_gradient(
    share: Tensor, probability: Tensor, upstream: Tensor, slope: Tensor | float, group: ProcessGroup | None
) -> Tensor:
    """`upstream (u - q sum u) slope`, without denormal entries."""
    total = _over_vocabulary(share.sum(-1, keepdim=True), group)
    gradient = torch.addcmul(share, probability, total, value=-1)
    return drop_denormals_(gradient.mul_(upstream[:, None]).mul_(slope))


# ---------------------------------------------------------------------------------------------------------------------
# Chunks


def divergence_sweep(
    engine: DivergenceEngine, problem: DivergenceProblem, upstream: Tensor | None, needs: tuple[Needs, Needs]
) -> DivergenceResult:
    """Divergences `[N]` and, where `upstream [N]` is given, the gradients of `sum_i upstream_i D_i`, in one sweep."""
    sides = problem.model, problem.ref
    dtype = torch.promote_types(*(statistics_dtype(side.hidden.dtype) for side in sides))
    wide = next(side.hidden for side in sides if statistics_dtype(side.hidden.dtype) == dtype)
    count = len(problem.model.hidden)
    trainable, weight = upstream is not None and any(need.weight for need in needs), problem.model.head.weight
    if problem.ranks is not None:
        weight = weight[:1].expand(problem.ranks.widest, -1)
    most = tokens_of_both_sides(wide, weight, problem.chunk_bytes, trainable=trainable)
    tokens = equal_chunks(count, most, wide.device.type)
    chunks = [
        _SideChunks(side, need if upstream is not None else Needs(False, False, False), tokens, dtype)
        for side, need in zip(sides, needs, strict=True)
    ]
    values = torch.empty(count, dtype=dtype, device=problem.model.hidden.device)
    for span in spans(count, tokens):
        model, ref = (side.raw(span) for side in chunks)
        values[span], *gradients = engine(model, ref, problem.options, None if upstream is None else upstream[span])
        for side, gradient in zip(chunks, gradients, strict=True):
            if gradient is not None:
                side.add(span, gradient)
    return DivergenceResult(values, chunks[0].sums, chunks[1].sums)


def tokens_of_both_sides(hidden: Tensor, weight: Tensor, chunk_bytes: int | None, *, trainable: bool) -> int:
    """The most tokens in a chunk. The default budget is one side's; one that was given holds both and temporaries."""
    buffers = 1 if chunk_bytes is None else 3
    return chunk_tokens(hidden, weight, Options(chunk_bytes=chunk_bytes), buffers, trainable=trainable)


class _SideChunks:
    """One side's operands, the buffer for a chunk of its logits, and the sums of its gradients."""

    def __init__(self, side: Side, needs: Needs, tokens: int, dtype: torch.dtype) -> None:
        device, own = side.hidden.device, side.hidden.dtype
        self.hidden, self.weight = side.hidden, side.head.weight
        self.multiplied = logit_dtype(own, device, None)
        self.head = in_dtype(side.head, dtype)
        self.buffer = torch.empty(tokens * row_stride(len(self.weight), dtype, device.type), dtype=dtype, device=device)
        self.operand = operand_dtype(own, device) if any(needs) else None
        self.begun = needs.weight and side.head_sum is not None  # the head's sum
        self.sums: Gradients = empty_gradients(side, needs._replace(weight=needs.weight and not self.begun), dtype)
        if self.begun:
            self.sums = self.sums._replace(weight=side.head_sum)

    def raw(self, span: slice) -> RawSide:
        hidden = self.hidden[span].to(self.multiplied)
        out = lay_out(self.buffer, len(hidden), len(self.weight), hidden.device.type)
        return RawSide(raw_products(hidden, self.weight, out), self.head, self.operand)

    def add(self, span: slice, gradient: Tensor) -> None:
        """Adds the products of a chunk's gradient; the head's sum begins with the first chunk's."""
        with float16_products(self.hidden.dtype, self.hidden.device):
            if self.sums.hidden is not None:
                products_with_head(gradient, self.weight, self.sums.hidden[span])
            if self.sums.weight is not None:
                hidden = self.hidden[span].to(gradient.dtype)
                multiply(gradient.T, hidden, out=self.sums.weight, add=self.begun)
                self.begun = True
            if self.sums.bias is not None:
                self.sums.bias.add_(gradient.sum(0, dtype=self.sums.bias.dtype))
