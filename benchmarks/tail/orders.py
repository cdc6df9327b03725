"""Orders of the vocabulary for the tail-corrected backward: what they make of its error, and what that is worth.

An order is measured on tokens that it was not made from, unless its name says "these tokens". What an order is worth is
the share kept at equal error, namely that of single entries in the native order at the default tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless import vocabulary_order
from logitless.bench.problem import Inputs
from logitless.bench.targets import Json
from logitless.types import TAIL_TOLERANCE

from ..internals import TAIL_BLOCK
from .data import drawn
from .exact import Exact

TOLERANCES = tuple(2.0**-k for k in range(6, 15))
#: The rules measured, by the name that they have in the results: entries in a block.
RULES = {"entries": TAIL_BLOCK, "blocks of 128": 128, "blocks of 64": 64}


class Source(NamedTuple):
    """What an order may be made from."""

    weight: Tensor  # [V, H]
    hidden: Tensor  # [tokens, H]


def split(sample: Inputs, tokens: int) -> tuple[Inputs, Tensor]:
    """Tokens to measure on, drawn from the first half of a text, and the hidden states of the second."""
    half = len(sample.hidden) // 2
    return drawn(sample, tokens, half), sample.hidden[half:]


# ---------------------------------------------------------------------------------------------------------------------
# Orders


def mean_probability(source: Source) -> Tensor:
    """Mean probability of every vocabulary entry, `[V]`."""
    parts = (F.softmax(x @ source.weight.T, -1).sum(0) for x in source.hidden.split(256))
    return sum(parts, torch.zeros(len(source.weight))) / len(source.hidden)


def from_head(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Orders that need no data."""
    centred = weight - weight.mean(0)
    yield "random", torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    yield "head: row norm", weight.norm(dim=1).argsort(descending=True)
    yield "head: logit at the mean row", (weight @ weight.mean(0)).argsort(descending=True)
    yield "head: first component of the rows", (centred @ torch.linalg.eigh(centred.T @ centred)[1][:, -1]).argsort()
    yield "head: clusters of rows", vocabulary_order(weight)


def from_data(name: str, source: Source) -> Iterator[tuple[str, Tensor]]:
    """Orders by the logits of some text."""
    mean = source.weight @ source.hidden.mean(0)
    yield f"logit at the mean hidden state, {name}", mean.argsort(descending=True)
    yield f"mean probability, {name}", mean_probability(source).argsort(descending=True)
    yield f"clusters of logits, {name}", vocabulary_order(source.weight, source.hidden)
    if name == "another part":
        few = source.hidden[:: max(1, len(source.hidden) // 64)]
        yield f"clusters of logits, {name}, 64 states", vocabulary_order(source.weight, few)


def orders(sample: Inputs, sources: dict[str, Source]) -> dict[str, Tensor]:
    """Every order, by name."""
    result = {"native": torch.arange(len(sample.weight))} | dict(from_head(sample.weight))
    for name, source in {"these tokens": Source(sample.weight, sample.hidden), **sources}.items():
        result |= from_data(name, source)
    return result


def measure(sample: Inputs, sources: dict[str, Source], report: Callable[[str], None]) -> Json:
    """Every order by every rule; `kept_at_equal_error` is None where no tolerance tried comes that close."""
    exact, result = Exact(sample), orders(sample, sources)
    rows: dict[str, dict[str, Json]] = {name: {rule: {"points": []} for rule in RULES} for name in result}
    for tolerance in TOLERANCES:
        for name, point in exact.entries(result, tolerance, RULES["entries"]).items():
            rows[name]["entries"]["points"].append({"tolerance": tolerance, **point})
    target = next(p["errors"] for p in rows["native"]["entries"]["points"] if p["tolerance"] == TAIL_TOLERANCE)
    for name, order in result.items():
        for rule, block in RULES.items():
            if rule != "entries":
                rows[name][rule]["points"] = exact.blocks(order, TOLERANCES, block)
            rows[name][rule]["kept_at_equal_error"] = kept_at(target, rows[name][rule]["points"])
        report(f"{name}: " + ", ".join(f"{rule} {row['kept_at_equal_error']}" for rule, row in rows[name].items()))
    return {"tokens": len(sample.targets), "equal_error": target, "orders": rows}


def kept_at(target: list[float], points: list[Json]) -> float | None:
    """The share kept at which neither error exceeds its target, between two tolerances by powers."""
    result = [_interpolated(math.log(t), [(p["errors"][k], p["kept"]) for p in points]) for k, t in enumerate(target)]
    return None if None in result else max(x for x in result if x is not None)


def _interpolated(log_error: float, points: list[tuple[float, float]]) -> float | None:
    logs = sorted((math.log(error), math.log(kept)) for error, kept in points)
    for (low, much), (high, little) in pairwise(logs):
        if low <= log_error <= high:
            return math.exp(much + (little - much) * (log_error - low) / (high - low))
    return None
