"""What every loss shares: its interface, the registry by name, the checks of its hyper-parameters, the sequence sums.

A loss is a frozen dataclass: its fields are its hyper-parameters, checked when it is made, and calling it is a pure
function of per-token or per-sequence vectors. It knows nothing of heads, chunks, masks or means.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..types import TokenStats


class Loss:
    """Base class of the losses: what a loss declares about itself.

    `level` says what one number of the loss depends on, and how it is called:

    - `"token"`: the token's own statistics; `loss(stats, **inputs)` gives the unreduced per-token tensor.
    - `"sequence"`: looks along time, over a sequence or over the batch; `loss(stats, **inputs, mask=, sequence=)` gives
      a per-token tensor, 0 where `mask` is False. `sequence` (int64) numbers the tokens' sequences; None where a row
      of the last axis is one.
    - `"pair"`: two sequences; `loss(chosen, rejected, ref_chosen, ref_rejected, **extras)` of one log-probability a
      sequence (without `inputs`: `loss(chosen, rejected, **extras)`) gives a named tuple whose first field is the
      unreduced loss per pair, and whose others are detached metrics.
    - `"unpaired"`: one sequence; `loss(logprob, ref_logprob, **sequence_inputs, **extras)`, likewise.
    - `"distribution"`: the whole distribution against a reference's; `loss(stats, divergence)` of what
      `linear_divergence` gives per token, `loss(stats, 0) + divergence_weight * divergence`. Without `outputs` the loss
      is that divergence itself.

    What belongs to the reference, and every other input, is a constant: it is detached here. A loss gives an ignored
    token whatever the formula makes of it: who reduces, masks.
    """

    name: ClassVar[str]
    __call__: Callable[..., Any]

    @property
    def level(self) -> str:
        return "token"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The per-token constants needed beside the statistics, in call order, such as `("ref_logprob",)`."""
        return ()

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Those that the loss can do without."""
        return ()

    @property
    def sequence_inputs(self) -> tuple[str, ...]:
        """Constants per sequence, `[S]`, or of one number, `[]`, that an unpaired loss needs."""
        return ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The fields of `TokenStats` that it reads."""
        return ("logprob",)

    @property
    def extras(self) -> tuple[str, ...]:
        """What a pair or unpaired loss reads of a sequence beside its log-probability, passed by keyword.

        `"length"`: counted tokens, as `chosen_length`, `rejected_length` (`length`). `"weight"`: the mean of
        `logprob - log_sum_sq` over a sequence's tokens, exponentiated and detached, as `chosen_weight`, ....
        """
        return ()

    @property
    def average_logprob(self) -> bool:
        """Whether sequences' log-probabilities are averages over their tokens instead of sums."""
        return False

    @property
    def tail_weight(self) -> float:
        """What a token beyond the shorter length of its pair counts in its sequence's sum."""
        return 1.0

    @property
    def of_sequences(self) -> bool:
        """Whether a value depends on where sequences begin; a loss of the whole batch's tokens alone need not."""
        return self.level in ("sequence", "pair", "unpaired")

    @property
    def batch_wide(self) -> bool:
        """Whether a value depends on the whole batch, so that no part of it can be computed alone."""
        return False

    @property
    def linear_divergence(self) -> dict[str, Any]:
        """Keyword arguments of `logitless.linear_divergence`, for a distribution loss."""
        return {}

    @property
    def divergence_weight(self) -> float:
        """The constant factor of a distribution loss's divergence, so that each part can have a sweep of its own."""
        return 1.0

    @property
    def stats_temperature(self) -> float:
        """The temperature at which its statistics are taken, a factor on the head's own."""
        return 1.0

    @property
    def reduction(self) -> str:
        """How the paper reduces it: a named reduction of `logitless.reduce`."""
        return "mean"


_REGISTRY: dict[str, type[Loss]] = {}
_LossType = TypeVar("_LossType", bound=type[Loss])


