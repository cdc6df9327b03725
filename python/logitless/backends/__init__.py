"""The backends, in order of preference, and the choice among them.

A backend is a module with ten functions. Nothing above this package knows what stands behind them:

    supports(device, dtype) -> None | str                why it cannot take such tensors
    forward(problem, outputs, unit_gradient) -> Forward
    backward(problem, stats, upstream, needs) -> Gradients
    single_pass(problem, outputs, coefficients, groups, needs) -> SinglePass
    tokens_at_once(hidden, weight, options) -> int       the longest group of tokens that single_pass keeps whole
    divergence(problem, upstream, needs) -> DivergenceResult
    tail_forward(problem, outputs, tolerance) -> (Forward, Saved)              tail-corrected: by entries (`tail`), or
    tail_backward(problem, stats, saved, upstream, needs, tolerance) -> Gradients      by blocks (`blocks`)
    tail_single_pass(problem, outputs, coefficients, groups, needs, tolerance) -> SinglePass
    tail_blocks(hidden, weight, transform) -> int        the width of what `tail_forward` saves, of fake tensors too
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import chunked, cuda, screen, triton

#: name -> module, without work at import; "auto" takes the first that supports the tensors, and the last always does.
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "chunked": chunked}
#: Those, and the tail-corrected strategy that is no backend of its own: `tokens_at_once` and the functions `tail_...`.
STRATEGIES: dict[str, ModuleType] = {**BACKENDS, "screened": screen}
#: Those whose rows leave a finished gradient, without a factor for each row, so that one product can make the head's.
FINISHED_GRADIENTS = ("cuda", "triton")


def pick(name: str, hidden: Tensor, without: tuple[str, ...] = ()) -> str:
    """The backend to use. A named one runs or raises; nothing falls back silently. `without`: those that "auto" passes
    over."""
    return _pick(name, hidden.device, hidden.dtype, without)


def pick_strategy(name: str, backward: str, hidden: Tensor) -> str:
    """Likewise, of `STRATEGIES`, for a tail-corrected `backward`."""
    return _pick_screen(name, hidden.device, hidden.dtype) if backward == "screened" else pick(name, hidden)


def _pick_screen(name: str, device: torch.device, dtype: torch.dtype) -> str:
    reason = screen.supports(device, dtype)
    if reason is None and name not in ("auto", "chunked"):
        reason = f"it is of backend='chunked', got backend={name!r}"
    if reason is not None:
        raise ValueError(f"backward: 'screened' cannot be used: {reason}")
    return "screened"


def _pick(name: str, device: torch.device, dtype: torch.dtype, without: tuple[str, ...]) -> str:
    if name == "auto":
        known = (candidate for candidate in BACKENDS if candidate not in without)
        return next(candidate for candidate in known if BACKENDS[candidate].supports(device, dtype) is None)
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {['auto', 'reference', *BACKENDS]}, got {name!r}")
    reason = BACKENDS[name].supports(device, dtype)
    if reason is not None:
        raise ValueError(f"backend: {name!r} cannot take these tensors: {reason}")
    return name


# What torch.compiler.assume_constant_result does, without importing torch._dynamo: a trace looks for no files.
_pick._dynamo_marked_constant = _pick_screen._dynamo_marked_constant = True  # type: ignore[attr-defined]
