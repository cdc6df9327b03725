"""TRL's trainers on logitless: their own losses on its operations, or any loss of its registry.

    from logitless.integrations.trl import enable, with_loss

    with enable():  # TRL's loss, gradients and metrics, without logits
        trainer = SFTTrainer(...)
        trainer.train()

    trainer = with_loss(SFTTrainer)(..., loss="dft")  # any loss that fits, in the trainer that fits it

`versions.py` has the releases that are known, `switch.py` what is replaced, `fused_head.py` and `divergence.py` with
what; `losses.py` has the trainers with a loss of the registry, on `loss_head.py`.
"""

from .divergence import chunked_divergence_loss
from .fused_head import add_fused_lm_head
from .losses import LinearLossMixin, with_loss
from .switch import Enabled, disable, enable
from .versions import RANGE, UnsupportedTRLError, check_release

__all__ = [
    "RANGE",
    "Enabled",
    "LinearLossMixin",
    "UnsupportedTRLError",
    "add_fused_lm_head",
    "check_release",
    "chunked_divergence_loss",
    "disable",
    "enable",
    "with_loss",
]
