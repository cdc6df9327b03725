"""What a user asks to be measured, and the problems and competitors that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_args

from logitless import losses
from logitless.plan.choose import DTYPES
from logitless.training.errors import InputError, nearest
from logitless.types import BackwardName

from .problem import Data, Problem
from .provider import Provider
from .providers import choice
from .targets import Json

#: The parts in the order in which they are measured, with the share that each has of the time.
PARTS = {"step": 6, "tokens": 2, "vocabulary": 1.5, "hidden": 1.5, "longest": 1.5, "pairs": 1.5, "model": 6}
#: The words that a field may have or list.
_KNOWN: dict[str, Sequence[str]] = {
    "loss": losses.names(),
    "losses": losses.names(),
    "against": tuple(choice.AGAINST),
    "backward": get_args(BackwardName),
    "parts": tuple(PARTS),
    "dtype": tuple(DTYPES),
    "data": get_args(Data),
}
#: The fields that no result depends on.
_FREE = ("memory_given", "parts", "minutes")


@dataclass(frozen=True)
class Request:
    """A shape, a loss, and whom to compare.

    Args:
        loss: a name of `logitless.losses`.
        tokens, hidden, vocabulary: N, H and V.
        dtype: of the hidden states and the head.
        length: tokens of each sequence, where the loss is one of sequences or pairs.
        against: names of `choice.AGAINST`.
        backward: logitless's strategies.
        data: as in `Problem`.
        frozen_head: whether the head gets no gradient.
        device: "cpu" or "cuda".
        rounds: turns of every competitor in a step.
        memory: bytes that the longest sequence and the largest batch have to fit, head and loss alone.
        memory_given: whether they were asked for. If not, a run that goes on keeps those of the results it finds.
        model: whose step is measured; None: none's.
        model_tokens: tokens of that step.
        losses: of that step, one after the other.
        checkpointing: whether that step computes activations again in the backward pass.
        parts: names of `PARTS`.
        minutes: what all of it may take.
    """

    loss: str
    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    length: int
    against: tuple[str, ...]
    backward: tuple[BackwardName, ...]
    data: Data
    frozen_head: bool
    device: str
    rounds: int
    memory: int
    memory_given: bool
    model: str | None
    model_tokens: int
    losses: tuple[str, ...]
    checkpointing: bool
    parts: tuple[str, ...]
    minutes: float

    def __post_init__(self) -> None:
        for name in ("tokens", "model_tokens", "hidden", "vocabulary", "length", "rounds", "memory", "minutes"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name, known in _KNOWN.items():
            given = getattr(self, name)
            for each in (given,) if isinstance(given, str) else given:
                if each not in known:
                    words = "a name that `logitless losses` lists" if "loss" in name else f"one of {', '.join(known)}"
                    raise InputError(f"{name}: expected {words}, got {each!r}{nearest(each, known)}")
        if "model" in self.parts and self.model is None:
            raise InputError("parts: 'model' needs a model, and none was given")
        if of_sequences(self.loss):
            self._require_whole(self.tokens, self.loss)
        for loss in self.losses if "model" in self.parts else ():
            self._require_whole(self.model_tokens, loss)

    def _require_whole(self, tokens: int, loss: str) -> None:
        """Raises InputError unless the tokens of a step are whole sequences, or whole pairs of them."""
        pairs = of_sequences(loss)
        step = self.length * (2 if pairs else 1)
        if tokens % step:
            of = f"{'pairs' if pairs else 'sequences'} of --length {self.length} for {loss}"
            raise InputError(f"tokens: expected a multiple of {step}, {of}, got {tokens}")

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def problem(self, **other: int) -> Problem:
        """The problem asked for, or one with other tokens, hidden size or vocabulary."""
        sizes = {name: getattr(self, name) for name in ("tokens", "hidden", "vocabulary")} | other
        return self._problem(self.loss, **sizes)

    def model_problem(self, loss: str) -> Problem:
        """What head and loss are in the model's step."""
        return self._problem(loss, self.model_tokens, self.hidden, self.vocabulary)

    def _problem(self, loss: str, tokens: int, hidden: int, vocabulary: int) -> Problem:
        pairs = 0
        if of_sequences(loss):
            length = max(1, min(self.length, tokens // 2))
            pairs = max(1, tokens // (2 * length))
            tokens = 2 * pairs * length
        dtype, frozen = DTYPES[self.dtype], self.frozen_head
        return Problem(tokens, hidden, vocabulary, dtype=dtype, pairs=pairs, frozen_head=frozen, data=self.data)

    def sequence(self, length: int) -> Problem:
        """One sequence of so many tokens, or one pair of sequences that have so many together."""
        tokens, pairs = (2 * (length // 2), 1) if of_sequences(self.loss) else (length, 0)
        return replace(self.problem(), tokens=tokens, pairs=pairs)

    def pairs(self, count: int) -> Problem:
        """So many pairs of sequences."""
        return replace(self.problem(), tokens=2 * count * self.length, pairs=count)

    def floors(self) -> tuple[Provider, ...]:
        """What no competitor can be faster than."""
        return choice.floors_of(self.loss, self.problem(), gpu=self.gpu)

    def competitors(self, loss: str | None = None) -> tuple[Provider, ...]:
        """Everyone who computes the loss, or another one: materialised logits, logitless, other libraries."""
        loss = loss or self.loss
        others = choice.others(loss, self.against, gpu=self.gpu)
        return choice.materialised_of(loss), *choice.ours(loss, self.backward), *others

    def as_json(self) -> Json:
        """The fields that results depend on: those of the same ones belong together."""
        return {name: x for name, x in asdict(self).items() if name not in _FREE} | {
            name: list(getattr(self, name)) for name in ("against", "backward", "losses")
        }


def of_sequences(loss: str) -> bool:
    """Whether the loss is one of whole sequences or pairs."""
    return losses.get(loss).level not in ("token", "distribution")
