"""`linear_loss` as a module, and the base of all modules that bind keyword arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .linear import linear_loss
from .losses import Loss, get
from .peers import refuse_unknown
from .types import OPTION_NAMES, LossReduction, OptionKeywords, Options


class BoundLoss(nn.Module):
    """A function of `logitless` with keyword arguments bound, which show in `repr`; a call may replace them."""

    def __init__(self, options: OptionKeywords, **bound: Any) -> None:
        super().__init__()
        refuse_unknown(type(self).__name__, options, OPTION_NAMES)
        Options(**options).transform  # noqa: B018  their names and values, checked now
        self.bound = {**bound, **options}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.bound.items())


class LinearLoss(BoundLoss):
    """Any loss of the registry as a module: `LinearLoss("grpo", delta=4.0)(hidden, weight, targets, advantages=...)`.

    Args:
        loss: a loss, or its name.
        reduction, max_length: as in `logitless.linear_loss`, whose other arguments are given at the call.
        **settings: the loss's hyper-parameters, and the options of the head and the backend. A name that is both (the
            `temperature` of `iw_sft`) is refused with a loss's name; with an object it is the head's.
    """

    def __init__(
        self,
        loss: Loss | str,
        *,
        reduction: LossReduction | None = None,
        max_length: int | None = None,
        **settings: Any,
    ) -> None:
        options = {name: x for name, x in settings.items() if name in OPTION_NAMES}
        own = get(loss, **{name: x for name, x in settings.items() if name not in OPTION_NAMES})
        for name in options:
            if isinstance(loss, str) and name in vars(own):
                both = f"an option of the head and a hyper-parameter of {loss!r}"
                raise ValueError(f"{name}: {both}; give the loss as an object, losses.{type(own).__name__}({name}=...)")
        super().__init__(options, loss=own, reduction=reduction, max_length=max_length)  # type: ignore[arg-type]

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **call: Any) -> Any:
        """The result of `linear_loss`, whose other arguments are given by name."""
        bound = {**self.bound, **call}
        return linear_loss(bound.pop("loss"), hidden, weight, targets, **bound)
