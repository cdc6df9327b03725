"""The loss of a batch and the per-token statistics of a batch: with logitless, and with materialised logits.

A loss is summed here and divided by a `normalizer` that the caller counted over all micro-batches and processes with
`loss_count`: tokens, sequences or pairs, as the loss's own reduction has it.

Runs train with `PatchedEngine`: the patched model computes both from hidden states. They are compared with
`MaterialisedEngine`: the unpatched model returns its logits, and the same losses are computed from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from logitless import reduce, reference
from logitless.arguments import loss_inputs
from logitless.integrations.scoring import dense_head
from logitless.losses import NLL, Loss
from logitless.losses.layout import TokenLayout, token_layout
from logitless.losses.whole_sequence import WholeSequenceLoss
from logitless.training.collate import Batch
from logitless.training.columns import TARGET_IDS, TOKEN_WEIGHT
from logitless.training.config import TrainOptions
from logitless.training.examples import IGNORED
from logitless.training.sharding import gathered_weights, is_sharded, whole_weight
from logitless.types import TokenStats


class Objective(NamedTuple):
    """The summed loss over a normalizer, and the metrics of a loss of whole sequences, one a pair or a sequence."""

    loss: torch.Tensor
    result: Any = None


class Engine(Protocol):
    """How losses and statistics are computed."""

    def objective(self, model: Any, batch: Batch, normalizer: float) -> Objective:
        """The loss of a batch divided by `normalizer`, differentiable."""
        ...

    def stats(self, model: Any, batch: Batch, outputs: tuple[str, ...]) -> TokenStats:
        """Statistics `[B, T]`; position t is about predicting token t + 1."""
        ...


def engine_of(options: TrainOptions, loss: Loss, device: torch.device) -> PatchedEngine | MaterialisedEngine:
    """The engine that the options ask for."""
    engine = MaterialisedEngine if options.backend == "materialised" else PatchedEngine
    length, temperature = options.max_length, 1.0
    if options.samples:
        length, temperature = options.max_completion_length, options.temperature
    return engine(loss, device, computes_in_bf16(options, device), length, temperature)


def computes_in_bf16(options: TrainOptions, device: torch.device) -> bool:
    """Whether the forward pass runs under bfloat16 autocast."""
    if options.bf16 is not None:
        return options.bf16
    return device.type == "cuda" and options.dtype == "float32" and torch.cuda.is_bf16_supported()


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """The precision that the forward pass computes in."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


@dataclass(frozen=True)
class PatchedEngine:
    """Through a model that `logitless.patch` was applied to."""

    loss: Loss
    device: torch.device
    bf16: bool
    max_length: int = 1  # of losses that divide by a constant length
    temperature: float = 1.0  # of the policy

    def objective(self, model: Any, batch: Batch, normalizer: float) -> Objective:
        flat = reads_sequences(self.loss) and batch.cu_seqlens is not None
        boundaries = {"cu_seqlens": batch.cu_seqlens} if flat else {}
        with autocast(self.device, self.bf16):
            output = model(
                **forward_inputs(model, batch),
                **boundaries,
                **self._targets(batch),
                num_items_in_batch=torch.tensor(normalizer, device=self.device),
                loss=self.loss,
                loss_inputs=_inputs(self.loss, batch, self.max_length) or None,
                skip_logits=True,
                temperature=None if self.temperature == 1 else self.temperature,
            )
        return Objective(output.loss, output.loss_result)

    def _targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The labels; of a loss of lists each token's ids, and none where the token does not count."""
        if not self.loss.lists:
            return {"labels": batch.labels}
        ignored = shifted(batch.labels) == IGNORED
        return {"shift_labels": batch.loss_inputs[TARGET_IDS].masked_fill(ignored[..., None], IGNORED)}

    def stats(self, model: Any, batch: Batch, outputs: tuple[str, ...]) -> TokenStats:
        with autocast(self.device, self.bf16):
            output = model(
                **forward_inputs(model, batch),
                labels=batch.labels,
                loss="nll",
                token_outputs=outputs,
                skip_logits=True,
                temperature=None if self.temperature == 1 else self.temperature,
            )
        stats: TokenStats = output.token_stats
        return stats

    def hidden(self, model: Any, batch: Batch) -> dict[str, Any]:
        """The inputs of a distribution loss: the model's hidden states and its head, as the reference's."""
        with autocast(self.device, self.bf16):
            output = model(**forward_inputs(model, batch), hidden_only=True)
        ends = list(model.get_output_embeddings().parameters())
        with gathered_weights(ends):
            head = dense_head(model)
            head = head._replace(temperature=head.temperature * self.temperature)
            if is_sharded(model):  # what was gathered is given back before the loss has used it
                bias = None if head.bias is None else whole_weight(head.bias).clone()
                head = head._replace(weight=whole_weight(head.weight).clone(), bias=bias)
        return {"ref_hidden": output.logits, "ref_head": head}


