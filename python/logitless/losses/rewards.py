"""Losses of reward models, which read scores and no log-probabilities: plain functions, not losses of the registry.

A score head has one column, or two, so that there is no vocabulary to save: the scores come from any model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

__all__ = ["bradley_terry_loss", "process_reward_loss"]


def bradley_terry_loss(
    chosen_reward: Tensor, rejected_reward: Tensor, margin: Tensor | None = None, *, center: float = 0.0
) -> Tensor:
    """Bradley-Terry loss of pairs: `-logsigmoid(chosen - rejected - margin) + center (chosen + rejected)^2`.

    The chance that the chosen answer wins is `sigmoid(chosen - rejected)`, which a constant added to all scores leaves
    as it is; `center` holds their mean at 0. Any finite scores give a finite loss and gradient (the square as far as
    its dtype goes). OpenRLHF's `LogExpLoss`, `log(1 + exp(rejected - chosen))`, is this loss without a margin.

    Args:
        chosen_reward, rejected_reward: `[B]`, a scalar score of each answer; half precision is computed in float32.
        margin: `[B]` by how much the chosen answer should lead, in the unit of the scores, a constant; Llama 2 derives
            it from how clear the annotators' preference was. None is 0.
        center: not negative; 0, off, by default. 0.01 is what its paper and TRL recommend.

    Returns:
        `[B]`, one value a pair; take their mean. The accuracy is that of `chosen_reward > rejected_reward`.

    Raises:
        ValueError: shapes differ, or `center` is negative or not finite.

    Source: Bradley-Terry in InstructGPT, arXiv 2203.02155, and LogExp in 2204.05862; margin in Llama 2, 2307.09288;
    centring 2312.09244; taken over from implementations (TRL's reward trainer, OpenRLHF's losses).
    """
    _check_scores("rejected_reward", rejected_reward, chosen_reward)
    if not 0 <= center < math.inf:
        raise ValueError(f"center: expected a finite number that is not negative, got {center!r}")
    chosen, rejected = _at_least_float32(chosen_reward), _at_least_float32(rejected_reward)
    lead = chosen - rejected
    if margin is not None:
        _check_scores("margin", margin, chosen_reward)
        lead = lead - margin.detach().to(lead.dtype)
    loss = -logsigmoid(lead)
    return loss if center == 0 else loss + center * (chosen + rejected).square()


def process_reward_loss(score: Tensor, label: Tensor) -> Tensor:
    """A process reward model's loss, binary cross-entropy of each step: `-y logsigmoid(s) - (1 - y) logsigmoid(-s)`.

    Args:
        score: `[...]`, s, the log-odds that a step is right, at the token that ends the step. A head of two classes
            gives `logits[..., 1] - logits[..., 0]`, whose loss is its cross-entropy. Half precision is computed in
            float32.
        label: `[...]`, y: True or 1 where the step is right, False or 0 where it is wrong, or a chance between; a
            negative label, such as -100, is no step: its value is 0 and has no gradient. A constant.

    Returns:
        `[...]`, one value a step; divide their sum by the number of steps, `(label >= 0).sum()`.

    Raises:
        ValueError: shapes differ.

    Source: arXiv 2211.14275; taken over from an implementation (TRL's PRM trainer, a head of two classes).
    """
    _check_scores("label", label, score)
    label = label.detach().to(torch.promote_types(score.dtype, torch.float32))
    counts = label >= 0
    wanted = torch.where(counts, _at_least_float32(score), 0.0)
    return torch.where(counts, binary_cross_entropy_with_logits(wanted, label, reduction="none"), 0.0)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_scores(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, that of the scores, got {list(value.shape)}")
