"""Zeros in the place of denormal numbers, in what a CPU multiplies.

A confident model's probabilities fall below 1.2e-38, the least normal number of float32 and bfloat16. What is below it
is denormal, and an Intel CPU leaves its fast path for each product with such a number. Next to the 1 of a row's largest
exponential it is below any rounding, so it is 0 here; float64 has its own least normal number. A GPU multiplies
denormal numbers at full speed: on one these functions leave them as they are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def exponential(x: Tensor, *, inplace: bool = False) -> Tensor:
    """`exp(x)`, and 0 where that is denormal; NaN stays NaN. The cut is made in x: `exp` is slow, too, below it."""
    if x.device.type != "cpu":
        return x.exp_() if inplace else x.exp()
    lowest = math.log(2 * torch.finfo(x.dtype).tiny)  # twice: an exponential is right to some ulps
    return F.threshold(x, lowest, -math.inf, inplace=inplace).exp_()


def drop_denormals_(x: Tensor) -> Tensor:
    """Replaces denormal entries, and the least normal number, by 0; NaN stays NaN."""
    return torch.hardshrink(x, lambd=torch.finfo(x.dtype).tiny, out=x) if x.device.type == "cpu" else x
