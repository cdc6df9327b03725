"""Triton's tail-corrected backward: its kernels against float64, and the properties of any backend by blocks.

`test_triton_tail.py` runs these, on a GPU where there is one, else in Triton's interpreter in a process of its own, as
`test_triton.py` does. By hand: `TRITON_INTERPRET=1 pytest tests/triton_tail_suite.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import block_properties as properties
import pytest
import torch
from block_properties import PROPERTIES, Backend
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from pair_lists import PairProblem, RoutedPairs, assert_within, draw, spread_over_columns
from tail_cases import tail_calls
from torch import Tensor

from logitless.backends import triton as backend
from logitless.kernels.triton import configs, sparse
from logitless.types import PAIR_BLOCK, PAIR_SPAN, Head

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
#: Of examples that take seconds in the interpreter: to shrink one takes many minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


#: A block of 128 in one tile, and in two. The interpreter's time is the number of tiles.
WHOLE = configs.TileConfig(64, 128, 32, 2, 1, 1), configs.TileConfig(64, 128, 64, 1, 1, 1)
HALVED = configs.TileConfig(32, 64, 32, 2, 1, 1), configs.TileConfig(64, 64, 32, 1, 1, 1)


@contextmanager
def tiles(gradient: configs.TileConfig, product: configs.TileConfig) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "INTERPRETED_TILE", gradient)
        patch.setattr(configs, "INTERPRETED_LISTED", product)
        yield


@pytest.fixture(autouse=True, scope="module")
def larger_tiles() -> Iterator[None]:
    with tiles(*WHOLE):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


def route(problem: PairProblem, magnitude: Tensor, threshold: float) -> RoutedPairs:
    block_lse, lse = problem.block_lse().float(), problem.logits.logsumexp(1).float()
    inputs = (block_lse, lse, magnitude, torch.tensor([threshold]))
    return RoutedPairs(*(x.cpu() for x in sparse.route(*(x.to(DEVICE).contiguous() for x in inputs))))


def moved(x: Tensor) -> Tensor:
    """On the device with its own strides, which `to` would make dense."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


def products(problem: PairProblem, routed: RoutedPairs, *, ordered: bool, blocks_at_once: int) -> tuple[Tensor, Tensor]:
    """d_hidden and d_weight of the listed pairs."""
    hidden, weight, targets = (moved(x) for x in (problem.hidden, problem.weight, problem.targets))
    pairs = tuple(x.to(DEVICE) for x in routed[:2])
    lse = problem.logits.logsumexp(1).float().to(DEVICE)
    factor = (problem.upstream[1] - problem.upstream[0]).to(DEVICE)
    d_hidden, d_weight = torch.zeros(hidden.shape, device=DEVICE), torch.zeros(weight.shape, device=DEVICE)
    for first in range(0, problem.blocks, blocks_at_once):
        group = (*pairs, first, min(blocks_at_once, problem.blocks - first))
        made = torch.full((len(hidden) * group[-1], PAIR_BLOCK), math.nan, dtype=hidden.dtype, device=DEVICE)
        sparse.listed_gradient(hidden, weight, None, targets, lse, factor, *group, made, slope=1.0)
        sparse.add_weight(made, hidden, *group, d_weight)
        sparse.add_hidden(made, weight, *group, d_hidden, ordered=ordered)
    return d_hidden.cpu(), d_weight.cpu()


