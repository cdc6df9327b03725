"""`linear_token_loss`: any differentiable function of a token's statistics, in one sweep, against full logits."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from logitless import linear_logprobs, linear_token_loss
from logitless.ops import functions
from logitless.testing import assert_matches_float64, make_problem, materialised, measure, poison_empty
from logitless.types import DIFFERENTIABLE, LogitTransform


def nll(stats):
    return -stats.logprob


def detached_weight(stats):
    return -stats.logprob.detach().exp() * stats.logprob


def everything(stats):
    return stats.logprob.tanh() + 0.1 * stats.lse.square() - stats.entropy + 0.3 * stats.mean_logit.sin()


def entropy_and_lse(stats):
    return stats.entropy * stats.lse


def constant_metrics(stats):
    return -stats.logprob * (1 + stats.correct) * stats.log_sum_sq.exp()


FUNCTIONS = {
    nll: ("logprob",),
    detached_weight: ("logprob",),
    everything: DIFFERENTIABLE,
    entropy_and_lse: ("lse", "entropy"),
    constant_metrics: ("logprob", "correct", "log_sum_sq"),
}


def ours(case: Case, function, **options):
    return lambda p: linear_token_loss(
        p.hidden, p.weight, p.targets, function, bias=p.bias, outputs=FUNCTIONS[function], **case.options, **options
    )


def oracle(case: Case, function, reduction):
    def compute(p):
        stats = materialised(p, case.transform, outputs=FUNCTIONS[function])
        losses = torch.where(p.targets != -100, function(stats), 0)
        if reduction == "none":
            return losses
        return losses.sum() / (max(int((p.targets != -100).sum()), 1) if reduction == "mean" else 1)

    return compute


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@settings(max_examples=40)
@given(case=cases(), reduction=st.sampled_from(["none", "sum", "mean"]), backend=st.sampled_from(["auto", "reference"]))
def test_any_options_against_float64(function, case, reduction, backend):
    problem = case.problem
    if function is everything and problem.bias is not None and problem.bias.isinf().any():
        return  # sin of -inf
    if function is constant_metrics and problem.hidden.dtype in (torch.bfloat16, torch.float16):
        return  # `correct` may differ where two logits round to the same
    with poison_empty():
        assert_matches_float64(
            ours(case, function, reduction=reduction, backend=backend),
            oracle(case, function, reduction),
            case.problem,
            scale=case.scale_of(FUNCTIONS[function]),
        )


@pytest.mark.parametrize("backward", ["single_pass", "recompute", "auto"])
@pytest.mark.parametrize("trainable", [("hidden",), ("weight",), ("bias",), ("hidden", "weight", "bias"), ()])
def test_strategies_agree(backward, trainable):
    problem = make_problem((7,), 5, 11, bias=True, ignored=0.2, trainable=trainable)
    problem.targets[0] = -100
    case = Case(problem, LogitTransform(softcap=4.0), 2)
    assert_matches_float64(ours(case, everything, backward=backward), oracle(case, everything, "mean"), problem)
    leaves = [x for x in problem if x is not None and x.requires_grad]
    assert ours(case, everything, backward=backward)(problem).requires_grad == bool(leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_sizes(dtype):
    problem = make_problem((252,), 123, 507, dtype=dtype, bias=True, ignored=0.2)
    problem.targets[0] = -100
    case = Case(problem, LogitTransform(softcap=30.0), 50)
    assert_matches_float64(ours(case, everything), oracle(case, everything, "mean"), problem)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(reduction, softcap):
    problem = make_problem((5,), 3, 8, dtype=torch.float64, bias=True, ignored=0.3)

    def function(hidden, weight, bias):
        return linear_token_loss(
            hidden, weight, problem.targets, everything, bias=bias, outputs=DIFFERENTIABLE, softcap=softcap,
            reduction=reduction, chunk_bytes=200,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (problem.hidden, problem.weight, problem.bias))


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3)])
def test_token_inputs_go_along(shape, backward):
    problem = make_problem(shape, 4, 9, ignored=0.3)
    scale, offset = torch.rand(shape), torch.randn(shape).transpose(0, -1).contiguous().transpose(0, -1)

    def weighted(stats, scale, offset):
        return scale * (stats.logprob - offset).square()

    def compute(p):
        return linear_token_loss(
            p.hidden, p.weight, p.targets, weighted, token_inputs=(scale, offset), chunk_bytes=70, reduction="sum",
            backward=backward,
        )  # fmt: skip

    def expected(p):
        losses = weighted(materialised(p), scale, offset)
        return torch.where(p.targets != -100, losses, 0).sum()

    assert_matches_float64(compute, expected, problem)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 100])
def test_the_function_sees_chunks_of_tokens_that_count(tokens):
    problem = make_problem((20,), 4, 9)
    problem.targets[::3] = -100
    seen = []

    def watch(stats, place):
        assert stats.lse is None and stats.entropy is None
        seen.append(place)
        return -stats.logprob

    place = torch.arange(20.0)
    linear_token_loss(
        problem.hidden, problem.weight, problem.targets, watch, token_inputs=(place,), chunk_bytes=tokens * 9 * 4
    )
    assert torch.equal(torch.cat(seen), place[problem.targets != -100])
    assert max(len(x) for x in seen) <= tokens


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("backward", ["auto", "recompute"])
def test_normalizer(as_tensor, backward):
    problem = make_problem((6,), 4, 9, ignored=0.3)
    normalizer = torch.tensor([17]) if as_tensor else 17
    arguments = (problem.hidden, problem.weight, problem.targets, nll)
    total = linear_token_loss(*arguments, reduction="sum", backward=backward)
    torch.testing.assert_close(linear_token_loss(*arguments, normalizer=normalizer, backward=backward), total / 17)


def test_micro_batches_with_one_normalizer_add_up():
    problem = make_problem((8,), 4, 9, ignored=0.3)
    count = int((problem.targets != -100).sum())
    parts = [
        linear_token_loss(problem.hidden[rows], problem.weight, problem.targets[rows], nll, normalizer=count)
        for rows in (slice(0, 3), slice(3, 8))
    ]
    whole = linear_token_loss(problem.hidden, problem.weight, problem.targets, nll)
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(4,), (0,), (2, 0)])
def test_all_ignored_is_zero_and_connected(shape, reduction, backward):
    problem = make_problem(shape, 3, 5, bias=True, ignored=1.0)
    loss = linear_token_loss(
        problem.hidden, problem.weight, problem.targets, nll, bias=problem.bias, reduction=reduction, backward=backward
    )
    assert loss.requires_grad and (loss == 0).all()
    loss.sum().backward()
    for leaf in (problem.hidden, problem.weight, problem.bias):
        assert leaf.grad is not None and (leaf.grad == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_reach_the_loss(bad):
    problem = make_problem((4,), 3, 5)
    with torch.no_grad():
        problem.hidden[2, 1] = bad
    assert linear_token_loss(problem.hidden, problem.weight, problem.targets, nll).isnan()


def test_what_ignored_tokens_hold_is_never_read():
    problem = make_problem((6,), 4, 9, bias=True)
    problem.targets[[0, 3]] = -100
    inputs = torch.rand(6)
    with torch.no_grad():
        problem.hidden[[0, 3]], inputs[[0, 3]] = math.nan, math.nan

    def compute(p):
        return linear_token_loss(
            p.hidden, p.weight, p.targets, lambda s, x: -x * s.logprob, token_inputs=(inputs,), bias=p.bias
        )

    found = measure(compute, problem)
    assert all(x.isfinite().all() for x in found.values())
    assert (found["d_hidden"][[0, 3]] == 0).all()


@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_twice_and_a_scaled_upstream_gradient(dtype, factor):
    problem = make_problem((6,), 4, 9, dtype=dtype, bias=True)
    leaves = (problem.hidden, problem.weight, problem.bias)
    loss = linear_token_loss(problem.hidden, problem.weight, problem.targets, nll, bias=problem.bias)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(once, scaled, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(b, factor * a)


def test_gradients_accumulate():
    problem = make_problem((6,), 4, 9)
    for _ in range(3):
        linear_token_loss(problem.hidden, problem.weight, problem.targets, nll).backward()
    single = torch.autograd.grad(
        linear_token_loss(problem.hidden, problem.weight, problem.targets, nll), problem.weight
    )[0]
    torch.testing.assert_close(problem.weight.grad, 3 * single)


def test_create_graph_is_refused():
    problem = make_problem((6,), 4, 9)
    loss = linear_token_loss(problem.hidden, problem.weight, problem.targets, nll)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, problem.hidden, create_graph=True)


def test_a_function_without_a_gradient():
    problem = make_problem((4,), 3, 5)
    loss = linear_token_loss(problem.hidden, problem.weight, problem.targets, lambda s: torch.ones_like(s.logprob))
    assert loss.item() == 1
    assert (torch.autograd.grad(loss, problem.weight)[0] == 0).all()


@pytest.mark.parametrize("what", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_function_comes_through_and_leaves_nothing_behind(what):
    problem = make_problem((4,), 3, 5)
    before = dict(functions._functions)

    def broken(stats):
        raise what

    with pytest.raises(what):
        linear_token_loss(problem.hidden, problem.weight, problem.targets, broken)
    assert functions._functions == before


def test_under_no_grad_nothing_is_differentiated():
    problem = make_problem((4,), 3, 5)
    loss = linear_token_loss(problem.hidden, problem.weight, problem.targets, nll)
    with torch.no_grad():
        quiet = linear_token_loss(problem.hidden, problem.weight, problem.targets, nll)
    assert not quiet.requires_grad and torch.equal(quiet, loss.detach())
    with torch.inference_mode():
        assert torch.equal(linear_token_loss(problem.hidden, problem.weight, problem.targets, nll), quiet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_callers_changes(dtype):
    problem = make_problem((6,), 4, 9, dtype=dtype, masked=slice(2, 4), ignored=0.3)
    inputs = torch.rand(6)
    before = [x.detach().clone() for x in (*problem, inputs)]
    loss = linear_token_loss(
        problem.hidden, problem.weight, problem.targets, lambda s, x: x * s.logprob, token_inputs=(inputs,),
        bias=problem.bias, softcap=3.0,
    )  # fmt: skip
    value = loss.detach().clone()
    loss.backward()
    assert torch.equal(loss.detach(), value)
    for now, then in zip((*problem, inputs), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice(dtype):
    problem = make_problem((65,), 16, 300, dtype=dtype, bias=True, ignored=0.2)
    case = Case(problem, LogitTransform(), 16)
    first, second = (measure(ours(case, everything), problem) for _ in "12")
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_chunks_do_not_change_the_accuracy(tokens):
    """float32 sums of a bf16 head's gradient: 252 chunks no worse than one."""
    problem = make_problem((252,), 33, 507, dtype=torch.bfloat16, spread=1.0)
    case = Case(problem, LogitTransform(), tokens)
    exact = measure(oracle(case, nll, "mean"), problem.to(torch.float64))["d_weight"]
    whole, found = (measure(ours(Case(problem, LogitTransform(), n), nll), problem)["d_weight"] for n in (None, tokens))
    assert (found - exact).norm() <= 1.05 * (whole - exact).norm()


