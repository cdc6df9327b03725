"""The releases of TRL whose internals logitless knows, and the check that the installed one is among them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

from ..hosts import UnsupportedHostError, in_range

RANGE = ">=1.15,<1.17"

_CURE = f"nothing has been changed: install trl{RANGE}, or train without logitless.integrations.trl"

#: The names in TRL that are replaced or made, with their parameters or fields.
_KNOWN = {
    ("trl.trainer.utils", "add_fused_lm_head"): "model temperature cast_lm_head_to_fp32 outputs",
    ("trl.trainer.utils", "FusedCausalLMOutput"): (
        "loss log_probs entropy log_sum_sq_probs mean_logits is_top1 label_mask aux_loss"
    ),
    ("trl.trainer.distillation_trainer", "_chunked_divergence_loss"): (
        "student_hidden_states teacher_hidden_states student_lm_head_weight teacher_lm_head_weight completion_mask "
        "beta num_items_in_batch student_lm_head_bias teacher_lm_head_bias student_logit_scale teacher_logit_scale "
        "student_final_logit_softcapping teacher_final_logit_softcapping temperature"
    ),
}


class UnsupportedTRLError(UnsupportedHostError):
    """The installed TRL is not one that logitless knows. The message has the version, the range and what to do."""


def check_release() -> None:
    """Raises unless TRL is installed, of a release in `RANGE`, and has the internals that logitless relies on.

    Nothing is changed in any case.

    Raises:
        ImportError: TRL is not installed.
        UnsupportedTRLError: its version is outside `RANGE`, or a function or class has other parameters than known.
    """
    try:
        import trl
    except ImportError as error:
        raise ImportError("logitless.integrations.trl needs TRL: pip install 'logitless[trl]'") from error
    if not in_range(trl.__version__, RANGE):
        raise UnsupportedTRLError(f"TRL {trl.__version__} is installed, and logitless knows {RANGE}; {_CURE}")
    for (module, name), expected in _KNOWN.items():
        found = _names_of(getattr(importlib.import_module(module), name, None))
        if found != expected.split():
            raise UnsupportedTRLError(
                f"TRL {trl.__version__}: {module}.{name} has {found}, and logitless knows it with "
                f"{expected.split()}; {_CURE}"
            )


def _names_of(known: Any) -> list[str] | None:
    """The names of a function's parameters, or of a dataclass's fields; None where there is no such thing."""
    if dataclasses.is_dataclass(known):
        return [field.name for field in dataclasses.fields(known)]
    return list(inspect.signature(known).parameters) if callable(known) else None
