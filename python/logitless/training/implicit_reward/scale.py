"""From numbers to colours: nine steps from blue through none to orange, which colour-blind readers tell apart.

Steps below the centre also have a dotted line under the text, those above it a solid one, so that colour is never the
only sign. Text on every colour has a contrast of 4.5 at least, in light and in dark mode (tests/test_reward_page.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 4  # on either side of the centre
INK = {"light": "#1b1b1b", "dark": "#f2f2f2"}
#: The background of step -4 to 4 in either mode.
COLOURS = {
    "light": ("#4f9fd6", "#85bde3", "#b3d5ee", "#dcebf7", "#ffffff", "#fdead2", "#fbd09a", "#f4b05c", "#e48f1e"),
    "dark": ("#1c6ca8", "#1d5785", "#1e4463", "#1c3142", "#16181b", "#3a2a14", "#5a3c10", "#784c0b", "#8f5205"),
}
#: Share of the numbers that the scale holds; few greater ones have the colour of its ends.
HELD = 0.95


class Scale(NamedTuple):
    """Numbers from `centre - span` to `centre + span`, in steps of equal width."""

    centre: float
    span: float

    def step(self, value: float) -> int:
        """The step of a number, -4 to 4; beyond the ends it is that of the end."""
        return max(-STEPS, min(STEPS, math.floor(STEPS * (value - self.centre) / self.span + 0.5)))


def fitted(values: Tensor, *, around_zero: bool) -> Scale:
    """The scale of these numbers, `[n]` with n at least 1, around 0 or around their median."""
    values = values.double()
    centre = 0.0 if around_zero else float(values.median())
    span = float(torch.quantile((values - centre).abs(), HELD))
    return Scale(centre, span or 1.0)
