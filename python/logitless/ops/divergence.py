"""`linear_divergence`, the primitive of distillation: checks, choice of backend and strategy, then the ops.

    logitless::divergence       values of every token, and their unit gradients for frozen heads
    logitless::divergence_sum   a weighted sum of them with its gradients, in one sweep; the backward of the former too

Tokens outside the mask are dropped here, before a backend sees the problem, since their number is data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from .. import backends, reduce, reference
from ..backends.problem import DivergenceProblem, DivergenceResult, Needs, Side
from ..types import (
    BackendName,
    BackwardName,
    DivergenceKind,
    DivergenceOptions,
    Head,
    LogitTransform,
    Options,
    Reduction,
    statistics_dtype,
)
from . import checks
from .library import _no_autocast, _or_empty, _refuse_double_backward, _scaled
from .logprobs import Call, prepare
from .token_loss import check_token_input
from .tokens import Tokens, of_mask


def linear_divergence(
    hidden: Tensor,
    head: Tensor | Head,
    ref_hidden: Tensor,
    ref_head: Tensor | Head,
    *,
    kind: DivergenceKind,
    mask: Tensor | None = None,
    mixture: float = 0.5,
    skew: float = 0.1,
    alpha: float = 0.5,
    normalized: bool = False,
    token_weight: Tensor | None = None,
    reduction: Reduction = "none",
    normalizer: Tensor | float | None = None,
    backend: BackendName = "auto",
    backward: BackwardName = "auto",
    chunk_bytes: int | None = None,
) -> Tensor:
    """Per-token divergence between two next-token distributions over the whole vocabulary, without either's logits.

    P is the reference's (teacher's) distribution and Q the model's (student's), each the softmax of its own head's
    logits, options and temperature included (no factor temperature^2 is applied: multiply where it is wanted):

        forward_kl          KL(P|Q)
        reverse_kl          KL(Q|P)
        js                  w KL(P|M) + (1-w) KL(Q|M),  M = w P + (1-w) Q,  w = mixture
        skew_forward_kl     KL(P | (1-l) Q + l P),  l = skew
        skew_reverse_kl     KL(Q | (1-l) P + l Q)
        total_variation     1/2 sum |P - Q|
        squared_hellinger   1 - sum sqrt(P Q)
        pearson_chi2        sum (Q - P)^2 / P
        neyman_chi2         sum (Q - P)^2 / Q
        alpha               (1 - sum P^a Q^(1-a)) / (a (1-a)); forward KL at a = 1, reverse KL at 0
        cross_entropy       -sum P log Q

    Args:
        hidden, ref_hidden: `[..., H]` and `[..., H']`, the same leading shape; H' may differ from H.
        head, ref_head: `[V, H]` and `[V, H']` weights, or `Head`s with bias and options of their own. One vocabulary.
        kind: see above.
        mask: `[...]` bool, the tokens that count; the others give 0 and no gradient, and cost nothing. None: all.
        mixture: weight of the *reference* in `js`, as in GKD; 1/2 is the symmetric one. The divergence vanishes
            towards both ends, so 0 and 1 are refused unless `normalized`.
        normalized: divides `js` by w (1-w), which makes it continuous: forward KL at 0, reverse KL at 1.
        skew: in [0, 1), the weight of the divergence's own first argument in the mixture; 0.1 as in DistiLLM.
        alpha: any number; 1/2 is 4 times the squared Hellinger distance, 2 half of Neyman's chi2, -1 of Pearson's.
        token_weight: `[...]` constants that multiply the tokens' divergences.
        reduction: "none" gives one number per token. "sum" and "mean" (by the number of tokens that count, or by
            `normalizer`) know every token's share at once, so that the gradients need no second sweep.
        normalizer: number, or tensor of one, that "mean" divides by.
        backend: "reference" (full logits, plain autograd), or one of `linear_logprobs`'s, or "auto".
        backward: "recompute" computes each chunk's logits again; "single_pass" does not: for "sum" and "mean", or
            where the heads are frozen, by keeping `d divergence / d hidden` of each token. "auto" takes the cheapest.
        chunk_bytes: budget for a chunk's float32 logits of both sides and the temporaries of their row operations.
            None: 96 MiB on a CPU, 768 MiB elsewhere, so that the GEMMs are as large as those of `linear_logprobs`.

    Returns:
        `[...]`, or a scalar for "sum" and "mean"; float32 (float64 where an input is). Differentiable for `hidden` and
        `head`, and for the reference's tensors where they require a gradient; with any upstream gradient.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or value, before anything is computed; a parameter
            that `kind` does not read.
        RuntimeError: the gradient is differentiated again (`create_graph=True`) with a backend other than "reference".

    Cost, in GEMMs of `2 N H V` flops of a side: forward 1 of each side. Backward: 2 of a trainable model, or 1 of a
    frozen head, and the forward's again where it recomputes: with a frozen reference 4 + 2 by recomputation, 3 + 1 in
    a single pass, 2 + 1 with frozen heads.

    Infinite results: `forward_kl` and `cross_entropy` are inf where P has mass and Q has none (-inf logits), their
    gradient for the model is finite there; `reverse_kl` where Q has mass and P has none, `pearson_chi2` and
    `neyman_chi2` also where `q^2 / p` (`p^2 / q`) overflows, at log-ratios of about 88 in float32, and `alpha` outside
    (0, 1) likewise: there the gradient is NaN. The others are bounded: js by the entropy of the mixture (log 2 at 1/2),
    skew by -log skew, total variation and squared Hellinger by 1. An entry whose probability underflows counts as
    absent.

    Source: GKD, arXiv 2306.13649 (js: its JSD(beta) with beta = mixture); DistiLLM, arXiv 2402.03898 (skews); the
    others are textbook f-divergences. Gradients derived; see `logitless.backends.divergence`.
    """
    options = DivergenceOptions(kind, mixture, skew, alpha, normalized)
    checks.check_choice("reduction", reduction, get_args(Reduction))
    reduce.check(reduction, normalizer)
    shared = Options(backend=backend, backward=backward, chunk_bytes=chunk_bytes)
    pair = _prepare(hidden, head, ref_hidden, ref_head, mask, shared)
    if token_weight is not None:
        check_token_input("token_weight", token_weight, hidden)
        token_weight = token_weight.reshape(-1)
    strategy = _strategy(pair, reduction)
    if strategy == "sum":
        total = _sum(pair, options, token_weight)
    else:
        values = _values(pair, options, unit=strategy == "unit")
        if token_weight is not None:
            values = values * token_weight.to(values.dtype)
        if reduction == "none":
            return values.reshape(hidden.shape[:-1])
        total = values.sum()
    if reduction == "sum":
        return total
    return reduce.mean(total, pair.tokens() if normalizer is None else normalizer)


# ---------------------------------------------------------------------------------------------------------------------
# Checks and strategy


class _Pair(NamedTuple):
    """One call, checked, cast and flattened."""

    model: Call
    ref: Call
    mask: Tensor | None  # [N] bool

    def needs(self) -> list[bool]:
        """Whether hidden, weight and bias of the model and then of the reference want a gradient here and now."""
        return [*self.model.needs(), *self.ref.needs()]

    def tokens(self) -> Tensor | float:
        """How many count; 1 at least where there is no mask."""
        return float(max(1, len(self.model.hidden))) if self.mask is None else self.mask.sum().float()

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first seven arguments of the ops."""
        sides = ((side.hidden, side.weight, side.options.bias) for side in (self.model, self.ref))
        return (*next(sides), *next(sides), self.mask)

    def transforms(self) -> list[float]:
        """Both heads' options as the ops take them; no softcap is an infinite one."""
        found: list[float] = []
        for side in (self.model, self.ref):
            scale, softcap, temperature = side.options.transform.numbers
            found += [float(scale), math.inf if softcap is None else float(softcap), float(temperature)]
        return found

    def backend(self) -> str:
        """The first of the table that takes both sides; "cuda" by name alone, as its rows here are PyTorch's."""
        name = self.model.options.backend
        picked = [backends.pick(name, side.hidden, without=("cuda",)) for side in (self.model, self.ref)]
        return max(picked, key=list(backends.BACKENDS).index)


