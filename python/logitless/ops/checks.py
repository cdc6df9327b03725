"""Checks of a caller's arguments: an error names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from ..peers import value_hint
from ..types import APPROXIMATE, OUTPUTS, TAIL_TOLERANCE, BackwardName, Options, statistics_dtype

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object, shape: str, dims: int | None = None) -> None:
    """Raises unless `value` is a tensor, with `dims` dimensions if a number is given. `shape` is for the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def check_tokens(hidden: object, targets: object) -> None:
    """Raises unless hidden and targets are tensors and hidden has an H axis: later checks compare shapes with them."""
    check_tensor("hidden", hidden, "[..., H]")
    check_tensor("targets", targets, "[...]")
    if isinstance(hidden, Tensor) and hidden.dim() < 1:
        raise ValueError("hidden: expected shape [..., H], got []")


def check_order(hidden: object, weight: object, targets: object) -> None:
    """Raises where the head came first, as some libraries have it."""
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor) and isinstance(targets, Tensor)):
        return
    # First what is so in every right call, because a compiler keeps each comparison of sizes as a guard.
    if hidden.shape[:-1] != targets.shape and hidden.dim() == 2 and weight.shape[:-1] == targets.shape:
        raise ValueError("hidden: the head seems to stand first; expected the order hidden, weight, targets")


def check_head(
    hidden: Tensor, weight: Tensor, options: Options, names: tuple[str, str, str] = ("hidden", "weight", "bias")
) -> None:
    """Raises unless the hidden states fit the head and every option has a value that some op can take.

    `names`: the caller's names of the three tensors, for messages.
    """
    hidden_name, weight_name, bias_name = names
    check_tensor(hidden_name, hidden, "[..., H]")
    check_tensor(weight_name, weight, "[V, H]", 2)
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        expected = f"[..., {weight.shape[1]}] to fit {weight_name} {list(weight.shape)}"
        raise ValueError(f"{hidden_name}: expected shape {expected}, got {list(hidden.shape)}")
    if weight.shape[0] == 0 and options.group is None:
        raise ValueError(f"{weight_name}: expected at least one vocabulary entry, got shape {list(weight.shape)}")
    if hidden.dtype not in FLOATING:
        raise TypeError(f"{hidden_name}: expected a floating dtype of {[str(d) for d in FLOATING]}, got {hidden.dtype}")
    same_kind(weight_name, weight, hidden)
    if options.bias is not None:
        check_tensor(bias_name, options.bias, "[V]", 1)
        if options.bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{bias_name}: expected shape [{weight.shape[0]}], got {list(options.bias.shape)}")
        same_kind(bias_name, options.bias, hidden)
    check_choice("backward", options.backward, get_args(BackwardName))
    if options.chunk_bytes is not None:
        if isinstance(options.chunk_bytes, bool) or not isinstance(options.chunk_bytes, int):
            raise TypeError(f"chunk_bytes: expected an int or None, got {type(options.chunk_bytes).__name__}")
        if options.chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes: expected a positive number of bytes, got {options.chunk_bytes}")
    if options.chunk_dtype not in (None, torch.bfloat16, torch.float32):
        raise ValueError(f"chunk_dtype: expected torch.bfloat16, torch.float32 or None, got {options.chunk_dtype}")
    if options.chunk_dtype is not None and hidden.dtype == torch.float64:
        raise ValueError(f"chunk_dtype: expected None for float64 inputs, got {options.chunk_dtype}")
    check_tail_tolerance(options)
    _check_vocabulary_order(options, weight)
    check_ignore_index(options.ignore_index)
    options.transform  # noqa: B018  its own checks run when it is made


