"""`linear_logprobs`: every combination of options against the float64 reference, its gradients, and its promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import HERE, Case, cases, strided
from hypothesis import given, settings
from hypothesis import strategies as st

from logitless import TokenStats, linear_logprobs
from logitless.backends import BACKENDS
from logitless.reference import transformed
from logitless.testing import (
    TokenProblem,
    assert_matches_float64,
    assert_within_budget,
    make_problem,
    materialised,
    measure,
    poison_empty,
)
from logitless.types import DIFFERENTIABLE, OUTPUTS, LogitTransform

ALL_BACKENDS = ["reference", *HERE]


def run(problem: TokenProblem, **options) -> TokenStats:
    return linear_logprobs(problem.hidden, problem.weight, problem.targets, bias=problem.bias, **options)


def check(case: Case, outputs: tuple[str, ...], logit_weight=None, **options) -> None:
    with poison_empty():
        assert_matches_float64(
            lambda p: run(p, outputs=outputs, logit_weight=logit_weight, **case.options, **options),
            lambda p: materialised(p, case.transform, outputs=outputs, logit_weight=logit_weight),
            case.problem,
            scale=case.scale_of(outputs),
        )


outputs_subset = st.sets(st.sampled_from(OUTPUTS), min_size=1).map(lambda s: tuple(x for x in OUTPUTS if x in s))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@settings(max_examples=200)
@given(case=cases(), outputs=outputs_subset, backward=st.sampled_from(["auto", "recompute"]))
def test_any_options_against_float64(backend, case, outputs, backward):
    check(case, outputs, backend=backend, backward=backward)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@given(case=cases(), others=outputs_subset, backward=st.sampled_from(["auto", "recompute"]), data=st.data())
def test_weights_of_the_mean_logit(backend, case, others, backward, data):
    outputs = tuple(name for name in OUTPUTS if name in (*others, "mean_logit"))
    vocabulary = len(case.problem.weight)
    weights = torch.tensor(
        data.draw(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=vocabulary, max_size=vocabulary))
    )
    with poison_empty():
        assert_matches_float64(
            lambda p: run(p, outputs=outputs, logit_weight=weights, backend=backend, backward=backward, **case.options),
            lambda p: weighted(p, case.transform, outputs, weights),
            case.problem,
            scale=max(case.scale_of(outputs), case.bent_scale),
        )


def weighted(problem: TokenProblem, transform: LogitTransform, outputs: tuple[str, ...], weights) -> TokenStats:
    """Statistics by plain PyTorch, the mean logit as its definition says."""
    stats = materialised(problem, transform, outputs=outputs)
    z = torch.nn.functional.linear(problem.hidden, problem.weight, problem.bias)
    z = transformed(z.to(torch.promote_types(z.dtype, torch.float32)), transform)
    mean = (z * weights.to(z)).sum(-1) / len(weights)
    return stats._replace(mean_logit=torch.where(problem.targets == -100, 0, mean))


@given(case=cases(trainable=st.just(("hidden",))), outputs=st.sampled_from(["logprob", "logprob lse", "lse"]))
def test_frozen_head_keeps_one_vector_per_token(case, outputs):
    check(case, tuple(outputs.split()), backward="single_pass")


@given(case=cases(trainable=st.just(("hidden",))), weighted=st.booleans())
def test_frozen_head_mean_logit(case, weighted):
    if case.transform.softcap is None and case.problem.bias is None:
        weights = torch.linspace(0.2, 3.0, len(case.problem.weight)) if weighted else None
        check(case, ("logprob", "lse", "mean_logit"), logit_weight=weights, backward="single_pass")


@pytest.mark.slow
@settings(max_examples=2000)
@given(case=cases(), outputs=outputs_subset, backward=st.sampled_from(["auto", "recompute"]))
def test_many_options_against_float64(case, outputs, backward):
    check(case, outputs, backward=backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_sizes(dtype):
    problem = make_problem((252,), 123, 507, dtype=dtype, bias=True, ignored=0.2)
    problem.targets[0] = -100
    check(Case(problem, LogitTransform(softcap=30.0), 50), DIFFERENTIABLE)


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)))
def test_gradients_are_those_asked_for(frozen):
    names = tuple(n for n, f in zip(("hidden", "weight", "bias"), frozen, strict=True) if not f)
    problem = make_problem((5,), 4, 7, bias=True, trainable=names)
    stats = run(problem, outputs=DIFFERENTIABLE)
    for value in stats[:4]:
        assert value.requires_grad == bool(names)
    assert set(measure(lambda p: run(p), problem)) == {"logprob", *(f"d_{n}" for n in names)}


def test_a_vector_is_not_made_for_a_hidden_state_that_needs_none(monkeypatch):
    """The backend is asked for no unit gradient and no sums under no_grad, or if everything is frozen."""
    asked = []
    forward = BACKENDS["chunked"].forward
    monkeypatch.setattr(BACKENDS["chunked"], "forward", lambda p, o, unit: asked.append(unit) or forward(p, o, unit))
    problem = make_problem((5,), 4, 7, trainable=("hidden",))
    run(problem)
    with torch.no_grad():
        run(problem)
    run(make_problem((5,), 4, 7, trainable=()))
    run(make_problem((5,), 4, 7, trainable=("hidden", "weight")))
    assert asked == [True, False, False, False]


@pytest.mark.parametrize("names", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_the_backward_computes_what_is_needed_alone(monkeypatch, names):
    asked = []
    backward = BACKENDS["chunked"].backward
    monkeypatch.setattr(BACKENDS["chunked"], "backward", lambda *args: asked.append(args[3]) or backward(*args))
    problem = make_problem((5,), 4, 7, bias=True, trainable=names)
    run(problem, backward="recompute").logprob.sum().backward()
    assert asked == [tuple(n in names for n in ("hidden", "weight", "bias"))]


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [None, slice(2, 6)])
@pytest.mark.parametrize("chunk_tokens", [None, 1])
def test_gradcheck(backend, softcap, masked, chunk_tokens):
    problem = make_problem((4,), 3, 8, dtype=torch.float64, bias=True, masked=masked, ignored=0.3)
    case = Case(problem, LogitTransform(1.3, softcap, 0.8), chunk_tokens)
    leaves = [problem.hidden, problem.weight]
    bias = problem.bias.detach() if masked is not None else problem.bias.requires_grad_()
    outputs = DIFFERENTIABLE if masked is None else DIFFERENTIABLE[:3]  # the mean logit is -inf

    def function(hidden, weight, bias):
        stats = linear_logprobs(
            hidden, weight, problem.targets, bias=bias, outputs=outputs, backend=backend, **case.options
        )
        return tuple(x for x in stats if x is not None)

    assert torch.autograd.gradcheck(function, (*leaves, bias))


@pytest.mark.parametrize("outputs", [("logprob",), ("lse",), ("logprob", "lse", "mean_logit")])
def test_gradcheck_of_a_frozen_head(outputs):
    problem = make_problem((4,), 3, 8, dtype=torch.float64, ignored=0.3, trainable=("hidden",))

    def function(hidden):
        stats = linear_logprobs(hidden, problem.weight, problem.targets, outputs=outputs, backward="single_pass")
        return tuple(x for x in stats if x is not None)

    assert torch.autograd.gradcheck(function, problem.hidden)


@pytest.mark.parametrize("outputs", [("lse",), ("entropy",), ("mean_logit",), ("lse", "entropy", "log_sum_sq")])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_without_targets(backend, outputs):
    problem = make_problem((2, 3), 4, 9, bias=True)

    def without(p):
        return linear_logprobs(p.hidden, p.weight, None, bias=p.bias, outputs=outputs, backend=backend, chunk_bytes=100)

    assert_matches_float64(without, lambda p: materialised(p, outputs=outputs), problem)


def test_fields_not_asked_for_are_none():
    stats = run(make_problem((3,), 4, 5), outputs=("entropy", "correct"))
    assert [name for name, x in stats._asdict().items() if x is not None] == ["entropy", "correct"]
    assert not stats.correct.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_shapes_and_dtypes(shape, dtype):
    problem = make_problem(shape, 4, 5, dtype=dtype)
    stats = run(problem, outputs=OUTPUTS)
    for value in (getattr(stats, name) for name in OUTPUTS):
        assert value.shape == shape
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    stats.logprob.sum().backward()
    assert problem.hidden.grad.dtype == dtype and problem.hidden.grad.shape == problem.hidden.shape
    assert problem.weight.grad.dtype == dtype


@given(case=cases())
@settings(max_examples=25)
def test_strides_change_nothing(case):
    plain = measure(lambda p: run(p, outputs=DIFFERENTIABLE, **case.options), case.problem)
    with torch.no_grad():  # `to` of a leaf keeps strides; `measure` takes its own leaves from these
        views = strided(case.problem)
    found = measure(lambda p: run(p, outputs=DIFFERENTIABLE, **case.options), views)
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_entry_may_have_any_strides(dtype):
    problem = make_problem((1,), 1, 1, dtype=dtype)
    with torch.no_grad():
        views = strided(problem)
    plain, found = (measure(lambda p: run(p, outputs=("lse",)), p) for p in (problem, views))
    for name in plain:
        torch.testing.assert_close(found[name], plain[name])


def test_transposed_inputs():
    problem = make_problem((6,), 4, 9)
    hidden = problem.hidden.detach().T.contiguous().T.requires_grad_()
    weight = problem.weight.detach().T.contiguous().T.requires_grad_()
    ours = torch.autograd.grad(linear_logprobs(hidden, weight, problem.targets).logprob.sum(), (hidden, weight))
    plain = torch.autograd.grad(run(problem).logprob.sum(), (problem.hidden, problem.weight))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_int32_targets():
    problem = make_problem((6,), 4, 9, ignored=0.3)
    torch.testing.assert_close(
        linear_logprobs(problem.hidden, problem.weight, problem.targets.int()).logprob, run(problem).logprob
    )


def test_any_ignore_index():
    problem = make_problem((6,), 4, 9)
    found = run(problem, ignore_index=int(problem.targets[0])).logprob
    counts = problem.targets != problem.targets[0]
    torch.testing.assert_close(found, torch.where(counts, run(problem).logprob, 0))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")])
def test_ignored_tokens_are_never_read(backend, trainable):
    problem = make_problem((6,), 4, 9, bias=True, trainable=trainable)
    problem.targets[[0, 3]] = -100
    with torch.no_grad():
        problem.hidden[[0, 3]] = math.nan
    found = measure(lambda p: run(p, outputs=("logprob", "lse"), backend=backend), problem)
    for name, value in found.items():
        assert value.isfinite().all(), name
    for name in ("logprob", "lse", "d_hidden"):
        assert (found[name][[0, 3]] == 0).all()


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight")])
def test_a_nan_gradient_of_an_ignored_token_goes_nowhere(trainable):
    problem = make_problem((4,), 3, 5, trainable=trainable)
    problem.targets[0] = -100
    upstream = torch.tensor([math.nan, 1.0, 2.0, 3.0])
    gradient = torch.autograd.grad(run(problem).logprob, problem.hidden, upstream)[0]
    assert gradient.isfinite().all() and (gradient[0] == 0).all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_all_ignored(backend):
    problem = make_problem((4,), 3, 5, bias=True, ignored=1.0)
    found = measure(lambda p: run(p, outputs=DIFFERENTIABLE, backend=backend), problem)
    assert all((value == 0).all() for value in found.values())
    assert set(found) >= {"d_hidden", "d_weight", "d_bias"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_nan_and_inf_reach_the_statistics(backend, bad):
    problem = make_problem((4,), 3, 5)
    with torch.no_grad():
        problem.hidden[1, 0] = bad
    stats = run(problem, outputs=("logprob", "lse", "entropy"), backend=backend)
    for value in stats[:3]:
        assert not value[1].isfinite()
        assert value[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("masked", [slice(0, 512), slice(512, 1024), slice(0, 1000), slice(100, 101)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_blocks_of_the_vocabulary(backend, masked, softcap):
    problem = make_problem((9,), 8, 1024, masked=masked, ignored=0.2)
    outputs = ("logprob", "lse", "entropy", "correct", "log_sum_sq")
    found = measure(lambda p: run(p, outputs=outputs, softcap=softcap, backend=backend, chunk_bytes=10000), problem)
    for name, value in found.items():
        assert value.isfinite().all(), name
    for name in ("d_weight", "d_bias"):
        assert (found[name][masked] == 0).all()
    kept = [i for i in range(1024) if i not in range(1024)[masked]]
    place = torch.full((1024,), -100)
    place[kept] = torch.arange(len(kept))
    smaller = TokenProblem(
        problem.hidden,
        problem.weight.detach()[kept].requires_grad_(),
        problem.bias.detach()[kept].requires_grad_(),
        torch.where(problem.targets < 0, -100, place[problem.targets]),
    )
    same = measure(lambda p: run(p, outputs=outputs, softcap=softcap, backend=backend), smaller)
    found["d_weight"], found["d_bias"] = found["d_weight"][kept], found["d_bias"][kept]
    for name in found:
        torch.testing.assert_close(found[name], same[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("masked", [slice(0, 3), slice(4, 9)])
def test_mean_logit_of_a_masked_vocabulary_is_minus_infinity(backend, masked):
    stats = run(make_problem((4,), 3, 9, masked=masked), outputs=("mean_logit",), backend=backend)
    assert (stats.mean_logit == -math.inf).all()


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_masked_target_has_probability_zero(backend):
    problem = make_problem((1,), 3, 9, masked=slice(0, 3))
    problem.targets[0] = 1
    stats = run(problem, outputs=("logprob", "correct"), backend=backend)
    assert stats.logprob.item() == -math.inf and stats.correct.item() == 0


def confident(margin: float, dtype: torch.dtype = torch.float32) -> TokenProblem:
    """One token whose target leads every other logit by `margin` nats."""
    weight = torch.zeros(50, 2, dtype=dtype)
    weight[7, 0] = margin
    hidden = torch.tensor([[1.0, 0.5]], dtype=dtype)
    return TokenProblem(hidden.requires_grad_(), weight.requires_grad_(), None, torch.tensor([7]))


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0])
def test_confident_tokens_keep_their_digits(backend, margin, trainable):
    problem = confident(margin)
    problem.weight.requires_grad_(trainable)
    found = measure(lambda p: run(p, backend=backend), problem)
    p_others = 49 * math.exp(-margin)
    assert found["logprob"].item() == pytest.approx(-math.log1p(p_others), rel=1e-6)
    wrong = p_others / (1 + p_others)
    upstream = torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64).item()
    assert found["d_hidden"][0, 0].item() == pytest.approx(upstream * margin * wrong, rel=1e-5)
    if trainable:
        assert found["d_weight"][7, 0].item() == pytest.approx(upstream * wrong, rel=1e-5)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_correct_counts_ties(backend):
    weight = torch.tensor([[1.0], [1.0], [0.0]])
    stats = linear_logprobs(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]), outputs=("correct",), backend=backend)
    assert stats.correct.tolist() == [1, 1, 0]


def test_large_logits_do_not_overflow():
    problem = make_problem((5,), 4, 9, spread=300.0)
    check(Case(problem, LogitTransform(), 2), DIFFERENTIABLE)


def test_float16_sums_beyond_its_range():
    hidden = torch.full((2, 64), 60.0, dtype=torch.float16, requires_grad=True)
    weight = torch.cat([torch.full((1, 64), 60.0), torch.full((1, 64), 59.0)]).half().requires_grad_()
    stats = linear_logprobs(hidden, weight, torch.tensor([0, 1]), outputs=("logprob", "lse"))
    assert stats.lse.tolist() == pytest.approx([64 * 3600.0] * 2)
    assert stats.logprob.tolist() == pytest.approx([0.0, -64 * 60.0])


# ---------------------------------------------------------------------------------------------------------------------
# Promises


@pytest.mark.parametrize("backward", ["recompute", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_twice(dtype, backward):
    problem = make_problem((65,), 16, 300, dtype=dtype, bias=True, ignored=0.2)
    first, second = (
        measure(lambda p: run(p, outputs=DIFFERENTIABLE, backward=backward, chunk_bytes=20000), problem) for _ in "12"
    )
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")])
def test_backward_twice(trainable):
    problem = make_problem((6,), 4, 9, bias=True, trainable=trainable)
    loss = run(problem, outputs=("logprob", "lse")).logprob.square().sum()
    leaves = [x for x in (problem.hidden, problem.weight, problem.bias) if x.requires_grad]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("backend", HERE)
def test_create_graph_is_refused(trainable, backend):
    problem = make_problem((6,), 4, 9, bias=True, trainable=trainable)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(run(problem, backend=backend).logprob.sum(), problem.hidden, create_graph=True)


def test_the_reference_can_be_differentiated_twice():
    problem = make_problem((3,), 3, 5, dtype=torch.float64)

    def function(hidden, weight):
        return linear_logprobs(hidden, weight, problem.targets, backend="reference").logprob

    assert torch.autograd.gradgradcheck(function, (problem.hidden, problem.weight))


@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_of_the_callers_changes(dtype, trainable):
    problem = make_problem((6,), 4, 9, dtype=dtype, masked=slice(2, 4), ignored=0.3, trainable=trainable)
    before = [x.detach().clone() for x in problem]
    upstream = torch.randn(6)
    copy = upstream.clone()
    stats = run(problem, outputs=("logprob", "entropy"), softcap=5.0, backward="recompute")
    results = [x.detach().clone() for x in stats if x is not None]
    torch.autograd.backward([stats.logprob, stats.entropy], [upstream.to(stats.logprob)] * 2)
    assert torch.equal(upstream, copy)
    for now, then in zip(problem, before, strict=True):
        assert torch.equal(now, then)
    for now, then in zip((x for x in stats if x is not None), results, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 507 * 7, 4 * 507 * 32, None])
def test_chunks_do_not_change_the_accuracy(chunk_bytes):
    """float32 sums of a bf16 head's gradient: 252 chunks no worse than one."""
    problem = make_problem((252,), 33, 507, dtype=torch.bfloat16, spread=1.0)
    exact = measure(lambda p: run(p, backend="reference"), problem.to(torch.float64))["d_weight"]
    whole = measure(lambda p: run(p), problem)["d_weight"]
    found = measure(lambda p: run(p, chunk_bytes=chunk_bytes), problem)["d_weight"]
    assert (found - exact).norm() <= 1.05 * (whole - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight", "bias")])
def test_autocast_is_a_cast(dtype, trainable):
    problem = make_problem((6,), 4, 9, dtype=dtype, bias=True, trainable=trainable)

    def under_autocast(p):
        with torch.autocast("cpu", torch.bfloat16):
            return run(p)

    def cast(p):
        hidden, weight, bias = (x.to(torch.bfloat16) for x in (p.hidden, p.weight, p.bias))
        return linear_logprobs(hidden, weight, p.targets, bias=bias)

    found, expected = measure(under_autocast, problem), measure(cast, problem)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name


def test_autocast_leaves_float64_alone_and_can_be_off():
    problem = make_problem((6,), 4, 9, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(problem)
    assert torch.equal(inside.logprob, run(problem).logprob)
    single = problem.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        inside = run(single)
    assert torch.equal(inside.logprob, run(single).logprob)


def test_mixed_dtypes_are_autocasts_business():
    problem = make_problem((6,), 4, 9)
    hidden = problem.hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        linear_logprobs(hidden, problem.weight, problem.targets).logprob.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16 and problem.weight.grad.dtype == torch.float32


def test_tied_weights_add_up():
    table = torch.randn(9, 4, requires_grad=True)
    ids, targets = torch.randint(9, (2, 5))
    loss = linear_logprobs(table[ids], table, targets).logprob.sum()
    plain = torch.log_softmax(table[ids] @ table.T, -1).gather(-1, targets[:, None]).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, table)[0], torch.autograd.grad(plain, table)[0])


