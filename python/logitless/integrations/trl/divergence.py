"""The loss of TRL's DistillationTrainer by `linear_divergence`: no logits of the student or of the teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import linear_divergence, linear_logprobs
from ...types import Head


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of student `[B, K, H]` and teacher `[B, K, H']`, as TRL's function of this name has it.

    `beta` 0 is KL(teacher | student), 1 is KL(student | teacher), and between them the mixture of GKD, `js` with
    mixture `beta`. Loss and gradients come from one sweep over the tokens that count.

    Args:
        completion_mask: `[B, K]`, not 0 where a position counts. The others cost nothing.
        num_items_in_batch: what the sum is divided by; None: the positions of this batch that count.

    Returns:
        The loss, the sum of the student's entropies without gradient, and how many positions count.
    """
    mask = completion_mask != 0
    count = mask.sum()
    student = Head(
        *_in_dtype_of(student_hidden_states, student_lm_head_weight, student_lm_head_bias),
        student_logit_scale,
        student_final_logit_softcapping,
        temperature,
    )
    teacher = Head(
        *_in_dtype_of(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias),
        teacher_logit_scale,
        teacher_final_logit_softcapping,
        temperature,
    )
    kind: dict[str, Any] = _KINDS.get(beta, {"kind": "js", "mixture": beta})
    loss = linear_divergence(
        student_hidden_states,
        student,
        teacher_hidden_states,
        teacher,
        mask=mask,
        reduction="mean",
        normalizer=count.clamp(min=1) if num_items_in_batch is None else _on(num_items_in_batch, mask),
        **kind,
    )
    return loss, _student_entropy(student_hidden_states, student, mask).sum(), count


_KINDS: dict[float, dict[str, Any]] = {0.0: {"kind": "forward_kl"}, 1.0: {"kind": "reverse_kl"}}


def _on(items: Tensor | int, mask: Tensor) -> Tensor | int:
    return items.to(mask.device) if isinstance(items, Tensor) else items


def _in_dtype_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of the hidden states, as TRL multiplies. Under autocast the ops cast all three."""
    if torch.is_autocast_enabled(hidden.device.type):
        return weight, bias
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


@torch.no_grad()
def _student_entropy(hidden: Tensor, head: Head, mask: Tensor) -> Tensor:
    """The entropies `[B, K]` of the student, 0 where a position does not count."""
    targets = mask.long() - 1  # id 0 where it counts: an entropy does not depend on the target
    entropy = linear_logprobs(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        temperature=head.temperature,
        ignore_index=-1,
        outputs=("entropy",),
    ).entropy
    assert entropy is not None
    return entropy
