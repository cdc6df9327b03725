"""Rounds of on-policy training: prompts are drawn, answered, rewarded and scored, and then trained on.

    round      prompts  ->  slots (what each completion is shown)  ->  completions  ->  rewards
               ->  log-probabilities of today's policy  ->  advantages  ->  examples with the inputs of the loss
    update     micro-batches of the round's examples, in another order in each pass

A round serves `steps_per_generation` micro-batches, `num_iterations` times. Its prompts, seeds and orders are functions
of its number alone: one that a killed run had not finished is sampled again as it was, and one that is being trained on
is in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch

from logitless.training.collate import Batch
from logitless.training.estimates import Running
from logitless.training.examples import Example, Item, TokenizedData
from logitless.training.inputs import SAMPLED
from logitless.training.loader import TOGETHER, Loader
from logitless.training.metrics import Record
from logitless.training.mixture import prefixed, without_prefix
from logitless.training.parallel import World
from logitless.training.rollouts import advantages, log, summary
from logitless.training.rollouts.critic import VALUE_INPUTS, Critic
from logitless.training.rollouts.generation import Sampling, TextGenerator
from logitless.training.rollouts.groups import Schedule, Slot, slots_of
from logitless.training.rollouts.inputs import Values, add_inputs, add_weights, policy_statistics
from logitless.training.rollouts.prompts import Prompt, Prompts
from logitless.training.rollouts.rewards import PASSED, Reward, Scores, score_completions
from logitless.training.rollouts.rollout import Rollout, rollout_of
from logitless.training.sampler import Sampler


class Judge(NamedTuple):
    """What rewards completions."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...] | None

    def __call__(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], tokenizer: Any) -> Scores:
        """The scores of completions, each with its prompt; a text has what it was shown in front."""
        texts = tokenizer.batch_decode([each.completion for each in rollouts], skip_special_tokens=True)
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in PASSED)
        return score_completions(
            self.rewards,
            self.weights,
            [prompt.asked for prompt in prompts],
            [as_answer(prompt.asked, text) for text, prompt in zip(texts, prompts, strict=True)],
            [each.completion.tolist() for each in rollouts],
            {name: [prompt.columns.get(name) for prompt in prompts] for name in names},
            [prompt.origin for prompt in prompts],
        )


def as_answer(asked: Any, text: str) -> Any:
    """A completion as TRL gives it to reward functions: a string behind a string, an assistant's turn behind turns."""
    return text if isinstance(asked, str) else [{"role": "assistant", "content": text}]


class RoundSettings(NamedTuple):
    """How a component's rounds are sampled, rewarded and trained on."""

    tokenizer: Any
    generator: TextGenerator
    sampling: Sampling
    judge: Judge | None
    """None where the loss reads no rewards."""
    schedule: Schedule
    estimator: str
    scale: str
    correction: str
    critic: Critic | None
    groups: int
    """Prompts that a process answers in a round."""
    updates: int
    """Optimizer steps of one pass over a round."""
    passes: int
    """Passes over a round."""


