"""The sparse backward's kernels (kernels/cuda/route.cuh, sparse.cuh) against the algorithm in float64 PyTorch.

They run on a GPU if there is one. Otherwise their own code runs on the CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_build import library_of_cpu_tensors, needs_compiler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pair_lists import PairProblem, RoutedPairs, assert_within, draw, spread_over_columns
from torch import Tensor

from logitless.kernels.cuda.library import Library
from logitless.types import PAIR_BLOCK, PAIR_SPAN

CPU = torch.device("cpu")
#: An entry of the listed gradient is rounded to bfloat16 once; as much again for what goes into it.
ROUNDING = 2 * 2.0**-9

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library() -> Library:
    return library_of_cpu_tensors()


def route(library: Library, problem: PairProblem, magnitude: Tensor, threshold: float) -> RoutedPairs:
    rows, blocks = len(problem.hidden), problem.blocks
    spans = -(-rows // PAIR_SPAN)
    block_lse, lse = problem.block_lse().float(), problem.logits.logsumexp(1).float()
    made = RoutedPairs(
        torch.full((blocks * spans + 1,), -1, dtype=torch.int32),
        torch.full((rows * blocks,), -1, dtype=torch.int32),
        torch.full((rows, blocks), math.nan),
    )
    inputs = (block_lse, blocks, lse, magnitude, torch.tensor([threshold]))
    library.launch("route", *inputs, rows, blocks, made.starts, made.tokens, made.tail, blocks, on=CPU)
    return made


def listed_gradient(library: Library, problem: PairProblem, routed: RoutedPairs, first: int, count: int) -> Tensor:
    rows, depth = problem.hidden.shape
    made = torch.full((rows * count, PAIR_BLOCK), math.nan, dtype=torch.bfloat16)
    lse, entropy = problem.logits.logsumexp(1).float(), problem.entropy().float()
    library.launch(
        "sparse_gradient",
        *(problem.hidden, problem.weight, rows, len(problem.weight), depth, depth, depth, None, problem.targets),
        *(1.0, problem.softcap, 1.0, lse, entropy, *problem.upstream.unbind()),
        *(routed.starts, routed.tokens, first, count, made, len(made)),
        on=CPU,
    )
    return made


def products(
    library: Library, problem: PairProblem, routed: RoutedPairs, *, ordered: bool, blocks_at_once: int
) -> tuple[Tensor, Tensor]:
    """d_hidden and d_weight of the listed pairs."""
    rows, depth = problem.hidden.shape
    sizes = (rows, len(problem.weight), depth, depth)
    d_hidden, d_weight = torch.zeros(problem.hidden.shape), torch.zeros(problem.weight.shape)
    for first in range(0, problem.blocks, blocks_at_once):
        count = min(blocks_at_once, problem.blocks - first)
        gradient = listed_gradient(library, problem, routed, first, count)
        pairs = (routed.starts, routed.tokens, first, count)
        library.launch("sparse_d_weight", gradient, problem.hidden, *sizes, *pairs, d_weight, depth, on=CPU)
        library.launch("sparse_d_hidden", gradient, problem.weight, *sizes, *pairs, ordered, d_hidden, depth, on=CPU)
    return d_hidden, d_weight


problems = st.builds(
    draw,
    rows=st.integers(1, 150),
    vocabulary=st.integers(1, 300),
    depth=st.sampled_from([8, 40, 136]),
    spread=st.sampled_from([0.1, 4.0, 12.0]),
    softcap=st.sampled_from([0.0, 0.0, 5.0]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=40)
@given(problem=problems, tolerance=st.sampled_from([0.0, 1e-3, 0.05, 2.0]))
def test_routing(library: Library, problem: PairProblem, tolerance: float) -> None:
    rows = len(problem.hidden)
    magnitude = problem.upstream[0].abs()
    magnitude[0] = 0
    routed = route(library, problem, magnitude, tolerance)
    pairs = routed.pairs(rows)
    assert torch.equal(pairs, pairs.unique(dim=0)), "by block, then by token, each once"
    assert (routed.tokens[len(pairs) :] == -1).all()

    spans = -(-rows // PAIR_SPAN)
    kept = routed.kept(rows)
    counts = torch.stack([piece.sum(0) for piece in kept.split(PAIR_SPAN)], 1).flatten()  # [blocks, spans]
    assert torch.equal(routed.starts.diff(), counts.int()) and routed.starts[0] == 0
    assert len(counts) == problem.blocks * spans

    mass = (problem.block_lse() - problem.logits.logsumexp(1, keepdim=True)).exp()
    product = mass * magnitude[:, None]
    assert (product[kept] >= tolerance * (1 - 1e-4)).all() and (product[kept] > 0).all()
    assert (product[~kept] <= tolerance * (1 + 1e-4)).all()
    torch.testing.assert_close(routed.tail.double(), mass.masked_fill(kept, 0), rtol=1e-4, atol=1e-30)


def test_nan_is_routed(library: Library) -> None:
    """Whatever the threshold, so that it reaches the gradient."""
    problem = draw(3, 200, 8)
    problem.hidden[1, 0] = math.nan
    kept = route(library, problem, torch.ones(3), 5.0).kept(3)
    assert kept.tolist() == [[False, False], [True, True], [False, False]]


@settings(max_examples=10)
@given(
    problem=problems,
    tolerance=st.sampled_from([0.0, 0.02, 0.3]),
    ordered=st.booleans(),
    blocks_at_once=st.integers(1, 3),
)
@example(problem=draw(150, 300, 136), tolerance=0.02, ordered=False, blocks_at_once=2)
@example(problem=draw(150, 300, 136), tolerance=0.02, ordered=True, blocks_at_once=2)
@example(problem=draw(1064, 130, 8), tolerance=0.0, ordered=False, blocks_at_once=2)  # 9 tiles for 8 thread blocks
def test_gradients_of_the_listed_pairs(
    library: Library, problem: PairProblem, tolerance: float, ordered: bool, blocks_at_once: int
) -> None:
    routed = route(library, problem, torch.ones(len(problem.hidden)), tolerance)
    kept = spread_over_columns(routed.kept(len(problem.hidden)), len(problem.weight))
    gradient = problem.gradient().masked_fill(~kept, 0)
    hidden, weight = problem.hidden.double(), problem.weight.double()
    # Of an entry: p (b - a - e (log p + entropy)) has parts that cancel, whose roundings stay.
    size = (problem.logits.log_softmax(1).exp() * (1 + problem.upstream.double().abs().sum(0))[:, None]).masked_fill(
        ~kept, 0
    )
    allowed = gradient.abs() * ROUNDING + size * 1e-4

    d_hidden, d_weight = products(library, problem, routed, ordered=ordered, blocks_at_once=blocks_at_once)
    assert_within(d_hidden, gradient @ weight, allowed @ weight.abs() + 1e-30)
    assert_within(d_weight, gradient.T @ hidden, allowed.T @ hidden.abs() + 1e-30)


def test_tail_put_back_makes_the_rows_sum_to_zero(library: Library) -> None:
    """Listed entries, the target's, and -a times the mass left out: nothing of a row is lost."""
    problem = draw(40, 700, 16)
    problem.upstream[1:] = 0
    a = problem.upstream[0].double()
    routed = route(library, problem, a.abs().float(), 0.03)
    gradient = listed_gradient(library, problem, routed, 0, problem.blocks)
    pairs = routed.pairs(40)
    assert 0 < len(pairs) < 40 * problem.blocks
    listed = torch.zeros(40, dtype=torch.float64).index_add_(0, pairs[:, 1], gradient[: len(pairs)].double().sum(1))
    logprob = problem.logits.log_softmax(1).gather(1, problem.targets[:, None])[:, 0]
    total = listed - a * torch.expm1(logprob) - a * routed.tail.double().sum(1)
    assert_within(total, torch.zeros_like(total), ROUNDING * a.abs() + 1e-6)


def test_the_ordered_sum_has_the_same_bits_every_time(library: Library) -> None:
    problem = draw(140, 400, 24)
    routed = route(library, problem, torch.ones(140), 0.01)
    first, again = (products(library, problem, routed, ordered=True, blocks_at_once=2) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_arguments_that_it_refuses(library: Library) -> None:
    problem = draw(4, 200, 16)
    routed = route(library, problem, torch.ones(4), 0.0)
    with pytest.raises(RuntimeError, match="size"):
        listed_gradient(library, problem, routed, 1, 2)  # there are two blocks
    problem.hidden, problem.weight = problem.hidden[:, :12], problem.weight[:, :12]
    with pytest.raises(RuntimeError, match="size"):
        listed_gradient(library, problem, routed, 0, 2)