def test_autocast_is_a_cast():
    problem = make_problem((6,), 4, 9)

    def under_autocast(p):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_token_loss(p.hidden, p.weight, p.targets, detached_weight)

    def cast(p):
        return linear_token_loss(p.hidden.bfloat16(), p.weight.bfloat16(), p.targets, detached_weight)

    found, expected = measure(under_autocast, problem), measure(cast, problem)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_autocast_does_not_reach_the_function():
    problem = make_problem((6,), 4, 9)
    seen = []

    def watch(stats):
        seen.append(stats.logprob.dtype)
        return -stats.logprob

    with torch.autocast("cpu", torch.bfloat16):
        assert linear_token_loss(problem.hidden, problem.weight, problem.targets, watch).dtype == torch.float32
    assert seen == [torch.float32]


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")])
def test_the_backend_makes_the_gradients_needed_alone(monkeypatch, trainable):
    from logitless.backends.chunked import CHUNKED

    asked = []
    single_pass = CHUNKED.single_pass
    monkeypatch.setattr(CHUNKED, "single_pass", lambda *args: asked.append(args[1].needs) or single_pass(*args))
    problem = make_problem((6,), 4, 9, bias=True, trainable=trainable)
    arguments = (problem.hidden, problem.weight, problem.targets, nll)
    linear_token_loss(*arguments, bias=problem.bias)
    with torch.no_grad():  # needs no sweep, but a forward
        linear_token_loss(*arguments, bias=problem.bias)
    assert asked == [tuple(n in trainable for n in ("hidden", "weight", "bias"))]


def test_equals_the_primitive_with_the_loss_on_top():
    problem = make_problem((2, 5), 4, 9, ignored=0.3)
    stats = linear_logprobs(problem.hidden, problem.weight, problem.targets, outputs=("lse", "entropy"))
    expected = (stats.entropy * stats.lse).sum() / (problem.targets != -100).sum()
    found = linear_token_loss(
        problem.hidden, problem.weight, problem.targets, entropy_and_lse, outputs=("lse", "entropy")
    )
    torch.testing.assert_close(found, expected)
    leaves = (problem.hidden, problem.weight)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)
