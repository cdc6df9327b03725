"""Losses as pure functions of per-token or per-sequence vectors, each a frozen dataclass of its hyper-parameters.

docs/losses.md lists them all, with formula, inputs, defaults and sources. `implicit_reward` has what a fine-tuned model
says of a text's tokens.

`get("dft")` makes one by name, `names()` lists them, `register` adds one. `sequence_logprob` turns token
log-probabilities into those of sequences, which is what pair losses take.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Loss, get, names, register, sequence_logprob
from .preference import DPO, DPOP, RDPO, PreferenceResult
from .sft import ASFT, NLL, PSFT, SFTKL, FDivergenceSFT
from .weighted import (
    DFT,
    EAFT,
    GEM,
    IDFT,
    SEDSFT,
    CHORDPhi,
    DeformedLog,
    Focal,
    LUFFYShaping,
    ProFiT,
    Unlikelihood,
    idft_mix,
)

if TYPE_CHECKING:
    from .families import *  # noqa: F403

__all__ = [
    "ASFT",
    "DFT",
    "DPO",
    "DPOP",
    "EAFT",
    "GEM",
    "IDFT",
    "NLL",
    "PSFT",
    "RDPO",
    "SEDSFT",
    "SFTKL",
    "CHORDPhi",
    "DeformedLog",
    "FDivergenceSFT",
    "Focal",
    "LUFFYShaping",
    "Loss",
    "PreferenceResult",
    "ProFiT",
    "Unlikelihood",
    "get",
    "idft_mix",
    "names",
    "register",
    "sequence_logprob",
]


def __getattr__(name: str) -> Any:
    """The other families' names."""
    families = import_module(".families", __name__)
    if name not in families.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(families, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *import_module(".families", __name__).__all__])
