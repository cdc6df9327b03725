"""Losses as pure functions of per-token or per-sequence vectors, each a frozen dataclass of its hyper-parameters.

docs/losses.md lists them all, with formula, inputs, defaults and sources. Each family has a folder: `sft`,
`preference`, `policy`, `distillation`. `Loss` and the five levels that derive from it say how a loss is called. The
losses of reward models, plain functions of scores, are in `rewards`.

`get("dft")` makes one by name, `names()` lists them, `register` adds one. `sequence_logprob` turns token
log-probabilities into those of sequences, which is what pair losses take.
"""

from typing import TYPE_CHECKING, Any

from .catalogue import get, names, public_names, register
from .loss import DistributionLoss, Loss, SequenceLoss, TokenLoss
from .sequences import sequence_logprob
from .whole_sequence import PairLoss, PreferenceResult, UnpairedLoss, UnpairedResult

if TYPE_CHECKING:  # At run time the modules are found. A name that is missing here is `Any` for a type checker.
    from .distillation.cross_tokenizer import *  # noqa: F403
    from .distillation.distribution import *  # noqa: F403
    from .distillation.sampled import *  # noqa: F403
    from .distillation.top_k import *  # noqa: F403
    from .formulas import *  # noqa: F403
    from .policy.advantages import *  # noqa: F403
    from .policy.demonstrations import *  # noqa: F403
    from .policy.implicit_reward import *  # noqa: F403
    from .policy.policy_loss import *  # noqa: F403
    from .policy.schedules import *  # noqa: F403
    from .policy.sequence_ratio import *  # noqa: F403
    from .policy.token_ratio import *  # noqa: F403
    from .policy.values import *  # noqa: F403
    from .policy.weights import *  # noqa: F403
    from .preference.dpo import *  # noqa: F403
    from .preference.reference_free import *  # noqa: F403
    from .preference.sampled import *  # noqa: F403
    from .preference.sums import *  # noqa: F403
    from .preference.unpaired import *  # noqa: F403
    from .preference.unpaired_statistics import *  # noqa: F403
    from .rewards import *  # noqa: F403
    from .sft.anchored import *  # noqa: F403
    from .sft.f_divergence import *  # noqa: F403
    from .sft.likelihood import *  # noqa: F403
    from .sft.per_answer import *  # noqa: F403
    from .sft.schedules import *  # noqa: F403
    from .sft.token_weights import *  # noqa: F403

__all__ = [
    "DistributionLoss",
    "Loss",
    "PairLoss",
    "PreferenceResult",
    "SequenceLoss",
    "TokenLoss",
    "UnpairedLoss",
    "UnpairedResult",
    "get",
    "names",
    "register",
    "sequence_logprob",
]


def __getattr__(name: str) -> Any:
    """The losses and the functions beside them."""
    known = public_names()
    if name not in known:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return known[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *public_names()})