def _prepare(
    hidden: Tensor,
    head: Tensor | Head,
    ref_hidden: Tensor,
    ref_head: Tensor | Head,
    mask: Tensor | None,
    options: Options,
) -> _Pair:
    model = _side("", hidden, head, options)
    ref = _side("ref_", ref_hidden, ref_head, options)
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        shape = f"{[*hidden.shape[:-1], ref_hidden.shape[-1]]} like hidden"
        raise ValueError(f"ref_hidden: expected shape {shape}, got {list(ref_hidden.shape)}")
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden: expected device {hidden.device} like hidden, got {ref_hidden.device}")
    if len(ref.weight) != len(model.weight):
        raise ValueError(
            f"ref_head: expected a vocabulary of {len(model.weight)} like head's, got {len(ref.weight)}; cut the "
            "larger, or give the missing entries a bias of -inf"
        )
    if mask is not None:
        checks.check_tensor("mask", mask, f"{list(hidden.shape[:-1])}")
        if mask.shape != hidden.shape[:-1] or mask.dtype != torch.bool or mask.device != hidden.device:
            raise ValueError(
                f"mask: expected bool {list(hidden.shape[:-1])} on {hidden.device}, got {mask.dtype} "
                f"{list(mask.shape)} on {mask.device}"
            )
        mask = mask.reshape(-1)
    return _Pair(model, ref, mask)


