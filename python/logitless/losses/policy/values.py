"""The loss of a value function, a head of one number per token beside the policy: no vocabulary is in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reduce

__all__ = ["value_loss"]


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    mask: Tensor | None = None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """PPO's clipped value loss, `max((V - R)^2, (V_clipped - R)^2) / 2`, averaged over the tokens that count.

    `V_clipped` is V held within `clip` of `old_values`. A value that has left that range towards its return gets no
    gradient; one that has left it the other way is still drawn back.

    Args:
        values: `[...]` per token, of the value function, with its graph.
        returns: what it should say, `generalized_advantages(...).returns`. Detached.
        old_values: of the value function that the advantages were made with. Detached.
        clip: positive; 0.2 is NeMo-RL's recipe's and TRL's, verl and OpenRLHF have 0.5. None: no clip, half the squared
            error, and no `old_values`.
        mask: bool, the tokens that count; all by default. What stands behind others is not looked at.
        normalizer: the number of tokens of the global batch; this batch's own by default.

    Returns:
        One number, 0 where no token counts.

    Raises:
        ValueError: a shape or `clip` does not fit; `old_values` and `clip` do not come together.

    Source: arXiv 1707.06347's implementations, as in verl, NeMo-RL and OpenRLHF.
    """
    if (old_values is None) != (clip is None):
        given = "absent" if old_values is None else "given"
        raise ValueError(f"old_values, clip: expected both or neither, got old_values {given} and {clip=}")
    if clip is not None and not 0 < clip < float("inf"):
        raise ValueError(f"clip: expected a positive number or None, got {clip!r}")
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    for name, x in (("returns", returns), ("old_values", old_values), ("mask", mask)):
        if x is not None and x.shape != values.shape:
            raise ValueError(f"{name}: expected shape {list(values.shape)} like values, got {list(x.shape)}")
    reduce.check("mean", normalizer)
    error = torch.where(mask, values - returns.detach(), 0.0).square()
    if old_values is not None and clip is not None:
        held = torch.clamp(values, old_values.detach() - clip, old_values.detach() + clip)
        error = torch.maximum(error, torch.where(mask, held - returns.detach(), 0.0).square())
    return reduce.apply(error / 2, mask, reduce.rule("mean", mask, normalizer=normalizer))
