"""The backends, in order of preference, and the choice among them.

`Backend` says what a backend is, `interface` what passes between it and the ops. `exact` has the sweeps over chunks
that every backend builds on, `approximate` the strategies that leave out what carries no probability. Nothing above
this package knows what stands behind a backend's name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..peers import value_hint
from .backend import Backend
from .chunked import CHUNKED
from .cuda import CUDA
from .native import why_not as why_not_screened
from .triton import TRITON

#: name -> backend, without work at import; "auto" takes the first that supports the tensors, and the last always does.
BACKENDS: dict[str, Backend] = {"cuda": CUDA, "triton": TRITON, "chunked": CHUNKED}


def pick(name: str, hidden: Tensor, without: tuple[str, ...] = ()) -> str:
    """The name of the backend to use; "auto" passes over those in `without`.

    A backend that was asked for by name runs or raises: nothing falls back silently.
    """
    return _pick(name, hidden.device, hidden.dtype, without)


def pick_approximate(name: str, backward: str, hidden: Tensor) -> str:
    """The name of the backend to use for an approximate `backward`."""
    if backward != "screened":
        return pick(name, hidden)
    return _pick_screened(name, hidden.device)


def _pick(name: str, device: torch.device, dtype: torch.dtype, without: tuple[str, ...]) -> str:
    if name == "auto":
        known = (candidate for candidate in BACKENDS if candidate not in without)
        return next(candidate for candidate in known if BACKENDS[candidate].supports(device, dtype) is None)
    if name not in BACKENDS:
        expected = ["auto", "reference", *BACKENDS]
        raise ValueError(f"backend: expected one of {expected}, got {name!r}{value_hint('backend', name)}")
    reason = BACKENDS[name].supports(device, dtype)
    if reason is not None:
        raise ValueError(f"backend: {name!r} cannot take these tensors: {reason}")
    return name


def _pick_screened(name: str, device: torch.device) -> str:
    reason = why_not_screened(device)
    if reason is None and name not in ("auto", "chunked"):
        reason = f"it is of backend='chunked', got backend={name!r}"
    if reason is not None:
        raise ValueError(f"backward: 'screened' cannot be used: {reason}")
    return "chunked"


# What torch.compiler.assume_constant_result does, without importing torch._dynamo: a trace looks for no files.
_pick._dynamo_marked_constant = _pick_screened._dynamo_marked_constant = True  # type: ignore[attr-defined]

__all__ = ["BACKENDS", "Backend", "pick", "pick_approximate", "why_not_screened"]
