"""Inputs of losses that a run estimates while it trains, where the rows have no column of them.

    old_logprob        the policy of a few updates ago (PSFT)
    reference_point    KL(model || reference) on mismatched completions (KTO)
    reward_shift       the mean of all rewards so far (BCO)
    log_normalizer     every prompt's moving normaliser (discriminative SFT)
    token_weight       demonstrations and own tokens averaged apart (CHORD, UFT)

Each is one object with one interface, `Estimate`. What it keeps is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from logitless.losses import Loss, sequence_logprob
from logitless.losses.policy.weights import own_means
from logitless.losses.preference.unpaired_statistics import RunningMean, bco_reward_shift, kto_reference_point
from logitless.training.collate import Batch, Piece
from logitless.training.config import TrainOptions
from logitless.training.examples import IGNORED, Example
from logitless.training.loader import Loader
from logitless.training.model import evaluating
from logitless.training.objective import Engine, batch_inputs, batch_layout, objective_of_stats
from logitless.training.parallel import World
from logitless.training.reference_model import ReferenceModel
from logitless.training.sampler import Sampler
from logitless.types import TokenStats


class Running(Protocol):
    """What the estimates read of a run's component."""

    @property
    def options(self) -> TrainOptions: ...

    world: World
    loss: Loss
    engine: Engine
    model: Any
    loader: Loader
    reference: ReferenceModel | None
    sampler: Sampler
    total_steps: int