def test_inference_mode_and_no_grad():
    problem = make_problem((5,), 4, 9)
    expected = run(problem).logprob.detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = run(problem).logprob
        assert not found.requires_grad and torch.equal(found, expected)


def test_in_a_checkpointed_block():
    problem = make_problem((6,), 4, 9)

    def block(hidden, weight):
        return linear_logprobs(hidden, weight, problem.targets).logprob.sum()

    out = torch.utils.checkpoint.checkpoint(block, problem.hidden, problem.weight, use_reentrant=False)
    plain = block(problem.hidden, problem.weight)
    leaves = (problem.hidden, problem.weight)
    for a, b in zip(torch.autograd.grad(out, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert torch.equal(a, b)


def test_the_budget_can_be_exceeded():
    """The assertion itself: a bf16 error in a float32 result fails, as does a NaN, and an infinity in another place."""
    problem = make_problem((16,), 8, 20)
    exact = run(problem.to(torch.float64)).logprob
    good = materialised(problem).logprob
    assert_within_budget(good, good, exact, dtype=torch.float32)
    for bad in (good.bfloat16().float(), good + math.nan, good[:3], torch.where(good == good[0], -math.inf, good)):
        with pytest.raises(AssertionError):
            assert_within_budget(bad, good, exact, dtype=torch.float32)
