"""What a step does to the vocabulary, counted: products, and passes of row operations over `[tokens, vocabulary]`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .problem import Problem

#: Where the shapes of the two factors stand among a product's arguments.
PRODUCTS = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}

#: These make another view of the same memory, or reserve some.
NO_WORK = frozenset(
    {
        *(
            "aten::view",
            "aten::t",
            "aten::transpose",
            "aten::as_strided",
            "aten::slice",
            "aten::narrow",
            "aten::select",
        ),
        *("aten::split", "aten::expand", "aten::unsqueeze", "aten::detach", "aten::resize_"),
        *("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"),
    }
)


class Work(NamedTuple):
    """Counts of one step."""

    products: float  # in units of 2 N H V flops
    passes: float  # of operations other than products over all N V entries


def count(step: Callable[[], object], problem: Problem) -> Work:
    """Runs it once under the profiler, which sees through custom ops and the autograd thread."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
    tokens, hidden, vocabulary = problem.tokens, problem.hidden, problem.vocabulary
    flops = entries = 0
    for event in _leaves(profile.events() or ()):
        shapes = [tuple(x) for x in event.input_shapes]
        if event.name in PRODUCTS:
            (rows, inner), (_, columns) = (shapes[i] for i in PRODUCTS[event.name])
            flops += 2 * rows * inner * columns
        elif event.name not in NO_WORK:
            rows_of_all = [x for x in shapes if len(x) > 1 and vocabulary in x and hidden not in x]
            entries += max(map(math.prod, rows_of_all), default=0)
    return Work(flops / (2 * tokens * hidden * vocabulary), entries / (tokens * vocabulary))


def _leaves(events: Iterable[Any]) -> Iterator[Any]:
    """Operators that call no other operator (a product calls none that counts)."""
    for event in events:
        inner = any(child.name.startswith("aten::") for child in event.cpu_children)
        if event.name in PRODUCTS or (event.name.startswith("aten::") and not inner):
            yield event
