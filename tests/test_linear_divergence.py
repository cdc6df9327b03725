"""`linear_divergence`: every kind against its definition, limits and bounds, strategies, memory, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_cases import (
    BOUNDED,
    INF,
    KINDS,
    SIDES,
    SideTensors,
    assert_right,
    call,
    check_entries_that_one_side_lacks,
    check_logits_of_ten_thousand,
    divergence_calls,
    make,
    measure,
    of_logits,
    plain,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

import logitless
from logitless import Head, linear_divergence, reference
from logitless.backends.exact import divergence as rows
from logitless.ops.registered import divergence as ops
from logitless.testing import watch_allocations
from logitless.types import DivergenceOptions, LogitTransform, statistics_dtype

TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


# ---------------------------------------------------------------------------------------------------------------------
# Against the definition


@given(divergence_calls(), st.sampled_from(["auto", "recompute"]))
def test_every_case_is_right_within_the_budget(case, backward):
    assert_right(
        case.tensors,
        case.divergence,
        mask=case.mask,
        transforms=case.transforms,
        chunk_bytes=case.chunk_bytes,
        backward=backward,
    )


@given(divergence_calls(), st.sampled_from(["sum", "mean"]))
def test_one_sweep_equals_recomputation(case, reduction):
    """The gradients at once, and those of the values per token, with weights."""
    shape = case.tensors.hidden.shape[:-1]
    weight = torch.linspace(-1, 2, shape.numel()).view(shape)
    common = dict(mask=case.mask, token_weight=weight, chunk_bytes=case.chunk_bytes, **vars(case.divergence))

    def value(x: SideTensors, **keywords: Any) -> torch.Tensor:
        return call(x, *case.transforms, **common, **keywords)

    at_once = measure(lambda x: value(x, reduction=reduction), case.tensors)
    count = shape.numel() if case.mask is None else int(case.mask.sum())
    divisor = 1 if reduction == "sum" else max(count, 1)
    later = measure(lambda x: value(x, backward="recompute").sum() / divisor, case.tensors)
    dtype = case.tensors.hidden.dtype
    for name, found in at_once.items():
        scale = max(1.0, later[name].abs().max().item() if later[name].numel() else 0.0)
        bound = 64 * torch.finfo(dtype if name != "value" else statistics_dtype(dtype)).eps * scale
        torch.testing.assert_close(found, later[name], rtol=0, atol=bound)


@pytest.mark.parametrize("options", [{}, dict(softcap=2.0, logit_scale=1.5, temperature=0.7)], ids=["plain", "bent"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, options):
    x = make((3,), (2, 3), 5, dtype=torch.float64, masked=1)
    tensors = [y for y in x if y is not None]
    transform = LogitTransform(**options)

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return call(SideTensors(*leaves), transform, LogitTransform(temperature=1.3), kind=kind, chunk_bytes=200)

    # finite differences of an infinite bias are NaN: the biases' gradients are the property test's
    tensors[2], tensors[5] = tensors[2].detach(), tensors[5].detach()
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_backend_is_the_definition(kind):
    x, options = make(masked=2), DivergenceOptions(kind)
    found = measure(lambda y: call(y, backend="reference", kind=kind), x)
    for name, value in measure(lambda y: plain(y, divergence=options), x).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Extreme distributions


@pytest.mark.parametrize("kind", BOUNDED)
def test_logits_of_ten_thousand(kind):
    check_logits_of_ten_thousand(kind)


@pytest.mark.parametrize(("kind", "ref_ahead"), [("pearson_chi2", -1), ("neyman_chi2", 1)])
def test_chi_squared_holds_to_the_end_of_float32_and_is_inf_beyond(kind, ref_ahead):
    z = torch.zeros(2, 3)
    ref = torch.tensor([[80.0, 0.0, 0.0], [120.0, 0.0, 0.0]]) * ref_ahead
    value, _ = of_logits(z, ref, kind=kind)
    exact = reference.divergence(ref.double().log_softmax(-1), z.double().log_softmax(-1), DivergenceOptions(kind))
    if kind == "pearson_chi2":
        torch.testing.assert_close(value[0].double(), exact[0], rtol=1e-5, atol=0)
        assert value[1].isinf()
    else:  # the model's least entry is 1/3
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    z_far = torch.tensor([[0.0, 0.0, -60.0], [0.0, 0.0, -120.0]])
    value, _ = of_logits(z_far, torch.zeros(2, 3), kind="neyman_chi2")
    assert value[0].isfinite() and value[1].isinf()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions(kind):
    z = torch.tensor([[0.3, -2.0, 7.0, -torch.inf], [1e4, -1e4, 0.0, -torch.inf], [0.0, 0.0, 0.0, -torch.inf]])
    value, gradient = of_logits(z, z, kind=kind)
    entropy = torch.distributions.Categorical(logits=z[:, :3]).entropy()
    torch.testing.assert_close(
        value, entropy if kind == "cross_entropy" else torch.zeros(3), rtol=0, atol=5e-7
    )  # ulps of logits of 9
    torch.testing.assert_close(gradient, torch.zeros(3, 4), rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_one_side_lacks(kind):
    check_entries_that_one_side_lacks(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [0, 3])
def test_a_nan_is_not_hidden(kind, side):
    x = make(masked=1)
    with torch.no_grad():
        x[side][2, 1] = torch.nan
    value = call(x, kind=kind)
    assert value[2].isnan() and value[[0, 1, 3, 4, 5]].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Limits, symmetries and bounds that must hold


def value(x: SideTensors, kind: str, **keywords: Any) -> torch.Tensor:
    return call(x, kind=kind, **keywords)


def exchanged(x: SideTensors) -> SideTensors:
    return SideTensors(*x[3:], *x[:3])


X = make((40,), (4, 4), 30, dtype=torch.float64, trainable=())


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_exchanging_the_sides():
    y = exchanged(X)
    close(value(X, "js"), value(y, "js"))
    close(value(X, "js", mixture=0.2), value(y, "js", mixture=0.8))
    close(value(X, "total_variation"), value(y, "total_variation"))
    close(value(X, "squared_hellinger"), value(y, "squared_hellinger"))
    close(value(X, "forward_kl"), value(y, "reverse_kl"))
    close(value(X, "skew_forward_kl", skew=0.3), value(y, "skew_reverse_kl", skew=0.3))
    close(value(X, "pearson_chi2"), value(y, "neyman_chi2"))
    close(value(X, "alpha", alpha=0.3), value(y, "alpha", alpha=0.7))
    assert (value(X, "js", mixture=0.2) - value(X, "js", mixture=0.8)).abs().max() > 0.01


def test_the_alpha_family():
    close(value(X, "alpha", alpha=1), value(X, "forward_kl"))
    close(value(X, "alpha", alpha=0), value(X, "reverse_kl"))
    close(value(X, "alpha", alpha=0.5), 4 * value(X, "squared_hellinger"))
    close(value(X, "alpha", alpha=2), value(X, "neyman_chi2") / 2)
    close(value(X, "alpha", alpha=-1), value(X, "pearson_chi2") / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("end", "kind"), [(0.0, "reverse_kl"), (1.0, "forward_kl")])
def test_alpha_reaches_the_ends_without_a_jump(dtype, end, kind):
    """The distance from the end's KL is proportional to that of alpha, as far as rounding lets one see."""
    x = X.to(dtype)
    limit = value(x, kind)
    for step in (1e-3, 1e-5, 1e-9, 1e-13, 1e-30):
        near = value(x, "alpha", alpha=end + step)
        torch.testing.assert_close(near, limit, rtol=10 * step + 2e-6, atol=2e-6)


