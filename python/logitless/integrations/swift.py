"""ms-swift's SFT and pre-training without logits: `enable()`, then `--loss_type logitless_dft` or another of our names.

ms-swift takes the labels out of the batch for a `loss_type`, so that a model returns logits. Here the model returns
hidden states, and the loss is computed inside the head's own call. The weights of `loss_scale` and the metric
`token_acc` are ms-swift's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import losses
from ..losses import Loss
from .hidden_loss import check_host_loss, drop_logits, loss_of_hidden, needs_tokens_alone, patched_or_not
from .hosts import Change, Switch, UnsupportedHostError

#: Releases of ms-swift that the tests ran.
TESTED = ">=4.6.0,<4.7"
_LOSS_TYPES = Switch("ms-swift", TESTED)


def enable(**named: Loss) -> Switch:
    """Offers the registry's losses to ms-swift as `loss_type`, and patches the models that train with one.

    Every loss that needs nothing but tokens has the name `logitless_` and its own, with its defaults: `logitless_nll`,
    `logitless_dft`, ... A file for `--external_plugins` needs no more than this call. `disable()` or the end of a
    `with` block takes it back; a model that was trained meanwhile stays patched.

    Args:
        **named: losses with other hyper-parameters under names of your own, `my_dft=losses.DFT(power=0.5)`.

    Raises:
        UnsupportedHostError: another release than `TESTED`, or enabled already. Later, as a trainer is made: an option
            that would be ignored, or a trainer of another task.
    """
    return _LOSS_TYPES.on(lambda: _type_changes(named))


def disable() -> None:
    """Puts ms-swift's trainers and its losses back."""
    _LOSS_TYPES.off()


def offered() -> dict[str, Loss]:
    """The losses of the registry that need nothing but tokens, by the names that ms-swift has for them."""
    return {f"logitless_{name}": losses.get(name) for name in losses.names() if needs_tokens_alone(losses.get(name))}


def _type_changes(named: dict[str, Loss]) -> list[Change]:
    from swift.trainers import Seq2SeqTrainer, mixin

    checked = {name: check_host_loss(loss, "ms-swift") for name, loss in named.items()}
    types = {name: partial(HiddenStateLoss, loss) for name, loss in {**offered(), **checked}.items()}
    return [
        Change(mixin, "loss_map", None, lambda own: {**own, **types}),
        Change(mixin.SwiftMixin, "create_loss_and_eval_metric", ("self", "args"), lambda own: own),
        Change(Seq2SeqTrainer, "_prepare_inputs", ("self", "inputs"), lambda own: own),
        Change(Seq2SeqTrainer, "__init__", ("self", "args", "kwargs"), lambda own: _patching_types(own, types)),
    ]


def _patching_types(own: Callable[..., None], types: dict[str, Any]) -> Callable[..., None]:
    """The trainer's `__init__`, with its model patched first if the loss is ours."""

    @wraps(own)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        named = {**dict(zip(("model", "args"), args, strict=False)), **kwargs}
        models = [named["model"]] if named["args"].loss_type in types else []
        with patched_or_not(*models):
            own(self, *args, **kwargs)

    return __init__


class HiddenStateLoss:
    """A `loss_type` of ms-swift whose `outputs.logits` are hidden states.

    Args:
        loss: the loss.
        args, trainer: as ms-swift gives them, while the trainer is being made.

    Raises:
        UnsupportedHostError: an option that this loss cannot serve, by name.
    """

    def __init__(self, loss: Loss, args: Any, trainer: Any) -> None:
        self.loss, self.args, self.trainer = loss, args, trainer
        self.loss_scale: Tensor | None = None
        self._check()
        self._own_prepare = trainer._prepare_inputs
        trainer._prepare_inputs = self._prepare_inputs

    def _check(self) -> None:
        from swift.trainers import Seq2SeqTrainer

        template, kind = self.trainer.template, type(self.trainer).__name__
        packed = template.padding_free or template.packing
        refused = {
            f"loss_type={self.args.loss_type} in {kind}": not isinstance(self.trainer, Seq2SeqTrainer),
            f"loss_type={self.args.loss_type} for task_type {template.task_type}": template.task_type != "causal_lm",
            "enable_dft_loss (take loss_type=logitless_dft)": self.args.enable_dft_loss,
            "enable_channel_loss": self.args.enable_channel_loss,
            "label_smoothing_factor (offer NLL(label_smoothing=...) by enable)": self.args.label_smoothing_factor != 0,
            "eval_metric without predict_with_generate": self.args.eval_metric is not None
            and not self.args.predict_with_generate,
            "acc_strategy=seq with packed rows": self.args.acc_strategy == "seq" and packed,
            "sequence_parallel_size > 1": template.sequence_parallel_size > 1,
        }
        for name, present in refused.items():
            if present:
                raise UnsupportedHostError(f"{name}: not served with the loss {self.loss.name!r} from hidden states")

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Asks for hidden states, and keeps the weights, which ms-swift would multiply with a loss from logits."""
        inputs = self._own_prepare(inputs)
        if "labels" in inputs:
            inputs["hidden_only"] = True
            self.loss_scale = inputs.pop("loss_scale", None)
        return inputs

    def __call__(self, outputs: Any, labels: Tensor, *, num_items_in_batch: Any = None, **_: Any) -> Tensor:
        """The loss over `num_items_in_batch`, or over the micro-batch's own tokens, and the metric of accuracy."""
        scale = self.loss_scale
        inputs = {} if scale is None else {"token_weight": torch.roll(scale, shifts=-1, dims=-1)}
        with self.trainer.accelerator.autocast():
            fields = loss_of_hidden(
                self.trainer.model,
                outputs.logits,
                labels,
                self.loss,
                num_items_in_batch=num_items_in_batch,
                token_outputs=("correct",),
                **inputs,
            )
        drop_logits(outputs)
        predicted = F.pad(labels, (0, 1), value=-100)[..., 1:].masked_fill(fields["token_stats"].correct == 0, -1)
        self.trainer._compute_acc(SimpleNamespace(logits=_Predicted(predicted)), labels)
        loss: Tensor = fields["loss"]
        return loss


class _Predicted:
    """What stands for logits where only their argmax is read: the target where it is likeliest, -1 elsewhere."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def argmax(self, dim: int) -> Tensor:
        return self.ids
