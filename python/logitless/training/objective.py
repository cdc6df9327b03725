"""The loss of a batch and the per-token statistics of a batch: with logitless, and with materialised logits.

`Linear` is what runs train with: the patched model computes both from hidden states. `Materialised` is what they are
compared with: the unpatched model returns its logits, and the same losses are computed from them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from logitless.losses import NLL, Loss, PreferenceResult, sequence_logprob
from logitless.training.batching import Batch
from logitless.training.render import IGNORED
from logitless.types import TokenStats


class Objective(NamedTuple):
    """The summed loss over a normalizer, and a preference loss's metrics per pair."""

    loss: torch.Tensor
    preference: PreferenceResult | None = None


class Engine(Protocol):
    """How losses and statistics are computed."""

    def objective(self, model: Any, batch: Batch, normalizer: float) -> Objective:
        """The loss of a batch divided by `normalizer`, differentiable."""
        ...

    def stats(self, model: Any, batch: Batch, outputs: tuple[str, ...]) -> TokenStats:
        """Statistics `[B, T]`; position t is about predicting token t + 1."""
        ...


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """The precision that the forward pass computes in."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


@dataclass(frozen=True)
class Linear:
    """Through a model that `logitless.patch` was applied to."""

    loss: Loss
    device: torch.device
    bf16: bool

    def objective(self, model: Any, batch: Batch, normalizer: float) -> Objective:
        boundaries = {} if self.loss.level == "token" or batch.cu_seqlens is None else {"cu_seqlens": batch.cu_seqlens}
        with autocast(self.device, self.bf16):
            output = model(
                **batch.model_inputs(),
                **boundaries,
                labels=batch.labels,
                num_items_in_batch=torch.tensor(normalizer, device=self.device),
                loss=self.loss,
                loss_inputs=batch.loss_inputs or None,
                skip_logits=True,
            )
        return Objective(output.loss, output.loss_result)

    def stats(self, model: Any, batch: Batch, outputs: tuple[str, ...]) -> TokenStats:
        with autocast(self.device, self.bf16):
            output = model(
                **batch.model_inputs(), labels=batch.labels, loss="nll", token_outputs=outputs, skip_logits=True
            )
        stats: TokenStats = output.token_stats
        return stats


@dataclass(frozen=True)
class Materialised:
    """Through the model's own `[B, T, V]` logits, as a training script without logitless does it."""

    loss: Loss
    device: torch.device
    bf16: bool

    def objective(self, model: Any, batch: Batch, normalizer: float) -> Objective:
        if self.loss == NLL():  # the loss that comes with the model
            count = torch.tensor(normalizer, device=self.device)
            with autocast(self.device, self.bf16):
                output = model(**batch.model_inputs(), labels=batch.labels, num_items_in_batch=count)
            return Objective(output.loss)
        total = objective_of_stats(self.loss, self.stats(model, batch, self.loss.outputs), batch)
        return total._replace(loss=total.loss / normalizer)

    def stats(self, model: Any, batch: Batch, outputs: tuple[str, ...]) -> TokenStats:
        with autocast(self.device, self.bf16):
            logits = model(**batch.model_inputs()).logits.float()
        return stats_of_logits(logits, shifted(batch.labels), outputs)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Targets: position t holds the label of t + 1, the last none."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def stats_of_logits(logits: torch.Tensor, targets: torch.Tensor, outputs: tuple[str, ...]) -> TokenStats:
    """`TokenStats` of full logits `[B, T, V]` with 0 at ignored targets."""
    counts = targets != IGNORED
    logprobs = logits.log_softmax(-1)
    values = {
        "logprob": lambda: logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0],
        "lse": lambda: logits.logsumexp(-1),
        "entropy": lambda: -(logprobs.exp() * logprobs).sum(-1),
        "mean_logit": lambda: logits.mean(-1),
        "correct": lambda: (logits.argmax(-1) == targets).float(),
    }
    return TokenStats(**{name: torch.where(counts, values[name](), 0.0) for name in outputs})


def objective_of_stats(loss: Loss, stats: TokenStats, batch: Batch) -> Objective:
    """The summed loss of a batch from its statistics; `batch.loss_inputs` holds the loss's inputs."""
    counts = shifted(batch.labels) != IGNORED
    inputs = [batch.loss_inputs[name] for name in loss.inputs]
    if loss.level == "pair":
        ours, theirs = (_sequences(loss, logprob, counts, batch) for logprob in (stats.logprob, *inputs))
        result = loss(*ours.chunk(2), *theirs.chunk(2))
        return Objective(result.loss.sum(), result)
    extra: dict[str, Any] = {}
    if loss.level == "sequence":
        extra = {"mask": counts, "sequence": sequence_ids(batch)}
    return Objective(torch.where(counts, loss(stats, *inputs, **extra), 0.0).sum())


def sequence_ids(batch: Batch) -> torch.Tensor | None:
    """`[B, T]` int64 numbers of the sequences that share rows, or None where a row is a sequence."""
    if batch.cu_seqlens is None:
        return None
    lengths = batch.cu_seqlens.long().diff()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths).view_as(batch.labels)


def _sequences(loss: Loss, logprob: torch.Tensor | None, counts: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probabilities of whole sequences, summed or averaged as the loss takes them."""
    assert logprob is not None
    average = bool(getattr(loss, "average_logprob", False))
    sequence = sequence_ids(batch)
    if sequence is None:
        return sequence_logprob(logprob, mask=counts, average=average)
    assert batch.cu_seqlens is not None
    return sequence_logprob(
        logprob.flatten(),
        sequence=sequence.flatten(),
        num_sequences=len(batch.cu_seqlens) - 1,
        mask=counts.flatten(),
        average=average,
    )
