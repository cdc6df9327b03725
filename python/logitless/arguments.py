"""The keyword arguments of `linear_loss`: their types, the checks of a loss's inputs, and the reference."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reduce
from .losses import Loss
from .losses.layout import TokenLayout, need_sequences, spread
from .losses.whole_sequence import WholeSequenceLoss
from .ops import linear_logprobs
from .ops.checks import check_constant, check_tensor
from .peers import peer_hint
from .types import Head, LossReduction, OptionKeywords

#: The inputs that `ref_hidden` stands for, and the statistic of the reference that each is.
REFERENCE_STATISTICS = {"ref_logprob": "logprob", "ref_lse": "lse"}


class LossArguments(OptionKeywords, total=False):
    """The keyword arguments of `linear_loss`, for type checkers: its own, the options, and the inputs of the losses."""

    token_weight: Tensor | None
    cu_seqlens: Tensor | None
    reduction: LossReduction | None
    normalizer: Tensor | float | None
    max_length: int | None
    among: Tensor | None
    ref_hidden: Tensor | None
    ref_head: Tensor | Head | None
    # The losses' own inputs.
    advantages: Tensor | None
    demonstration: Tensor | None
    density_ratio: Tensor | None
    desirable: Tensor | None
    draw: Tensor | None
    from_reference: Tensor | None
    group: Any  # a tensor, of a loss that reads it; else the option of that name
    log_normalizer: Tensor | None
    negative: Tensor | None
    nll_weight: Tensor | None
    old_logprob: Tensor | None
    policy_weight: Tensor | None
    quality: Tensor | None
    ref_logprob: Tensor | None
    ref_lse: Tensor | None
    reference_point: Tensor | None
    reward: Tensor | None
    reward_shift: Tensor | None
    sampling_logprob: Tensor | None
    sft_logprob: Tensor | None
    teacher_logprob: Tensor | None
    teacher_tail: Tensor | None
    token_power: Tensor | None


def check_level(loss: Loss, token_weight: Tensor | None, reduction: str) -> None:
    """Refuses settings of per-token losses for a loss of whole sequences."""
    if not isinstance(loss, WholeSequenceLoss):
        return
    if token_weight is not None:
        raise ValueError(f"token_weight: a {loss.level} loss ({loss.name}) has no per-token losses to weight")
    if reduction in reduce.OF_SEQUENCES:
        raise ValueError(f"reduction: a {loss.level} loss ({loss.name}) has no per-token losses, got {reduction!r}")


def check_lists(loss: Loss, hidden: Tensor, targets: Tensor, among: Tensor | None, ref_hidden: Tensor | None) -> None:
    """Raises unless the targets are lists where the loss reads lists, and it can be had `among` listed ids."""
    if loss.lists != (targets.dim() == hidden.dim()):
        expected = "[..., K], several ids a token" if loss.lists else "[...], one id a token"
        raise ValueError(f"targets: {loss.name!r} expects shape {expected}, got {list(targets.shape)}")
    if among is None:
        return
    if loss.lists or loss.compares_distributions:
        raise ValueError(f"among: {loss.name!r} reads more than the targets' log-probs, and does not take it")
    if ref_hidden is not None:
        raise ValueError("among: goes with ref_logprob, which says what it is renormalised over, not with ref_hidden")


def loss_inputs(
    loss: Loss,
    given: Mapping[str, Any],
    tokens: TokenLayout,
    device: torch.device,
    listed: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss's inputs, checked and spread to one value a token; `sequence_inputs` stay as they are.

    `listed [..., K]`, of a loss of lists, has the places that hold an id; its `inputs` are -inf elsewhere.

    Raises:
        TypeError, ValueError: an unknown input, a missing one that is not optional, or one of a wrong type or shape;
            flat tokens without `cu_seqlens`, if the loss looks at sequences.
    """
    needed = (*loss.inputs, *loss.sequence_inputs)
    known = (*needed, *loss.optional_inputs)
    for name in given:
        if name not in known:
            takes = ", ".join(known) or "none"
            own = f"; a hyper-parameter: losses.{type(loss).__name__}({name}=...)"
            hint = own if name in vars(loss) else peer_hint(name)
            raise TypeError(f"linear_loss: {loss.name!r} has no input or option {name!r}; its inputs are {takes}{hint}")
    per_sequence = f"[{tokens.sequences}], one number a sequence"
    shapes = dict.fromkeys(known, f"{list(tokens.mask.shape)}, or {per_sequence}")
    shapes |= dict.fromkeys(loss.sequence_inputs, per_sequence)
    for name in needed:
        if given.get(name) is None:
            other = ", or ref_hidden" if name in REFERENCE_STATISTICS else ""
            raise ValueError(f"{name}: {loss.name!r} needs it, a tensor {shapes[name]}{other}, got None")
    present = [name for name in known if given.get(name) is not None]
    constants = {name: _constant(name, given[name], shapes[name], device) for name in present}
    inputs = {}
    for name, x in constants.items():
        if listed is not None and name in loss.inputs:
            inputs[name] = _of_list(name, x, listed)
        else:
            inputs[name] = x if name in loss.sequence_inputs else spread(name, x, tokens)
    if loss.of_sequences:
        need_sequences(tokens, f"a loss of whole sequences ({loss.name})")
    for name in loss.sequence_inputs:
        if inputs[name].shape not in ((), (tokens.sequences,)):
            raise ValueError(f"{name}: expected {per_sequence}, or [], one for all, got {list(inputs[name].shape)}")
    return inputs


