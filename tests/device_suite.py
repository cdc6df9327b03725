"""The ops on a device, over every backend that takes its tensors: against float64, and the same bits twice.

`python -m benchmarks gpu` runs this on a GPU. By hand: `LOGITLESS_TEST_DEVICE=cuda pytest tests/device_suite.py`.
Deterministic mode wants CUBLAS_WORKSPACE_CONFIG=:4096:8 there.
"""

from __future__ import annotations

from typing import get_args

import list_cases
import pytest
import torch
from cases import DEVICE, DTYPES, HERE, Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from logitless import (
    TokenStats,
    linear_cross_entropy,
    linear_divergence,
    linear_logprobs,
    linear_token_loss,
    linear_top_k,
    reference,
)
from logitless.backends import BACKENDS
from logitless.testing import (
    TokenProblem,
    assert_matches_float64,
    assert_within_budget,
    make_problem,
    materialised,
    measure,
    poison_empty,
)
from logitless.types import (
    DIFFERENTIABLE,
    LIST_OUTPUTS,
    OUTPUTS,
    DivergenceKind,
    LogitTransform,
    statistics_dtype,
)

outputs_subset = st.sets(st.sampled_from(OUTPUTS), min_size=1).map(lambda s: tuple(x for x in OUTPUTS if x in s))
#: Examples of a property. On a GPU Triton compiles for most of them, a second or so each.
MANY, SOME = (60, 20) if DEVICE.type == "cpu" else (16, 8)
#: Several tiles of every kernel each way, none of them full at the end; rows that 16-byte accesses can read.
SIZES = ((331,), 192, 5003)


def taken(backend: str) -> tuple[torch.dtype, ...]:
    return tuple(dtype for dtype in DTYPES if BACKENDS[backend].supports(DEVICE, dtype) is None)


def logprobs(problem: TokenProblem, **options) -> TokenStats:
    return linear_logprobs(problem.hidden, problem.weight, problem.targets, bias=problem.bias, **options)


def check(case: Case, outputs: tuple[str, ...], logit_weight=None, **options) -> None:
    with poison_empty():
        assert_matches_float64(
            lambda p: logprobs(p, outputs=outputs, logit_weight=logit_weight, **case.options, **options),
            lambda p: materialised(p, case.transform, outputs=outputs, logit_weight=logit_weight),
            case.problem,
            scale=max(case.scale_of(outputs), case.bent_scale),
        )


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=MANY)
@given(data=st.data(), outputs=outputs_subset, backward=st.sampled_from(["auto", "recompute"]))
def test_any_options_against_float64(backend, data, outputs, backward):
    check(data.draw(cases(taken(backend))), outputs, backend=backend, backward=backward)


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=SOME)
@given(data=st.data(), outputs=st.sampled_from(["logprob", "logprob lse", "lse"]))
def test_a_frozen_head(backend, data, outputs):
    case = data.draw(cases(taken(backend), trainable=st.just(("hidden",))))
    check(case, tuple(outputs.split()), backend=backend, backward="single_pass")


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=SOME)
@given(data=st.data(), reduction=st.sampled_from(["sum", "mean"]))
def test_single_pass(backend, data, reduction):
    """A loss of several statistics."""
    outputs = ("logprob", "lse", "entropy")

    def loss(stats):
        return stats.logprob.exp() * stats.lse - 0.3 * stats.entropy + stats.logprob.square()

    def ours(p):
        call = dict(outputs=outputs, reduction=reduction, bias=p.bias, backend=backend, backward="single_pass")
        return linear_token_loss(p.hidden, p.weight, p.targets, loss, **call, **case.options)

    def baseline(p):
        total = torch.where(p.targets == -100, 0, loss(materialised(p, case.transform, outputs=outputs))).sum()
        return total / (p.targets != -100).sum().clamp(min=1) if reduction == "mean" else total

    case = data.draw(cases(taken(backend)))
    problem = case.problem
    scale = problem.weight.abs().max().item() + problem.targets.numel()
    assert_matches_float64(ours, baseline, problem, scale=scale)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.3, 30.0, 0.7)], ids=["plain", "softcap"])
@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b in HERE for d in taken(b)], ids=str)
def test_many_tiles(backend, dtype, transform):
    problem = make_problem(*SIZES, dtype=dtype, device=DEVICE, bias=True, ignored=0.1)
    check(Case(problem, transform, 100), DIFFERENTIABLE, backend=backend, backward="recompute")


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.3, 30.0, 0.7)], ids=["plain", "softcap"])
@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b in HERE for d in taken(b)], ids=str)
def test_weights_of_the_mean_logit(backend, dtype, transform, backward):
    problem = make_problem(*SIZES, dtype=dtype, device=DEVICE, bias=True, ignored=0.1)
    weights = torch.linspace(0.1, 3.0, SIZES[2], device=DEVICE)
    check(Case(problem, transform, 100), DIFFERENTIABLE, logit_weight=weights, backend=backend, backward=backward)


@pytest.mark.parametrize("backend", HERE)
@settings(max_examples=MANY)
@given(data=st.data(), outputs=st.sampled_from([("logprob",), ("logprob", "tail"), LIST_OUTPUTS]))
def test_lists_of_ids(backend, data, outputs):
    list_cases.check(data.draw(list_cases.listed_cases(dtypes=taken(backend))), outputs, backend=backend)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(1.3, 30.0, 0.7)], ids=["plain", "softcap"])