@dataclass
class Rounds:
    """The rounds of one component of a run.

    Args:
        prompts: of the training data.
        loader: how sequences become batches; its own data are not read.
        settings: how they are made.
    """

    prompts: Prompts
    loader: Loader
    settings: RoundSettings
    number: int = -1  # of the round that is trained on
    data: TokenizedData | None = None
    metrics: Record = field(default_factory=dict)

    def steps_per_epoch(self, world: World) -> int:
        """Updates in which every prompt is answered once; the last round goes on with the next epoch's."""
        rounds = -(-len(self.prompts.prompts) // (self.settings.groups * world.size))
        return rounds * self.settings.updates * self.settings.passes

    def batches(self, run: Running, step: int) -> list[Batch]:
        """The micro-batches of an update, for which a round is sampled if it is the first of one.

        The value function, where there is one, takes its own step on them.
        """
        options = run.options
        number, within = divmod(step, self.settings.updates * self.settings.passes)
        if number != self.number:
            self._sample(run, number, step)
        assert self.data is not None
        together = TOGETHER if TOGETHER in run.loss.inputs else None
        loader = replace(self.loader, data=self.data, together=together)
        size = options.per_device_train_batch_size // (options.num_generations if together else 1)
        seed = _seed_of_round(options.seed, number, run.world)
        sampler = Sampler(len(loader.units), size, options.gradient_accumulation_steps, seed)
        batches = [loader.batch(units) for units in sampler.micro_batches(within)]
        if self.settings.critic is None:
            return batches
        self.metrics = {**self.metrics, **self.settings.critic.update(batches)}
        return [batch.without_inputs(*VALUE_INPUTS) for batch in batches]

    # -----------------------------------------------------------------------------------------------------------------
    # A round

    def _sample(self, run: Running, number: int, step: int) -> None:
        """Makes round `number`, before update `step`."""
        started, options, world, settings = perf_counter(), run.options, run.world, self.settings
        draws = torch.Generator().manual_seed(_seed_of_round(options.seed, number, world))
        prompts = self._drawn(number, world, options.seed)
        slots, rollouts = self._answers(run, number, step, prompts, draws)
        asked, sampled = [prompts[slot.prompt] for slot in slots], perf_counter() - started
        scores = None if settings.judge is None else settings.judge(asked, rollouts, settings.tokenizer)
        group = torch.tensor([slot.prompt for slot in slots])
        values = policy_statistics(run, self.loader, [each.example() for each in rollouts])
        examples = [each.example(masked=options.mask_truncated_completions and not each.ended) for each in rollouts]
        everyone = summary.of_everyone(rollouts, values, group, scores, world)
        share = advantages.share_of_right(everyone.get(summary.TOTAL), everyone["sampled"])
        right = torch.zeros(len(slots)) if scores is None else (scores.total > 0).float()
        add_inputs(values, rollouts, group, right * share, draws)
        if settings.correction != "none":
            add_weights(values, rollouts, settings.correction, options.importance_sampling_cap)
        self.metrics = summary.metrics(everyone) | {"sampling/seconds": sampled}
        if scores is not None:
            self._add_advantages(values, rollouts, examples, everyone, world)
            self.metrics |= scores.metrics
        self.number, self.data = number, _as_data(examples, values, self._names(run))
        if options.log_completions:
            log.write(options.output_dir, step, asked, rollouts, scores, values, settings.tokenizer, world)

    def _answers(
        self, run: Running, number: int, step: int, prompts: Sequence[Prompt], draws: torch.Generator
    ) -> tuple[list[Slot], list[Rollout]]:
        """The slots of a round's prompts, and what was sampled behind them by the model of today."""
        options, settings = run.options, self.settings
        slots = slots_of(
            prompts,
            settings.schedule,
            group=options.num_generations,
            demonstrations=options.num_demonstrations,
            step=step,
            total_steps=run.total_steps,
            generator=draws,
        )
        settings.generator.follow(run.model, step)
        seed = _seed_of_round(options.seed, number, run.world)
        return slots, answered(settings.generator, slots, settings.sampling, seed)

    def _add_advantages(
        self,
        values: Sequence[Values],
        rollouts: Sequence[Rollout],
        examples: Sequence[Example],
        everyone: Mapping[str, torch.Tensor],
        world: World,
    ) -> None:
        """Adds the advantages, which compare the completions of all processes."""
        settings, first = self.settings, world.rank * len(rollouts)
        rewards, known = advantages.filled(everyone[summary.TOTAL], everyone["group"])
        own = slice(first, first + len(rollouts))
        if settings.critic is not None:
            found = settings.critic.advantages(self.loader, examples, rewards[own])
            for each, added, counts in zip(values, found, known[own], strict=True):
                each.update(added)
                each["advantages"] = added["advantages"] * counts
            return
        sampled = advantages.Sampled(rewards, everyone["group"], everyone["shown"], everyone["length"])
        parts = (x[own] * known[own] for x in advantages.estimate(settings.estimator, settings.scale, sampled))
        for each, rollout, of_own, of_shown in zip(values, rollouts, *parts, strict=True):
            each["advantages"] = rollout.aligned(float(of_shown), float(of_own))

    def _names(self, run: Running) -> list[str]:
        """The inputs that the examples of a round hold: those that the loss reads, and the critic."""
        read = {*run.loss.inputs, *run.loss.optional_inputs}
        if self.settings.correction == "none":
            read.discard("policy_weight")
        return [name for name in SAMPLED if name in read] + (
            list(VALUE_INPUTS) if self.settings.critic is not None else []
        )

    def _drawn(self, number: int, world: World, seed: int) -> list[Prompt]:
        """This process's prompts of a round: its part of the epochs' orders, one behind another."""
        count = len(self.prompts.prompts)
        sampler = Sampler(count, 1, 1, seed)
        first = (number * world.size + world.rank) * self.settings.groups
        places = [divmod(place, count) for place in range(first, first + self.settings.groups)]
        orders = {epoch: sampler.order(epoch) for epoch in {epoch for epoch, _ in places}}
        return [self.prompts.prompts[orders[epoch][place]] for epoch, place in places]

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def state(self, world: World) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: the round of every process that is being trained on, and the value function."""
        found: dict[str, torch.Tensor] = {}
        if self.data is not None:
            examples = [example for (example,) in self.data.items]
            own = {"number": torch.tensor(self.number), "lengths": torch.tensor([len(e.labels) for e in examples])}
            own |= {name: torch.cat([getattr(e, name) for e in examples]) for name in ("input_ids", "labels")}
            names = examples[0].inputs
            own |= prefixed("input", {name: torch.cat([e.inputs[name] for e in examples]) for name in names})
            own |= prefixed(
                "metric", {name: torch.tensor(value, dtype=torch.float64) for name, value in self.metrics.items()}
            )
            for rank, each in enumerate(world.gather(own)):
                found |= prefixed(str(rank), each)
        if self.settings.critic is not None:
            found |= prefixed("critic", self.settings.critic.state())
        return found

    def restore(self, saved: Mapping[str, torch.Tensor], world: World) -> None:
        """Takes back what `state` gave."""
        if self.settings.critic is not None:
            self.settings.critic.restore(without_prefix("critic", saved))
        own = without_prefix(str(world.rank), saved)
        if not own:
            return
        lengths = own["lengths"].tolist()
        ids, labels = (own[name].split(lengths) for name in ("input_ids", "labels"))
        inputs = {name: values.split(lengths) for name, values in without_prefix("input", own).items()}
        items: list[Item] = [
            (Example(ids[i], labels[i], {name: parts[i] for name, parts in inputs.items()}),)
            for i in range(len(lengths))
        ]
        self.number, self.data = int(own["number"]), _data_of(items)
        self.metrics = {name: float(value) for name, value in without_prefix("metric", own).items()}


def answered(generator: TextGenerator, slots: Sequence[Slot], sampling: Sampling, seed: int) -> list[Rollout]:
    """The slots with what was sampled behind them."""
    asked = [slot.start for slot in slots if slot.sampled]
    completions = iter(generator.generate(asked, sampling, seed) if asked else [])
    return [rollout_of(slot, next(completions) if slot.sampled else None, sampling.max_tokens) for slot in slots]


def _as_data(examples: Sequence[Example], values: Sequence[Values], names: Sequence[str]) -> TokenizedData:
    return _data_of(
        [
            (example._replace(inputs={name: own[name] for name in names}),)
            for example, own in zip(examples, values, strict=True)
        ]
    )


def _data_of(items: list[Item]) -> TokenizedData:
    return TokenizedData(items, len(items), 0, 0, tuple(range(len(items))))


def _seed_of_round(seed: int, number: int, world: World) -> int:
    """The seed of a round's draws in this process; small, since a sampler multiplies it."""
    return ((seed * 1_000_003 + number) * 1_009 + world.rank) % 2**40
