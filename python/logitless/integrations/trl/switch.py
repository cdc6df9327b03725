"""`enable()` and `disable()`: which of TRL's functions are replaced, where, and how they come back."""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from ..families import UnsupportedModelError
from ..heads import check_adapter
from . import versions
from .divergence import chunked_divergence_loss
from .fused_head import add_fused_lm_head, add_head_of_metrics

#: TRL's functions and what stands in for them, by the module that defines them.
_REPLACED = {
    ("trl.trainer.utils", "add_fused_lm_head"): add_fused_lm_head,
    ("trl.trainer.distillation_trainer", "_chunked_divergence_loss"): chunked_divergence_loss,
}
#: TRL's trainers on its fused head. Each refuses an adapter on the output head by asking for PEFT's class of layers.
_FUSED_TRAINERS = tuple(f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "kto", "grpo", "rloo"))
#: Those that log the entropy and never train on it.
_LOGGING = tuple(f"trl.trainer.{name}_trainer" for name in ("sft", "dpo", "kto"))


class _Swap(NamedTuple):
    """A name in TRL's modules, and the two objects that it may lead to."""

    name: str
    theirs: Any
    ours: Any


_swaps: list[_Swap] = []  # those in force; none while logitless is disabled
_lock = threading.RLock()  # two threads that enable at once would take each other's functions for a stranger's


class Enabled:
    """What `enable()` returns. As a context manager it disables at its end, unless logitless was enabled before."""

    def __init__(self, changed: bool) -> None:
        self._changed = changed

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._changed:
            disable()


def enable() -> Enabled:
    """Puts logitless under TRL's own trainers: same losses, gradients and metrics, without their logits' tiles.

    The trainers on TRL's fused head are served (SFT, DPO, KTO, GRPO, RLOO, those derived from them, and experimental
    ones that import it), and DistillationTrainer with those derived from it. TRL's modules are changed, not its
    classes: a trainer that is made while logitless is enabled keeps its head afterwards, and one that was made before
    keeps TRL's. DistillationTrainer computes its loss in a function, so there what counts is the time of the step.

    LoRA on the output head is trained while logitless is enabled, except by DistillationTrainer and the asynchronous
    trainers, which go on refusing it.

    Calling it again changes nothing. `with enable(): ...` disables at the end, also after an exception.

    Raises:
        ImportError: TRL is not installed.
        UnsupportedTRLError: a release, or an internal of it, that logitless does not know; or one that something else
            has replaced. Nothing has been changed then.
    """
    with _lock:
        if _swaps:
            return Enabled(changed=False)
        versions.check_release()
        own = [_Swap(name, _own(module, name), ours) for (module, name), ours in _REPLACED.items()]
        _check_trainers(own[0])
        placed = [(swap, _modules_with(swap.name, swap.theirs)) for swap in own]
        logging = [importlib.import_module(name) for name in _LOGGING]
        placed.append((own[0]._replace(ours=add_head_of_metrics), logging))
        trainers = [x for x in map(importlib.import_module, _FUSED_TRAINERS) if "BaseTunerLayer" in vars(x)]
        if trainers:  # PEFT is installed
            layers = trainers[0].BaseTunerLayer
            placed.append((_Swap("BaseTunerLayer", layers, _refused_of(layers)), trainers))
        for swap, modules in placed:
            _put(swap.ours, modules, swap.name)
            _swaps.append(swap)
        return Enabled(changed=True)


def disable() -> None:
    """Gives TRL back what `enable` replaced, the very objects. Without `enable` before, it does nothing.

    A module that was loaded in between and imported a replaced function gets TRL's too. A place where something else
    has been put since is left as it is.
    """
    with _lock:
        for swap in _swaps:
            _put(swap.theirs, _modules_with(swap.name, swap.ours), swap.name)
        _swaps.clear()


def _own(module: str, name: str) -> Any:
    """TRL's function. Raises if something has replaced it, because that would be undone in silence."""
    function = getattr(importlib.import_module(module), name)
    source = getattr(function, "__module__", None)
    if source != module:
        raise versions.UnsupportedTRLError(
            f"{module}.{name} is not TRL's own but comes from {source}; enable logitless before that, or without it. "
            "Nothing has been changed"
        )
    return function


def _check_trainers(swap: _Swap) -> None:
    """Raises if a trainer's module holds another function under this name than the one that TRL defines."""
    for module in _FUSED_TRAINERS:
        found = getattr(importlib.import_module(module), swap.name, None)
        if found is not swap.theirs:
            raise versions.UnsupportedTRLError(
                f"{module}.{swap.name} is not TRL's own but comes from {getattr(found, '__module__', None)}; enable "
                "logitless before that, or without it. Nothing has been changed"
            )


def _modules_with(name: str, value: Any) -> list[ModuleType]:
    """TRL's loaded modules in which `name` is that very object."""
    modules = [m for key, m in list(sys.modules.items()) if key.partition(".")[0] == "trl" and m is not None]
    return [module for module in modules if vars(module).get(name) is value]


def _put(value: Any, modules: list[ModuleType], name: str) -> None:
    for module in modules:
        setattr(module, name, value)


class _Refused(type):
    """The class of a class whose instances are the layers of PEFT that the output head may not be."""

    layers: type

    def __instancecheck__(cls, layer: Any) -> bool:
        if not isinstance(layer, cls.layers):
            return False
        try:
            check_adapter(layer)
        except UnsupportedModelError:
            return True
        return False


def _refused_of(layers: type) -> _Refused:
    return _Refused("RefusedTunerLayer", (), {"layers": layers})