def check_grad_out(options: Options, weight: Tensor) -> None:
    """Raises unless `grad_out` is a buffer that the gradient of the head `weight` can be added to.

    The gradient of a weight that autograd made would not reach what it was made from, so that weight must be a leaf.
    """
    buffer, expected = options.grad_out, f"[{', '.join(map(str, weight.shape))}]"
    if buffer is None:
        return
    check_tensor("grad_out", buffer, expected)
    if buffer.shape != weight.shape:
        raise ValueError(f"grad_out: expected shape {expected} like weight, got {list(buffer.shape)}")
    if buffer.dtype not in (statistics_dtype(weight.dtype), weight.dtype):
        known = dict.fromkeys((str(statistics_dtype(weight.dtype)), str(weight.dtype)))
        raise TypeError(f"grad_out: expected dtype {' or '.join(known)}, got {buffer.dtype}")
    _same_device("grad_out", buffer, weight, like="weight")
    if not buffer.is_contiguous():
        raise ValueError(f"grad_out: expected a contiguous buffer, got strides {list(buffer.stride())}")
    if buffer.requires_grad:
        raise ValueError("grad_out: is a buffer that gradients are added to, but requires one itself; detach it")
    if not weight.requires_grad:
        raise ValueError("grad_out: the head is frozen (weight.requires_grad is False), and nothing would be added")
    if not weight.is_leaf:
        raise ValueError(
            "grad_out: expected a weight that is a leaf, got the result of an operation, whose inputs would get no "
            "gradient; give weight.detach().requires_grad_() if that is meant"
        )
    if options.backend == "reference":
        raise ValueError("grad_out: backend='reference' is plain autograd, which adds to .grad; use another backend")
    if not torch.compiler.is_compiling() and _overlap(buffer, weight):
        raise ValueError("grad_out: expected memory of its own, got some of weight's")


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the bytes from the first to the last element of two tensors overlap."""
    starts = [t.data_ptr() for t in (x, y)]
    sizes = [t.itemsize * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) for t in (x, y)]
    return starts[0] < starts[1] + sizes[1] and starts[1] < starts[0] + sizes[0] and min(x.numel(), y.numel()) > 0


def check_tail_tolerance(options: Options) -> None:
    """Raises unless the tolerance is a number in [0, 1], and the strategy reads it if it is not the default."""
    value = options.tail_tolerance
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"tail_tolerance: expected a number, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"tail_tolerance: expected a number in [0, 1], got {value}")
    if value != TAIL_TOLERANCE and options.backward not in APPROXIMATE:
        raise ValueError(
            f"tail_tolerance: is read by backward in {list(APPROXIMATE)} alone, got backward={options.backward!r}"
        )


def _check_vocabulary_order(options: Options, weight: Tensor) -> None:
    order, expected = options.vocabulary_order, f"int64 [{weight.shape[0]}]"
    if order is None:
        return
    check_tensor("vocabulary_order", order, expected)
    if order.dtype != torch.int64:
        raise TypeError(f"vocabulary_order: expected {expected}, got {order.dtype}")
    if order.shape != weight.shape[:1]:
        raise ValueError(f"vocabulary_order: expected {expected}, got shape {list(order.shape)}")
    _same_device("vocabulary_order", order, weight)
    if options.backward not in APPROXIMATE:
        raise ValueError(
            f"vocabulary_order: is read by backward in {list(APPROXIMATE)} alone, got backward={options.backward!r}"
        )


def require(holds: Tensor, complaint: Callable[[], str]) -> None:
    """Raises unless a condition `[]` on a tensor's numbers holds. On a GPU the device asserts it, and nothing waits."""
    if holds.is_cuda:
        torch._assert_async(holds)
    elif not holds:
        raise ValueError(complaint())


def check_permutation(order: Tensor | None) -> None:
    """Raises unless every vocabulary entry is there once."""
    if order is None:
        return
    known = (order >= 0) & (order < len(order))
    once = torch.zeros_like(known).index_fill_(0, order.where(known, 0), True).all() & known.all()
    require(once, lambda: f"vocabulary_order: expected a permutation of the {len(order)} vocabulary entries")


def check_constant(name: str, value: Tensor, device: torch.device, like: str = "hidden") -> None:
    """Raises unless a loss's constant requires no gradient and is on the device of the tensor called `like`."""
    if value.requires_grad:
        raise ValueError(f"{name}: is a constant of the loss and gets no gradient, but requires one; detach it")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} like {like}, got {value.device}")


