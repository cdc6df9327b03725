"""A training step of a real model: its layers, then a provider's loss, and backward through all of it.

A provider is a function of hidden states, head and targets. Here the hidden states are what the model's layers make of
text, the head is the model's own, and the gradients go on into every weight. The optimizer's step is left out: it is
the same for every provider. So are terms that some models add to their loss, such as a router's.

Errors are those of the loss and of its gradients alone. The reference runs the same layers in the model's own dtype,
and the head and the loss in float64.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logitless import losses
from logitless.integrations.scoring import plain_head
from logitless.integrations.selfcheck import self_check
from logitless.training.checks import Extreme, Reach, check_positions, check_vocabulary
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.model import (
    checkpoint_activations,
    disable_dropout,
    hide_progress_bars,
    load_model,
    load_tokenizer,
    locate,
    patched,
)
from logitless.training.parallel import World
from logitless.training.places import require_places

from .measure import Part
from .problem import CPU, Inputs, Problem
from .targets import Json
from .text import reference, sequences, tokenised

#: Files of a model on the hub that a step needs.
FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
#: What a report says of the ids.
TEXT = "Python's language reference"


class ModelInputs(NamedTuple):
    """A model and its tokens, as what a provider takes a step on."""

    model: Any  # patched, in training mode
    weight: nn.Parameter  # [V, H], the model's own head
    ids: Tensor  # [sequences, length + 1]
    problem: Problem
    facts: Json
    watched: bool = False  # whether a step keeps the gradient of the hidden states, which training does not

    @property
    def gradient_bytes(self) -> int:
        """Nothing: the memory of a whole step has its gradients in it."""
        return 0

    def about(self) -> Json:
        """The model, its tokens, and the problem that its head and loss are."""
        return {**self.facts, "problem": str(self.problem), "logits_bytes": self.problem.logits_bytes}

    def operands(self) -> tuple[Tensor, Tensor, Inputs]:
        """The last hidden states of all tokens, computed now, and the head's weight."""
        self.model.zero_grad()  # left by a step that failed
        found = self.model(input_ids=self.ids[:, :-1], use_cache=False, hidden_only=True).logits
        hidden, weight = found.flatten(0, 1).to(self.problem.dtype), self.weight.to(self.problem.dtype)
        if self.watched:
            hidden.retain_grad()
        uniform = torch.full(hidden.shape[:1], -math.log(self.problem.vocabulary), device=hidden.device)
        targets = self.ids[:, 1:].flatten()
        rest = Inputs(hidden.detach(), weight.detach(), targets, uniform, self.problem)
        return hidden, weight.detach() if self.problem.frozen_head else weight, rest

    def gradients(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the watched hidden states and of the head, from the whole step. The model's own are dropped.

        The head of a tied model is the embedding too, whose gradient is in this one.
        """
        result = hidden.grad if self.watched else None, None if self.problem.frozen_head else self.weight.grad
        self.model.zero_grad()
        return result

    def to(self, dtype: torch.dtype) -> ModelInputs:
        """Head and loss in another dtype, above the same layers."""
        return self._replace(problem=replace(self.problem, dtype=dtype))

    def brief(self) -> ModelInputs:
        """Few tokens and their watched hidden states: as many pairs, or at most one sequence for each 256 tokens."""
        few = self.problem.brief()
        length = min(few.length, self.ids.shape[1] - 1)
        count = few.tokens // length
        return self._replace(
            ids=self.ids[:count, : length + 1], problem=replace(few, tokens=count * length), watched=True
        )


@dataclass(frozen=True)
class ModelPart(Part):
    """A real model and the providers that take turns as its loss.

    The problem has the model's hidden size, vocabulary and dtype. Its tokens are all of a step's, and with pairs the
    chosen sequences come first. There are no floors among the providers: they would leave out the layers.

    Args:
        model: hub id, folder or .gguf file.
        loss: the name that the report has for what is trained.
        length: tokens of each sequence.
        checkpointing: activations are computed again in the backward pass.

    Raises:
        InputError: the tokens are not sequences of that length.
    """

    model: str = ""
    loss: str = "nll"
    length: int = 256
    checkpointing: bool = False

    def __post_init__(self) -> None:
        tokens, pairs = self.problem.tokens, self.problem.pairs
        if self.length < 1 or tokens % self.length or (pairs and self.length != self.problem.length):
            of = f"{pairs} pairs of sequences of " if pairs else "a multiple of "
            raise InputError(f"tokens: expected {of}{self.length} tokens, got {tokens}")

    @property
    def sequences(self) -> int:
        """Rows of a step."""
        return self.problem.tokens // self.length

    @property
    def options(self) -> TrainOptions:
        """What the training command would load the model with."""
        return TrainOptions(model_name_or_path=self.model, dtype=str(self.problem.dtype).removeprefix("torch."))

    def about(self) -> Json:
        """What a report says of the part before the model is there."""
        return {
            "kind": "model",
            "model": self.model,
            "loss": self.loss,
            "sequences": self.sequences,
            "length": self.length,
            "tokens": self.problem.tokens,
            "checkpointing": self.checkpointing,
            "problem": str(self.problem),
            "logits_bytes": self.problem.logits_bytes,
        }

    def fetch(self) -> None:
        """Fetches a model of the hub, which may take longer than a worker is waited for.

        What fails here fails again where the model is loaded, with a reason.
        """
        name = locate(self.options)
        if not Path(name).is_dir():
            from huggingface_hub import snapshot_download

            with suppress(OSError, ValueError):
                snapshot_download(name, allow_patterns=FETCHED)

    def tiny(self) -> ModelPart:
        """At most 8 tokens of each sequence. The model stays as it is."""
        length = min(8, self.length)
        return replace(self, problem=replace(self.problem, tokens=self.sequences * length), length=length)

    def inputs(self, device: torch.device = CPU) -> ModelInputs:
        """The model, in training mode and without dropout, and its tokens.

        Raises:
            InputError: it cannot be loaded, its logits are not `hidden @ weight.T`, or it cannot read the tokens.
        """
        hide_progress_bars()
        options = self.options
        require_places(options)
        source = locate(options)
        model = load_checked(source, options, device)
        weight = model.get_output_embeddings().weight
        expected = [self.problem.vocabulary, self.problem.hidden]
        if list(weight.shape) != expected:
            raise InputError(f"{self.model}: its output head is {list(weight.shape)}; expected {expected}, V and H")
        if self.checkpointing:
            checkpoint_activations(model)
        ids, text = self._ids(model, source, options)
        parameters = sum(p.numel() for p in model.parameters())
        facts = {**self.about(), "parameters": parameters, "text": text}
        problem = replace(self.problem, data="random")  # whose name says nothing: the data are text
        return ModelInputs(model, weight, ids.to(device), problem, facts)

    def _ids(self, model: Any, source: str, options: TrainOptions) -> tuple[Tensor, str]:
        """`[sequences, length + 1]` ids, and what they are; a text that is too short is repeated."""
        length, count = self.length, self.problem.tokens + 1
        check_positions(model, Reach(length=Extreme(length, TEXT)), self.model)
        try:
            tokenizer, ids = _read(source, options)
        except InputError as reason:
            draw = torch.Generator().manual_seed(0)
            drawn = torch.randint(self.problem.vocabulary, (count,), generator=draw)
            return sequences(drawn, length), f"random ids ({reason})"
        most = Extreme(int(ids.max()), TEXT)
        check_vocabulary(model, tokenizer, Reach(read=most, target=most), self.model)
        return sequences(ids.repeat(-(-count // len(ids)))[:count], length), TEXT


def _read(source: str, options: TrainOptions) -> tuple[Any, Tensor]:
    """The model's tokenizer, and the ids that it makes of the text.

    Raises:
        InputError: there is no tokenizer, or Transformers made an empty one in its place.
    """
    tokenizer = load_tokenizer(source, options)
    ids = tokenised(tokenizer, reference())
    if not len(ids):
        raise InputError(f"{source}: no tokenizer could be loaded from there: it makes no tokens of text")
    return tokenizer, ids


def load_checked(source: str, options: TrainOptions, device: torch.device) -> Any:
    """The model, patched so that it gives hidden states, in training mode and without dropout.

    Its own logits of a few tokens have been compared with `hidden @ weight.T`.

    Raises:
        InputError: it cannot be loaded, or something else makes its logits. The message names the model.
    """
    model = patched(load_model(source, options, World(0, 1, device)), options, losses.NLL())
    name, kind = options.model_name_or_path, type(model).__name__
    head = plain_head(model)
    more = [
        what
        for what, there in (
            ("a bias", head.bias is not None),
            (f"a scale of {head.logit_scale:g}", head.logit_scale != 1.0),
            (f"a softcap of {head.softcap or 0:g}", head.softcap is not None),
            (f"a cut to {len(head.weight)} entries", len(head.weight) < len(model.get_output_embeddings().weight)),
        )
        if there
    ]
    if more:
        raise InputError(
            f"{name}: the output head of {kind} has {' and '.join(more)}; expected logits that are hidden @ weight.T "
            "alone, because that is what every provider here computes"
        )
    try:
        self_check(model, model._logitless_patch)
    except ValueError as reason:
        raise InputError(f"{name}: {reason}") from reason
    disable_dropout(model.train())
    return model
