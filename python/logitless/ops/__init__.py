"""The primitives: checks, then the choice of backend and strategy, then a `torch.library` op."""

from ..backends.approximate.report import TailReport, tail_report
from .divergence import linear_divergence
from .listed import TopK, linear_top_k
from .logprobs import linear_logprobs
from .token_loss import linear_token_loss

__all__ = [
    "TailReport",
    "TopK",
    "linear_divergence",
    "linear_logprobs",
    "linear_token_loss",
    "linear_top_k",
    "tail_report",
]
