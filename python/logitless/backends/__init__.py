"""The backends, in order of preference, and the choice among them.

A backend is a module with five functions. Nothing above this package knows what stands behind them:

    supports(hidden, weight) -> None | str               why it cannot take these tensors
    forward(problem, outputs, unit_gradient) -> Forward
    backward(problem, stats, upstream, needs) -> Gradients
    single_pass(problem, outputs, coefficients, groups, needs) -> SinglePass
    tokens_at_once(hidden, weight, options) -> int       the longest group of tokens that single_pass keeps whole
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import chunked

#: name -> module, without work at import; "auto" takes the first that supports the tensors.
BACKENDS: dict[str, ModuleType] = {"chunked": chunked}


def pick(name: str, hidden: Tensor, weight: Tensor) -> str:
    """The backend to use. A named one runs or raises; nothing falls back silently."""
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend: expected one of {['auto', 'reference', *BACKENDS]}, got {name!r}")
        reason = BACKENDS[name].supports(hidden, weight)
        if reason is not None:
            raise ValueError(f"backend: {name!r} cannot take these tensors: {reason}")
        return name
    reasons = {candidate: BACKENDS[candidate].supports(hidden, weight) for candidate in BACKENDS}
    for candidate, reason in reasons.items():
        if reason is None:
            return candidate
    raise ValueError(f"backend: none takes these tensors: {reasons}")
