"""The losses by name, and the modules that hold them, which are found by walking this package.

A module registers its losses with `@register`; that makes their classes names of `logitless.losses`. A module may have
an `__all__` of further public names, such as functions that make a loss's inputs. There is no other list: a new file in
the package is enough.

The modules are loaded when a loss of theirs, or a name that is not loaded yet, is first asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any, TypeVar

import torch

from ..peers import peer_hint, refuse_unknown, value_hint
from .checks import near_words
from .loss import DistributionLoss, Loss, SequenceLoss, TokenLoss
from .whole_sequence import PairLoss, UnpairedLoss

LEVELS = (TokenLoss, SequenceLoss, DistributionLoss, PairLoss, UnpairedLoss)

_REGISTRY: dict[str, type[Loss]] = {}
_LossType = TypeVar("_LossType", bound=type[Loss])


def register(cls: _LossType) -> _LossType:
    """Class decorator: makes a loss, a frozen dataclass with a `name`, known to `get` and `names`.

    Raises:
        TypeError: `cls` is not a frozen dataclass that derives from one of the five levels.
        ValueError: the name is taken.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if not (issubclass(cls, LEVELS) and params is not None and params.frozen):
        levels = ", ".join(level.__name__ for level in LEVELS)
        raise TypeError(f"register: expected a frozen dataclass that derives from one of {levels}, got {cls.__name__}")
    if cls.name in _REGISTRY:
        raise ValueError(f"register: the name {cls.name!r} is taken by {_REGISTRY[cls.name].__name__}")
    _REGISTRY[cls.name] = cls
    _name_unknown_fields(cls)
    return cls


def _name_unknown_fields(cls: type[Loss]) -> None:
    """Has the constructor say what a keyword argument of another library is called here."""
    made: Callable[..., None] = cls.__init__
    known = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @wraps(made)
    def init(self: Loss, *args: Any, **given: Any) -> None:
        refuse_unknown(cls.__name__, given, known)
        made(self, *args, **given)

    cls.__init__ = init  # type: ignore[assignment, method-assign]


def names() -> list[str]:
    """The names of the registered losses, sorted."""
    load_modules()
    return sorted(_REGISTRY)


def get(loss: str | Loss, **overrides: Any) -> Loss:
    """The loss of that name with its default hyper-parameters, or the loss itself; `overrides` replace some of them.

    `get("dft")`, `get("dft", power=2)`, `get(DFT(power=2))`.

    Raises:
        TypeError: `loss` is neither a name nor a loss, or an override is not one of its hyper-parameters.
        ValueError: no loss has that name (near names are listed), or a hyper-parameter is out of its range.
    """
    if isinstance(loss, Loss):
        if not overrides:
            return loss
        _check_overrides(type(loss), overrides)
        return dataclasses.replace(loss, **overrides)  # type: ignore[type-var]
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a logitless.losses.Loss, got {type(loss).__name__}")
    # A compiler must not read the registry before an import adds to it.
    if torch.compiler.is_compiling() or loss not in _REGISTRY:
        load_modules()
    if loss not in _REGISTRY:
        hint = value_hint("loss", loss) or near_words(loss, names())
        raise ValueError(f"no loss is named {loss!r}{hint}; there are {', '.join(names())}")
    cls = _REGISTRY[loss]
    if overrides:  # torch.compile cannot trace `dataclasses.fields`
        _check_overrides(cls, overrides)
    return cls(**overrides)


def load_modules() -> tuple[ModuleType, ...]:
    """All modules of this package, imported now if they were not yet."""
    from .modules import MODULES

    return MODULES


@cache
def public_names() -> dict[str, Any]:
    """The names of `logitless.losses` that are found in its modules: the losses, and those of every `__all__`."""
    modules = load_modules()
    losses = {cls.__name__: cls for cls in _REGISTRY.values() if cls.__module__.startswith(f"{__package__}.")}
    return losses | {name: getattr(module, name) for module in modules for name in getattr(module, "__all__", ())}


def _check_overrides(cls: type[Loss], overrides: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in overrides:
        if key not in known:
            near, fields = peer_hint(key) or near_words(key, known), ", ".join(known) or "none"
            raise TypeError(f"{cls.name} has no hyper-parameter {key!r}{near}; it has {fields}")
