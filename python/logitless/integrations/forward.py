"""The forward of a patched model: its arguments looked at, then the model's own forward or the loss without logits."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..losses import Loss
from ..losses.sft.likelihood import NLL
from . import selfcheck
from .heads import check_output_head, find_head
from .names import check_loss_function, check_loss_inputs, check_names
from .scoring import REQUEST_ARGUMENTS, Patch, Request, check_request, score

logger = logging.getLogger(__name__)

#: Keyword arguments of the patched forward that the original forward does not know.
OWN_ARGUMENTS = (
    *("skip_logits", "loss", "loss_inputs", "token_outputs", "token_constants", "hidden_only", "cu_seqlens"),
    "temperature",
)


class PatchedForward:
    """The `forward` of one patched model.

    It looks like a bound method of the model's class to those who inspect it: `__self__`, `__func__`, and the
    signature of the class's forward, which Trainer and generate read. A bound method itself would be pickled by its
    name, and the name leads to the class's own forward.
    """

    __name__ = "forward"
    __slots__ = ("__func__", "__self__", "__signature__", "__weakref__")

    def __init__(self, model: Any) -> None:
        cls: Any = type(model)
        self.__self__ = model
        self.__func__ = _function_of(cls)
        self.__signature__ = inspect.signature(cls.forward.__get__(model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the model."""
        return _forward(self.__self__, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """The function's attributes, as a bound method has them: torch.export reads `__code__`."""
        if name in self.__slots__ or name == "__dict__":
            raise AttributeError(name)
        return getattr(self.__func__, name)

    def __reduce__(self) -> tuple[type[PatchedForward], tuple[Any]]:
        """For pickle and copy: the forward of that model, which carries its own state."""
        return PatchedForward, (self.__self__,)

    def admit(self, names: tuple[str, ...], ours: bool) -> bool:
        """Checks the names of a call's arguments; with `ours` those that the model's own loss function would read."""
        if ours:
            check_loss_function(self.__self__, self.__self__._logitless_patch, names)
        else:
            check_names(self.__self__, self.__self__._logitless_patch, names)
        return True

    def confirm(self) -> bool:
        """The self-check on the model's real weights, before the first loss and where the kind of head has changed."""
        _check_once(self.__self__, self.__self__._logitless_patch)
        return True

    def warn(self) -> bool:
        """Says once that a training call computed logits, and what to do."""
        _warn_once(self.__self__, self.__self__._logitless_patch)
        return True

    # What torch.compiler.assume_constant_result does, without the second that importing torch._dynamo takes: a
    # compiler runs these while it traces, and none of it gets into the graph.
    admit._dynamo_marked_constant = True  # type: ignore[attr-defined]
    confirm._dynamo_marked_constant = True  # type: ignore[attr-defined]
    warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _function_of(cls: type[nn.Module]) -> Callable[..., Any]:
    """The patched forward of a class as a function of the model, for a host that wraps functions (accelerate)."""

    def patched_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, args, kwargs)

    patched_forward.__doc__ = cls.forward.__doc__
    patched_forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return patched_forward


def _forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: Patch = model._logitless_patch  # type: ignore[assignment]
    if len(args) > len(state.names):
        kind = type(model).__name__
        raise TypeError(f"{kind}: takes at most {len(state.names)} positional arguments, got {len(args)}")
    inputs = {**dict(zip(state.names[: len(args)], args, strict=True)), **kwargs}
    ours = {name: inputs.pop(name) for name in REQUEST_ARGUMENTS if name in inputs}
    _admit(state, tuple(inputs), ours=False)
    request = Request(inputs, **{name: value for name, value in ours.items() if value is not None})
    check_request(request)
    loss = state.loss if request.loss is None else losses.get(request.loss)
    check_loss_inputs(loss, request.loss_inputs or ())
    skip = _skips_logits(state, request, model.training)
    if _original_serves(state, request, loss, skip):
        if not request.scored and request.skip_logits is None and model.training and torch.is_grad_enabled():
            state.forward.warn()
        return state.original(model, *args, **{k: v for k, v in kwargs.items() if k not in OWN_ARGUMENTS})
    if request.scored:
        _admit(state, tuple(inputs), ours=True)
        if state.check:
            state.forward.confirm()
    output = score(model, state, request, loss, skip=skip)
    as_dict = getattr(model.config, "return_dict", True) if request.return_dict is None else request.return_dict
    return output if as_dict else output.to_tuple()


def _skips_logits(state: Patch, request: Request, training: bool) -> bool:
    if request.skip_logits is None:
        return training or not state.eval_logits
    return request.skip_logits


def _original_serves(state: Patch, request: Request, loss: Loss, skip: bool) -> bool:
    """Whether the model's own forward can serve the request: no loss at all, or plain NLL beside true logits."""
    if request.hidden_only:
        return False
    if not request.scored:
        return True
    tempered = (state.temperature if request.temperature is None else request.temperature) != 1.0
    items = request.num_items_in_batch
    none = isinstance(items, Tensor) and items.device.type == "cpu" and not torch.compiler.is_compiling() and items == 0
    asked = request.token_outputs or request.cu_seqlens is not None or request.loss_inputs
    ours = skip or asked or tempered or none  # its own loss divides by 0 items
    return not ours and request.labels is not None and loss == NLL()


def _admit(state: Patch, names: tuple[str, ...], *, ours: bool) -> None:
    """Looks at the names of the arguments, once at each; `ours` if the loss is not the model's own."""
    if torch.compiler.is_compiling():
        state.forward.admit(names, ours)
        return
    admitted = state.admitted_to_loss if ours else state.admitted
    if not admitted.issuperset(names):
        state.forward.admit(names, ours)
        admitted.update(names)


def _warn_once(model: nn.Module, state: Patch) -> None:
    if state.warned:
        return
    state.warned = True
    warnings.warn(
        f"a training call of a patched {type(model).__name__} had no labels, so that it computed full logits, as it "
        "would unpatched. The host takes the labels out, as Trainer does with label_smoothing_factor and "
        "compute_loss_func. Without them: leave the labels in the batch and give the loss to the patch, as "
        'patch(model, loss=losses.NLL(label_smoothing=0.1)) or loss="dft"; or call the model with hidden_only=True, '
        "and compute the loss by logitless.linear_loss from its hidden states. skip_logits=False asks for logits",
        stacklevel=6,
    )


def _check_once(model: nn.Module, state: Patch) -> None:
    """Runs the self-check, if it has not seen this kind of head."""
    head = find_head(model)
    if state.checked is type(head.inner):
        return
    check_output_head(model, head)
    error = selfcheck.self_check(model, state)
    state.checked = type(head.inner)
    logger.info("%s agrees with its own logits: largest error %.3g", type(model).__name__, error)
