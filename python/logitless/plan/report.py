"""A plan as lines of text, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from ..commands import columns_of
from .choose import StepPlan, Strategy
from .sizes import show_bytes
from .step import NOT_PREDICTED, Step
from .terms import Term, total

TITLES = ("strategy", "inputs", "gradients", "extra", "total", "fits", "most tokens", "products", "seconds", "ratio")


def report_lines(plan: StepPlan) -> list[str]:
    """The whole plan: the table of strategies, the choice, and each strategy's terms."""
    rest = total(plan.rest)
    lines = [
        _step_line(plan.step),
        f"memory {show_bytes(plan.memory)}; rough terms outside the head {show_bytes(rest)}",
        "",
        *columns_of([TITLES, *(_table_row(each) for each in plan.strategies if each.obstacle is None)]),
        "",
        *(f"{each.name}: {each.obstacle}" for each in plan.strategies if each.obstacle is not None),
        *(f"{name}: not predicted: {reason}" for name, reason in NOT_PREDICTED.items()),
        "",
        _choice_line(plan),
    ]
    step = plan.step
    sizes = f"N {step.tokens} tokens, n {step.chunk} of a chunk, H {step.hidden} hidden, V {step.vocabulary} vocabulary"
    lines += ["", sizes]
    known = [each.memory for each in plan.strategies if each.memory is not None]
    lines += ["", *_titled("inputs", known[0].inputs), "", *_titled("gradients", known[0].gradients)]
    for strategy in plan.strategies:
        lines += _details(strategy)
    lines += ["", *_titled("outside the head, rough", plan.rest)]
    if plan.shape.missing:
        lines.append(f"  no weights and activations: {plan.shape.missing}")
    return lines


def _step_line(step: Step) -> str:
    head = "frozen" if step.frozen_head else "trainable"
    sizes = f"N {step.tokens}, H {step.hidden}, V {step.vocabulary}"
    return f"{step.loss.name}: {sizes}, {_dtype_name(step.dtype)}, {head} head, {step.device}, backend {step.backend}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table_row(strategy: Strategy) -> tuple[str, ...]:
    memory = strategy.memory
    assert memory is not None
    seconds, ratio = strategy.seconds, strategy.ratio
    return (
        strategy.name,
        show_bytes(total(memory.inputs)),
        show_bytes(total(memory.gradients)),
        show_bytes(memory.extra),
        show_bytes(memory.total),
        "yes" if strategy.fits else "no",
        str(strategy.most_tokens),
        str(strategy.products),
        "-" if seconds is None else f"{seconds:.3g}",
        "-" if ratio is None else f"{ratio:.2f}",
    )


def _choice_line(plan: StepPlan) -> str:
    if plan.choice is None:
        best = max(plan.strategies, key=lambda each: each.most_tokens)
        return f"choose: nothing fits; {best.name} fits up to {best.most_tokens} tokens"
    what = "materialised logits" if plan.choice == "materialised" else f'backward="{plan.choice}"'
    known = plan.strategy(plan.choice).seconds is not None
    return f"choose: {what}, which fits and takes the least {'time' if known else 'products'}"


def _details(strategy: Strategy) -> list[str]:
    """The terms of a strategy's memory at its peak, and the parts of its time."""
    memory = strategy.memory
    if memory is None:
        return []
    lines = ["", *_titled(f"{strategy.name}: alive beside the inputs at the peak, {memory.moment}", memory.alive)]
    if strategy.costs is not None:
        rows: list[tuple[str, ...]] = [(f"  {cost.seconds:.3g} s", cost.name, cost.formula) for cost in strategy.costs]
        lines += [f"{strategy.name}: time", *columns_of(rows)]
    return lines


def _titled(title: str, terms: Iterable[Term]) -> list[str]:
    rows: list[tuple[str, ...]] = [(f"  {show_bytes(each.bytes)}", each.name, each.formula) for each in terms]
    return [title, *(columns_of(rows) if rows else ["  nothing"])]


def report_json(plan: StepPlan) -> str:
    """Everything in the plan as JSON; bytes and seconds are plain numbers."""
    step = {name: getattr(plan.step, name) for name in plan.step.__dataclass_fields__}
    step |= {
        "loss": plan.step.loss.name,
        "dtype": _dtype_name(plan.step.dtype),
        "chunk": plan.step.chunk,
    }
    content = {
        "step": step,
        "shape": asdict(plan.shape),
        "memory": plan.memory,
        "rates": None if plan.rates is None else asdict(plan.rates),
        "rest": _terms_json(plan.rest),
        "strategies": [_strategy_json(each) for each in plan.strategies],
        "not_predicted": NOT_PREDICTED,
        "choice": plan.choice,
    }
    return json.dumps(content, indent=1) + "\n"


def _terms_json(terms: Iterable[Any]) -> list[dict[str, Any]]:
    return [each._asdict() for each in terms]


def _strategy_json(strategy: Strategy) -> dict[str, Any]:
    names = ("name", "obstacle", "fits", "most_tokens", "products", "seconds", "ratio")
    found = {name: getattr(strategy, name) for name in names}
    memory = strategy.memory
    if memory is not None:
        lists = {name: _terms_json(getattr(memory, name)) for name in ("inputs", "gradients", "alive")}
        found["memory"] = {"moment": memory.moment, "extra": memory.extra, "total": memory.total, **lists}
    found["costs"] = None if strategy.costs is None else _terms_json(strategy.costs)
    return found
