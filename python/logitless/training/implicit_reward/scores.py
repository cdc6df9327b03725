"""Answers with the implicit reward of every token, from a model and, if there is one, its reference.

The numbers are those of `losses.dense_rewards`, which has their formulas; here they get the tokens that they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logitless.losses.policy.implicit_reward import ImplicitReward, dense_rewards
from logitless.training.collate import Piece, padded
from logitless.training.errors import InputError
from logitless.training.examples import IGNORED, Example
from logitless.training.implicit_reward.pieces import token_pieces
from logitless.training.objective import Engine, shifted

NEEDED = ("logprob", "lse")


class Answer(NamedTuple):
    """The n tokens of a text that count, and the numbers of each."""

    ids: list[int]
    pieces: list[str]  # the text that each adds
    between: list[str]  # the text without numbers before each; before the first it is the prompt
    numbers: ImplicitReward  # [n] each

    @property
    def sequence_reward(self) -> float:
        """The sum of the log-odds, as DPO's reward is."""
        return float(self.numbers.log_odds.double().sum())

    @property
    def mean_log_odds(self) -> float:
        """The log-odds of a token on average."""
        return self.sequence_reward / len(self.ids)

    def value_at(self, share: float) -> float:
        """V of the state in which this share of the tokens before the last is read.

        0 is the prompt's state. 1 is the state before the last token, because behind it V is 0 by definition.
        """
        return float(self.numbers.value[math.floor(share * (len(self.ids) - 1) + 0.5)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written."""
        lists = {name: values.tolist() for name, values in zip(self.numbers._fields, self.numbers, strict=True)}
        written = {"prompt": self.between[0], "tokens": self.pieces, "ids": self.ids}
        return written | lists | {"sequence_reward": self.sequence_reward, "count": len(self.ids)}


@dataclass(frozen=True)
class Scorer:
    """What makes answers of token sequences.

    Args:
        engine: how the models are asked.
        model: the one whose reward is asked for.
        reference: the one that it is compared with; None for the endogenous reward.
        tokenizer: of the sequences.
        beta: the unit of the rewards.
    """

    engine: Engine
    model: Any
    reference: Any | None
    tokenizer: Any
    beta: float
    device: torch.device

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example], origins: Sequence[str]) -> list[Answer]:
        """The answer of each sequence.

        Raises:
            InputError: a token without probability, by the place (`origins`) of its row.
        """
        batch = padded([Piece(example) for example in examples], pad_token=0).to(self.device)
        own = self.engine.stats(self.model, batch, NEEDED)
        other = None if self.reference is None else self.engine.stats(self.reference, batch, NEEDED)
        counts = shifted(batch.labels) != IGNORED
        found = dense_rewards(own, other, beta=self.beta, mask=counts)
        sizes = counts.sum(1).tolist()
        parts = zip(*(values[counts].float().cpu().split(sizes) for values in found), strict=True)
        return [self._answer(*each) for each in zip(examples, map(ImplicitReward._make, parts), origins, strict=True)]

    def _answer(self, example: Example, numbers: ImplicitReward, origin: str) -> Answer:
        if not all(bool(values.isfinite().all()) for values in numbers):
            raise InputError(f"{origin}: a token's reward is not finite: a model gives it no probability at all")
        ids, counts = example.input_ids.tolist(), example.labels != IGNORED
        return Answer(
            example.input_ids[counts].tolist(), *_divided_text(token_pieces(self.tokenizer, ids), counts), numbers
        )


def _divided_text(pieces: Sequence[str], counts: Tensor) -> tuple[list[str], list[str]]:
    """The pieces of the tokens that count, and what stands before each of them without counting."""
    counted: list[str] = []
    between: list[str] = []
    waiting = ""
    for piece, counting in zip(pieces, counts.tolist(), strict=True):
        if counting:
            counted.append(piece)
            between.append(waiting)
        waiting = "" if counting else waiting + piece
    return counted, between
