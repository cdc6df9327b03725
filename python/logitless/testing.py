"""Tools to test these ops, on any device: problems, error budgets, a watch on the allocator, poisoned memory.

The truth is the formula in float64. An op's error may be as large as that of plain materialised PyTorch code in the
op's dtype (or as that of a rounding of the inputs, if it is larger), times a small factor, plus the rounding of the
result itself. No tolerance is tuned to a test.

    problem = make_problem((64,), 32, 1000, dtype=torch.bfloat16)
    for name, ours in measure(lambda h, w, b, t: linear_logprobs(h, w, t, bias=b), problem).items(): ...
    with watch_allocations() as seen: ...
    assert seen.largest < 1e6
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .types import OUTPUTS, LogitTransform, TokenStats, statistics_dtype

# ---------------------------------------------------------------------------------------------------------------------
# Problems


class TokenProblem(NamedTuple):
    """The tensors of one call of an op on tokens."""

    hidden: Tensor  # [*shape, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    targets: Tensor  # [*shape] int64

    def to(self, dtype: torch.dtype) -> TokenProblem:
        """A copy in another dtype: fresh leaves, which require a gradient if the original does."""
        return TokenProblem(*(_leaf(x, dtype) for x in self))  # type: ignore[arg-type]


def _leaf(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if x is None or not x.is_floating_point():
        return x
    return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)


def make_problem(
    shape: tuple[int, ...],
    hidden_size: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = False,
    masked: slice | None = None,
    ignored: float = 0.0,
    trainable: tuple[str, ...] = ("hidden", "weight", "bias"),
    spread: float = 2.0,
    seed: int = 0,
) -> TokenProblem:
    """Random hidden states, head and targets, with the same values on every device.

    Args:
        shape: leading shape of the tokens. hidden_size: H. vocabulary: V.
        dtype, device: of the floating tensors. The values are drawn in float32 on the CPU, and rounded.
        bias: whether the head has a bias.
        masked: vocabulary entries with a bias of -inf (implies `bias`). No target is among them.
        ignored: share of the targets that are -100.
        trainable: names of the tensors that require a gradient.
        spread: rough standard deviation of the logits. 2 gives next-token distributions like a model's.
        seed: of the random numbers.
    """
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, hidden_size, generator=draw)
    weight = torch.randn(vocabulary, hidden_size, generator=draw) * (spread / max(hidden_size, 1) ** 0.5)
    offset = torch.randn(vocabulary, generator=draw) if bias or masked is not None else None
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    if masked is not None and offset is not None:
        offset[masked], allowed[masked] = -torch.inf, False
    ids = allowed.nonzero()[:, 0]
    targets = ids[torch.randint(len(ids), shape, generator=draw)]
    targets[torch.rand(shape, generator=draw) < ignored] = -100
    drawn = TokenProblem(hidden, weight, offset, targets)
    leaves = (x if x is None else x.to(device=device, dtype=dtype if x.is_floating_point() else None) for x in drawn)
    return TokenProblem(
        *(  # type: ignore[arg-type]
            x.requires_grad_() if x is not None and name in trainable else x
            for name, x in zip(TokenProblem._fields, leaves, strict=True)
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# Errors within budget


#: Allowed rounding of a result, in ulps of its dtype at the largest entry, for the sum of a row and of its products.
FLOOR_ULPS = 16
#: Another order of the same sum may have a few times the error of the baseline's order.
FACTOR = 4.0


def materialised(
    problem: TokenProblem,
    transform: LogitTransform | None = None,
    *,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logprob",),
    logit_weight: Tensor | None = None,
) -> TokenStats:
    """`TokenStats` by plain PyTorch, the baseline: logits in the model's dtype, softmax in float32."""
    hidden, weight, bias, targets = problem
    transform = transform or LogitTransform()
    shape = hidden.shape[:-1]
    listed = targets.shape[len(shape) :]  # [K], or nothing
    flat = targets.reshape(-1, *listed)
    counts = flat != ignore_index
    kept = (counts.any(-1) if listed else counts).nonzero()[:, 0]
    rows = hidden.reshape(-1, hidden.shape[-1])[kept]
    z = torch.nn.functional.linear(rows, weight, bias).to(statistics_dtype(hidden.dtype))
    z = reference.transformed(z, transform)
    formulas = partial(reference.statistics, logit_weight=logit_weight)
    compact = (reference.list_statistics if listed else formulas)(z, flat[kept].masked_fill(~counts[kept], -1), outputs)
    stats = reference.for_all(compact, kept, len(flat))
    return TokenStats(*(None if x is None else x.reshape((*shape, *x.shape[1:])) for x in stats))