@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b in HERE for d in taken(b)], ids=str)
def test_long_lists_over_many_tiles(backend, dtype, transform):
    problem = make_problem(*SIZES, dtype=dtype, device=DEVICE, bias=True)
    lists = torch.randint(0, SIZES[2], (*SIZES[0], 70), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    list_cases.check(Case(problem._replace(targets=lists), transform, 100), LIST_OUTPUTS, backend=backend)


@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b in HERE for d in taken(b)], ids=str)
def test_the_likeliest_ids(backend, dtype):
    problem = make_problem(*SIZES, dtype=dtype, device=DEVICE, trainable=())
    found = linear_top_k(problem.hidden, problem.weight, 9, backend=backend, chunk_bytes=100 * 4 * SIZES[2])
    logp = (problem.hidden.double() @ problem.weight.double().T).log_softmax(-1)
    assert all(len(set(row)) == 9 for row in found.ids.tolist())
    assert_within_budget(found.logprob, found.logprob, logp.gather(-1, found.ids), dtype=dtype)
    assert_within_budget(logp.gather(-1, found.ids), found.logprob, logp.topk(9).values, dtype=dtype)  # but for ties


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_set(dtype):
    problem = make_problem(*SIZES, dtype=dtype, device=DEVICE)
    kept = torch.stack([problem.targets, problem.targets.flip(0), (problem.targets + 1) % SIZES[2]], -1)

    def baseline(p):
        z = (p.hidden @ p.weight.T).to(statistics_dtype(dtype)).gather(-1, kept)
        again = (kept[:, 1] == kept[:, 0])[:, None] & torch.tensor([False, True, False], device=DEVICE)
        again |= (kept[:, 2] == kept[:, 1])[:, None] & torch.tensor([False, False, True], device=DEVICE)
        return z.masked_fill(again, -torch.inf).log_softmax(-1)[:, 0]

    def ours(p):
        return linear_logprobs(p.hidden, p.weight, p.targets, among=kept).logprob

    assert_matches_float64(ours, baseline, problem, scale=problem.weight.abs().max().item())


@pytest.mark.parametrize("kind", get_args(DivergenceKind))
@pytest.mark.parametrize("backend", HERE)
def test_divergences(backend, kind):
    problem = make_problem((37,), 24, 75, device=DEVICE, trainable=("hidden", "weight"))
    ref_hidden, ref_weight = (x.detach().flip(0) for x in problem[:2])

    def ours(p, backend):
        dtype = p.hidden.dtype
        return linear_divergence(
            p.hidden, p.weight, ref_hidden.to(dtype), ref_weight.to(dtype), kind=kind, backend=backend
        )

    assert_matches_float64(lambda p: ours(p, backend), lambda p: ours(p, "reference"), problem)


@pytest.mark.parametrize("trainable", [("hidden", "weight"), ("hidden",)], ids=["trainable", "frozen"])
@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
@pytest.mark.parametrize(("backend", "dtype"), [(b, d) for b in HERE for d in taken(b)], ids=str)
def test_same_bits_twice(backend, dtype, backward, trainable):
    torch.use_deterministic_algorithms(True)
    problem = make_problem(*SIZES, dtype=dtype, device=DEVICE, ignored=0.1, trainable=trainable)

    def loss(p):
        options = dict(backend=backend, backward=backward, chunk_bytes=100 * 4 * SIZES[2])
        return linear_cross_entropy(p.hidden, p.weight, p.targets, **options)

    first, second = measure(loss, problem), measure(loss, problem)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CPU captures no graphs")
@pytest.mark.parametrize("backward", ["recompute", "single_pass"])
@pytest.mark.parametrize("backend", HERE)
def test_a_captured_step_is_replayed_on_other_tokens(backend, backward):
    problem = make_problem(*SIZES, dtype=torch.bfloat16, device=DEVICE, ignored=0.1)
    others = make_problem(*SIZES, dtype=torch.bfloat16, device=DEVICE, ignored=0.3, seed=1, trainable=())

    def step() -> list[torch.Tensor]:
        hidden, weight, targets = problem.hidden, problem.weight, problem.targets
        loss = linear_cross_entropy(hidden, weight, targets, backend=backend, backward=backward)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads what is called for the first time
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        problem.hidden.copy_(others.hidden)
        problem.targets.copy_(others.targets)
    graph.replay()
    for x, exact in zip(found, step(), strict=True):
        assert (x.double() - exact.double()).norm() <= 2.0**-7 * exact.double().norm()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="takes a CPU too long")
@pytest.mark.parametrize("backend", HERE)
def test_more_logits_than_32_bits_count(backend):
    """The last rows and the last columns, whose offsets are beyond 2^31."""
    tokens, vocabulary = 40_000, 70_000
    problem = make_problem((tokens,), 64, vocabulary, dtype=torch.bfloat16, device=DEVICE, trainable=("hidden",))
    with torch.no_grad():
        problem.targets[-8:] = torch.arange(vocabulary - 8, vocabulary, device=DEVICE)
    found = measure(lambda p: logprobs(p, outputs=("logprob", "lse"), backend=backend, backward="recompute"), problem)
    last = TokenProblem(problem.hidden[-8:].detach().double(), problem.weight.double(), None, problem.targets[-8:])
    exact = reference.statistics(last.hidden @ last.weight.T, last.targets, ("logprob", "lse"))
    for name in ("logprob", "lse"):
        torch.testing.assert_close(found[name][-8:].double(), getattr(exact, name), rtol=1e-4, atol=1e-4)
    assert found["d_hidden"].isfinite().all() and found["d_hidden"][-8:].any(-1).all()