def _of_list(name: str, value: Tensor, listed: Tensor) -> Tensor:
    """An input with one value for each listed id, -inf at an absent place."""
    if value.shape != listed.shape:
        raise ValueError(f"{name}: expected shape {list(listed.shape)} like targets, got {list(value.shape)}")
    return value.masked_fill(~listed, -math.inf)


def _constant(name: str, value: object, shape: str, device: torch.device) -> Tensor:
    """A constant tensor on the tokens' device; `shape` is for the message."""
    check_tensor(name, value, shape)
    assert isinstance(value, Tensor)
    check_constant(name, value, device)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The reference


@dataclass(frozen=True)
class ReferenceStates:
    """The reference's hidden states and head: constants, also where the head is the model's own."""

    hidden: Tensor
    head: Head

    def statistics(self, names: Iterable[str], targets: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs of these names, of the targets' shape: a forward pass without a gradient."""
        expected = [*targets.shape, self.head.weight.shape[1]]
        if list(self.hidden.shape) != expected:
            got = list(self.hidden.shape)
            raise ValueError(f"ref_hidden: expected shape {expected} to fit targets and head, got {got}")
        shared = {name: options[name] for name in _FORWARD_OPTIONS if name in options}
        fields = {name: REFERENCE_STATISTICS[name] for name in names}
        with torch.no_grad():
            stats = linear_logprobs(
                self.hidden, targets=targets, outputs=tuple(fields.values()), **self.head._asdict(), **shared
            )
        return {name: getattr(stats, field) for name, field in fields.items()}


#: The options of a forward pass that are not those of a head.
_FORWARD_OPTIONS = ("ignore_index", "backend", "chunk_bytes", "chunk_dtype", "group")


def reference_of(
    loss: Loss,
    names: Collection[str],
    given: Mapping[str, Any],
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_head: Tensor | Head | None,
    options: Mapping[str, Any],
) -> ReferenceStates | None:
    """The reference of a call, checked; None if there is none. `names` are the inputs that it stands for."""
    argument = "ref_hidden" if ref_hidden is not None else "ref_head"
    if ref_hidden is not None or ref_head is not None:
        if not (names or loss.compares_distributions):
            raise ValueError(f"{argument}: {loss.name!r} reads nothing of a reference; its inputs are {loss.inputs}")
        for name in names:
            if name in given:
                raise ValueError(f"{name}: expected either it or ref_hidden, got it and {argument}")
    if ref_hidden is None:
        if loss.compares_distributions or ref_head is not None:
            raise ValueError(f"ref_hidden: {loss.name!r} needs the reference's hidden states, got None")
        return None
    own = {name: options[name] for name in Head._fields if name in options}
    head = ref_head if isinstance(ref_head, Head) else Head(weight if ref_head is None else ref_head, **own)
    check_tensor("ref_head", head.weight, "[V, H'], or a Head", 2)
    check_tensor("ref_hidden", ref_hidden, f"[..., {head.weight.shape[1]}]")
    bias = None if head.bias is None else head.bias.detach()
    return ReferenceStates(ref_hidden.detach(), head._replace(weight=head.weight.detach(), bias=bias))
