"""The primitives: checks, then the choice of backend and strategy, then a `torch.library` op."""

from ..backends.approximate.report import TailReport, tail_report
from .divergence import linear_divergence
from .logprobs import linear_logprobs
from .token_loss import linear_token_loss

__all__ = ["TailReport", "linear_divergence", "linear_logprobs", "linear_token_loss", "tail_report"]