def register(cls: _LossType) -> _LossType:
    """Class decorator: makes a loss, a frozen dataclass with a `name`, known to `get` and `names`.

    Raises:
        TypeError: `cls` is not a frozen dataclass that derives from `Loss`.
        ValueError: the name is taken.
    """
    params = getattr(cls, "__dataclass_params__", None)
    if not (issubclass(cls, Loss) and params is not None and params.frozen):
        raise TypeError(f"register: {cls.__name__} must be a frozen dataclass that derives from logitless.losses.Loss")
    if cls.name in _REGISTRY:
        raise ValueError(f"register: the name {cls.name!r} is taken by {_REGISTRY[cls.name].__name__}")
    _REGISTRY[cls.name] = cls
    return cls


def names() -> list[str]:
    """The names of the registered losses, sorted."""
    _load_all()
    return sorted(_REGISTRY)


def get(loss: str | Loss, **overrides: Any) -> Loss:
    """The loss of that name with its default hyper-parameters, or the loss itself; `overrides` replace some of them.

    `get("dft")`, `get("dft", power=2)`, `get(DFT(power=2))`.

    Raises:
        TypeError: `loss` is neither a name nor a loss, or an override is not one of its hyper-parameters.
        ValueError: no loss has that name (near names are listed), or a hyper-parameter is out of its range.
    """
    if isinstance(loss, Loss):
        if not overrides:
            return loss
        _check_overrides(type(loss), overrides)
        return dataclasses.replace(loss, **overrides)  # type: ignore[type-var]
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or a logitless.losses.Loss, got {type(loss).__name__}")
    if loss not in _REGISTRY:
        _load_all()
    if loss not in _REGISTRY:
        raise ValueError(f"no loss is named {loss!r}{_near(loss, names())}; there are {', '.join(names())}")
    cls = _REGISTRY[loss]
    if overrides:  # torch.compile cannot trace `dataclasses.fields`, and need not where there are none
        _check_overrides(cls, overrides)
    return cls(**overrides)


def _load_all() -> None:
    """Registers the families that are not loaded yet."""
    from . import families  # noqa: F401


def _check_overrides(cls: type[Loss], overrides: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in overrides:
        if key not in known:
            raise TypeError(
                f"{cls.name} has no hyper-parameter {key!r}{_near(key, known)}; it has {', '.join(known) or 'none'}"
            )


def _near(word: str, words: Iterable[str]) -> str:
    matches = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(match) for match in matches)}?)" if matches else ""


# Checks of hyper-parameters, for `__post_init__`. They name the class and the field.


def check_number(
    loss: Loss,
    field: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises unless the field is a finite number between `low` and `high` (either end excluded where it is open)."""
    value = getattr(loss, field)
    where = f"{type(loss).__name__}: {field}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number, got {type(value).__name__} {value!r}")
    below = value <= low if low_open else value < low
    above = value >= high if high_open else value > high
    if not -math.inf < value < math.inf or below or above:
        left, right = "(" if low_open or low == -math.inf else "[", ")" if high_open or high == math.inf else "]"
        raise ValueError(f"{where} must be a finite number in {left}{low}, {high}{right}, got {value!r}")


def check_choice(loss: Loss, field: str, choices: Iterable[str]) -> None:
    """Raises unless the field is one of the choices; near ones are listed."""
    value, choices = getattr(loss, field), tuple(choices)
    where = f"{type(loss).__name__}: {field}"
    if not isinstance(value, str):
        raise TypeError(f"{where} must be a string, got {type(value).__name__} {value!r}")
    if value not in choices:
        raise ValueError(f"{where} must be one of {', '.join(choices)}; got {value!r}{_near(value, choices)}")


def check_flag(loss: Loss, field: str) -> None:
    """Raises unless the field is a bool."""
    value = getattr(loss, field)
    if not isinstance(value, bool):
        raise TypeError(f"{type(loss).__name__}: {field} must be a bool, got {type(value).__name__} {value!r}")


# Access to what a loss is called with.


def read(loss: Loss, stats: TokenStats, field: str) -> Tensor:
    """The statistic of that name; raises ValueError where it was not asked for."""
    value: Tensor | None = getattr(stats, field)
    if value is None:
        raise ValueError(f"{loss.name} reads stats.{field}, which is None: compute it with outputs={loss.outputs}")
    return value


def constant(loss: Loss, name: str, value: Tensor | None, like: Tensor) -> Tensor:
    """A per-token input, detached and in the statistics' dtype; raises where missing or of another type or shape."""
    if value is None:
        raise ValueError(f"{loss.name} needs {name}, a tensor of shape {tuple(like.shape)}, got None")
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{loss.name}: {name} must be a tensor of shape {tuple(like.shape)}, got {type(value).__name__}"
        )
    if value.shape != like.shape:
        raise ValueError(f"{loss.name}: {name} must have shape {tuple(like.shape)}, got {tuple(value.shape)}")
    return value.detach().to(like.dtype)