problems = st.builds(
    draw,
    rows=st.integers(1, 150),
    vocabulary=st.integers(1, 300),
    depth=st.sampled_from([1, 8, 40, 67]),
    spread=st.sampled_from([0.1, 4.0, 12.0]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=20)
@given(problem=problems, tolerance=st.sampled_from([0.0, 1e-3, 0.05, 2.0]))
@example(problem=draw(150, 5000, 8), tolerance=1e-3)
def test_routing(problem: PairProblem, tolerance: float) -> None:
    rows = len(problem.hidden)
    magnitude = problem.upstream[0].abs()
    magnitude[0] = 0
    routed = route(problem, magnitude, tolerance)
    pairs = routed.pairs(rows)
    assert torch.equal(pairs, pairs.unique(dim=0)), "by block, then by token, each once"
    kept = routed.kept(rows)
    counts = torch.stack([piece.sum(0) for piece in kept.split(PAIR_SPAN)], 1).flatten()  # [blocks, spans]
    assert torch.equal(routed.starts.diff(), counts.int()) and routed.starts[0] == 0

    mass = (problem.block_lse() - problem.logits.logsumexp(1, keepdim=True)).exp()
    product = mass * magnitude[:, None]
    assert (product[kept] >= tolerance * (1 - 1e-4)).all() and (product[kept] > 0).all()
    assert (product[~kept] <= tolerance * (1 + 1e-4)).all()
    torch.testing.assert_close(routed.tail.double(), mass.masked_fill(kept, 0), rtol=1e-4, atol=1e-30)


def test_nan_is_routed() -> None:
    """Whatever the threshold, so that it reaches the gradient."""
    problem = draw(3, 200, 8)
    problem.hidden[1, 0] = math.nan
    kept = route(problem, torch.ones(3), 5.0).kept(3)
    assert kept.tolist() == [[False, False], [True, True], [False, False]]


def test_more_pairs_than_an_int32_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden: .* at most 1048575 tokens"):
        sparse.route(torch.zeros(1, 1).expand(2**20, 2**11), *[torch.zeros(1).expand(2**20)] * 2, torch.zeros(1))


def check_products(problem: PairProblem, tolerance: float, *, ordered: bool, blocks_at_once: int) -> None:
    problem.upstream[2] = 0
    routed = route(problem, torch.ones(len(problem.hidden)), tolerance)
    kept = spread_over_columns(routed.kept(len(problem.hidden)), len(problem.weight))
    gradient = problem.gradient().masked_fill(~kept, 0)
    hidden, weight = problem.hidden.double(), problem.weight.double()
    # An entry is rounded once (the interpreter truncates); float32's own errors grow with logits and sums.
    allowed = gradient.abs() * (torch.finfo(problem.hidden.dtype).eps + 1e-4)
    with tiles(*HALVED):
        d_hidden, d_weight = products(problem, routed, ordered=ordered, blocks_at_once=blocks_at_once)
    assert_within(d_hidden, gradient @ weight, allowed @ weight.abs() + 1e-30)
    assert_within(d_weight, gradient.T @ hidden, allowed.T @ hidden.abs() + 1e-30)


@pytest.mark.parametrize("ordered", [False, True], ids=["atomics", "ordered"])
@settings(max_examples=4)
@given(
    problem=problems,
    tolerance=st.sampled_from([0.0, 0.02, 0.3]),
    blocks_at_once=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
@example(problem=draw(150, 300, 67), tolerance=0.02, blocks_at_once=2, dtype=torch.bfloat16)
def test_gradients_of_the_listed_pairs(
    ordered: bool, problem: PairProblem, tolerance: float, blocks_at_once: int, dtype: torch.dtype
) -> None:
    problem = replace(problem, hidden=problem.hidden.to(dtype), weight=problem.weight.to(dtype))
    check_products(problem, tolerance, ordered=ordered, blocks_at_once=blocks_at_once)


@pytest.mark.parametrize("ordered", [False, True], ids=["atomics", "ordered"])
def test_any_strides(ordered: bool) -> None:
    problem = draw(20, 200, 24)
    spaced = (properties.spaced(x, 2, 0) for x in (problem.hidden, problem.weight.T))
    hidden, weight_t = spaced
    check_products(replace(problem, hidden=hidden, weight=weight_t.T), 0.02, ordered=ordered, blocks_at_once=2)


def test_nothing_listed_adds_nothing() -> None:
    """Lists are empty, and what G holds is undefined."""
    problem = draw(5, 200, 8)
    routed = route(problem, torch.zeros(5), 1.0)
    assert not routed.starts.any()
    for ordered in (False, True):
        assert not any(x.any() for x in products(problem, routed, ordered=ordered, blocks_at_once=2))


def test_the_ordered_sum_has_the_same_bits_every_time() -> None:
    problem = draw(140, 400, 24)
    routed = route(problem, torch.ones(140), 0.01)
    first, again = (products(problem, routed, ordered=True, blocks_at_once=2) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


# ---------------------------------------------------------------------------------------------------------------------
# Behind the ops


@settings(max_examples=2, phases=PHASES)
@given(case=tail_calls(), dtype=st.sampled_from(DTYPES))
def test_the_bounds_hold(case: dict[str, Any], dtype: torch.dtype) -> None:
    properties.check_bounds(Backend("triton", dtype, DEVICE), case)


@pytest.mark.slow
@settings(max_examples=4, phases=PHASES)
@given(case=tail_calls(), dtype=st.sampled_from(DTYPES))
def test_the_bounds_hold_on_many(case: dict[str, Any], dtype: torch.dtype) -> None:
    properties.check_bounds(Backend("triton", dtype, DEVICE), case)


#: Of the strategy more than of the kernels: float32's will do.
ONCE = (
    properties.a_softcap_is_exact,
    properties.any_order_of_the_vocabulary,
    properties.per_token_losses,
    properties.it_compiles_without_a_break,
    properties.the_op_is_well_formed,
)
#: In bfloat16; the others, and float32's, are slow.
FAST = (
    properties.every_gradient_is_close,
    properties.more_tokens_than_a_slice,
    properties.the_report_is_exact,
    properties.flat_calls_are_exact,
    properties.settled_tokens_keep_nothing,
    properties.ignored_tokens_and_none,
    properties.nan_is_not_hidden,
)


def fast_or_slow() -> Iterator[Any]:
    for check, dtype in itertools.product(PROPERTIES, DTYPES):
        if check in ONCE and dtype != torch.float32:
            continue
        fast = check in FAST and dtype == torch.bfloat16
        name = f"{check.__name__}-{dtype}"
        yield pytest.param(check, dtype, id=name, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("check", "dtype"), list(fast_or_slow()))
def test_properties(check: Callable[[Backend], None], dtype: torch.dtype) -> None:
    check(Backend("triton", dtype, DEVICE))


@pytest.mark.slow
@pytest.mark.parametrize("output", ["lse", "entropy", "mean_logit"])
def test_the_other_statistics(output: str) -> None:
    properties.the_other_statistics(Backend("triton", torch.float32, DEVICE), output)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_preferences(frozen: bool) -> None:
    properties.preferences(Backend("triton", torch.float32, DEVICE), frozen)


def test_deterministic_algorithms_choose_the_ordered_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[bool] = []

    def watched(*arguments: Any, ordered: bool, add: Callable[..., None] = sparse.add_hidden) -> None:
        chosen.append(ordered)
        add(*arguments, ordered=ordered)

    monkeypatch.setattr(sparse, "add_hidden", watched)
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        properties.every_gradient_is_close(Backend("triton", torch.float32, DEVICE))
        assert chosen and set(chosen) == {wanted}
        chosen.clear()


def test_float16_goes_by_entries() -> None:
    """Small gradients are below the range of float16."""
    half = torch.zeros(2, 8, dtype=torch.float16, device=DEVICE)
    assert [backend.TritonBlocks().takes(x, Head(x)) for x in (half, half.float())] == [False, True]
    properties.a_softcap_is_exact(Backend("triton", torch.float16, DEVICE))
