"""Settings of SFT losses that are found rather than given: `IDFT.mix` at a step, `SEDSFT.min_entropy` of some data."""

from __future__ import annotations

from torch import Tensor

__all__ = ["idft_mix", "sed_sft_min_entropy"]


def sed_sft_min_entropy(entropy: Tensor, *, share: float = 0.3) -> float:
    """`SEDSFT.min_entropy` above which the given share of the tokens lies, of a sample of validation texts.

    Args:
        entropy: `[N]`, of the tokens that count, before training; the authors take 100 texts.
        share: in (0, 1); 0.3, with which the authors' command marks tokens (by low top-k mass, here by high entropy).

    Raises:
        ValueError: no token, or a share that is not in (0, 1).

    Source: arXiv 2602.07464's code, with entropy in place of its top-k mass.
    """
    if entropy.dim() != 1 or not len(entropy):
        raise ValueError(f"entropy: expected the tokens' values [N], got {list(entropy.shape)}")
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number in (0, 1), got {share!r}")
    return float(entropy.sort().values[max(int((1 - share) * len(entropy)), 1) - 1])  # kthvalue is not deterministic


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
