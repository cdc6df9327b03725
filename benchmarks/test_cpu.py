"""The same parts and providers under pytest-benchmark: `python -m pytest benchmarks` (or `-k dpo`).

One group a part; the figure in brackets behind each time is its ratio to the fastest of the group. Slow peers and
large problems take minutes; the report's ratios (benchmarks/cpu_report.py) are the better ones on a noisy machine, for
there the providers take turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import measure
from .parts import PARTS, Part
from .problems import Inputs
from .providers import Provider

ROUNDS = 3
CASES = [(part, provider) for part in PARTS for provider in part.providers]


@pytest.fixture(scope="module")
def tensors() -> Iterator[dict[str, Inputs]]:
    """The inputs of the part at hand: the parts come one after the other."""
    kept: dict[str, Inputs] = {}
    yield kept
    kept.clear()


@pytest.mark.parametrize(("part", "provider"), CASES, ids=lambda value: value.name)
def test_step(benchmark, tensors: dict[str, Inputs], part: Part, provider: Provider) -> None:  # type: ignore[no-untyped-def]
    if part.name not in tensors:
        tensors.clear()
        tensors[part.name] = part.problem.inputs()
    [row] = measure.first_calls([provider], part.problem.brief().inputs())
    if row.failure:
        pytest.skip(f"does not run: {row.failure}")
    benchmark.group = f"{part.name}: {part.problem}"
    benchmark.extra_info["error"] = row.error
    benchmark.pedantic(provider.step, args=(tensors[part.name],), rounds=ROUNDS, iterations=1, warmup_rounds=0)