def sequence_logprob(
    logprob: Tensor,
    *,
    sequence: Tensor | None = None,
    num_sequences: int | None = None,
    mask: Tensor | None = None,
    average: bool = False,
) -> Tensor:
    """Log-probabilities of sequences from those of their tokens: `sum_t m_t logprob_t`, or that over `sum_t m_t`.

    Args:
        logprob: `[B, T]`, one row per sequence; or flat `[N]` with `sequence`.
        sequence: `[N]` int64, the number of the sequence that each token belongs to (in any order).
        num_sequences: B of the flat form; the largest number in `sequence` plus one by default (a GPU is waited
            for).
        mask: bool, of the shape of `logprob`: the tokens that count. All by default; the ops give 0 for an ignored
            token, so that a sum needs no mask and an average does.
        average: divide by the number of tokens that count (IPO); a sequence without any gives 0.

    Returns:
        `[B]`, float32 (float64 for float64 input): bf16 cannot count beyond 256. Differentiable.

    Raises:
        ValueError, TypeError: a shape or a dtype does not fit.
        IndexError: (CPU) a number in `sequence` is outside `[0, num_sequences)`.
    """
    _check_tokens(logprob, sequence, num_sequences, mask)
    logprob = logprob.to(torch.promote_types(logprob.dtype, torch.float32))
    if mask is not None:
        logprob = logprob.masked_fill(~mask, 0.0)
    if sequence is not None and num_sequences is None:
        num_sequences = int(sequence.max()) + 1 if sequence.numel() else 0
    total = _sum(logprob, sequence, num_sequences)
    if not average:
        return total
    counted = torch.ones_like(logprob) if mask is None else mask.to(logprob.dtype)
    return total / _sum(counted, sequence, num_sequences).clamp(min=1.0)


def _sum(values: Tensor, sequence: Tensor | None, num_sequences: int | None) -> Tensor:
    if sequence is None or num_sequences is None:
        return values.sum(-1)
    # One token after another, where a thousand in float32 lose three digits.
    total = torch.zeros(num_sequences, dtype=widest(values.device), device=values.device)
    return total.index_add(0, sequence, values.to(total.dtype)).to(values.dtype)


def widest(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check_tokens(logprob: Tensor, sequence: Tensor | None, num_sequences: int | None, mask: Tensor | None) -> None:
    where = "sequence_logprob"
    if not logprob.is_floating_point():
        raise TypeError(f"{where}: logprob must be a floating-point tensor, got {logprob.dtype}")
    if logprob.dim() != (2 if sequence is None else 1):
        expected = "[B, T]; flat [N] needs `sequence`" if sequence is None else "[N] when `sequence` is given"
        raise ValueError(f"{where}: logprob must be {expected}; got shape {tuple(logprob.shape)}")
    if sequence is None and num_sequences is not None:
        raise ValueError(f"{where}: num_sequences={num_sequences} belongs to the flat form, with `sequence`")
    if sequence is not None and (sequence.dtype != torch.int64 or sequence.shape != logprob.shape):
        got = f"{sequence.dtype} {tuple(sequence.shape)}"
        raise ValueError(f"{where}: sequence must be int64 of shape {tuple(logprob.shape)}, got {got}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != logprob.shape):
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"{where}: mask must be bool of shape {tuple(logprob.shape)}, got {got}")
