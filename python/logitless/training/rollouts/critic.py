"""A value function beside the policy, for PPO: what the rest of an answer is worth, token by token.

It is a copy of the model with one output a token in place of the head, trained on the returns by an AdamW of its own.
Advantages are GAE's, whitened over the round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from logitless.losses.policy.advantages import generalized_advantages, token_rewards, whiten
from logitless.losses.policy.values import value_loss
from logitless.training.collate import Batch, by_sequence
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.examples import IGNORED, Example
from logitless.training.loader import Loader
from logitless.training.metrics import Record
from logitless.training.objective import autocast, forward_inputs, shifted
from logitless.training.parallel import World
from logitless.training.places import unreadable
from logitless.training.rollouts.inputs import batches_of

#: Values that the critic reads of a batch, and the loss does not.
VALUE_INPUTS = ("returns", "old_values")


class Critic:
    """The value function of a run.

    Args:
        model: with one output a token, `[B, T, 1]`.
        options: of the run: gamma, lam, cliprange_value, critic_learning_rate, max_grad_norm.
        world: of the run; gradients are averaged over its processes.
        bf16: whether it runs under bfloat16 autocast.
    """

    def __init__(self, model: Any, options: TrainOptions, world: World, *, bf16: bool) -> None:
        self.model, self.options, self.world, self.bf16 = model.eval(), options, world, bf16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=options.critic_learning_rate, weight_decay=0.0)

    def advantages(
        self, loader: Loader, examples: Sequence[Example], rewards: torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        """A mapping for every sequence: `advantages`, and `returns` and `old_values` to learn from, `[T]` each.

        A sequence's reward stands on its last token that counts.

        Args:
            loader: how sequences become batches.
            examples: the round's sequences.
            rewards: `[S]`.
        """
        found = [
            self._of_sequence(values, example, reward)
            for values, example, reward in zip(self._values(loader, examples), examples, rewards, strict=True)
        ]
        masks = [shifted(example.labels[None])[0] != IGNORED for example in examples]
        flat, counts = torch.cat([own["advantages"] for own in found]), torch.cat(masks)
        everyone = self.world.gather({"advantages": flat, "counts": counts})
        first = sum(len(each["counts"]) for each in everyone[: self.world.rank])
        whitened = whiten(*(torch.cat([each[name] for each in everyone]) for name in ("advantages", "counts")))
        for own, part in zip(found, whitened[first : first + len(flat)].split(list(map(len, masks))), strict=True):
            own["advantages"] = part
        return found

    def _of_sequence(self, values: torch.Tensor, example: Example, reward: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = shifted(example.labels[None]) != IGNORED
        rewards = token_rewards(reward[None].float(), mask)
        gae = generalized_advantages(rewards, values[None], gamma=self.options.gamma, lam=self.options.lam, mask=mask)
        return {"advantages": gae.advantages[0], "returns": gae.returns[0], "old_values": values}

    @torch.no_grad()
    def _values(self, loader: Loader, examples: Sequence[Example]) -> list[torch.Tensor]:
        batches = batches_of(examples, loader, self.options, self.world)
        return [each for batch in batches for each in by_sequence(batch, self._forward(batch).cpu())]

    def _forward(self, batch: Batch) -> torch.Tensor:
        """Values `[B, T]`: at position t of the state before token t + 1."""
        with autocast(self.world.device, self.bf16):
            out: torch.Tensor = self.model(**forward_inputs(self.model, batch)).logits
        return out[..., 0].float()

    def update(self, batches: Sequence[Batch]) -> Record:
        """One step on the returns of an update's micro-batches."""
        masks = [shifted(batch.labels) != IGNORED for batch in batches]
        tokens = self.world.sum(float(sum(int(mask.sum()) for mask in masks))) or 1.0
        total = 0.0
        for batch, mask in zip(batches, masks, strict=True):
            moved = batch.to(self.world.device)
            loss = value_loss(
                self._forward(moved),
                moved.loss_inputs["returns"],
                moved.loss_inputs["old_values"],
                clip=self.options.cliprange_value,
                mask=mask.to(self.world.device),
                normalizer=tokens,
            )
            loss.backward()
            total += float(loss.detach())
        self._exchange()
        limit = self.options.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"value/loss": self.world.sum(total), "value/grad_norm": float(norm)}

    def _exchange(self) -> None:
        """The sum of all processes' gradients: each has divided its own by the tokens of all."""
        if self.world.size > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments, for a checkpoint; the same in every process."""
        found = {f"weight.{name}": parameter.detach().cpu() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{moment}.{name}"] = value.detach().cpu()
        return found

    @torch.no_grad()
    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` gave."""
        parameters = dict(self.model.named_parameters())
        for key, value in saved.items():
            moment, _, name = key.partition(".")
            if moment == "weight":
                parameters[name].copy_(value)
                continue
            # AdamW counts its steps on the CPU
            device = value.device if moment == "step" else parameters[name].device
            self.optimizer.state[parameters[name]][moment] = value.to(device, copy=True)


def load_critic(source: str, revision: str, options: TrainOptions, world: World, *, bf16: bool) -> Critic:
    """A critic that begins with the model's weights, and with values of 0.

    Raises:
        InputError: the model's family has no variant with an output a token, or the run is sharded.
    """
    from transformers import AutoModelForTokenClassification
    from transformers.utils import logging

    if world.strategy.shards:
        raise InputError(f"advantage_estimator gae: the value function is not sharded ({world.strategy.name}); use "
                         "another estimator, such as group")  # fmt: skip
    spoken = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is no warning here
    try:
        model, report = AutoModelForTokenClassification.from_pretrained(
            source,
            revision=revision,
            num_labels=1,
            dtype=torch.float32,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
    except ValueError as error:
        raise InputError(f"advantage_estimator gae: {source} has no variant with one value a token: {error}") from error
    except Exception as error:  # a damaged file can break the reader anywhere
        raise unreadable(source, "value function", error) from error
    finally:
        logging.set_verbosity(spoken)
    for name, parameter in model.named_parameters():
        if name in report["missing_keys"]:  # the new head
            nn.init.zeros_(parameter)
    return Critic(model.to(world.device), options, world, bf16=bf16)