@pytest.mark.parametrize(("end", "kind"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_js_is_continuous_at_its_ends_where_normalised(end, kind):
    x = make((40,), (4, 4), 30, trainable=("hidden",), bias=False, spread=0.5)
    limit = measure(lambda y: value(y, kind), x)
    at_the_end = measure(lambda y: value(y, "js", mixture=end, normalized=True), x)
    for name in limit:
        torch.testing.assert_close(at_the_end[name], limit[name])
    for step in (1e-3, 1e-5, 1e-7):
        mixture = abs(end - step)
        near = measure(lambda y, w=mixture: value(y, "js", mixture=w, normalized=True), x)
        for name in limit:  # float32: log1p(w expm1(r)) keeps the digits that a logaddexp would lose
            torch.testing.assert_close(near[name], limit[name], rtol=50 * step + 3e-5, atol=50 * step + 3e-5)
        vanishing = value(x, "js", mixture=mixture)
        assert (vanishing <= step * limit["value"] * 1.01 + 1e-6).all()


def test_symmetric_kl_is_the_weighted_sum_of_both_kls():
    """The gradient too; at the ends it is one of them alone, which may be finite where the other is not."""
    x = make((40,), (4, 4), 30, dtype=torch.float64, trainable=SIDES)
    forward, reverse = (measure(lambda y, kind=kind: value(y, kind), x) for kind in ("forward_kl", "reverse_kl"))
    for mixture in (0.0, 0.1, 0.5, 0.9, 1.0):
        found = measure(lambda y, w=mixture: value(y, "symmetric_kl", mixture=w), x)
        for name, mixed in found.items():
            close(mixed, (1 - mixture) * forward[name] + mixture * reverse[name])
    close(value(X, "symmetric_kl"), value(exchanged(X), "symmetric_kl"))
    z, ref = torch.tensor([[0.5, INF]]), torch.tensor([[0.2, 0.4]])
    assert of_logits(z, ref, kind="symmetric_kl", mixture=1.0)[0].isfinite().all()
    assert of_logits(ref, z, kind="symmetric_kl", mixture=0.0)[0].isfinite().all()


def test_no_skew_is_plain_kl():
    close(value(X, "skew_forward_kl", skew=0.0), value(X, "forward_kl"))
    close(value(X, "skew_reverse_kl", skew=0.0), value(X, "reverse_kl"))


def test_cross_entropy_is_forward_kl_and_the_references_entropy():
    log_p = linear(X.ref_hidden, X.ref_weight, X.ref_bias).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    close(value(X, "cross_entropy"), value(X, "forward_kl") + entropy)


def test_bounds_and_that_disjoint_distributions_reach_them():
    z, ref = torch.tensor([[0.0, 0.0, INF, INF]]), torch.tensor([[INF, INF, 1.0, 0.0]])
    bounds = {
        ("total_variation", ()): 1.0,
        ("squared_hellinger", ()): 1.0,
        ("js", ()): math.log(2),
        ("js", (("mixture", 0.2),)): -0.2 * math.log(0.2) - 0.8 * math.log(0.8),
        ("skew_forward_kl", (("skew", 0.1),)): -math.log(0.1),
        ("skew_reverse_kl", (("skew", 0.3),)): -math.log(0.3),
        ("alpha", (("alpha", 0.25),)): 1 / (0.25 * 0.75),
    }
    for (kind, parameters), bound in bounds.items():
        reached, gradient = of_logits(z, ref, kind=kind, **dict(parameters))
        assert reached.item() == pytest.approx(bound, rel=1e-6)
        assert (gradient.abs() <= 1e-6).all()  # nothing that moves the model's mass about helps
        assert (value(X, kind, **dict(parameters)) < bound).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([1e-4, 1.0, 20.0]))
def test_never_below_zero_beyond_rounding(kind, seed, spread):
    """The least value is 0, at equality; the normalisers' rounding shows at 1e-7 nats."""
    x = make((8,), (3, 3), 50, seed=seed, spread=spread, trainable=())
    assert (value(x, kind) >= -1e-6).all()


# ---------------------------------------------------------------------------------------------------------------------
# Peers


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl_generalized_jsd(beta, temperature, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    x = make((2, 5), (4, 3), 40, trainable=("hidden", "weight"))
    labels = torch.zeros(2, 5, dtype=torch.long)
    labels[0, :2] = -100

    def theirs(y: SideTensors) -> torch.Tensor:
        z, ref = linear(*y[:3]), linear(*y[3:])
        return gkd.GKDTrainer.generalized_jsd_loss(z, ref, labels=labels, beta=beta, temperature=temperature)

    # at the ends TRL takes the KLs, with a jump, which is `normalized` here
    kind = dict(kind="js", mixture=beta, normalized=beta in (0, 1))
    tempered = LogitTransform(temperature=temperature)
    ours = measure(lambda y: call(y, tempered, tempered, mask=labels != -100, reduction="mean", **kind), x)
    for name, expected in measure(theirs, x).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_liger_jsd(beta):
    jsd = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    x = make((10,), (4, 3), 40, trainable=("hidden", "weight", "bias"))

    def theirs(y: SideTensors) -> torch.Tensor:
        z, ref = linear(*y[:3]), linear(*y[3:])
        return jsd.LigerFusedLinearJSDFunction.distillation_loss_fn(z, ref, beta=beta)

    ours = measure(lambda y: call(y, kind="js", mixture=beta, normalized=beta == 1, reduction="sum"), x)
    for name, expected in measure(theirs, x).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Strategies, and what they cost


@pytest.fixture
def products(monkeypatch):
    """Names of the GEMMs of the sweep, in order."""
    seen: list[str] = []
    for name in ("raw_products", "products_with_head", "multiply"):
        original = getattr(rows, name)

        def counted(*arguments: Any, _name: str = name, _original: Any = original, **keywords: Any) -> Any:
            seen.append(_name)
            return _original(*arguments, **keywords)

        monkeypatch.setattr(rows, name, counted)
    return seen


@pytest.mark.parametrize(
    ("trainable", "keywords", "forward", "backward"),
    [
        ((), {}, 2, 0),
        (("hidden", "weight"), {}, 2, 4),
        (("hidden", "weight"), dict(reduction="mean"), 4, 0),
        (("hidden", "weight"), dict(reduction="mean", backward="recompute"), 2, 4),
        (("hidden",), {}, 3, 0),
        (("hidden",), dict(backward="single_pass"), 3, 0),
        (("hidden",), dict(backward="recompute"), 2, 3),
        (("hidden", "ref_hidden"), {}, 4, 0),
        (SIDES, dict(reduction="sum"), 6, 0),
    ],
)
def test_matrix_products(products, trainable, keywords, forward, backward):
    """The number of products of both sides for one chunk is that of the docstring."""
    x = make(trainable=trainable)
    found = call(x, kind="js", **keywords)
    assert len(products) == forward
    if found.requires_grad:
        found.sum().backward()
    assert len(products) == forward + backward


def test_masked_tokens_cost_nothing_and_may_be_anything(products):
    x = make((6,), trainable=("hidden", "weight"))
    mask = torch.tensor([True, False, True, False, False, True])
    expected = measure(lambda y: call(y, kind="js", mask=mask), x)
    with torch.no_grad():
        x.hidden[~mask], x.ref_hidden[~mask] = torch.nan, torch.inf
    found = measure(lambda y: call(y, kind="js", mask=mask), x)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    assert (found["value"][~mask] == 0).all() and (found["d_hidden"][~mask] == 0).all()


@pytest.mark.parametrize("trainable", [SIDES, ("hidden",)], ids=["all", "frozen"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0,), (4,)])
def test_no_token_that_counts(trainable, reduction, shape):
    x = make(shape, trainable=trainable)
    mask = torch.zeros(shape, dtype=torch.bool) if shape[0] else None
    found = call(x, kind="reverse_kl", mask=mask, reduction=reduction)
    assert found.sum() == 0 and found.requires_grad
    found.sum().backward()
    assert all((y.grad == 0).all() for name, y in zip(SIDES, x, strict=True) if name in trainable)


def test_the_normalizer_divides_the_mean():
    x = make()
    total = call(x, kind="js", reduction="sum")
    for normalizer in (7, torch.tensor(7)):
        torch.testing.assert_close(call(x, kind="js", reduction="mean", normalizer=normalizer), total / 7)


def test_backward_twice_and_the_same_bits():
    x = make()
    found = call(x, kind="js", reduction="sum", chunk_bytes=300)
    first = torch.autograd.grad(found, [x.hidden, x.weight], retain_graph=True)
    second = torch.autograd.grad(found, [x.hidden, x.weight])
    again = torch.autograd.grad(call(x, kind="js", reduction="sum", chunk_bytes=300), [x.hidden, x.weight])
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_create_graph_is_refused(reduction):
    x = make()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(call(x, kind="js", reduction=reduction).sum(), x.hidden, create_graph=True)
    found = call(x, kind="js", reduction=reduction, backend="reference").sum()
    (gradient,) = torch.autograd.grad(found, x.hidden, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x.hidden)[0].isfinite().all()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_sides_of_two_dtypes(dtypes):
    own, ref = (make(dtype=dtype) for dtype in dtypes)
    x = SideTensors(*own[:3], *ref[3:])
    found = measure(lambda y: call(y, kind="js"), x)
    exact = measure(lambda y: call(y, kind="js", backend="reference"), x.to(torch.float64))
    assert found["value"].dtype == statistics_dtype(dtypes[1])
    tolerance = 0.05 if dtypes[0] == torch.bfloat16 else 1e-5
    for name in exact:
        torch.testing.assert_close(found[name].double(), exact[name], rtol=tolerance, atol=tolerance)


def test_autocast_casts_both_sides():
    x = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measure(lambda y: call(y, kind="js"), x)
    expected = measure(lambda y: call(y, kind="js"), x.to(torch.bfloat16))
    torch.testing.assert_close(found["value"], expected["value"])
    assert found["d_hidden"].dtype == torch.float32


def test_strided_inputs():
    x = make((3, 4), trainable=())
    scattered = SideTensors(*(y.detach()[..., None].expand(*y.shape, 2).contiguous()[..., 0] for y in x))
    torch.testing.assert_close(call(scattered, kind="js"), call(x, kind="js"))


# ---------------------------------------------------------------------------------------------------------------------
# Memory

N, V, H = 128, 1024, 2
WHOLE = N * V * 4
BUDGET = 3 * 16 * V * 4  # 16 tokens: an eighth of the whole for either side, and as much for temporaries
COMMON = [("js", SIDES, "sum"), ("js", ("hidden",), "none"), ("js", (), "none")]


@pytest.mark.parametrize(("kind", "trainable", "reduction"), [*((kind, SIDES, "none") for kind in KINDS), *COMMON])
def test_no_allocation_comes_near_the_logits(kind, trainable, reduction):
    x = make((N,), (H, H), V, trainable=trainable)
    with watch_allocations() as seen:
        found = call(x, kind=kind, reduction=reduction, chunk_bytes=BUDGET).sum()
        if found.requires_grad:
            found.backward()
    gradients = sum(y.grad.nbytes for y in x if y.grad is not None)
    assert seen.largest <= WHOLE // 8
    assert seen.peak <= 1.1 * BUDGET + 2 * gradients


def test_the_reference_is_seen_to_allocate_the_logits():
    with watch_allocations() as seen:
        call(make((N,), (H, H), V), kind="js", backend="reference").sum().backward()
    assert seen.largest >= WHOLE


# ---------------------------------------------------------------------------------------------------------------------
# torch.library and torch.compile


def arguments(x: SideTensors, kind: str) -> tuple:
    transforms = [1.5, 3.0, 0.7, 1.0, math.inf, 1.0]
    mask = torch.tensor([True, True, False, True, False, True])
    return (*x, mask, kind, [0.5, 0.1, 0.5], False, transforms)


@pytest.mark.parametrize(
    ("units", "dtype"),
    [((False, False), torch.float32), ((True, True), torch.float32), ((True, False), torch.bfloat16)],
    ids=str,
)
def test_opcheck_divergence(units, dtype):
    trainable = [name for name, unit in zip(("hidden", "ref_hidden"), units, strict=True) if unit] or SIDES
    x = make(trainable=trainable, dtype=dtype)
    torch.library.opcheck(
        torch.ops.logitless.divergence.default,
        (*arguments(x, "js"), list(units), None, "chunked", 300, "", 0),
        test_utils=TESTS,
    )


@pytest.mark.parametrize("trainable", [SIDES, ("hidden", "weight")], ids=str)
def test_opcheck_divergence_sum(monkeypatch, trainable):
    # as for token_loss: the last backward scales private gradients in place
    monkeypatch.setattr(ops, "scaled", lambda gradient, factor, dtype: (gradient * factor).to(dtype))
    needs = [name in trainable for name in SIDES]
    every = (torch.rand(6), *arguments(make(trainable=trainable), "js"), needs, None, "chunked", 300, "", 0)
    torch.library.opcheck(torch.ops.logitless.divergence_sum.default, every, test_utils=TESTS)


@pytest.mark.parametrize("trainable", [("hidden", "weight", "bias"), ("hidden",)], ids=["all", "frozen"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_without_a_graph_break(trainable, reduction):
    x = make(trainable=trainable)
    mask = torch.rand(6) < 0.7

    def function(y: SideTensors) -> torch.Tensor:
        return call(y, LogitTransform(softcap=3.0), None, kind="js", mixture=0.3, mask=mask, reduction=reduction)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = measure(function, x)
    for name, found in measure(compiled, x).items():
        torch.testing.assert_close(found, expected[name])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (dict(kind="kl"), ValueError, "kind: expected one of"),
    (dict(hidden=[1.0]), TypeError, "hidden: expected a tensor"),
    (dict(head=Head([1.0])), TypeError, r"head\.weight: expected a tensor"),
    (dict(head="lm_head"), TypeError, "head: expected a weight"),
    (dict(ref_head=None), TypeError, "ref_head: expected a weight"),
    (dict(ref_head=torch.zeros(8, 5)), ValueError, "ref_head: expected a vocabulary of 9 like head's, got 8"),
    (dict(ref_head=torch.zeros(9, 4)), ValueError, "ref_hidden: expected shape"),
    (dict(ref_hidden=torch.zeros(5, 5)), ValueError, r"ref_hidden: expected shape \[6, 5\] like hidden"),
    (dict(head=Head(torch.zeros(9, 4), torch.zeros(8))), ValueError, r"head\.bias: expected shape \[9\], got \[8\]"),
    (dict(head=torch.zeros(9, 4).double()), TypeError, r"head\.weight: expected dtype torch.float32"),
    (dict(head=Head(torch.zeros(9, 4), softcap=0)), ValueError, "softcap"),
    (dict(ref_head=Head(torch.zeros(9, 5), temperature=0.0)), ValueError, "temperature"),
    (dict(mask=torch.ones(6)), ValueError, r"mask: expected bool \[6\]"),
    (dict(mask=torch.ones(5, dtype=torch.bool)), ValueError, r"mask: expected bool \[6\]"),
    (dict(mask=[True]), TypeError, "mask: expected a tensor"),
    (dict(mixture=1.5), ValueError, r"mixture: expected a number in \[0, 1\], got 1.5"),
    (dict(mixture=1.0), ValueError, "mixture: the js divergence with mixture 1.0 is 0"),
    (dict(mixture="half"), TypeError, "mixture: expected"),
    (dict(normalized=1), TypeError, "normalized: expected a bool"),
    (dict(kind="forward_kl", mixture=0.3), ValueError, "mixture: kind 'forward_kl' does not read it, got 0.3"),
    (dict(kind="forward_kl", normalized=True), ValueError, "normalized: kind 'forward_kl' does not read it"),
    (dict(skew=0.2), ValueError, "skew: kind 'js' does not read it"),
    (dict(alpha=0.2), ValueError, "alpha: kind 'js' does not read it"),
    (dict(kind="skew_forward_kl", skew=1.0), ValueError, r"skew: expected a number in \[0, 1\), got 1.0"),
    (dict(kind="alpha", alpha=math.inf), ValueError, "alpha: expected a finite number"),
    (dict(reduction="average"), ValueError, "reduction: expected one of"),
    (dict(normalizer=2.0), ValueError, "normalizer: divides"),
    (dict(reduction="mean", normalizer=0.0), ValueError, "normalizer: expected a positive number"),
    (dict(token_weight=torch.ones(5)), ValueError, "token_weight: expected shape"),
    (dict(token_weight=torch.ones(6, requires_grad=True)), ValueError, "token_weight: is a constant"),
    (dict(backend="cublas"), ValueError, "backend: expected one of"),
    (dict(backward="tail_corrected"), ValueError, "backward: expected one of"),
    (dict(chunk_bytes=0), ValueError, "chunk_bytes: expected a positive number"),
    (dict(backward="single_pass", head=torch.zeros(9, 4, requires_grad=True)), ValueError, "backward: 'single_pass'"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(wrong, error, message):
    good = dict(hidden=torch.zeros(6, 4), head=torch.zeros(9, 4), ref_hidden=torch.zeros(6, 5),
                ref_head=torch.zeros(9, 5), kind="js")  # fmt: skip
    with pytest.raises(error, match=message):
        linear_divergence(**{**good, **wrong})


def test_every_kind_has_its_rows():
    assert set(rows.KINDS) == set(KINDS)
    assert logitless.linear_divergence is linear_divergence
    assert replace(DivergenceOptions("js"), mixture=0.25).mixture == 0.25
