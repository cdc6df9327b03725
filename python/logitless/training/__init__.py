"""The training loop behind `logitless train`; needs the `train` extra (Transformers and friends)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from logitless.training.config import METHODS, TrainOptions
from logitless.training.errors import InputError, NonFiniteLossError

if TYPE_CHECKING:
    from logitless.training.trainer import TrainResult, train

__all__ = ["METHODS", "InputError", "NonFiniteLossError", "TrainOptions", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    """Loads the loop, and with it the optional packages, on first use: options and help need neither."""
    if name not in ("TrainResult", "train"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from logitless.training import trainer

    return getattr(trainer, name)
