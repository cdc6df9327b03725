"""Calls of `linear_divergence`, random and extreme, and their checks against the definition in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from cases import DTYPES, shapes, transforms
from hypothesis import strategies as st
from torch.nn.functional import linear

from logitless import Head, linear_divergence, reference
from logitless.testing import assert_within_budget
from logitless.types import DivergenceKind, DivergenceOptions, LogitTransform, statistics_dtype

KINDS = get_args(DivergenceKind)
SIDES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")


class SideTensors(NamedTuple):
    """The tensors of one call. Those that require a gradient are leaves."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    ref_bias: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> SideTensors:
        return SideTensors(
            *(x if x is None else x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad) for x in self)
        )


def make(
    shape=(6,), sizes=(4, 5), vocabulary=9, *, dtype=torch.float32, trainable=SIDES, bias=True, masked=0, spread=1.5,
    seed=0,
) -> SideTensors:  # fmt: skip
    """Random tensors; the last `masked` entries of the vocabulary have a bias of -inf on both sides."""
    draw = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor | None] = []
    for size in sizes:
        offset = torch.randn(vocabulary, generator=draw) if bias or masked else None
        if masked and offset is not None:
            offset[-masked:] = -torch.inf
        hidden = torch.randn(*shape, size, generator=draw)
        found += [hidden, torch.randn(vocabulary, size, generator=draw) * (spread / size**0.5), offset]
    cast = (None if x is None else x.to(dtype) for x in found)
    return SideTensors(
        *(x if x is None else x.requires_grad_(name in trainable) for name, x in zip(SIDES, cast, strict=True))
    )


def call(x: SideTensors, options=None, ref_options=None, *, device="cpu", mask=None, **keywords: Any) -> torch.Tensor:
    """`linear_divergence` on a device, with heads of their own options."""
    x = SideTensors(*(y if y is None else y.to(device) for y in x))
    heads = [Head(x[i], x[i + 1], *(o or LogitTransform()).numbers) for i, o in ((1, options), (4, ref_options))]
    mask = None if mask is None else mask.to(device)
    return linear_divergence(x.hidden, heads[0], x.ref_hidden, heads[1], mask=mask, **keywords).cpu()


