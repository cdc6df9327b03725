"""What samples completions of prompts: the interface, which a model in this process or a server stands behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from logitless.training.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn: from the model's distribution at a temperature, less what the other settings cut off.

    Args:
        max_tokens: longest completion, in tokens, its end token included.
        temperature: what the logits are divided by; 0 takes the likeliest token.
        top_p: the likeliest tokens whose probabilities sum to at least this are kept; 1 keeps all.
        top_k: as many of the likeliest are kept; 0 keeps all.
        min_p: tokens of at least this share of the likeliest one's probability are kept; 0 keeps all.

    Raises:
        InputError: a value outside its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_completion_length", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not holds:
                value = self.max_tokens if name == "max_completion_length" else getattr(self, name)
                raise InputError(f"{name} must be {expected}, got {value!r}")

    @property
    def cuts(self) -> bool:
        """Whether some tokens that the model gives a probability cannot be drawn."""
        return self.temperature == 0 or self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class Completion(NamedTuple):
    """One sampled completion."""

    ids: torch.Tensor
    """`[T]` int32, with the end token where one was drawn; a server may give none at all."""
    sampling_logprob: torch.Tensor
    """`[T]` float32: under the distribution that the tokens were drawn from; NaN where the sampler does not say."""
    logprob: torch.Tensor
    """`[T]` float32: under the model at the temperature, before anything is cut off; NaN likewise."""
    ended: bool
    """Whether it ends with an end token; else it was cut off at `max_tokens`."""


class TextGenerator(Protocol):
    """What samples completions."""

    def generate(self, prompts: Sequence[torch.Tensor], sampling: Sampling, seed: int) -> list[Completion]:
        """A completion of every prompt, `[T]` int32 ids each; equal calls on equal weights give equal completions.

        `seed` is of the whole call. A prompt that stands several times is sampled several times.
        """
        ...

    def follow(self, model: Any, step: int) -> None:
        """Takes over the weights that the trained model has after `step` updates."""
        ...
