"""Orders of the vocabulary for the tail-corrected backward: what they make of its error, and what that is worth.

An order is measured on tokens that it was not made from, unless its name says "these tokens". Both rules are: single
entries, with their tail in blocks of 256 (the CPU's), and whole blocks of 128 or 64 entries (a GPU's). What an order is
worth is the share kept at equal error, namely that of single entries in the native order at the default tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from logitless.backends import tail
from logitless.backends.order import vocabulary_order
from logitless.types import TAIL_TOLERANCE

from .tail_data import Sample

Json = dict[str, Any]
ENTRY_TOLERANCES = tuple(2.0**-k for k in range(6, 15))
BLOCK_TOLERANCES = tuple(2.0**-k for k in range(6, 15))
#: The rules measured, by the name that they have in the results: entries in a block.
RULES = {"entries": tail.BLOCK, "blocks of 128": 128, "blocks of 64": 64}


class Source(NamedTuple):
    """What an order may be made from."""

    weight: Tensor  # [V, H]
    hidden: Tensor  # [tokens, H]


def split(sample: Sample, tokens: int) -> tuple[Sample, Tensor]:
    """Tokens to measure on, drawn from the first half of a text, and the hidden states of the second."""
    half = len(sample.hidden) // 2
    drawn = torch.randperm(half, generator=torch.Generator().manual_seed(0))[:tokens]
    return Sample(sample.hidden[drawn], sample.weight, sample.targets[drawn]), sample.hidden[half:]


# ---------------------------------------------------------------------------------------------------------------------
# Orders


def mean_probability(source: Source) -> Tensor:
    """`[V]`."""
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


def orders(sample: Sample, sources: dict[str, Source]) -> dict[str, Tensor]:
    """Every order, by name."""
    found = {"native": torch.arange(len(sample.weight))} | dict(from_head(sample.weight))
    for name, source in {"these tokens": Source(sample.weight, sample.hidden), **sources}.items():
        found |= from_data(name, source)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Errors


class Measured:
    """Gradients of the mean NLL on few tokens, and how far off they are by either rule. Probabilities are `[V, N]`."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        p = sample.weight @ sample.hidden.T
        self.p = p.sub_(p.logsumexp(0)).exp_()
        self.tokens = torch.arange(len(sample.targets))
        self.total = self._products(self.p)
        hits = torch.zeros_like(self.total[1]).index_add_(0, sample.targets, sample.hidden)
        exact = self.total[0] - sample.weight[sample.targets], self.total[1] - hits
        self.norms = [x.norm() for x in exact]

    def _products(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """With the head `[N, H]`, and with the hidden states `[V, H]`."""
        return matrix.T @ self.sample.weight, matrix @ self.sample.hidden

    def _relative(self, d_hidden: Tensor, d_weight: Tensor) -> list[float]:
        return [float(x.norm() / norm) for x, norm in zip((d_hidden, d_weight), self.norms, strict=True)]

    def entries(self, orders: dict[str, Tensor], tolerance: float, block: int) -> dict[str, Json]:
        """Single entries are kept, the same ones in every order; the blocks of what is left differ."""
        keep = self.p >= tolerance / tail.SHARE
        keep[self.sample.targets, self.tokens] = True
        rest = torch.where(keep, 0, self.p)
        dropped = self._products(rest)
        found = {}
        for name, order in orders.items():
            starts = torch.arange(0, len(order), block)
            sums = F.embedding_bag(order, rest, starts, mode="sum")
            means = F.embedding_bag(order, self.sample.weight, starts, mode="mean")
            size = starts.diff(append=torch.tensor([len(order)]))
            share = (sums @ self.sample.hidden / size[:, None]).repeat_interleave(size, 0)
            errors = dropped[0] - sums.T @ means, dropped[1].index_select(0, order).sub_(share)
            found[name] = {"kept": float(keep.float().mean()), "errors": self._relative(*errors)}
        return found

    def blocks(self, order: Tensor, tolerances: tuple[float, ...], block: int) -> list[Json]:
        """Whole blocks of an order are kept by their mass, and the target's."""
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        weight, p = (_in_blocks(x.index_select(0, order), block) for x in (self.sample.weight, self.p))
        mass, means, found = p.sum(1), weight.mean(1), []
        for tolerance in tolerances:
            keep = mass >= tolerance
            keep[places[self.sample.targets] // block, self.tokens] = True
            left = torch.where(keep, 0, mass)
            d_hidden = self.total[0] - left.T @ means
            d_weight = _in_blocks(self.total[1].index_select(0, order), block)
            d_weight.sub_((left @ self.sample.hidden / block)[:, None])
            for b in range(len(keep)):
                tokens = keep[b].nonzero()[:, 0]
                near = p[b].index_select(1, tokens)
                d_hidden.index_add_(0, tokens, near.T @ weight[b], alpha=-1)
                d_weight[b].addmm_(near, self.sample.hidden[tokens], alpha=-1)
            errors = self._relative(d_hidden, d_weight.flatten(0, 1)[: len(order)])
            found.append({"tolerance": tolerance, "kept": float(keep.float().mean()), "errors": errors})
        return found


def _in_blocks(rows: Tensor, block: int) -> Tensor:
    """`[V, K]` to `[blocks, block, K]`."""
    return F.pad(rows, (0, 0, 0, -len(rows) % block)).view(-1, block, rows.shape[1])


def measure(sample: Sample, sources: dict[str, Source], report: Callable[[str], None]) -> Json:
    """Every order by every rule; `kept_at_equal_error` is None where no tolerance tried comes that close."""
    measured, found = Measured(sample), orders(sample, sources)
    rows: dict[str, dict[str, Json]] = {name: {rule: {"points": []} for rule in RULES} for name in found}
    for tolerance in ENTRY_TOLERANCES:
        for name, point in measured.entries(found, tolerance, RULES["entries"]).items():
            rows[name]["entries"]["points"].append({"tolerance": tolerance, **point})
    target = next(p["errors"] for p in rows["native"]["entries"]["points"] if p["tolerance"] == TAIL_TOLERANCE)
    for name, order in found.items():
        for rule, block in RULES.items():
            if rule != "entries":
                rows[name][rule]["points"] = measured.blocks(order, BLOCK_TOLERANCES, block)
            rows[name][rule]["kept_at_equal_error"] = kept_at(target, rows[name][rule]["points"])
        report(f"{name}: " + ", ".join(f"{rule} {row['kept_at_equal_error']}" for rule, row in rows[name].items()))
    return {"tokens": len(sample.targets), "equal_error": target, "orders": rows}


def kept_at(target: list[float], points: list[Json]) -> float | None:
    """The share kept at which neither error exceeds its target, between two tolerances by powers."""
    found = [_interpolated(math.log(t), [(p["errors"][k], p["kept"]) for p in points]) for k, t in enumerate(target)]
    return None if None in found else max(x for x in found if x is not None)


def _interpolated(log_error: float, points: list[tuple[float, float]]) -> float | None:
    logs = sorted((math.log(error), math.log(kept)) for error, kept in points)
    for (low, much), (high, little) in pairwise(logs):
        if low <= log_error <= high:
            return math.exp(much + (little - much) * (log_error - low) / (high - low))
    return None
