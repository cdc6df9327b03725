"""Tensors that are spread over processes (DTensor, ZeRO-3), as the ops need them: whole.

An op reads a DTensor as the tensor that its pieces make up. It is gathered for the call, and its gradient goes back
into its own placements. The gradient of a parameter is a mean over the processes, as FSDP2's and DDP's are:

    processes that see tokens of their own     the mean is what data parallelism expects
    processes that see the same tokens         the mean of equal gradients is the gradient

So nothing has to be known of the mesh. Over a dimension named "tp" the second row holds by definition, and the mean is
not computed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..types import Head

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

#: Arguments that hold a head, or numbers for every entry of its vocabulary. Other tensors hold values of tokens.
_OF_HEAD = ("weight", "bias", "head", "ref_head", "class_weight", "logit_weight", "vocabulary_order")


def on_whole_tensors(op: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The op, with every sharded tensor among its arguments made whole first.

    With a `group` the processes keep their rows of a head, and only tensors of tokens are made whole.
    """
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        shared = kwargs.get("group") is not None and not isinstance(kwargs["group"], Tensor)  # a loss's input is one
        plain = _own_rows if shared else whole
        given = [plain(names[min(i, len(names) - 1)], x) for i, x in enumerate(args)]
        return op(*given, **{name: plain(name, x) for name, x in kwargs.items()})

    return call


def whole(name: str, value: Any) -> Any:
    """A sharded tensor as a plain one that autograd leads back to it; anything else as it is.

    Args:
        name: of the caller's argument, which says whether this is a parameter. If it is none, every process sees the
            same whole tensor, and its gradient needs no reduction.

    Raises:
        ValueError: a parameter with a `Partial` placement, or one that FSDP1 or ZeRO-3 has put away.
    """
    if isinstance(value, Head):
        return Head(*(whole(f"{name}.{field}", x) for field, x in zip(Head._fields, value, strict=True)))
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return [whole(f"{name}[{i}]", x) for i, x in enumerate(value)]
    if not isinstance(value, Tensor):
        return value
    if hasattr(value, "device_mesh"):
        return _whole_dtensor(name, value)
    if hasattr(value, "ds_id"):
        return _whole_zero3(name, value)
    _check_fsdp1(name, value)
    return value


def _own_rows(name: str, value: Any) -> Any:
    """This process's rows of a head that is a DTensor; anything else as `whole` has it."""
    if isinstance(value, Head):
        return Head(*(_own_rows(f"{name}.{field}", x) for field, x in zip(Head._fields, value, strict=True)))
    if name.partition(".")[0] not in _OF_HEAD or not hasattr(value, "device_mesh"):
        return whole(name, value)
    if len(value.placements) != 1 or not value.placements[0].is_shard(0):
        raise ValueError(
            f"{name}: with group= expected a DTensor whose rows are sharded over one mesh dimension, [Shard(0)], or a "
            f"tensor of this process's rows; got {list(value.placements)}"
        )
    return value.to_local()


def _whole_dtensor(name: str, value: Any) -> Tensor:
    from torch.distributed.tensor import Partial, Replicate

    of_head = name.partition(".")[0] in _OF_HEAD
    if of_head and any(isinstance(x, Partial) for x in value.placements):
        raise ValueError(f"{name}: expected a DTensor of placements Shard and Replicate, got {value.placements}")
    names = value.device_mesh.mesh_dim_names or [""] * value.device_mesh.ndim
    equal = [not of_head or dim == "tp" for dim in names]
    gathered: Tensor = value.full_tensor(grad_placements=[Replicate() if x else Partial("avg") for x in equal])
    return gathered


def _check_fsdp1(name: str, value: Tensor) -> None:
    """Raises for a piece of FSDP1's flat parameter: what the module's attribute is outside its forward."""
    if torch.compiler.is_compiling() or name.partition(".")[0] not in _OF_HEAD:
        return
    if getattr(value, "_fsdp_flattened", False) and value.dim() != 2 and not name.endswith("bias"):
        state = f"a flat piece of shape {list(value.shape)}"
    elif type(value) is Tensor and value.numel() and _is_freed(value):
        state = f"shape {list(value.shape)} without its data"
    else:
        return
    raise ValueError(
        f"{name}: expected a whole tensor, got {state}, which FSDP1 leaves outside its module's forward; call the op "
        "inside that forward (logitless.patch does), use fully_shard (FSDP2), or for a call without a gradient "
        "FullyShardedDataParallel.summon_full_params"
    )


def _is_freed(value: Tensor) -> bool:
    return value.device.type != "meta" and value.untyped_storage().size() == 0


# ---------------------------------------------------------------------------------------------------------------------
# ZeRO-3


def _whole_zero3(name: str, value: Any) -> Any:
    """A parameter of DeepSpeed's ZeRO-3. Inside the forward of its own module DeepSpeed has gathered it already."""
    if value.ds_active_sub_modules:
        return value
    if torch.compiler.is_compiling():
        raise ValueError(f"{name}: a ZeRO-3 parameter is not gathered in compiled code outside its module's forward")
    if value.ds_status.name == "AVAILABLE":
        return _Gathered.apply(value)
    import deepspeed

    with deepspeed.zero.GatheredParameters([value]):
        return _Gathered.apply(value)


class _Gathered(torch.autograd.Function):
    """The whole values of a ZeRO-3 parameter, which stay after DeepSpeed has put the parameter away again."""

    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.parameter = parameter
        values: Tensor = parameter.detach()
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Has autograd hand the gradient to DeepSpeed's own hook, which reduces it.

        Autograd adds a gradient to a parameter of its shape alone. The stand-in has that shape, and one element.
        """
        if ctx.parameter.ds_status.name != "AVAILABLE":
            ctx.parameter.data = ctx.parameter.data.new_empty(1).expand(ctx.parameter.ds_shape)
            _after_gradient(ctx.parameter)
        return gradient


def _after_gradient(parameter: Any) -> None:
    """Takes the stand-in away, unless DeepSpeed has gathered the parameter since, as that of a tied embedding."""

    def put_away(parameter: Any) -> None:
        handle.remove()
        if parameter.ds_status.name != "AVAILABLE":
            parameter.data = parameter.data.new_empty(0)

    handle = parameter.register_post_accumulate_grad_hook(put_away)
