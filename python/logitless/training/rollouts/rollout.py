"""One completion of a round, and where its values stand among its tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from logitless.training.examples import IGNORED, Example
from logitless.training.rollouts.generation import Completion
from logitless.training.rollouts.groups import Slot


class Rollout(NamedTuple):
    """A prompt, what was shown of its demonstration, and what the policy sampled behind that."""

    ids: torch.Tensor
    """`[T]` int32."""
    begin: int
    """The first token of the completion; those of the prompt stand before it."""
    shown: int
    """How many tokens from there on are the demonstration's."""
    ended: bool
    """Whether the completion came to its end, or is a whole demonstration."""
    sampling_logprob: torch.Tensor
    """`[n]` float32 of the sampled tokens; see `Completion`."""
    logprob: torch.Tensor
    """`[n]` likewise."""

    @property
    def completion(self) -> torch.Tensor:
        """The ids of the completion, those shown in front."""
        return self.ids[self.begin :]

    @property
    def sampled(self) -> int:
        """How many tokens the policy sampled."""
        return len(self.ids) - self.begin - self.shown

    def example(self, *, masked: bool = False) -> Example:
        """The tokens, of which the completion counts; of one that is `masked`, what was shown alone."""
        labels = self.ids.clone()
        labels[: self.begin] = IGNORED
        if masked:
            labels[self.begin + self.shown :] = IGNORED
        return Example(self.ids, labels)

    def aligned(self, shown: float | torch.Tensor, own: float | torch.Tensor) -> torch.Tensor:
        """`[T]` float32 with a value, or one each, for the tokens shown and for those sampled, else 0.

        A value stands where its token is predicted, one position before it, as in `Batch.loss_inputs`.
        """
        values = torch.zeros(len(self.ids) + 1)
        values[self.begin : self.begin + self.shown] = shown
        values[self.begin + self.shown : -1] = own
        return values[1:]


def rollout_of(slot: Slot, completion: Completion | None, room: int) -> Rollout:
    """A slot with its completion, of which no more is kept than `room` tokens with what was shown; None: as it is."""
    begin = len(slot.start) - slot.shown
    if completion is None:
        none = torch.zeros(0)
        return Rollout(slot.start, begin, slot.shown, True, none, none)
    kept = room - slot.shown
    ended = completion.ended and len(completion.ids) <= kept
    ids = torch.cat([slot.start, completion.ids[:kept].int()])
    return Rollout(ids, begin, slot.shown, ended, completion.sampling_logprob[:kept], completion.logprob[:kept])