def plain(
    x: SideTensors,
    options=None,
    ref_options=None,
    *,
    divergence: DivergenceOptions,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The divergence as materialised code computes it: logits in the model's dtype, the definition in float32."""
    sides = ((x[:3], options), (x[3:], ref_options))
    z = [reference.transformed(linear(*side).to(statistics_dtype(side[0].dtype)), o or LogitTransform())
         for side, o in sides]  # fmt: skip
    log_q, log_p = (y.reshape(-1, y.shape[-1]).log_softmax(-1) for y in z)
    if mask is None:
        mask = torch.ones(x.hidden.shape[:-1], dtype=torch.bool)
    kept = mask.flatten().nonzero()[:, 0]
    found = reference.divergence(log_p[kept], log_q[kept], divergence)
    return found.new_zeros(mask.numel()).index_add(0, kept, found).view(mask.shape)


def measure(function: Any, x: SideTensors) -> dict[str, torch.Tensor]:
    """The value, and every gradient under a random upstream gradient."""
    value = function(x)
    found = {"value": value.detach()}
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.dtype)
    leaves = {name: y for name, y in zip(SIDES, x, strict=True) if y is not None and y.requires_grad}
    if leaves:
        assert value.requires_grad
        gradients = torch.autograd.grad((value * upstream).sum(), list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            found[f"d_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
            assert found[f"d_{name}"].dtype == leaf.dtype
    return found


def moved(x: SideTensors) -> SideTensors:
    """In float64, every input off by an ulp of the statistics' dtype."""
    eps = torch.finfo(statistics_dtype(x.hidden.dtype)).eps
    draw = torch.Generator().manual_seed(2)
    exact = x.to(torch.float64)
    with torch.no_grad():
        for y in exact:
            if y is not None:
                y.mul_(1 + eps * torch.randn(y.shape, generator=draw).double())
    return exact


def assert_right(
    x: SideTensors, divergence: DivergenceOptions, *, mask=None, transforms=(None, None), **keywords
) -> None:
    """Values and gradients within the budget that the materialised definition in the same dtype sets."""

    def ours(y: SideTensors) -> torch.Tensor:
        return call(y, *transforms, mask=mask, **vars(divergence), **keywords)

    def definition(y: SideTensors) -> torch.Tensor:
        return plain(y, *transforms, divergence=divergence, mask=mask)

    found, baseline = measure(ours, x), measure(definition, x)
    exact, shaken = measure(definition, x.to(torch.float64)), measure(definition, moved(x))
    assert found.keys() == exact.keys()
    for name, value in found.items():
        errors = [(y[name].double() - exact[name]).abs().nan_to_num().amax() if value.numel() else 0
                  for y in (baseline, shaken)]  # fmt: skip
        nearest = baseline[name] if errors[0] >= errors[1] else shaken[name]
        assert_within_budget(value, nearest, exact[name], dtype=x.hidden.dtype, scale=1.0, name=name)


PARAMETRIC = ("js", "symmetric_kl", "skew_forward_kl", "skew_reverse_kl", "alpha")
parameters = st.one_of(
    st.sampled_from([k for k in KINDS if k not in PARAMETRIC]).map(DivergenceOptions),
    st.builds(DivergenceOptions, st.just("js"), mixture=st.sampled_from([0.5, 0.1, 0.9]), normalized=st.booleans()),
    st.builds(DivergenceOptions, st.just("js"), mixture=st.sampled_from([0.0, 1.0]), normalized=st.just(True)),
    st.builds(DivergenceOptions, st.just("symmetric_kl"), mixture=st.sampled_from([0.5, 0.1, 0.9, 0.0, 1.0])),
    st.builds(DivergenceOptions, st.sampled_from(["skew_forward_kl", "skew_reverse_kl"]),
              skew=st.sampled_from([0.0, 0.1, 0.6])),
    st.builds(DivergenceOptions, st.just("alpha"), alpha=st.sampled_from([-0.7, 0.0, 0.25, 0.5, 0.8, 1.0, 1.6])),
)  # fmt: skip


@dataclass(frozen=True)
class DivergenceCall:
    tensors: SideTensors
    divergence: DivergenceOptions
    transforms: tuple[LogitTransform, LogitTransform]
    mask: torch.Tensor | None
    chunk_bytes: int | None


@st.composite
def divergence_calls(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> DivergenceCall:
    """Any shape, sizes, dtype, biases (part of them -inf), frozen tensors, options of either head, mask and chunk."""
    vocabulary = draw(st.integers(1, 17))
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    tensors = make(
        shape,
        (draw(st.integers(1, 7)), draw(st.integers(1, 7))),
        vocabulary,
        dtype=dtype,
        trainable=draw(st.sets(st.sampled_from(SIDES))),
        bias=draw(st.booleans()),
        masked=draw(st.integers(0, vocabulary - 1)) if draw(st.booleans()) else 0,
        seed=draw(st.integers(0, 10**6)),
    )
    share, seed = draw(st.sampled_from([None, 0.0, 0.6])), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = None if share is None else torch.rand(shape, generator=seed) < share
    size = 8 if dtype == torch.float64 else 4
    tokens = draw(st.sampled_from([None, 1, 3]))
    budget = None if tokens is None else tokens * 3 * size * vocabulary
    return DivergenceCall(tensors, draw(parameters), (draw(transforms), draw(transforms)), mask, budget)


def of_logits(z_model, z_ref, device="cpu", **keywords) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence of given logits `[n, V]`, and its gradient for the model's."""
    z_model = torch.as_tensor(z_model, dtype=torch.float32).detach().requires_grad_()
    z_ref = torch.as_tensor(z_ref, dtype=torch.float32)
    # hidden states are the logits of all but -inf, which a bias brings
    bias, ref_bias = (torch.zeros_like(z[0]).masked_fill(z[0].isneginf(), -torch.inf) for z in (z_model, z_ref))
    states, ref_states = z_model.masked_fill(z_model.isneginf(), 0), z_ref.masked_fill(z_ref.isneginf(), 0)
    eye = torch.eye(z_ref.shape[1])
    value = call(SideTensors(states, eye, bias, ref_states, eye, ref_bias), device=device, **keywords)
    (gradient,) = torch.autograd.grad(value.sum(), z_model)
    return value.detach(), gradient


BOUNDED = [k for k in KINDS if k not in ("pearson_chi2", "neyman_chi2")]


def check_logits_of_ten_thousand(kind, **keywords):
    torch.manual_seed(3)
    z, ref = torch.randn(8, 12) * 1e4, torch.randn(8, 12) * 1e4
    ref[:4] = z[:4] + torch.randn(4, 12)  # half of them agree
    value, gradient = of_logits(z, ref, kind=kind, **keywords)
    log_q, log_p = (y.double().log_softmax(-1) for y in (z, ref))
    exact = reference.divergence(log_p, log_q, DivergenceOptions(kind))
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=2e-6)
    assert gradient.isfinite().all()
    assert (
        gradient.sum(-1).abs() <= 1e-6 * gradient.abs().sum(-1) + 1e-30
    ).all()  # a shift of the logits changes nothing


INF = -torch.inf
ABSENT = {  # kind -> value where the model, and where the reference, lacks an entry that the other has
    "forward_kl": (True, False),
    "reverse_kl": (False, True),
    "symmetric_kl": (True, True),
    "cross_entropy": (True, False),
    "pearson_chi2": (False, True),
    "neyman_chi2": (True, False),
}


def check_entries_that_one_side_lacks(kind, **keywords):
    full, part = [[0.5, 1.0, -0.5, INF]], [[0.2, INF, 0.4, INF]]
    for infinite, z, ref in zip(ABSENT.get(kind, (False, False)), (part, full), (full, part), strict=True):
        value, gradient = of_logits(z, ref, kind=kind, **keywords)
        log_q, log_p = (torch.tensor(y).double().log_softmax(-1) for y in (z, ref))
        exact = reference.divergence(log_p, log_q, DivergenceOptions(kind))
        assert value.isposinf().all() == infinite
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
        if not infinite:
            assert gradient.isfinite().all()
        elif kind in ("forward_kl", "cross_entropy"):
            p = torch.tensor(ref).softmax(-1)
            torch.testing.assert_close(gradient[:, 0], torch.tensor(z).softmax(-1)[:, 0] - p[:, 0])
