"""LLaMA-Factory's stages `sft`, `pt`, `dpo` and `kto` without logits: `enable()` before `run_exp`.

`use_dft_loss`, `use_asft_loss` and `use_eaft_loss` are those of LLaMA-Factory, with its normalisation.
`enable(loss=...)` trains another loss of the registry. The losses of preferences are LLaMA-Factory's, on
log-probabilities from here. The stages `rm` and `ppo` stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from ..losses import ASFT, DFT, Loss, get
from .hidden_loss import check_host_loss, drop_logits, loss_of_hidden, patched_or_not, read_hidden_states, top_entropy
from .hosts import Change, Switch, UnsupportedHostError
from .llamafactory_preference import pair_forward, unpaired_forward
from .scoring import plain_head

#: Releases of LLaMA-Factory that the tests ran.
TESTED = ">=0.9.5,<0.9.6"
_TRAINERS = Switch("llamafactory", TESTED)
#: LLaMA-Factory's own losses, in the order in which it looks at them.
OWN_LOSSES = ("use_dft_loss", "use_eaft_loss", "use_asft_loss")


def enable(loss: Loss | str = "nll", **patch_options: Any) -> Switch:
    """Makes LLaMA-Factory's trainers of the stages `sft`, `pt`, `dpo` and `kto` compute without logits.

    Their models are patched as they are made. `disable()` or the end of a `with` block puts the trainers back; models
    that were trained meanwhile stay patched.

    Args:
        loss: a loss of the registry that needs nothing but tokens, in place of NLL. Together with one of
            LLaMA-Factory's own `use_..._loss`, or in a preference stage, it is refused.
        **patch_options: `backend`, `backward`, `temperature` and `check` of `logitless.patch`.

    Raises:
        UnsupportedHostError: another release than `TESTED`, enabled already, or a loss that needs more. Later, as a
            trainer is made: `label_smoothing_factor`, which would take the labels out of the batch.
    """
    return _TRAINERS.on(lambda: _trainer_changes(check_host_loss(get(loss), "LLaMA-Factory"), patch_options))


def disable() -> None:
    """Puts LLaMA-Factory's trainers back."""
    _TRAINERS.off()


def _trainer_changes(loss: Loss, options: dict[str, Any]) -> list[Change]:
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.kto.trainer import CustomKTOTrainer
    from llamafactory.train.pt.trainer import CustomTrainer
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    first = ("self", "finetuning_args", "processor", "model_args")
    pairs = ("self", "model", "ref_model", "finetuning_args", "processor", "disable_dropout", "kwargs")
    make = partial(_patching_initialiser, loss=loss, options=options)
    prefer = partial(_patching_preferences, loss=loss, options=options)
    return [
        Change(CustomSeq2SeqTrainer, "__init__", (*first, "gen_kwargs", "ref_model", "kwargs"), make),
        Change(CustomTrainer, "__init__", (*first, "kwargs"), partial(make, own_losses=())),
        Change(CustomDPOTrainer, "__init__", pairs, prefer),
        Change(CustomDPOTrainer, "concatenated_forward", ("self", "model", "batch", "is_ref_model"), pair_forward),
        Change(CustomKTOTrainer, "__init__", pairs, prefer),
        Change(CustomKTOTrainer, "forward", ("self", "model", "batch", "prefix"), unpaired_forward),
    ]


def _patching_preferences(own: Callable[..., None], loss: Loss, options: dict[str, Any]) -> Callable[..., None]:
    """The `__init__` of a trainer on preferences, which has a loss of its own, with its models patched first."""

    @wraps(own)
    def __init__(self: Any, model: Any, ref_model: Any, *args: Any, **kwargs: Any) -> None:
        if loss != get("nll"):
            raise UnsupportedHostError(f"loss={loss.name!r}: {type(self).__name__} has a loss of its own (pref_loss)")
        with patched_or_not(*(m for m in (model, ref_model) if m is not None), **options):
            own(self, model, ref_model, *args, **kwargs)

    return __init__


def _patching_initialiser(
    own: Callable[..., None], loss: Loss, options: dict[str, Any], own_losses: tuple[str, ...] = OWN_LOSSES
) -> Callable[..., None]:
    """The trainer's `__init__` with its models patched first, so that the trainer sees a patched forward."""

    @wraps(own)
    def __init__(self: Any, finetuning_args: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
        chosen = next((name for name in own_losses if getattr(finetuning_args, name, False)), None)
        _check_options(kwargs["args"], chosen, loss)
        models = [model for model in (kwargs["model"], kwargs.get("ref_model")) if model is not None]
        metrics = kwargs.get("compute_metrics") is not None
        with patched_or_not(*models, loss=loss, eval_logits=metrics, **options):
            own(self, finetuning_args, processor, *args, **kwargs)
            if chosen is not None:
                _serve(self, chosen, finetuning_args)

    return __init__


def _check_options(arguments: Any, chosen: str | None, loss: Loss) -> None:
    if chosen is not None and loss != get("nll"):
        raise UnsupportedHostError(f"{chosen}: enable(loss={loss.name!r}) asks for another loss; take one of them")
    if chosen is None and arguments.label_smoothing_factor:
        raise UnsupportedHostError(
            "label_smoothing_factor: Trainer would take the labels out of the batch; give it to the loss, "
            "enable(loss=losses.NLL(label_smoothing=...))"
        )


def _serve(trainer: Any, chosen: str, arguments: Any) -> None:
    """Computes one of LLaMA-Factory's own losses from hidden states."""
    if chosen == "use_asft_loss":
        trainer.compute_loss = _AnchoredLoss(trainer, ASFT(kl_weight=arguments.asft_alpha, kl="forward_kl"))
    elif chosen == "use_dft_loss":
        read_hidden_states(trainer, lambda *batch: _token_loss(*batch, loss=DFT()))
    else:
        read_hidden_states(trainer, lambda *batch: _entropy_weighted(*batch, alpha=arguments.eaft_alpha))


def _token_loss(
    model: Any, hidden: Tensor, labels: Tensor, items: Any, *, loss: Loss | str = "nll", **inputs: Any
) -> Tensor:
    total: Tensor = loss_of_hidden(model, hidden, labels, loss, num_items_in_batch=items, **inputs)["loss"]
    return total


def _entropy_weighted(model: Any, hidden: Tensor, labels: Tensor, items: Any, *, alpha: float) -> Tensor:
    """EAFT as LLaMA-Factory has it: NLL times `(entropy of the 20 likeliest / 3)^alpha`."""
    weight = (top_entropy(model, hidden, labels, 20) / 3.0).pow(alpha)
    return _token_loss(model, hidden, labels, items, token_weight=weight)


class _AnchoredLoss:
    """`compute_loss` with ASFT: a micro-batch's own mean, as in LLaMA-Factory, whatever the accumulation."""

    def __init__(self, trainer: Any, loss: Loss) -> None:
        self.trainer, self.loss = trainer, loss

    def __call__(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        reference, labels = self.trainer.ref_model, inputs["labels"]
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        with torch.no_grad():
            ref_hidden = reference(input_ids=ids, attention_mask=mask, hidden_only=True).logits
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest, hidden_only=True)
        with self.trainer.accelerator.autocast():
            head = plain_head(reference)
            fields = loss_of_hidden(
                self.trainer.model, outputs.logits, labels, self.loss, ref_hidden=ref_hidden, ref_head=head
            )
        drop_logits(outputs)
        return (fields["loss"], outputs) if return_outputs else fields["loss"]
