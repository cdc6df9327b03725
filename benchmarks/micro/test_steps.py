"""Steps of NLL and DPO, the products alone and the materialised loss in the same group, and forwards of statistics.

Groups are problems, so that a table of pytest-benchmark compares the ways through one of them.
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import logitless
from logitless.bench.problem import Problem
from logitless.bench.provider import Provider
from logitless.bench.providers import floors, materialised, own
from logitless.types import OUTPUTS, BackwardName

#: A third of SmolLM2's vocabulary and few tokens, so that a step takes a fraction of a second on two cores.
TOKENS = Problem(256, vocabulary=16384, data="peaked")
PAIRS = Problem(256, vocabulary=16384, pairs=8)
ROUNDS = 5


def _of_strategy(backward: BackwardName) -> Provider:
    return Provider(f"logitless, {backward}", "logitless", partial(own.nll, backward=backward))


STRATEGIES = [_of_strategy(name) for name in get_args(BackwardName) if name != "auto"]
NLL = (floors.GEMMS, materialised.NLL, *STRATEGIES)
DPO = (floors.GEMMS, materialised.DPO, own.DPO)
STEPS = [
    pytest.param(problem, provider, id=f"{loss}-{provider.name}")
    for loss, problem, providers in (("nll", TOKENS, NLL), ("dpo", PAIRS, DPO))
    for provider in providers
]


@pytest.mark.parametrize(("problem", "provider"), STEPS)
def test_step(benchmark: BenchmarkFixture, problem: Problem, provider: Provider) -> None:
    """Forward and backward."""
    benchmark.group = f"a step, {problem}"
    benchmark.pedantic(provider.step, (problem.inputs(),), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("outputs", [("logprob",), OUTPUTS], ids=["logprob", "all"])
def test_statistics(benchmark: BenchmarkFixture, outputs: tuple[str, ...]) -> None:
    """Forward without gradients."""
    benchmark.group = f"statistics, {TOKENS}"
    inputs = TOKENS.inputs()
    forward = partial(logitless.linear_logprobs, outputs=outputs)
    with torch.no_grad():
        benchmark.pedantic(forward, (inputs.hidden, inputs.weight, inputs.targets), rounds=ROUNDS, warmup_rounds=1)


def test_logits(benchmark: BenchmarkFixture) -> None:
    """The product that statistics are computed from."""
    benchmark.group = f"statistics, {TOKENS}"
    inputs = TOKENS.inputs()
    benchmark.pedantic(torch.matmul, (inputs.hidden, inputs.weight.T), rounds=ROUNDS, warmup_rounds=1)
