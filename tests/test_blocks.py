"""The tail-corrected backward by (token, block) pairs: its strategy, on an engine of plain PyTorch with all logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import block_properties as properties
import pytest
import torch
from block_properties import PROPERTIES, Backend
from hypothesis import given, settings
from tail_cases import peaked_problem, tail_calls
from torch import Tensor

from logitless import backends, linear_logprobs, reference
from logitless.backends.approximate import blocks
from logitless.backends.approximate.blocks import BlockEngine, Routed
from logitless.backends.exact.torch_rows import TorchRows
from logitless.backends.interface import Problem
from logitless.types import PAIR_BLOCK, PAIR_SPAN, Head, TokenStats, statistics_dtype


class Dense(BlockEngine):
    """`blocks.BlockEngine` in the words of its protocol. What it leaves undefined is NaN, or no token."""

    def takes(self, hidden: Tensor, head: Head) -> bool:
        return head.softcap is None

    def measure(self, problem: Problem, outputs: tuple[str, ...]) -> tuple[TokenStats, Tensor]:
        for matrix in (problem.hidden, problem.head.weight):
            assert blocks.has_aligned_rows(matrix) or matrix.shape[1] * matrix.itemsize % 16
        z = self._logits(problem)
        stats = reference.statistics(z, problem.targets, ("logprob", "lse", *outputs))
        others = z.scatter(1, problem.targets[:, None], -math.inf)
        return stats, torch.stack([block.logsumexp(1) for block in others.split(PAIR_BLOCK, 1)], 1)

    def route(self, block_lse: Tensor, lse: Tensor, magnitude: Tensor, threshold: Tensor) -> Routed:
        mass = (block_lse - lse[:, None]).exp()
        product = mass * magnitude[:, None]
        kept = ~(product < threshold) & (product != 0)
        count, width = kept.shape
        spans = -(-count // PAIR_SPAN)
        cut = torch.nn.functional.pad(kept.T, (0, spans * PAIR_SPAN - count)).view(width * spans, PAIR_SPAN).sum(1)
        tokens = torch.full((count * width,), -1, dtype=torch.int32)
        found = kept.T.nonzero()[:, 1]
        tokens[: len(found)] = found.int()
        return Routed(torch.cat([torch.zeros(1), cut.cumsum(0)]).int(), tokens, mass.masked_fill(kept, 0))

    def gradient(
        self, problem: Problem, lse: Tensor, factor: Tensor, routed: Routed, first: int, count: int, out: Tensor
    ) -> None:
        p = (self._logits(problem) - lse[:, None]).exp().scatter(1, problem.targets[:, None], 0)
        g = p * (factor * problem.head.transform.slope)[:, None]
        pairs = self._pairs(len(factor), routed, first, count)
        assert len(out) >= len(factor) * count
        out.fill_(math.nan)
        for at, (token, block) in enumerate(pairs):
            row = g[token, block * PAIR_BLOCK : (block + 1) * PAIR_BLOCK]
            out[at] = torch.nn.functional.pad(row, (0, PAIR_BLOCK - len(row)))

    def add_weight(self, gradient: Tensor, hidden: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        for at, (token, block) in enumerate(self._pairs(len(hidden), routed, first, count)):
            part = out[block * PAIR_BLOCK : (block + 1) * PAIR_BLOCK]
            part += gradient[at, : len(part), None] * hidden[token]

    def add_hidden(self, gradient: Tensor, weight: Tensor, routed: Routed, first: int, count: int, out: Tensor) -> None:
        for at, (token, block) in enumerate(self._pairs(len(out), routed, first, count)):
            part = weight[block * PAIR_BLOCK : (block + 1) * PAIR_BLOCK]
            out[token] += gradient[at, : len(part)] @ part

    def _logits(self, problem: Problem) -> Tensor:
        dtype = statistics_dtype(problem.hidden.dtype)
        z = problem.hidden.to(dtype) @ problem.head.weight.to(dtype).T
        return (z if problem.head.bias is None else z + problem.head.bias.to(dtype)) * problem.head.transform.slope

    def _pairs(self, count: int, routed: Routed, first: int, number: int) -> list[tuple[int, int]]:
        starts = routed.starts[:: -(-count // PAIR_SPAN)].tolist()
        return [
            (token, block)
            for block in range(first, first + number)
            for token in routed.tokens[starts[block] : starts[block + 1]].tolist()
        ]


@pytest.fixture(autouse=True, scope="module")
def dense() -> Iterator[None]:
    """The backend "dense": PyTorch's rows, tail-corrected by blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.BACKENDS, "dense", backends.Backend(TorchRows(), blocks=Dense()))
        yield


DOUBLE = Backend("dense", torch.float64)


@settings(max_examples=60, deadline=None)
@given(tail_calls())
def test_the_bounds_hold(case: dict[str, Any]) -> None:
    properties.check_bounds(DOUBLE, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_properties(check: Callable[[Backend], None], dtype: torch.dtype) -> None:
    check(Backend("dense", dtype))


@pytest.mark.parametrize("output", ["lse", "entropy", "mean_logit"])
def test_the_other_statistics(output: str) -> None:
    properties.the_other_statistics(DOUBLE, output)


@pytest.mark.parametrize("frozen", [False, True])
def test_preferences(frozen: bool) -> None:
    properties.preferences(DOUBLE, frozen)


def test_a_frozen_head_costs_no_work_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dense, "add_weight", lambda *_: pytest.fail("the head's gradient was computed"))
    problem = peaked_problem()
    hidden = problem["hidden"].requires_grad_()
    linear_logprobs(hidden, problem["weight"], problem["targets"], **DOUBLE.options()).logprob.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([0, 1, 2, 3, 4], TypeError, r"expected a tensor int64 \[5\], got list"),
        (torch.arange(5).int(), TypeError, r"expected int64 \[5\], got torch.int32"),
        (torch.arange(4), ValueError, r"expected int64 \[5\], got shape \[4\]"),
        (torch.tensor([0, 1, 2, 3, 3]), ValueError, "expected a permutation of the 5 vocabulary entries"),
        (torch.tensor([0, 1, 2, 3, 5]), ValueError, "expected a permutation"),
        (torch.tensor([0, 1, 2, 3, -1]), ValueError, "expected a permutation"),
    ],
    ids=str,
)
def test_bad_orders(order: Any, error: type[Exception], message: str) -> None:
    hidden, weight, targets = torch.randn(2, 4, requires_grad=True), torch.randn(5, 4), torch.tensor([0, 1])
    with pytest.raises(error, match=f"vocabulary_order: {message}"):
        linear_logprobs(hidden, weight, targets, **DOUBLE.options(), vocabulary_order=order)
    with pytest.raises(ValueError, match="vocabulary_order: is read by backward in"):
        linear_logprobs(hidden, weight, targets, vocabulary_order=torch.arange(5))


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 384])
def test_the_last_block(vocabulary: int) -> None:
    """Short, whole, or the only one."""
    draw = torch.Generator().manual_seed(vocabulary)
    case = {
        "hidden": 4 * torch.randn(7, vocabulary, generator=draw, dtype=torch.float64),
        "weight": torch.eye(vocabulary, dtype=torch.float64),
        "targets": torch.randint(vocabulary, (7,), generator=draw),
        "coefficient": torch.randn(7, generator=draw, dtype=torch.float64),
        "bias": torch.randn(vocabulary, generator=draw, dtype=torch.float64),
        "temperature": 1.0,
        "tail_tolerance": 0.2,
    }
    properties.check_bounds(DOUBLE, case)
