"""The primitives: checks, then the choice of backend and strategy, then a `torch.library` op."""

from .logprobs import linear_logprobs
from .token_loss import linear_token_loss

__all__ = ["linear_logprobs", "linear_token_loss"]