def measure(function: Callable[[TokenProblem], TokenStats | Tensor], problem: TokenProblem) -> dict[str, Tensor]:
    """The values of `function` for the problem, and its gradients under a random upstream gradient.

    The upstream gradient is non-uniform, and equal for equal shapes. The keys are the names of the statistics (or
    "value"), and `d_hidden`, `d_weight`, `d_bias` for the tensors that require a gradient. The problem is not changed.
    """
    leaves = problem.to(problem.hidden.dtype)
    out = function(leaves)
    named = {"value": out} if isinstance(out, Tensor) else {k: v for k, v in out._asdict().items() if v is not None}
    draw = torch.Generator().manual_seed(1)
    total: Tensor | None = None
    for name in sorted(named):
        upstream = torch.randn(named[name].shape, generator=draw, dtype=torch.float64).to(named[name])
        if named[name].requires_grad:
            part = (upstream * named[name]).masked_fill(named[name].isinf(), 0).sum()
            total = part if total is None else total + part
    wanted = {k: v for k, v in leaves._asdict().items() if v is not None and v.requires_grad}
    if total is not None and wanted:
        gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
            named[f"d_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: value.detach() for name, value in named.items()}


def assert_within_budget(
    actual: Tensor,
    baseline: Tensor,
    exact: Tensor,
    *,
    dtype: torch.dtype | None = None,
    factor: float = FACTOR,
    scale: float = 0.0,
    name: str = "result",
    blur: float = 0.0,
) -> None:
    """`max |actual - exact| <= factor * max |baseline - exact| + FLOOR_ULPS ulps of max(|exact|, scale) + blur`.

    Args:
        actual: the tested result.
        baseline: the result of the materialised formula in the dtype of the test.
        exact: the result of the formula in float64 on the same (rounded) inputs.
        dtype: dtype of the inputs, whose ulp counts: bf16 logits make float32 statistics right to bf16 only. It is
            `actual`'s by default.
        factor: see `FACTOR`.
        scale: size of the terms of the result, needed if they cancel and `exact` itself is rounded (float64).
        name: name of the result in the message.
        blur: what `exact` itself may be off by.

    Raises:
        AssertionError: the budget is exceeded, shapes differ, or infinities and NaNs are not in the same places.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    largest = torch.finfo(actual.dtype).max
    actual, baseline, truth = (x.detach().double().cpu() for x in (actual, baseline, exact))
    truth = torch.where(truth.abs() > largest, truth.sign() * math.inf, truth)  # what the result's dtype cannot hold
    finite = truth.isfinite()
    same = torch.equal(actual[~finite].nan_to_num(0.5), truth[~finite].nan_to_num(0.5))
    assert same and bool(actual[finite].isfinite().all()), f"{name}: infinities or NaNs in other places than expected"
    if not bool(finite.any()):
        return
    error, allowed = _error(actual, truth), _error(baseline, truth)
    floor = FLOOR_ULPS * torch.finfo(dtype or exact.dtype).eps * max(truth[finite].abs().max().item(), scale)
    budget = factor * allowed + floor + blur
    message = f"{name}: error {error:.3g} exceeds {budget:.3g} (baseline {allowed:.3g}, floor {floor:.3g})"
    assert error <= budget, message


def _error(actual: Tensor, exact: Tensor) -> float:
    """The largest error over the entries at which both are finite."""
    difference = (actual.double() - exact).abs()
    return difference[difference.isfinite()].max().item() if bool(difference.isfinite().any()) else 0.0


def assert_matches_float64(
    function: Callable[[TokenProblem], TokenStats | Tensor],
    baseline: Callable[[TokenProblem], TokenStats | Tensor],
    problem: TokenProblem,
    *,
    factor: float = FACTOR,
    scale: float = 0.0,
) -> None:
    """Asserts that the errors of `function`'s values and gradients are within the budget of `baseline`'s own.

    `baseline` runs three times: in the problem's dtype, in float64 for the truth, and in float64 with every input moved
    by an ulp of the statistics' dtype. If terms cancel, no formula can be nearer than the last. `factor` and `scale`
    are those of `assert_within_budget`; for a problem in float64 the scale is at least that of the inputs.
    """
    ours, theirs = measure(function, problem), measure(baseline, problem)
    exact, moved = (measure(baseline, x) for x in (problem.to(torch.float64), _moved(problem)))
    assert ours.keys() == exact.keys(), f"expected {sorted(exact)}, got {sorted(ours)}"
    dtype = problem.hidden.dtype
    if dtype == torch.float64:
        scale = max(scale, *(_size(x) for x in problem[:3]))
    for name, value in ours.items():
        if name == "correct":
            continue  # a tie within rounding may go either way
        nearest = theirs[name]
        if _error(moved[name], exact[name]) > _error(nearest, exact[name]):
            nearest = moved[name]
        # An entropy has the logarithm of a sum of 1 and little, which float64 rounds to its own ulp of 1.
        blur = torch.finfo(torch.float64).eps if name == "entropy" else 0.0
        assert_within_budget(value, nearest, exact[name], dtype=dtype, factor=factor, scale=scale, name=name, blur=blur)


def _size(x: Tensor | None) -> float:
    return 1.0 if x is None or not x.numel() else max(1.0, x.detach().nan_to_num(0, 0, 0).abs().max().item())


def _moved(problem: TokenProblem) -> TokenProblem:
    eps = torch.finfo(statistics_dtype(problem.hidden.dtype)).eps
    draw = torch.Generator().manual_seed(2)
    exact = problem.to(torch.float64)
    with torch.no_grad():
        for x in exact:
            if x is not None and x.is_floating_point():
                x.mul_(1 + eps * torch.randn(x.shape, generator=draw).to(x))
    return exact


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@dataclass
class Allocations:
    """Allocations within `watch_allocations`, in bytes. The fields are set when the block ends."""

    largest: int = 0
    """The largest single allocation."""
    peak: int = 0
    """The largest amount held at one time, less the amount held at the start."""


@contextmanager
def watch_allocations(device: str = "cpu") -> Iterator[Allocations]:
    """Records every allocation of the block as the allocator sees it, inside registered ops too.

    It is built on `torch.profiler.profile(profile_memory=True)`, so do not nest it in another profile.
    """
    seen = Allocations()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield seen
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    wanted = {"cpu": 0, "cuda": 1}[device]  # c10::DeviceType
    changes = [
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == wanted
    ]
    held = 0
    for _, _, change in sorted(changes):
        held += change
        seen.largest, seen.peak = max(seen.largest, change), max(seen.peak, held)


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fills new memory (`torch.empty` and its like) with NaN, or the greatest integer, so unwritten entries show.

    This is PyTorch's own `torch.utils.deterministic.fill_uninitialized_memory`. It needs deterministic mode, in which
    an operation without a deterministic form warns.
    """
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # its attribute is a property of a module class, which no stub knows
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


__all__ = [
    "OUTPUTS",
    "Allocations",
    "TokenProblem",
    "assert_matches_float64",
    "assert_within_budget",
    "make_problem",
    "materialised",
    "measure",
    "poison_empty",
    "watch_allocations",
]
