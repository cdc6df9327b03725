"""The backends, in order of preference, and the choice among them.

A backend is a module with six functions. Nothing above this package knows what stands behind them:

    supports(device, dtype) -> None | str                why it cannot take such tensors
    forward(problem, outputs, unit_gradient) -> Forward
    backward(problem, stats, upstream, needs) -> Gradients
    single_pass(problem, outputs, coefficients, groups, needs) -> SinglePass
    tokens_at_once(hidden, weight, options) -> int       the longest group of tokens that single_pass keeps whole
    divergence(problem, upstream, needs) -> DivergenceResult
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import chunked, cuda, triton

#: name -> module, without work at import; "auto" takes the first that supports the tensors, and the last always does.
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "chunked": chunked}


def pick(name: str, hidden: Tensor, without: tuple[str, ...] = ()) -> str:
    """The backend to use. A named one runs or raises; nothing falls back silently. `without`: those that "auto" passes
    over."""
    return _pick(name, hidden.device, hidden.dtype, without)


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
_pick._dynamo_marked_constant = True  # type: ignore[attr-defined]
