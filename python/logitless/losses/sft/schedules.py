"""The schedule of `IDFT.mix` over training."""

from __future__ import annotations

__all__ = ["idft_mix"]


def idft_mix(step: int, total_steps: int, *, warmup: float = 0.2, transition: float = 0.1) -> float:
    """`IDFT.mix` at a step: 0 for the share `warmup` of all steps, then linear to 1 over the share `transition`.

    Source: the code of arXiv 2602.12222, with its defaults.

    Raises:
        ValueError: a negative step, no steps in all, or shares that are negative or exceed 1 together.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"idft_mix: expected 0 <= step and 1 <= total_steps, got {step} and {total_steps}")
    if warmup < 0 or transition < 0 or warmup + transition > 1:
        expected = "shares of the steps, at most 1 together"
        raise ValueError(f"idft_mix: warmup and transition: expected {expected}, got {warmup} and {transition}")
    done = step - warmup * total_steps
    return min(max(done / max(transition * total_steps, 1.0), 0.0), 1.0)
