"""A model that is asked and not trained: for its samples, and for what it holds of tokens.

Statistics come from hidden states, so that no logits are there but those of the next token while it is sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from logitless import linear_divergence, linear_logprobs
from logitless.losses import NLL
from logitless.training.checks import (
    Reach,
    check_finite,
    check_positions,
    check_tokenizers,
    check_vocabulary,
    head_rows,
    padding_token,
)
from logitless.training.collate import Batch
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.examples import IGNORED, TokenizedData
from logitless.training.model import hide_progress_bars, load_model, load_tokenizer, locate, patched
from logitless.training.objective import PatchedEngine, autocast, computes_in_bf16, shifted
from logitless.training.parallel import World
from logitless.training.reference_model import first_rows
from logitless.training.run import confirm_patch
from logitless.types import BackendName, Head, TokenStats


class States(NamedTuple):
    """The hidden states of a batch, `[B, T, H]`, and the head that makes them a distribution."""

    hidden: torch.Tensor
    head: Head


@dataclass(frozen=True)
class Frozen:
    """A patched model in evaluation mode, with the options that it was loaded by."""

    options: TrainOptions
    model: Any
    engine: PatchedEngine
    pad_token: int

    @torch.no_grad()
    def states(self, batch: Batch, *, temperature: float = 1.0, rows: int | None = None) -> States:
        """What a batch on the device becomes in the model, of whose head the first `rows` count, all by default."""
        given = dataclasses.replace(self.engine, temperature=temperature).hidden(self.model, batch)
        return States(given["ref_hidden"], first_rows(given["ref_head"], rows))

    @torch.no_grad()
    def stats(self, states: States, batch: Batch, outputs: tuple[str, ...]) -> TokenStats:
        """Statistics `[B, T]` of `states`; position t is about predicting token t + 1."""
        options: dict[str, Any] = dict(zip(Head._fields[1:], states.head[1:], strict=True))
        with autocast(self.engine.device, self.engine.bf16):
            return linear_logprobs(
                states.hidden, states.head.weight, shifted(batch.labels), outputs=outputs,
                backend=cast(BackendName, self.options.backend), **options,
            )  # fmt: skip

    @torch.no_grad()
    def divergence(self, states: States, reference: States, batch: Batch) -> torch.Tensor:
        """KL(model || reference) of every position that predicts a token that counts, `[B, T]`; else 0."""
        with autocast(self.engine.device, self.engine.bf16):
            return linear_divergence(
                *states, *reference, kind="reverse_kl", mask=shifted(batch.labels) != IGNORED,
                backend=cast(BackendName, self.options.backend),
            )  # fmt: skip


def load_frozen(
    options: TrainOptions, world: World, tokenizer: Any, reach: Sequence[Reach], *, read: Sequence[TokenizedData] = ()
) -> tuple[Frozen, list[str]]:
    """The model of `options.model_name_or_path`, which must be able to read the rows, and notes on it.

    Args:
        tokenizer: the one that made the tokens.
        reach: of the rows.
        read: tokenised rows, of which the model's own tokenizer must make the same; none where it is that tokenizer.

    Raises:
        InputError: no model there, or one that cannot read the rows.
    """
    if options.backend == "materialised":
        raise InputError("backend: hidden states are needed, which 'materialised' does not have")
    options = dataclasses.replace(options, use_peft=False)
    source, name, loss = locate(options), options.model_name_or_path, NLL()
    if Path(source).is_dir():  # a download's bars stay
        hide_progress_bars()
    if read:
        check_tokenizers(tokenizer, load_tokenizer(source, options), read, name, whole=True, role="reference")
    engine = PatchedEngine(loss, world.device, computes_in_bf16(options, world.device))
    model = patched(load_model(source, options, world, frozen=True), options, loss).eval()
    check_finite(model, name)
    for each in reach:
        check_vocabulary(model, tokenizer, each, name)
    notes = [note for each in reach for note in check_positions(model, each, name)]
    confirm_patch(engine, model, options, world.device)
    return Frozen(options, model, engine, padding_token(tokenizer, model)), notes


def load_reference_of(
    policy: Frozen, world: World, tokenizer: Any, reach: Sequence[Reach], read: Sequence[TokenizedData]
) -> tuple[Frozen | None, list[str]]:
    """The model of `teacher_model_name_or_path`, and notes; None where none is named.

    Raises:
        InputError: `load_frozen`'s, or a head with fewer rows than the policy's.
    """
    name = policy.options.teacher_model_name_or_path
    if name is None:
        return None, []
    options = dataclasses.replace(policy.options, model_name_or_path=name)
    reference, notes = load_frozen(options, world, tokenizer, reach, read=read)
    ours, theirs = head_rows(policy.model), head_rows(reference.model)
    if theirs < ours:
        raise InputError(f"teacher_model_name_or_path: the head of {name} has {theirs} rows and that of "
                         f"{policy.options.model_name_or_path} {ours}; expected as many or more")  # fmt: skip
    return reference, notes


def start_alone(world: World, what: str) -> None:
    """Raises InputError where a command that runs in one process was started in several, or sharded."""
    if world.size > 1 or world.strategy.shards:
        raise InputError(f"{what} runs in one process and is not sharded, got {world.size}; give each a part of the "
                         "rows")  # fmt: skip
