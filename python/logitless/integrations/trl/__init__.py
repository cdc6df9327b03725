"""TRL's trainers on logitless: `enable()` puts its operations under their losses, gradients and metrics.

    from logitless.integrations import trl as logitless_trl

    with logitless_trl.enable():
        trainer = SFTTrainer(...)
        trainer.train()

`versions.py` has the releases that are known, `switch.py` what is replaced, `fused_head.py` and `divergence.py` what
stands in its place.
"""

from .divergence import chunked_divergence_loss
from .fused_head import add_fused_lm_head
from .switch import Enabled, disable, enable
from .versions import RANGE, UnsupportedTRLError, check_version

__all__ = [
    "RANGE",
    "Enabled",
    "UnsupportedTRLError",
    "add_fused_lm_head",
    "check_version",
    "chunked_divergence_loss",
    "disable",
    "enable",
]
