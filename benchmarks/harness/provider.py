"""Providers: one way each through a problem, written once for CPU and GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Inputs

Role = Literal["floor", "materialised", "logitless", "peer"]
Loss = Callable[[Tensor, Tensor, Inputs], Tensor]  # takes hidden, weight and the rest
TORCH_OP = "torch.nn.functional.linear_cross_entropy"


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
        package: what must be installed.
    """

    name: str
    role: Role
    loss: Loss
    compared: str = "nll"
    frozen: bool = False
    dtype: torch.dtype | None = None
    package: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, as far as that shows before it is called."""
        if self.package == TORCH_OP:
            return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no {TORCH_OP}"
        absent = self.package is not None and importlib.util.find_spec(self.package) is None
        return f"{self.package} is not installed" if absent else None

    def of(self, inputs: Inputs) -> Inputs:
        """The inputs as this provider takes them."""
        inputs = inputs if self.dtype is None else inputs.to(self.dtype)
        frozen = self.frozen or inputs.problem.frozen_head
        return inputs._replace(problem=replace(inputs.problem, frozen_head=frozen))

    def step(self, inputs: Inputs, between: Callable[[], object] = lambda: None) -> Outcome:
        """A training step: forward, `between()`, `backward()`, gradients in `.grad`."""
        return differentiate(self.loss, self.of(inputs), between)


def differentiate(loss: Loss, inputs: Inputs, between: Callable[[], object] = lambda: None) -> Outcome:
    """Forward, `between()` and backward of `loss(hidden, weight, inputs)`; a frozen head's weight is a constant."""
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(not inputs.problem.frozen_head)
    value = loss(hidden, weight, inputs)
    between()
    value.backward()
    return Outcome(value.detach(), hidden.grad, weight.grad)
