"""logitless: losses for language-model post-training from hidden states and the output head, never from logits."""

from . import losses, nn
from .functional import linear_cross_entropy, linear_dft, linear_dpo, linear_f_divergence_sft, linear_loss
from .info import info
from .integrations.transformers import patch, unpatch
from .ops import linear_logprobs, linear_token_loss
from .types import Head, TokenStats

__all__ = [
    "Head",
    "TokenStats",
    "info",
    "linear_cross_entropy",
    "linear_dft",
    "linear_dpo",
    "linear_f_divergence_sft",
    "linear_logprobs",
    "linear_loss",
    "linear_token_loss",
    "losses",
    "nn",
    "patch",
    "unpatch",
]
__version__ = "0.1.0"
