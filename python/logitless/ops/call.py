"""One call of an op: its tensors checked, cast and flattened, and how it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.interface import Needs
from ..parallel import VocabularyGroup
from ..types import Head, Options
from . import checks
from .registered.shared import Execution


class Call(NamedTuple):
    """One call, checked, cast and flattened."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor | None  # [N] int64, or [N, K] with -1 for an absent place
    options: Options

    def listed(self) -> bool:
        """Whether every token lists several ids. (Dynamo of torch 2.9 has no rule for a named tuple's property.)"""
        return self.targets is not None and self.targets.dim() > 1

    def group(self) -> VocabularyGroup:
        """The processes that share the head, where there are some."""
        assert self.options.group is not None
        return self.options.group

    def needs(self) -> Needs:
        """Which of hidden, weight and bias want a gradient here and now."""
        tensors = (self.hidden, self.weight, self.options.bias)
        hidden, weight, bias = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
        return Needs(hidden, weight, bias)

    def trains_head(self) -> bool:
        """Whether the head wants a gradient here and now."""
        needs = self.needs()
        return needs.weight or needs.bias

    def approximates(self) -> bool:
        """Whether there is a gradient, and an approximate one was asked for."""
        return self.options.approximates() and any(self.needs())

    def backend(self) -> str:
        """The name of the backend that takes the call; an error where one was asked for that cannot."""
        if self.approximates():
            return backends.pick_approximate(self.options.backend, self.options.backward, self.hidden)
        return backends.pick(self.options.backend, self.hidden)

    def execution(self, exact: str) -> Execution:
        """How the op runs; `exact` is its strategy where no approximate one was asked for."""
        options, approximates = self.options, self.approximates()
        strategy = options.backward if approximates else exact
        tolerance = float(options.tail_tolerance) if approximates else 0.0
        return Execution(self.backend(), strategy, tolerance, options.chunk_bytes, options.chunk_dtype)

    def tokens_at_once(self) -> int:
        """The longest group of tokens that a single pass keeps whole."""
        backend, options, head = backends.BACKENDS[self.backend()], self.options, self.head()
        if self.approximates():
            return backend.approximate(options.backward).tokens_at_once(self.hidden, head, options)
        return backend.tokens_at_once(self.hidden, head, options)

    def bytes_of_chunk(self, tokens: int) -> int:
        """The `chunk_bytes` that makes chunks of so many tokens at most."""
        return tokens * backends.BACKENDS[self.backend()].bytes_of_token(self.hidden, self.head(), self.options)

    def head(self) -> Head:
        """The head with its options."""
        options = self.options
        return Head(self.weight, options.bias, options.logit_scale, options.softcap, options.temperature)

    def fits_one_chunk(self, outputs: tuple[str, ...]) -> bool:
        """Whether one product makes a bfloat16 head's gradient in a single pass, so that it may be rounded at once."""
        halves = self.weight.dtype == torch.bfloat16 and self.needs().weight
        if not halves or self.approximates() or "mean_logit" in outputs or self.options.grad_out is not None:
            return False
        return backends.BACKENDS[self.backend()].finishes_gradients and len(self.hidden) <= self.tokens_at_once()


def prepare_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    options: Options,
    *,
    lists: bool = False,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
) -> Call:
    """Checks and normalises the arguments that every op shares, and follows autocast as `F.linear` does.

    Args:
        lists: the targets may be `[..., K]`.
        names: the caller's names of the tensors, for messages.
    """
    if options.grad_out is not None:  # of the weight before a cast
        checks.check_tensor(names[1], weight, "[V, H]", 2)
        checks.check_grad_out(options, weight)
    if isinstance(hidden, Tensor) and _autocasts(hidden.device.type):
        device = hidden.device.type
        hidden, weight = _autocast(hidden, device), _autocast(weight, device)
        options = replace(options, bias=None if options.bias is None else _autocast(options.bias, device))
    if options.group is not None:
        checks.check_tensor(names[1], weight, "[V, H]", 2)
        options = replace(options, group=_group_of(options.group, weight, names[1]))
    checks.check_order(hidden, weight, targets)
    checks.check_head(hidden, weight, options, names)
    if targets is not None:
        checks.check_targets("targets", targets, hidden, lists=lists)
        targets = flat_ids(targets, hidden, options.ignore_index)
    return Call(hidden.reshape(-1, hidden.shape[-1]), weight, targets, options)


def _group_of(group: Any, weight: Tensor, name: str) -> VocabularyGroup | None:
    """The processes that share the head's rows; None where this one has them all."""
    if not isinstance(group, VocabularyGroup):
        group = VocabularyGroup.of(group, weight)
    if group.rows[group.rank] != len(weight):
        expected = f"[{group.rows[group.rank]}, H] as group has it for rank {group.rank}"
        raise ValueError(f"{name}: expected shape {expected}, got {list(weight.shape)}")
    return group if len(group.rows) > 1 else None


def flat_ids(ids: Tensor, hidden: Tensor, ignore_index: int) -> Tensor:
    """The ids of all tokens, `[N]` int64, or lists of them `[N, K]` with -1 for an absent place."""
    listed = ids.shape[hidden.dim() - 1 :]  # [K], or nothing
    flat = ids.reshape(-1, *listed).long()
    return flat.masked_fill(flat == ignore_index, -1) if listed else flat


def _autocasts(device: str) -> bool:
    # Dynamo of torch 2.11 has no rule for the question whether a device knows autocast at all.
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def _autocast(x: Tensor, device: str) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))
