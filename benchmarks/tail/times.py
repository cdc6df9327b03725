"""Approximate steps timed in turns with the exact ones and the three GEMMs, and what each left out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import logitless
from logitless.bench.machine import this_machine
from logitless.bench.measure import Row, in_turns, relative, time_once
from logitless.bench.problem import Inputs
from logitless.bench.provider import Outcome, Provider
from logitless.bench.providers import floors, materialised, own
from logitless.bench.targets import Json

FLOOR, EXACT = "three GEMMs", "single pass"
BFLOAT16 = torch.bfloat16


def providers(order: Tensor) -> tuple[Provider, ...]:
    """What is timed; "ordered" has the vocabulary in `order`."""
    result = [
        Provider(FLOOR, "floor", floors.chunked_products, ""),
        materialised.NLL,
        _ours(EXACT),
        _ours("log-probs, recompute", own.logprobs),
        Provider("frozen head, two GEMMs", "floor", floors.chunked_products, "", frozen=True),
        _ours("frozen head, single pass", frozen=True),
        _ours("bfloat16, single pass", dtype=BFLOAT16),
    ]
    for strategy, tolerances in (("tail-corrected", (10, 12, 13)), ("screened", (9, 10, 12, 13))):
        by = partial(_options, strategy)
        result += [_ours(f"{strategy} 2^-{k}", **by(k)) for k in tolerances]
        result += [
            _ours(f"{strategy} 2^-10, ordered", **by(10), vocabulary_order=order),
            _ours(f"log-probs, {strategy} 2^-12", own.logprobs, **by(12)),
            _ours(f"frozen head, {strategy} 2^-12", frozen=True, **by(12)),
            _ours(f"bfloat16, {strategy} 2^-12", dtype=BFLOAT16, **by(12)),
        ]
    return tuple(result)


def _options(strategy: str, k: int) -> Json:
    return {"backward": strategy.replace("-", "_"), "tail_tolerance": 2.0**-k}


def _ours(
    name: str, loss: Any = own.token_loss_nll, *, frozen: bool = False, dtype: Any = None, **options: Any
) -> Provider:
    return Provider(name, "logitless", partial(loss, **options), frozen=frozen, dtype=dtype)


def chosen(every: Sequence[Provider], names: Sequence[str]) -> list[Provider]:
    """The named ones with the floor and the exact step; all, where none is named."""
    return [p for p in every if not names or p.name in (FLOOR, EXACT, *names)]


def flat(inputs: Inputs) -> Inputs:
    """An untrained model's near-uniform distributions, which need the exact path: a strategy has to find that out."""
    return inputs._replace(hidden=0.1 * inputs.hidden)


def times(every: Sequence[Provider], inputs: Inputs, rounds: int) -> Json:
    """Seconds of every provider in turns, errors against the single pass in float32, and what was left out."""
    machine = this_machine(gpu=False)
    rows = {p.name: Row(p.name, p.role) for p in every}
    for provider in every:
        if provider.name in (FLOOR, EXACT):
            provider.step(inputs)  # warm up
    for provider in in_turns(every, rounds):
        time_once(provider, rows[provider.name], inputs, machine)
    exact = next(p for p in every if p.name == EXACT).step(inputs)
    return {p.name: {"seconds": rows[p.name].seconds, **_once(p, p.of(inputs), exact)} for p in every}


def _once(provider: Provider, inputs: Inputs, exact: Outcome) -> Json:
    """CPU time of the whole process, which a busy machine does not change much, errors, and the report."""
    start = time.process_time()
    outcome = provider.step(inputs)
    result: Json = {"cpu_seconds": time.process_time() - start}
    if provider.role != "floor":
        result["errors"] = _errors(outcome, exact)
    if "2^-" in provider.name:
        with logitless.tail_report() as report:
            provider.step(inputs)
        result["kept"] = report.kept / max(1, report.entries)
        result |= {"tail_mass": float(report.tail_mass.mean()), "exact_tokens": report.exact_tokens}
    return result


def _errors(outcome: Outcome, exact: Outcome) -> list[float]:
    """Errors of the loss (absolute), d hidden and d weight (relative, if there is one)."""
    pairs = zip(outcome[1:], exact[1:], strict=True)
    loss = float((outcome.loss.float() - exact.loss).abs())
    return [loss, *(relative(x, y) for x, y in pairs if x is not None and y is not None)]
