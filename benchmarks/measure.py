"""Gradient error against float64, and time in turns: every provider once a round, so that a slow minute slows all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from . import work
from .definitions import DEFINITIONS
from .problems import Inputs
from .providers import Outcome, Provider, differentiate

#: A peer that took this many times as long as the materialised loss is not timed again: its rank is beyond doubt.
PATIENCE = 1.5


@dataclass
class Row:
    """What was found of one provider. `seconds` are in round order, from round 0 on."""

    provider: str
    role: str
    seconds: list[float] = field(default_factory=list)
    first_call_seconds: float | None = None  # on few tokens: imports and compilation
    error: dict[str, float] | None = None  # relative, of loss, d_hidden and d_weight, against float64 on few tokens
    memory: dict[str, int | None] | None = None
    failure: str | None = None
    work: dict[str, float] | None = None  # of logitless: products and passes over the vocabulary, on few tokens

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def first_calls(providers: Sequence[Provider], inputs: Inputs) -> list[Row]:
    """One call of each on few tokens: it warms up, and is compared with float64. A peer may fail, with its reason."""
    exact = inputs.to(torch.float64)
    reference = {name: differentiate(DEFINITIONS[name], exact) for name in {p.loss for p in providers} if name}
    rows = []
    for provider in providers:
        row = Row(provider.name, provider.role)
        rows.append(row)
        start = time.perf_counter()
        outcome = _attempt(provider, inputs, row)
        if outcome is None:
            continue
        row.first_call_seconds = time.perf_counter() - start
        if provider.role == "logitless":
            row.work = work.count(partial(provider.step, inputs), inputs.problem)._asdict()
        if provider.loss:
            row.error = errors(outcome, reference[provider.loss])
    return rows


def _attempt(provider: Provider, inputs: Inputs, row: Row) -> Outcome | None:
    try:
        return provider.step(inputs)
    except Exception as reason:
        if provider.role != "peer":
            raise
        row.failure = f"{type(reason).__name__}: {str(reason).strip().splitlines()[0] if str(reason).strip() else ''}"
        return None


def errors(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """`|x - reference| / |reference|` of the loss and of each gradient."""

    def relative(x: Tensor, exact: Tensor) -> float:
        return float((x.double() - exact).norm() / (exact.norm() or 1.0))

    pairs = zip(Outcome._fields, outcome, reference, strict=True)
    return {name: relative(x, exact) for name, x, exact in pairs if x is not None and exact is not None}


def time_in_turns(
    providers: Sequence[Provider], rows: Sequence[Row], inputs: Inputs, rounds: int, deadline: float = float("inf")
) -> None:
    """Appends to the rows' `seconds`: `rounds` rounds, fewer (but one) where the clock passes `deadline`."""
    for turn in range(rounds):
        if turn and time.monotonic() > deadline:
            return
        for provider, row in list(zip(providers, rows, strict=True))[:: -1 if turn % 2 else 1]:
            if row.failure is None and not (turn and _hopeless(row, rows)):
                _time_once(provider, row, inputs)


def _time_once(provider: Provider, row: Row, inputs: Inputs) -> None:
    start = time.perf_counter()
    outcome = _attempt(provider, inputs, row)
    if outcome is not None:
        row.seconds.append(time.perf_counter() - start)


def _hopeless(row: Row, rows: Sequence[Row]) -> bool:
    base = next((r for r in rows if r.role == "materialised"), None)
    return row.role == "peer" and base is not None and row.seconds[0] > PATIENCE * base.seconds[0]
