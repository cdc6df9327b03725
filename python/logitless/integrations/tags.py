"""What a patched model says to a trainer of TRL that would put a loss of its own in place of the patch's.

TRL's trainers compute their losses themselves, from what a forward of their own returns. A patched model learns of them
by the tags of the model card that such a trainer gives to its model while it is built, or else by its first call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ..losses.sft.likelihood import NLL
from .forward import logger


def add_tags(model: Any, tags: Iterable[str] | str) -> None:
    """The `add_model_tags` of a patched model: the class's own, after a look at who tags it.

    Raises:
        ValueError: the tags are those of a trainer of TRL that would ignore the patch's loss or temperature.
    """
    names = [tags] if isinstance(tags, str) else list(tags)
    if "trl" in names and not _module_of_forward(model).startswith("logitless.integrations.trl."):
        _meet_trl(model, [name for name in names if name != "trl"])
    type(model).add_model_tags(model, tags)


def before_call(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before a patched model's call, for the trainers of TRL that give no tags: the asynchronous ones.

    Raises:
        ValueError: the call is for a head of TRL's own, and the patch is for another loss than NLL.
    """
    if kwargs.get("fused_lm_head") and "_logitless_head" not in vars(model):
        refuse_other_loss(model, "a trainer of TRL")


def _meet_trl(model: Any, kinds: list[str]) -> None:
    """Refuses a trainer that would ignore the patch's loss, and says when it ignores the rest of the patch."""
    fused = hasattr(sys.modules.get("trl.trainer.utils"), "add_fused_lm_head")
    if "sft" in kinds and not fused:
        return  # an SFTTrainer of an older release calls the patched forward with labels
    trainer = f"TRL's {' '.join(kinds) or 'own'} trainer"
    try:
        refuse_other_loss(model, trainer)
    except ValueError:
        model.forward = model._logitless_patch.forward  # in place of the head that the trainer has put there
        raise
    if _module_of_forward(model).startswith("logitless."):
        return
    logger.warning(
        "%s runs a head of its own in place of this %s's patch; "
        "logitless.integrations.trl.with_loss has the trainers that run it",
        trainer,
        type(model).__name__,
    )


def _module_of_forward(model: Any) -> str:
    """The module of the function that stands in place of the class's forward."""
    function = getattr(vars(model).get("forward"), "__func__", None)
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


def refuse_other_loss(model: Any, trainer: str) -> None:
    """Raises ValueError if a patched model is for another loss than the plain NLL, which a trainer would ignore."""
    patch = model._logitless_patch
    if patch.loss != NLL() or patch.temperature != 1.0:
        raise ValueError(
            f"patch: {trainer} computes a loss of its own, and would ignore that of this {type(model).__name__}: "
            f"{patch.loss} at temperature {patch.temperature:g}. Build the trainer by "
            "logitless.integrations.trl.with_loss(trl.SFTTrainer), or of DPOTrainer, KTOTrainer, GRPOTrainer, "
            "which take loss=...; or give it a model without a patch"
        )
