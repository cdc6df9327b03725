"""Providers: one way each through a problem, written once for CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar, get_args

import torch
from torch import Tensor

from .problem import Inputs, Problem

Role = Literal["floor", "materialised", "logitless", "peer"]
#: All of them: for `Method.may_fail`, where any failure is a line.
ROLES: tuple[Role, ...] = get_args(Role)
Loss = Callable[[Tensor, Tensor, Inputs], Tensor]  # takes hidden, weight and the rest


class Subject(Protocol):
    """What steps are taken on: the tensors of a problem (`Inputs`), or a model and its tokens."""

    @property
    def problem(self) -> Problem: ...

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that every provider holds, so that memory is counted beyond them."""

    def about(self) -> dict[str, Any]:
        """What a report says of it, ready for JSON."""

    def operands(self) -> tuple[Tensor, Tensor, Inputs]:
        """What a loss is called with: hidden states and weight to differentiate by, and the rest."""

    def gradients(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the hidden states and of the head, after the backward pass; None: not known."""

    def to(self, dtype: torch.dtype) -> Self:
        """The operands in another dtype."""

    def brief(self) -> Self:
        """Few tokens of the same structure, for warming up and for the comparison with float64."""

    def _replace(self, *, problem: Problem) -> Self: ...


AnySubject = TypeVar("AnySubject", bound=Subject)


class Outcome(NamedTuple):
    """What a step leaves behind. A floor has gradients of nothing in particular."""

    loss: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None


@dataclass(frozen=True)
class Provider:
    """A loss that autograd differentiates, as in a training step, so that forward and backward are timed alike.

    Args:
        compared: the definition that its loss and gradients are held against; "": none.
        frozen: whether the head is a constant even where the problem's is not.
        dtype: of the operands where it is not the problem's.
        library: the name that `--against` has for it.
        approximate: whether its gradients are approximations by design.
        bytes: read and written by a floor that is a copy.
        absent: why it cannot be called at all.
    """

    name: str
    role: Role
    loss: Loss
    compared: str = "nll"
    frozen: bool = False
    dtype: torch.dtype | None = None
    library: str = ""
    approximate: bool = False
    bytes: int | None = None
    absent: str | None = None

    def of(self, inputs: AnySubject) -> AnySubject:
        """The inputs as this provider takes them."""
        inputs = inputs if self.dtype is None else inputs.to(self.dtype)
        frozen = self.frozen or inputs.problem.frozen_head
        return inputs._replace(problem=replace(inputs.problem, frozen_head=frozen))

    def step(self, inputs: Subject, between: Callable[[], object] = lambda: None) -> Outcome:
        """A training step: forward, `between()`, `backward()`, gradients in `.grad`."""
        return differentiate(self.loss, self.of(inputs), between)


def differentiate(loss: Loss, inputs: Subject, between: Callable[[], object] = lambda: None) -> Outcome:
    """Forward, `between()` and backward of `loss(hidden, weight, inputs)`; a frozen head's weight is a constant."""
    hidden, weight, rest = inputs.operands()
    value = loss(hidden, weight, rest)
    between()
    value.backward()
    return Outcome(value.detach(), *inputs.gradients(hidden, weight))
