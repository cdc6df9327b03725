"""Runs that sample, for their tests: reward functions, options, and one sampled round that is looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from training_fixtures import make_model, make_options, write_jsonl
from transformers import LlamaForCausalLM

from logitless.training import TrainOptions, parallel
from logitless.training.examples import Example
from logitless.training.rollouts.generation import Sampling
from logitless.training.rollouts.rounds import Rounds
from logitless.training.run import Component, Run, prepare

#: The reward functions, as `reward_funcs` names them also in other processes.
HERE = str(Path(__file__).with_name("rollout_rewards.py").resolve())
VARIED = f"{HERE}:varied"


def sampling_options(folder: Path, model: str, data: str, **changes: Any) -> TrainOptions:
    """Options of a quick run that samples two groups of four for an update."""
    defaults: dict[str, Any] = {
        "method": "grpo",
        "reward_funcs": (VARIED,),
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 8,
        "max_steps": 2,
    }
    return make_options(folder, model, data, **defaults | changes)


def rows_with_answers(count: int = 10) -> list[dict[str, str]]:
    """Sums as strings, with answers of several lengths."""
    return [{"prompt": f"{i} + {i} = ", "completion": str(11 * i) * (2 + i % 3)} for i in range(count)]


class Folder(NamedTuple):
    """A model and data that a test may train on."""

    path: Path
    model: str
    data: str

    def options(self, name: str = "run", **changes: Any) -> TrainOptions:
        return sampling_options(self.path / name, self.model, self.data, **changes)

    def prepared(self, name: str = "run", **changes: Any) -> Run:
        return prepare(self.options(name, **changes), parallel.start(True))


def make_folder(path: Path) -> Folder:
    return Folder(path, make_model(path / "model"), write_jsonl(path / "train.jsonl", rows_with_answers()))


def rounds_of(run: Run) -> tuple[Component, Rounds]:
    """The run's only component, and its rounds."""
    (component,) = run.components
    assert component.rounds is not None
    return component, component.rounds


def sampled_round(run: Run, step: int = 0) -> list[Example]:
    """The examples of the round that an update begins with, in the order of their groups."""
    component, rounds = rounds_of(run)
    component.batches(step)
    assert rounds.data is not None
    return [example for (example,) in rounds.data.items]


class Twin:
    """The model by itself, in float64 and with full logits."""

    def __init__(self, folder: str, temperature: float = 1.0) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.temperature = temperature

    def take(self, model: Any) -> None:
        """The weights of a trained model."""
        self.model.load_state_dict({name: value.double() for name, value in model.state_dict().items()}, strict=False)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """`[T - 1, V]`: position t is about token t + 1."""
        logits: torch.Tensor = self.model(input_ids=ids.long()[None]).logits[0, :-1] / self.temperature
        return logits

    def logprob(self, ids: torch.Tensor) -> torch.Tensor:
        """`[T - 1]`, of the token behind each position."""
        return taken(self.logits(ids).log_softmax(-1), ids[1:])

    def entropy(self, ids: torch.Tensor) -> torch.Tensor:
        logprob = self.logits(ids).log_softmax(-1)
        return -(logprob.exp() * logprob).sum(-1)


def taken(distribution: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Entries `[n]` of `[n, V]`."""
    return distribution.gather(1, ids.long()[:, None])[:, 0]


def cut(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of one token's distribution `[V]` with what is cut off at -inf, by their definitions."""
    order = logits.argsort(descending=True)
    kept = order.tolist()[: sampling.top_k or None]
    probability = logits.softmax(-1)
    share, nucleus = probability[kept] / probability[kept].sum(), []
    for place, token in enumerate(kept):
        if sampling.top_p == 1 or share[:place].sum() < sampling.top_p:
            nucleus.append(token)
    kept = [token for token in nucleus if probability[token] >= sampling.min_p * probability[nucleus[0]]]
    found = torch.full_like(logits, -torch.inf)
    found[kept] = (probability[kept] / probability[kept].sum()).log()
    return found