class Estimate:
    """An input that the run estimates; what it keeps from step to step is its own.

    Batches come and go on the device, with the columns' and the reference's values in them.
    """

    #: Whether it asks the reference model for more than a batch's own values.
    asks_reference: ClassVar[bool] = False
    #: Whether it keeps values of rows that are still to be read, by the process that reads them.
    of_rows: ClassVar[bool] = False

    def training(self, run: Running, step: int, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step with the input, before the first of their gradients."""
        return [self.evaluation(run, batch) for batch in batches]

    def evaluation(self, run: Running, batch: Batch) -> Batch:
        """A batch of held-out rows with the input; nothing is kept of it."""
        raise NotImplementedError

    def state(self, run: Running) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it, of all processes."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` gave."""


@torch.no_grad()
def current_stats(run: Running, batch: Batch, outputs: tuple[str, ...] = ("logprob",)) -> TokenStats:
    """Statistics `[B, T]` of today's model, without dropout and without a gradient."""
    with evaluating(run.model):
        return run.engine.stats(run.model, batch, outputs)


class OldPolicy(Estimate):
    """Log-probabilities under the policy of up to `old_policy_steps` updates ago.

    At the first of these updates the model scores the rows of all of them, as the authors' code of PSFT (and verl)
    scores a batch before it is cut into mini-batches. In evaluation the old policy is today's.
    """

    of_rows: ClassVar[bool] = True

    def __init__(self) -> None:
        self.known: dict[str, torch.Tensor] = {}  # by step, micro-batch and process

    def training(self, run: Running, step: int, batches: list[Batch]) -> list[Batch]:
        if _name(run, step, 0) not in self.known:
            for later in range(step, min(step + run.options.old_policy_steps, run.total_steps)):
                for index, units in enumerate(run.sampler.micro_batches(later)):
                    scored = self.evaluation(run, run.loader.batch(units).to(run.world.device))
                    self.known[_name(run, later, index)] = scored.loss_inputs["old_logprob"].cpu()
        values = [self.known.pop(_name(run, step, index)) for index in range(len(batches))]
        return [
            batch.with_inputs(old_logprob=value.to(run.world.device))
            for batch, value in zip(batches, values, strict=True)
        ]

    def evaluation(self, run: Running, batch: Batch) -> Batch:
        return batch.with_inputs(old_logprob=current_stats(run, batch).logprob)

    def state(self, run: Running) -> dict[str, torch.Tensor]:
        return {name: value for known in run.world.gather(self.known) for name, value in known.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.known = dict(state)


def _name(run: Running, step: int, index: int) -> str:
    return f"{step}.{index}.{run.world.rank}"


class ReferencePoint(Estimate):
    """KTO's reference point, over a step's rows: each prompt with the completion of the row before it.

    The rows of a process are paired among themselves, as in the authors' code and TRL, and the estimate is over all.
    """

    asks_reference: ClassVar[bool] = True

    def training(self, run: Running, step: int, batches: list[Batch]) -> list[Batch]:
        scores = run.world.gather(self._scores(run, batches))
        point = self._point(run, {name: torch.cat([each[name] for each in scores]) for name in scores[0]})
        return [batch.with_inputs(reference_point=point) for batch in batches]

    def evaluation(self, run: Running, batch: Batch) -> Batch:
        return batch.with_inputs(reference_point=self._point(run, self._scores(run, [batch])))

    def _point(self, run: Running, scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return kto_reference_point(scores["logprob"], scores["ref_logprob"]).to(run.world.device)

    def _scores(self, run: Running, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        """Log-probabilities `[S]` of the mismatched sequences under both models."""
        assert run.reference is not None
        examples = [example for batch in batches for example in batch.examples]
        pieces = [Piece(mismatched(*pair)) for pair in zip(examples, examples[-1:] + examples[:-1], strict=True)]
        found: dict[str, list[torch.Tensor]] = {"logprob": [], "ref_logprob": []}
        for batch in batches:
            own, pieces = pieces[: len(batch.examples)], pieces[len(batch.examples) :]
            wrong = run.loader.collate(own).to(run.world.device)
            found["logprob"].append(_of_sequences(current_stats(run, wrong).logprob, wrong))
            found["ref_logprob"].append(_of_sequences(run.reference(wrong)["ref_logprob"], wrong))
        rows = len(examples) if len(examples) > 1 else 0  # the only row is no mismatch
        return {name: torch.cat(parts)[:rows] for name, parts in found.items()}


def mismatched(example: Example, other: Example) -> Example:
    """The prompt of one example and the completion of the other, no longer than the longer of the two."""
    starts = [int((each.labels != IGNORED).nonzero()[0]) for each in (example, other)]
    length = max(len(example.input_ids), len(other.input_ids))
    ids = torch.cat([example.input_ids[: starts[0]], other.input_ids[starts[1] :]])[:length]
    labels = torch.cat([example.labels[: starts[0]], other.labels[starts[1] :]])[:length]
    return Example(ids, labels)


def _of_sequences(logprob: Any, batch: Batch) -> torch.Tensor:
    """Summed log-probabilities of a batch's sequences, `[S]` float64 on the CPU."""
    tokens = batch_layout(batch)
    assert tokens.sequence is not None
    total = sequence_logprob(
        logprob.flatten().double(),
        sequence=tokens.sequence.flatten(),
        num_sequences=tokens.sequences,
        mask=tokens.mask.flatten(),
    )
    return total.cpu()


class RewardShift(Estimate):
    """BCO's shift: the mean of all rewards of the run, those of the step itself among them."""

    def __init__(self) -> None:
        self.mean = RunningMean(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))

    def training(self, run: Running, step: int, batches: list[Batch]) -> list[Batch]:
        rewards = [self._rewards(run, batch) for batch in batches]
        gathered = run.world.gather({"rewards": torch.cat(rewards)})
        self.mean = bco_reward_shift(torch.cat([each["rewards"] for each in gathered]), self.mean)
        return super().training(run, step, batches)

    def evaluation(self, run: Running, batch: Batch) -> Batch:
        return batch.with_inputs(reward_shift=self.mean.mean.to(run.world.device))

    def _rewards(self, run: Running, batch: Batch) -> torch.Tensor:
        stats = current_stats(run, batch, run.loss.outputs)
        result = objective_of_stats(run.loss, stats, self.evaluation(run, batch)).result._asdict()
        return torch.cat([x for name, x in result.items() if name.endswith("reward")]).cpu()  # of both sides of a pair

    def state(self, run: Running) -> dict[str, torch.Tensor]:
        return self.mean._asdict()

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.mean = RunningMean(**state)


class PromptNormalizer(Estimate):
    """The logarithm of every prompt's moving normaliser, 0 before its first step, as the loss itself moves it.

    In evaluation it begins at 0: the numbers of prompts belong to the training rows.
    """

    def __init__(self) -> None:
        self.kept: dict[int, float] = {}

    def training(self, run: Running, step: int, batches: list[Batch]) -> list[Batch]:
        given = [self._with(batch, [self.kept.get(g, 0.0) for g in _groups(batch)]) for batch in batches]
        moved = [self._moved(run, batch) for batch in given]
        names, values = ([each[part] for each in moved] for part in ("groups", "values"))
        for each in run.world.gather({"groups": torch.cat(names), "values": torch.cat(values)}):
            self.restore(each)
        return given

    def evaluation(self, run: Running, batch: Batch) -> Batch:
        return self._with(batch, [0.0] * batch.labels.numel())

    def _with(self, batch: Batch, values: list[float]) -> Batch:
        return batch.with_inputs(log_normalizer=torch.tensor(values, device=batch.labels.device).view_as(batch.labels))

    def _moved(self, run: Running, batch: Batch) -> dict[str, torch.Tensor]:
        """The prompts' numbers and new values, one for every token that counts."""
        loss: Any = run.loss
        tokens = batch_layout(batch)
        stats = current_stats(run, batch, loss.outputs)
        inputs, _ = batch_inputs(loss, batch)
        values = loss.updated_normalizer(stats, **inputs, mask=tokens.mask, sequence=tokens.sequence)
        groups = batch.loss_inputs["group"]
        return {"groups": groups[tokens.mask].cpu(), "values": values[tokens.mask].float().cpu()}

    def state(self, run: Running) -> dict[str, torch.Tensor]:
        return {"groups": torch.tensor(list(self.kept)), "values": torch.tensor(list(self.kept.values()))}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self.kept |= dict(zip(state["groups"].tolist(), state["values"].tolist(), strict=True))


def _groups(batch: Batch) -> list[int]:
    groups: list[int] = batch.loss_inputs["group"].flatten().tolist()
    return groups


class OwnMeans(Estimate):
    """Weights with which demonstrations and own tokens have a mean each, over all of a step's tokens."""

    def training(self, run: Running, step: int, batches: list[Batch]) -> list[Batch]:
        counts = [int(run.world.sum(n)) for n in self._counts(batches)]
        return [self._with(batch, *counts) for batch in batches]

    def evaluation(self, run: Running, batch: Batch) -> Batch:
        return self._with(batch, *self._counts([batch]))

    def _counts(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """Tokens of demonstrations, and all others, that count."""
        demonstrations = sum(int((_shown(b) & batch_layout(b).mask).sum()) for b in batches)
        return demonstrations, sum(batch.counted for batch in batches) - demonstrations

    def _with(self, batch: Batch, demonstrations: int, others: int) -> Batch:
        weight = own_means(_shown(batch), rollout_tokens=others, demonstration_tokens=demonstrations)
        return batch.with_inputs(token_weight=weight)


def _shown(batch: Batch) -> torch.Tensor:
    return batch.loss_inputs["demonstration"] != 0


ESTIMATED_INPUTS: dict[str, type[Estimate]] = {
    "old_logprob": OldPolicy,
    "reference_point": ReferencePoint,
    "reward_shift": RewardShift,
    "log_normalizer": PromptNormalizer,
    "token_weight": OwnMeans,
}
