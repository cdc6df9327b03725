"""Losses for language-model post-training, computed from hidden states and the output head, without logits."""

from . import losses, nn
from .backends.approximate.order import vocabulary_order
from .depths import DepthLosses, depth_targets, linear_depth_loss
from .functional import linear_cross_entropy, linear_dft, linear_dpo, linear_f_divergence_sft
from .info import info
from .integrations.transformers import patch, unpatch
from .linear import linear_loss
from .ops import TailReport, TopK, linear_divergence, linear_logprobs, linear_token_loss, linear_top_k, tail_report
from .parallel import VocabularyGroup, gather_sequence
from .types import Head, TokenStats

__all__ = [
    "DepthLosses",
    "Head",
    "TailReport",
    "TokenStats",
    "TopK",
    "VocabularyGroup",
    "depth_targets",
    "gather_sequence",
    "info",
    "linear_cross_entropy",
    "linear_depth_loss",
    "linear_dft",
    "linear_divergence",
    "linear_dpo",
    "linear_f_divergence_sft",
    "linear_logprobs",
    "linear_loss",
    "linear_token_loss",
    "linear_top_k",
    "losses",
    "nn",
    "patch",
    "tail_report",
    "unpatch",
    "vocabulary_order",
]
__version__ = "0.1.0"