def _side(prefix: str, hidden: Tensor, head: Tensor | Head, options: Options) -> Call:
    if isinstance(head, Tensor):
        head = Head(head)
    if not isinstance(head, Head):
        raise TypeError(f"{prefix}head: expected a weight [V, H] or a logitless.Head, got {type(head).__name__}")
    weight, bias, logit_scale, softcap, temperature = head
    options = replace(options, bias=bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    names = (f"{prefix}hidden", f"{prefix}head.weight", f"{prefix}head.bias")
    return prepare(hidden, weight, None, options, names)


def _strategy(pair: _Pair, reduction: str) -> str:
    """Of "plain" (the values, then recomputation), "unit" (frozen heads keep a vector per token) and "sum" (gradients
    at once); an error where the single pass was asked for by name and cannot be."""
    needs, backward = pair.needs(), pair.model.options.backward
    trainable_head = needs[1] or needs[2] or needs[4] or needs[5]
    checks.check_choice("backward", backward, ("auto", "recompute", "single_pass"))
    if backward == "single_pass" and reduction == "none" and trainable_head:
        raise ValueError(
            "backward: 'single_pass' cannot serve reduction='none' with a trainable head, whose upstream gradients "
            "come after the pass; use backward='auto' or 'recompute'"
        )
    if backward == "recompute" or not any(needs) or pair.model.options.backend == "reference":
        return "plain"
    if reduction != "none":
        return "sum"
    return "plain" if trainable_head else "unit"


def _values(pair: _Pair, options: DivergenceOptions, unit: bool) -> Tensor:
    """`[N]`, differentiable."""
    if pair.model.options.backend == "reference":
        heads = [
            Head(side.weight, side.options.bias, *side.options.transform.numbers) for side in (pair.model, pair.ref)
        ]
        return reference.linear_divergence(
            pair.model.hidden, heads[0], pair.ref.hidden, heads[1], mask=pair.mask, options=options
        )
    needs = pair.needs()
    units = [unit and needs[0], unit and needs[3]]
    values, *_ = divergence(*pair.tensors(), *_described(options), pair.transforms(), units, *_where(pair))
    return values


def _sum(pair: _Pair, options: DivergenceOptions, token_weight: Tensor | None) -> Tensor:
    """`[]`, the weighted sum with its gradients in one sweep."""
    if token_weight is None:
        token_weight = torch.ones(len(pair.model.hidden), device=pair.model.hidden.device)
    total, *_ = divergence_sum(
        token_weight, *pair.tensors(), *_described(options), pair.transforms(), pair.needs(), *_where(pair)
    )
    return total


def _described(options: DivergenceOptions) -> tuple[str, list[float], bool]:
    """The kind and its parameters as the ops take them."""
    return options.kind, [float(options.mixture), float(options.skew), float(options.alpha)], options.normalized


def _where(pair: _Pair) -> tuple[str, int | None]:
    return pair.backend(), pair.model.options.chunk_bytes


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def _run(
    sides: Sequence[Tensor | None],
    tokens: Tokens,
    kind: str,
    parameters: Sequence[float],
    normalized: bool,
    transforms: Sequence[float],
    backend: str,
    chunk_bytes: int | None,
    upstream: Tensor | None,
    needs: Sequence[bool],
) -> DivergenceResult:
    """The backend's sweep over the tokens that count. `sides`: hidden, weight and bias of both."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = sides
    assert hidden is not None and weight is not None and ref_hidden is not None and ref_weight is not None
    mixture, skew, alpha = parameters
    problem = DivergenceProblem(
        Side(tokens.take(hidden), weight, bias, _transform(transforms[:3])),
        Side(tokens.take(ref_hidden), ref_weight, ref_bias, _transform(transforms[3:])),
        DivergenceOptions(kind, mixture, skew, alpha, normalized),  # type: ignore[arg-type]
        chunk_bytes,
    )
    with _no_autocast(hidden.device):
        return backends.BACKENDS[backend].divergence(
            problem, tokens.take(upstream), (Needs(*needs[:3]), Needs(*needs[3:]))
        )


def _transform(numbers: Sequence[float]) -> LogitTransform:
    scale, softcap, temperature = numbers
    return LogitTransform(scale, None if softcap == math.inf else softcap, temperature)


def _result_dtype(*hidden: Tensor) -> torch.dtype:
    return torch.promote_types(*(statistics_dtype(x.dtype) for x in hidden))


@torch.library.custom_op("logitless::divergence", mutates_args=())
def divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    parameters: Sequence[float],
    normalized: bool,
    transforms: Sequence[float],
    units: Sequence[bool],
    backend: str,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences `[N]`, then `d divergence / d hidden [N, H]` and `/ d ref_hidden` where `units` asks (else empty).

    `parameters`: mixture, skew and alpha. `transforms`: logit_scale, softcap (inf for none) and temperature, twice."""
    tokens = of_mask(mask)
    sides = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    ones = torch.ones(len(hidden), device=hidden.device) if any(units) else None
    needs = [units[0], False, False, units[1], False, False]
    values, model, ref = _run(
        sides, tokens, kind, parameters, normalized, transforms, backend, chunk_bytes, ones, needs
    )
    unit, ref_unit = (
        None if x is None else x.to(y.dtype) for x, y in ((model.hidden, hidden), (ref.hidden, ref_hidden))
    )
    return tokens.spread(values, hidden), tokens.spread(unit, hidden), tokens.spread(ref_unit, hidden)


@divergence.register_fake
def _divergence_fake(  # type: ignore[no-untyped-def]
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, kind, parameters, normalized, transforms, units, *_
):
    vectors = (x.new_empty(x.shape if unit else 0) for x, unit in zip((hidden, ref_hidden), units, strict=True))
    return hidden.new_empty(hidden.shape[0], dtype=_result_dtype(hidden, ref_hidden)), *vectors


@torch.library.custom_op("logitless::divergence_sum", mutates_args=())
def divergence_sum(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    kind: str,
    parameters: Sequence[float],
    normalized: bool,
    transforms: Sequence[float],
    needs: Sequence[bool],
    backend: str,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`sum_i upstream_i D_i` over the tokens that count, and its gradients for the six tensors in the statistics'
    dtype, empty where not needed."""
    tokens = of_mask(mask)
    sides = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    upstream = upstream.to(_result_dtype(hidden, ref_hidden))
    values, model, ref = _run(
        sides, tokens, kind, parameters, normalized, transforms, backend, chunk_bytes, upstream, needs
    )
    total = (tokens.masked(values) * tokens.take(upstream)).sum()
    found = [
        x
        for side in (model, ref)
        for x in (tokens.spread(side.hidden, hidden), *(_or_empty(y, hidden) for y in side[1:]))
    ]
    return total, found[0], found[1], found[2], found[3], found[4], found[5]


@divergence_sum.register_fake
def _divergence_sum_fake(  # type: ignore[no-untyped-def]
    upstream, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, kind, parameters, normalized, transforms,
    needs, *_
):  # fmt: skip
    dtype = _result_dtype(hidden, ref_hidden)
    sides = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    gradients = (
        x.new_empty(x.shape, dtype=dtype) if need and x is not None else hidden.new_empty(0)
        for x, need in zip(sides, needs, strict=True)
    )
    return hidden.new_empty((), dtype=dtype), *gradients


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kind, parameters, normalized, transforms, units, backend, chunk_bytes = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.units = units
    ctx.description, ctx.rest = (kind, parameters, normalized, transforms), (backend, chunk_bytes)
    ctx.save_for_backward(*output[1:], *tensors)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    _refuse_double_backward()
    found: list[Any] = [None] * 14
    if grad is None:
        return tuple(found)
    unit, ref_unit, *tensors = ctx.saved_tensors
    mask = tensors[6]
    if any(ctx.units):
        grad = grad if mask is None else torch.where(mask, grad, 0)
        for i, vector, wanted in ((0, unit, ctx.units[0]), (3, ref_unit, ctx.units[1])):
            if wanted:
                found[i] = (grad[:, None] * vector).to(vector.dtype)
        return tuple(found)
    needs = [need and x is not None for x, need in zip(tensors[:6], ctx.needs_input_grad, strict=False)]
    _, *gradients = divergence_sum(grad, *tensors, *ctx.description, needs, *ctx.rest)
    for i, (gradient, x, need) in enumerate(zip(gradients, tensors, needs, strict=False)):
        found[i] = gradient.to(x.dtype) if need else None
    return tuple(found)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.needs, ctx.dtypes = inputs[12], [None if x is None else x.dtype for x in inputs[1:7]]
    ctx.save_for_backward(*output[1:])


def _differentiate_sum(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    _refuse_double_backward()
    found: list[Any] = [None] * 15
    if grad is None:
        return tuple(found)
    for i, (gradient, dtype, need) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)):
        if need:
            found[1 + i] = _scaled(gradient, grad, dtype)
    return tuple(found)


divergence.register_autograd(_differentiate, setup_context=_save)
divergence_sum.register_autograd(_differentiate_sum, setup_context=_save_sum)
