"""Orders of the vocabulary: what `vocabulary_order` finds, and that an order changes the blocks of the tail alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless.backends import BACKENDS
from logitless.backends.approximate import select
from logitless.backends.approximate.order import SIZES, inverse, permuted, restored, vocabulary_order
from logitless.backends.approximate.report import tail_report
from logitless.backends.interface import Gradients, Needs, Problem, SummedLosses, Upstream
from logitless.testing import make_problem
from logitless.types import Head, TokenStats

V = 700  # two whole blocks of 256 and a short one
TOLERANCE = 2.0**-6
ALL = Needs(True, True, True)
ENTRIES = BACKENDS["chunked"].approximate("tail_corrected")


def problem_of(seed: int, *, order: bool = True, masked: bool = False, count: int = 12) -> Problem:
    """Peaked enough for products in two parts."""
    made = make_problem((count,), 16, V, dtype=torch.float64, spread=12.0, seed=seed, trainable=())
    draw = torch.Generator().manual_seed(seed)
    bias = torch.randn(V, generator=draw, dtype=torch.float64)
    if masked:
        bias[torch.rand(V, generator=draw) < 0.3] = -torch.inf
    logits = made.hidden @ made.weight.T + bias
    found = torch.randperm(V, generator=draw) if order else None
    head = Head(made.weight, bias, temperature=2.0)
    return Problem(made.hidden, head, logits.argmax(-1), 8 * V * 5, None, found)


def by_logprobs(problem: Problem, tolerance: float = TOLERANCE) -> Gradients:
    """Gradients of `sum_i (-1)^i logprob_i + lse_i / 4`."""
    signs = torch.ones(len(problem.targets), dtype=torch.float64)
    signs[1::2] = -1
    forward, saved = ENTRIES.forward(problem, ("logprob", "lse"), tolerance)
    upstream = Upstream(logprob=signs, lse=torch.full_like(signs, 0.25))
    return ENTRIES.backward(problem, forward.stats, saved, upstream, ALL, tolerance)


def by_single_pass(problem: Problem, tolerance: float = TOLERANCE) -> Gradients:
    """Gradients of the sum of the negative log-probs and a little entropy."""

    def coefficients(stats: TokenStats, rows: slice) -> tuple[Tensor, Upstream]:
        assert stats.logprob is not None
        one = torch.ones_like(stats.logprob)
        return -stats.logprob.sum(), Upstream(logprob=-one, entropy=0.1 * one)

    losses = SummedLosses(("logprob", "entropy"), coefficients, None, ALL)
    return ENTRIES.single_pass(problem, losses, tolerance).gradients


WAYS = {"logprobs": by_logprobs, "single pass": by_single_pass}


def assert_close(found: Gradients, expected: Gradients, tolerance: float = 1e-10) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x is not None and y is not None
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), masked=st.booleans())
def test_an_order_gives_what_the_reordered_head_gives(way: str, seed: int, masked: bool) -> None:
    """`permuted` moves rows, biases and targets, `restored` moves gradients back; the order itself moves none."""
    problem = problem_of(seed, masked=masked)
    with tail_report() as report:
        found = WAYS[way](problem)
    with tail_report() as moved_report:
        moved = restored(WAYS[way](permuted(problem)), problem.vocabulary_order)
    assert_close(found, moved)
    assert report.kept == moved_report.kept
    torch.testing.assert_close(report.left, moved_report.left, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_the_native_order_by_name_is_none(way: str) -> None:
    problem = problem_of(3)
    native = WAYS[way](replace(problem, vocabulary_order=torch.arange(V)))
    assert_close(native, WAYS[way](replace(problem, vocabulary_order=None)))


@pytest.mark.parametrize("way", WAYS)
def test_the_two_parts_are_taken_and_the_order_matters(way: str) -> None:
    """Otherwise the comparisons above would be of exact products."""
    problem = problem_of(3)
    with tail_report() as report:
        found = WAYS[way](problem)
    assert report.exact_tokens == 0 and report.tail_mass.max() > 1e-3
    native = WAYS[way](replace(problem, vocabulary_order=None))
    assert found.hidden is not None and native.hidden is not None
    assert (found.hidden - native.hidden).norm() > 1e-6 * native.hidden.norm()


def test_the_bounds_hold_in_any_order() -> None:
    """With the identity for a head, `d hidden` is the gradient of the logits."""
    for seed in range(5):
        made = problem_of(seed, count=20)
        logits = made.hidden @ made.head.weight.T
        head = made.head._replace(weight=torch.eye(V, dtype=torch.float64), bias=None)
        problem = replace(made, hidden=logits, head=head, targets=logits.argmax(-1), chunk_bytes=None)
        with tail_report() as report:
            found = by_logprobs(problem).hidden
        exact = by_logprobs(problem, 2.0**-60).hidden
        assert found is not None and exact is not None
        error = found - exact
        assert report.exact_tokens == 0 and error.abs().max() > 0
        assert (error.abs().sum(-1) <= report.l1_bound + 1e-12).all()
        assert (error.norm(dim=-1) <= report.l2_bound + 1e-12).all()
        assert (found.sum(-1) - exact.sum(-1)).abs().max() < 1e-12


def test_sums_by_block_do_not_depend_on_the_layout() -> None:
    order, matrix = torch.randperm(V), torch.randn(6, V, dtype=torch.float64)
    vocabulary_major = matrix.T.contiguous().T
    expected = torch.stack([matrix[:, part].sum(1) for part in order.split(select.TAIL_BLOCK)], 1)
    for found in (select._by_block(matrix, order), select._by_block(vocabulary_major, order)):
        torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# vocabulary_order


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 63, 65, 256, 700, 1025])
def test_it_is_a_permutation_and_the_same_each_time(vocabulary: int, dtype: torch.dtype) -> None:
    weight, hidden = torch.randn(vocabulary, 8).to(dtype), torch.randn(3, 200, 8).to(dtype)
    for found in (vocabulary_order(weight), vocabulary_order(weight, hidden)):
        assert found.dtype == torch.int64 and torch.equal(found.sort().values, torch.arange(vocabulary))
    assert torch.equal(found, vocabulary_order(weight, hidden))
    assert torch.equal(inverse(found)[found], torch.arange(vocabulary))


@pytest.mark.parametrize("from_data", [False, True])
def test_it_finds_clusters(from_data: bool) -> None:
    """The head has one cluster for each block of the largest size, shuffled over the vocabulary."""
    draw = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(8, 32, generator=draw)
    cluster = torch.arange(8).repeat(SIZES[0])[torch.randperm(8 * SIZES[0], generator=draw)]
    weight = centres[cluster] + 0.1 * torch.randn(len(cluster), 32, generator=draw)
    hidden = torch.randn(100, 32, generator=draw) if from_data else None
    found = cluster[vocabulary_order(weight, hidden)].view(8, SIZES[0])
    assert (found == found[:, :1]).all()


def test_it_lowers_the_error_where_the_head_has_clusters() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 16, generator=draw, dtype=torch.float64)
    weight = centres[torch.randint(8, (2048,), generator=draw)]
    weight += 0.1 * torch.randn(2048, 16, generator=draw, dtype=torch.float64)
    hidden = 6 * torch.randn(40, 16, generator=draw, dtype=torch.float64)
    problem = Problem(hidden, Head(weight), (hidden @ weight.T).argmax(-1))
    exact, errors = by_logprobs(problem, 2.0**-60), []
    for order in (None, vocabulary_order(weight), vocabulary_order(weight, torch.randn(100, 16))):
        with tail_report() as report:
            found = by_logprobs(replace(problem, vocabulary_order=order), 2.0**-5)
        assert report.exact_tokens == 0
        assert found.hidden is not None and exact.hidden is not None
        errors.append(float((found.hidden - exact.hidden).norm()))
    assert max(errors[1:]) < errors[0] / 2


def test_equal_rows_keep_their_order() -> None:
    assert torch.equal(vocabulary_order(torch.ones(300, 4)), torch.arange(300))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]],), TypeError, r"weight: expected a floating tensor of shape \[V, H\], got list"),
        ((torch.ones(3, 4, dtype=torch.int64),), TypeError, "weight: expected a floating tensor .* got torch.int64"),
        ((torch.ones(3),), ValueError, r"weight: expected shape \[V, H\], got \[3\]"),
        ((torch.ones(3, 4), torch.ones(2, 5)), ValueError, r"hidden: expected shape \[..., 4\], got \[2, 5\]"),
        ((torch.ones(3, 4), torch.ones(0, 4)), ValueError, r"hidden: expected shape .* got \[0, 4\]"),
        ((torch.ones(3, 4), 1), TypeError, "hidden: expected a floating tensor .* got int"),
        ((torch.ones(3, 4), torch.ones(2, 4, device="meta")), ValueError, "hidden: expected it on cpu like weight"),
    ],
)
def test_what_it_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vocabulary_order(*arguments)
