"""Losses that a host computes itself, after the model's forward: from hidden states, inside the head's own call.

Such a host takes the labels out of the batch, so that the model returns logits. A patched model returns hidden states
in their place (`hidden_only=True`), and the functions here turn them into the host's loss.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import losses
from ..losses import Loss
from ..ops import linear_top_k
from ..types import TokenStats
from .families import head_rule
from .heads import find_head, product
from .hosts import UnsupportedHostError
from .scoring import Patch, Request, score_hidden
from .support import causal_lm
from .transformers import patch, unpatch


def inner_model(model: Any) -> nn.Module:
    """The causal LM inside PEFT's and the launchers' wrappers (DDP, a DeepSpeed engine, a compiled model)."""
    while type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine", "FullyShardedDataParallel"):
        model = model.module
    return causal_lm(getattr(model, "_orig_mod", model))


def is_patched(model: Any) -> bool:
    """Whether the causal LM inside is patched."""
    return "_logitless_patch" in inner_model(model).__dict__


def patch_of(model: Any) -> Patch:
    """The state of a patched model."""
    state: Patch = inner_model(model)._logitless_patch  # type: ignore[assignment]
    return state


def needs_tokens_alone(loss: Loss) -> bool:
    """Whether a host can train a loss: its batches hold tokens alone, and the count that it divides by is of tokens."""
    plain = loss.token_wise and not loss.lists and loss.divided_by is None and loss.reduction == "mean"
    return plain and not loss.inputs and not loss.sequence_inputs


def check_host_loss(loss: Loss, host: str) -> Loss:
    """The loss; raises UnsupportedHostError unless it `needs_tokens_alone`."""
    if not needs_tokens_alone(loss):
        raise UnsupportedHostError(
            f"loss={loss.name!r}: {host} has batches of tokens and a count of them, and this loss needs more than that"
        )
    return loss


@contextmanager
def patched_or_not(*models: Any, **options: Any) -> Iterator[None]:
    """Patches models that are not patched yet. If the block raises, these are as before."""
    done: list[Any] = []
    try:
        for model in models:
            if not is_patched(model):
                done.append(patch(inner_model(model), **options))
        yield
    except BaseException:
        for model in done:
            unpatch(model)
        raise


def loss_of_hidden(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    loss: Loss | str = "nll",
    *,
    num_items_in_batch: Tensor | float | None = None,
    token_outputs: tuple[str, ...] = (),
    **loss_inputs: Any,
) -> dict[str, Any]:
    """The loss of hidden states that a patched model has returned, as its forward would have computed it.

    Args:
        model: the patched model, in any wrapper.
        hidden: `[B, T, H]`, the output of `hidden_only=True`.
        labels: `[B, T]`, not shifted; -100 does not count.
        loss, num_items_in_batch, token_outputs: as in the patched forward.
        **loss_inputs: what `loss_inputs` of the patched forward holds.

    Returns:
        The fields `loss`, and `token_stats` and `loss_result` where there are such.
    """
    request = Request(
        {},
        labels=labels,
        num_items_in_batch=num_items_in_batch,
        token_outputs=token_outputs,
        loss_inputs=loss_inputs,
    )
    return _scored(model, hidden, request, losses.get(loss))


def stats_of_hidden(
    model: Any, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...], temperature: float = 1.0
) -> TokenStats:
    """The statistics of hidden states `[B, T, H]` that a patched model has returned, for targets `[B, T]` in place."""
    request = Request({}, shift_labels=targets, token_outputs=outputs, temperature=temperature)
    stats: TokenStats = _scored(model, hidden, request, losses.get("nll"))["token_stats"]
    return stats


def _scored(model: Any, hidden: Tensor, request: Request, loss: Loss) -> dict[str, Any]:
    state = patch_of(model)
    if state.check:
        state.forward.confirm()
    return score_hidden(inner_model(model), state, request, loss, hidden)


@torch.no_grad()
def top_entropy(model: Any, hidden: Tensor, labels: Tensor, k: int) -> Tensor:
    """The entropy of each next token's k likeliest ids, renormalised, `[B, T]` in nats; 0 where the label is ignored.

    LLaMA-Factory and Axolotl weight tokens by it (EAFT). It takes a product with the vocabulary of its own.
    """
    inner = inner_model(model)
    head, rule = find_head(inner), head_rule(inner)
    counts = F.pad(labels, (0, 1), value=-100)[..., 1:] != -100

    def entropy(rows: Tensor) -> dict[str, Tensor]:
        rows, weight, bias, group = product(head.inner, rows).cut(rule.vocabulary)
        scale: Any = {"logit_scale": rule.transform.logit_scale, "softcap": rule.transform.softcap}
        top = linear_top_k(rows, weight, k, bias=bias, group=group, **scale).logprob.log_softmax(-1)
        return {"entropy": -(top.exp() * top).sum(-1)}

    found = head.call(hidden[counts], entropy)["entropy"]
    return found.new_zeros(counts.shape).masked_scatter(counts, found)


def drop_logits(output: Any) -> None:
    """Removes hidden states from a Transformers output's `logits`, where a host would take them for logits."""
    output.logits = None
    if "logits" in output:
        OrderedDict.__delitem__(output, "logits")  # ModelOutput forbids its own


def read_hidden_states(trainer: Any, function: Callable[..., Tensor]) -> None:
    """Makes a Transformers `Trainer` compute its own loss from hidden states: its `compute_loss_func` without logits.

    `function(model, hidden, labels, num_items_in_batch)` takes the place of `compute_loss_func`. Evaluation with
    metrics needs logits, and goes the host's own way.
    """
    own_compute, own_function = trainer.compute_loss, trainer.compute_loss_func

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training or trainer.compute_metrics is None:
            inputs = {**inputs, "hidden_only": True}
        return own_compute(model, inputs, *args, **kwargs)

    def loss_function(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        model = trainer.model
        if not (model.training or trainer.compute_metrics is None):
            logits_loss: Tensor = own_function(outputs, labels, num_items_in_batch=num_items_in_batch)
            return logits_loss
        with trainer.accelerator.autocast():
            loss = function(model, outputs.logits, labels, num_items_in_batch)
        drop_logits(outputs)
        return loss

    trainer.compute_loss, trainer.compute_loss_func = compute_loss, loss_function
