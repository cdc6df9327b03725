"""An output head whose rows are shared out among processes, and the messages that go between these.

Vocabulary parallelism is tensor parallelism of the head: rank r of a group holds a run of the head's rows, all ranks
see the same tokens. Nothing of the size of the head or of the logits is sent: a few numbers for each token, and the
gradient of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabularyGroup:
    """The processes that share a head's rows, and how many rows each of them holds.

    `group=` of every op takes one, or a bare process group, for which the ranks tell each other their numbers of rows
    in every call. The rows of the ranks lie behind one another in the order of their ranks in the group.

    Every process of the group must make the same calls, on the same tokens, targets and inputs, as tensor parallelism
    has it. Each gets the same statistics and the same loss, the gradient of its own rows, and the whole gradient of the
    hidden states.

    Args:
        group: a process group (also Megatron's tensor-parallel group), or a `DeviceMesh` of one dimension.
        rows: of each rank, in the group's order. They may differ, and be 0.
        reduces_hidden: True adds up the gradient of the hidden states over the ranks, which is right where all ranks
            have the same hidden states. With False each rank gets its own rows' part, for a caller whose own operation
            adds the parts up, or scatters their sum as under sequence parallelism (`gather_sequence`).

    Raises:
        TypeError, ValueError: not a group, or rows that do not fit it.
    """

    group: ProcessGroup
    rows: tuple[int, ...]
    reduces_hidden: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", process_group(self.group))
        object.__setattr__(self, "rows", tuple(self.rows))
        if len(self.rows) != self.group.size():
            raise ValueError(f"rows: expected {self.group.size()} numbers, one for each rank, got {list(self.rows)}")
        for count in self.rows:
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"rows: expected numbers of rows, got {list(self.rows)}")
        if not self.vocabulary:
            raise ValueError("rows: expected at least one row on some rank, got 0 on each")

    @staticmethod
    def of(group: Any, weight: Tensor, *, reduces_hidden: bool = True) -> VocabularyGroup:
        """The group of a head's local rows `weight [V / ranks, H]`; the ranks tell each other how many they hold.

        Make one before training, and no call waits for the others' numbers.

        Args:
            group, reduces_hidden: as in the class.
            weight: this rank's rows; every rank must call this at once.

        Raises:
            TypeError, ValueError: not a group, or no rank has a row.
        """
        group = process_group(group)
        own = torch.tensor([len(weight)], device=weight.device)
        return VocabularyGroup(group, tuple(gathered(own, group)[:, 0].tolist()), reduces_hidden)

    def __deepcopy__(self, memo: Any) -> VocabularyGroup:
        """The group itself: a copied module, such as a moving average's, has the same processes."""
        return self

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return self.group.rank()

    @property
    def start(self) -> int:
        """The vocabulary id of this rank's first row."""
        return sum(self.rows[: self.rank])

    @property
    def vocabulary(self) -> int:
        """The number of rows of all ranks together."""
        return sum(self.rows)


def process_group(group: Any) -> ProcessGroup:
    """The process group that the argument `group` stands for."""
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(
                f'group: expected a mesh of one dimension, such as mesh["tp"], got {group.ndim} dimensions'
            )
        group = group.get_group()
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"group: expected a process group, a DeviceMesh or a logitless.VocabularyGroup, got {type(group).__name__}"
        )
    return group


def named_group(name: str) -> ProcessGroup:
    """The process group of a name, for an op, whose schema has no groups."""
    group: ProcessGroup = torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore
    return group


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x` of every rank, `[ranks, ...]`, one message; without a gradient."""
    out = x.new_empty((group.size() * len(x), *x.shape[1:]))
    _collective("all_gather_single", "all_gather_into_tensor")(out, x.detach().contiguous(), group=group)
    return out.view(group.size(), *x.shape)


def _collective(name: str, former: str) -> Any:
    """The function of torch.distributed of this name; releases before 2.13 have the former one."""
    return getattr(torch.distributed, name, None) or getattr(torch.distributed, former)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of `x` over the ranks, one message; without a gradient."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(out, group=group)
    return out


class Gather(torch.autograd.Function):
    """`gathered`, for what all ranks go on to compute alike: a rank takes its own part of the result's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.rank = group.rank()
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rank], None


class Sum(torch.autograd.Function):
    """`summed`, for what all ranks go on to compute alike: every rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SumGradient(torch.autograd.Function):
    """A tensor that all ranks have alike, of which each uses a part: the parts' gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return summed(grad, ctx.group), None


def gather_sequence(hidden: Tensor, group: Any, dim: int = 0) -> Tensor:
    """The hidden states of all ranks behind one another, for a head that is shared among ranks with different tokens.

    Under sequence parallelism each rank holds a run of the tokens. The head's rows need all tokens. Call the op with
    the result, the targets of all tokens, and a `VocabularyGroup` with `reduces_hidden=False`: the gradient is summed
    over the ranks and scattered to them here, in one message.

    Args:
        hidden: this rank's part, `[T / ranks, B, H]` for `dim` 0; the parts of all ranks have one shape.
        group: as in `VocabularyGroup`.
        dim: the dimension of the tokens, 0 as in Megatron's `[T, B, H]`.

    Returns:
        `[T, B, H]`, the same on every rank.

    Raises:
        TypeError, ValueError: not a group, or a mesh of several dimensions.
    """
    out: Tensor = _GatherSequence.apply(hidden, process_group(group), dim)
    return out


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return torch.cat(gathered(hidden, group).unbind(), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = torch.cat(grad.chunk(ctx.group.size(), ctx.dim))
        own = parts.new_empty(parts.shape[0] // ctx.group.size(), *parts.shape[1:])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, parts, group=ctx.group)
        return own, None, None