def check_entry_weight(name: str, value: Tensor, weight: Tensor) -> None:
    """Raises unless the value is one constant for each vocabulary entry of a head's `weight`."""
    check_tensor(name, value, f"[{weight.shape[0]}]", 1)
    if len(value) != weight.shape[0]:
        raise ValueError(f"{name}: expected shape [{weight.shape[0]}], got {list(value.shape)}")
    check_constant(name, value, weight.device, like="weight")


def check_logit_weight(value: Tensor | None, weight: Tensor, outputs: tuple[str, ...]) -> None:
    """Raises unless the weights of the mean logit fit the head, and the mean logit is asked for."""
    if value is None:
        return
    check_entry_weight("logit_weight", value, weight)
    if "mean_logit" not in outputs:
        raise ValueError(f"logit_weight: is read by 'mean_logit' alone, got outputs={list(outputs)}")


def check_ignore_index(value: object) -> None:
    """Raises unless the value is an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"ignore_index: expected an int, got {type(value).__name__}")


def same_kind(name: str, value: Tensor, hidden: Tensor) -> None:
    """Raises unless device and dtype are those of `hidden`: a mixture is either a mistake or autocast's business."""
    if value.dtype != hidden.dtype:
        raise TypeError(f"{name}: expected dtype {hidden.dtype} like hidden (outside autocast), got {value.dtype}")
    _same_device(name, value, hidden)


def _same_device(name: str, value: Any, other: Any, like: str = "hidden") -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} like {like}, got {value.device}")


def check_targets(name: str, targets: Tensor, hidden: Tensor, *, lists: bool = False) -> None:
    """Raises unless the targets are integers of the tokens' shape, on the device of `hidden`.

    `lists`: they may have one axis more, of several ids a token.
    """
    shape = list(hidden.shape[:-1])
    expected = f"{shape}, or {[*shape, 'K']}," if lists else str(shape)
    check_tensor(name, targets, expected)
    listed = lists and targets.dim() == len(shape) + 1 and targets.shape[-1] > 0
    if list(targets.shape[:-1] if listed else targets.shape) != shape:
        raise ValueError(f"{name}: expected shape {expected} like hidden, got {list(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 (or int32) token ids, got {targets.dtype}")
    _same_device(name, targets, hidden)


def check_ids(targets: Tensor, counts: Tensor, ignore_index: int, vocabulary: int, name: str = "targets") -> None:
    """Raises unless every target that counts is in the vocabulary."""
    outside = counts & ((targets < 0) | (targets >= vocabulary))
    expected = f"{name}: expected ids in [0, {vocabulary}) or ignore_index {ignore_index}"
    require(~outside.any(), lambda: f"{expected}, got {int(targets[outside][0])}")


def check_outputs(outputs: Iterable[str], *, with_targets: bool, known: tuple[str, ...] = OUTPUTS) -> tuple[str, ...]:
    """The names asked for; raises unless each is `known` and can be computed from what the caller gives."""
    if isinstance(outputs, str) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs: expected a tuple of names of {list(known)}, got {outputs!r}")
    names = tuple(outputs)
    for name in names:
        if known is not OUTPUTS and name in OUTPUTS and name not in known:
            raise ValueError(f"outputs: tokens that list several ids have {list(known)}, got {name!r}")
        if known is OUTPUTS and name == "tail":
            raise ValueError(
                "outputs: 'tail' is of targets [..., K], several ids a token; targets[..., None] has K = 1"
            )
        check_choice("outputs", name, known)
        if not with_targets and name in ("logprob", "correct"):
            raise ValueError(f"targets: expected token ids, as outputs asks for {name!r}, got None")
    return names


def check_constants(constants: tuple[str, ...], outputs: Iterable[str]) -> None:
    """Raises unless `constants` are names of the statistics asked for."""
    if isinstance(constants, str):
        raise TypeError(f"constants: expected a tuple of names of {list(outputs)}, got {constants!r}")
    for name in constants:
        check_choice("constants", name, outputs)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises unless the value is one of the choices."""
    if value not in tuple(choices):
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}{value_hint(name, value)}")