@dataclass(frozen=True)
class MaterialisedEngine:
    """Through the model's own `[B, T, V]` logits, as a training script without logitless does it."""

    loss: Loss
    device: torch.device
    bf16: bool
    max_length: int = 1
    temperature: float = 1.0

    def objective(self, model: Any, batch: Batch, normalizer: float) -> Objective:
        plain = self.temperature == 1 and TOKEN_WEIGHT not in batch.loss_inputs
        if self.loss == NLL() and plain:  # the loss that comes with the model
            count = torch.tensor(normalizer, device=self.device)
            with autocast(self.device, self.bf16):
                output = model(**forward_inputs(model, batch), labels=batch.labels, num_items_in_batch=count)
            return Objective(output.loss)
        logits = self._logits(model, batch)
        if self.loss.stats_temperature != 1.0:
            logits = logits / self.loss.stats_temperature
        stats = stats_of_logits(logits, shifted(batch.labels), self.loss.outputs)
        return objective_of_stats(self.loss, stats, batch, normalizer, self.max_length)

    def stats(self, model: Any, batch: Batch, outputs: tuple[str, ...]) -> TokenStats:
        return stats_of_logits(self._logits(model, batch), shifted(batch.labels), outputs)

    def _logits(self, model: Any, batch: Batch) -> torch.Tensor:
        with autocast(self.device, self.bf16):
            logits: torch.Tensor = model(**forward_inputs(model, batch)).logits
        return logits.float() / self.temperature if self.temperature != 1 else logits.float()


def forward_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    """A batch as the model's forward takes it, labels apart, and without the cache, which is for generation.

    The cache is turned off here rather than in the configuration, which is saved as it came.
    """
    plain = getattr(model, "module", model)  # of DistributedDataParallel
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    off = {"use_cache": False} if "use_cache" in inspect.signature(plain.forward).parameters else {}
    return {**batch.model_inputs(), **off}


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Targets: position t holds the label of t + 1, the last none."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def stats_of_logits(logits: torch.Tensor, targets: torch.Tensor, outputs: tuple[str, ...]) -> TokenStats:
    """`TokenStats` of full logits `[B, T, V]`, as the reference defines them, with 0 at ignored targets."""
    stats = reference.statistics(logits.flatten(0, 1), targets.clamp(min=0).flatten(), outputs)
    counts = targets != IGNORED
    return TokenStats(*(None if x is None else torch.where(counts, x.view(targets.shape), 0.0) for x in stats))


def objective_of_stats(
    loss: Loss, stats: TokenStats, batch: Batch, normalizer: float = 1.0, max_length: int = 1
) -> Objective:
    """The summed loss of a batch over `normalizer`, from its statistics; `batch.loss_inputs` holds the inputs."""
    inputs, settings = batch_inputs(loss, batch, max_length)
    out = loss.evaluate(stats, batch_layout(batch), inputs, reduction=loss.reduction, normalizer=normalizer, **settings)
    return Objective(out) if isinstance(out, torch.Tensor) else Objective(out.loss, out)


def batch_inputs(loss: Loss, batch: Batch, max_length: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The loss's inputs as `loss.evaluate` takes them, and the settings that it takes beside them."""
    given = _inputs(loss, batch, max_length)
    settings: dict[str, Any] = {name: given.pop(name, None) for name in (TOKEN_WEIGHT, "max_length")}
    return loss_inputs(loss, given, batch_layout(batch), batch.labels.device), settings


def loss_count(loss: Loss, batch: Batch, stats: Callable[[], TokenStats]) -> int:
    """What the loss of a batch is divided by: its pairs, its sequences, or its tokens that count.

    `stats` is asked by a loss that counts by its statistics.
    """
    tokens = batch_layout(batch)
    if isinstance(loss, WholeSequenceLoss):
        return loss.count_groups(tokens.sequences)
    counted = tokens.mask
    if loss.divided_by is not None:
        kept = loss.divided_by(None, batch.loss_inputs)
        kept = loss.divided_by(stats(), batch.loss_inputs) if kept is None else kept
        assert kept is not None
        counted = counted & kept.to(counted.device)
    if loss.reduction not in reduce.OF_SEQUENCES:
        return int(counted.sum())
    assert tokens.sequence is not None
    return len(tokens.sequence[counted].unique())


def batch_layout(batch: Batch) -> TokenLayout:
    """The tokens of a batch that count, and their sequences."""
    return token_layout(shifted(batch.labels) != IGNORED, batch.cu_seqlens)


def reads_sequences(loss: Loss) -> bool:
    """Whether the loss has to know where sequences begin."""
    return not (loss.token_wise or loss.compares_distributions) or loss.reduction in reduce.OF_SEQUENCES


def _inputs(loss: Loss, batch: Batch, max_length: int) -> dict[str, Any]:
    """The loss's inputs of the batch; an input of a whole sequence is taken from its first token."""
    inputs: dict[str, Any] = {name: x for name, x in batch.loss_inputs.items() if name != TARGET_IDS}
    for name in loss.sequence_inputs:
        if inputs[name].dim():  # one number of the whole step stays one
            first = inputs[name].flatten()
            inputs[name] = inputs[name][:, 0] if batch.cu_seqlens is None else first[batch.cu_seqlens[:-1].long()]
    if loss.reduction == "constant_length":
        inputs["max_length"] = max_length
    return inputs
