"""Axolotl's plugin: `plugins: [logitless.integrations.axolotl.LogitlessPlugin]` in its YAML.

The model is patched once it has its adapters, so that fine-tuning and pre-training compute no logits. `use_eaft` is
Axolotl's own, computed from hidden states. Axolotl's `rl` trainers are TRL's, and are not served here.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from .. import losses
from ..losses import Loss
from .hidden_loss import (
    check_host_loss,
    inner_model,
    is_patched,
    loss_of_hidden,
    patch_of,
    read_hidden_states,
    top_entropy,
)
from .hosts import UnsupportedHostError, check_parameters, check_version, host_module
from .transformers import patch

#: Releases of Axolotl that the tests ran.
TESTED = ">=0.19.0,<0.20"
_host: Any = host_module("axolotl", TESTED, "axolotl.integrations.base")
#: Options of Axolotl that compute the loss in another way, or that would be ignored.
CONFLICTS = (
    "rl",
    "reward_model",
    "process_reward_model",
    "orpo_alpha",
    "label_smoothing_factor",
    "chunked_cross_entropy",
    "cut_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
)


class LogitlessArgs(BaseModel):
    """The plugin's keys in Axolotl's YAML.

    Attributes:
        logitless: False leaves the model as it is.
        logitless_loss: a loss of the registry that needs nothing but tokens.
        logitless_loss_args: its hyper-parameters by name; its own defaults otherwise.
        logitless_backend, logitless_backward: as in `logitless.patch`.
    """

    logitless: bool = True
    logitless_loss: str = "nll"
    logitless_loss_args: dict[str, Any] = Field(default_factory=dict)
    logitless_backend: str = "auto"
    logitless_backward: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def check_conflicts(cls, data: Any) -> Any:
        """Refuses, by name, options that are not served together with this plugin."""
        if data.get("logitless", True):
            for name in CONFLICTS:
                if data.get(name):
                    raise ValueError(f"{name}: not served by LogitlessPlugin; take one of them out")
            loss = data.get("logitless_loss", "nll")
            check_host_loss(losses.get(loss, **data.get("logitless_loss_args") or {}), "Axolotl")
            if data.get("use_eaft") and loss != "nll":
                raise ValueError(f"use_eaft: logitless_loss={loss!r} asks for another loss; take one of them")
        return data


class LogitlessPlugin(_host.BasePlugin):
    """Patches the model that Axolotl has loaded, as `LogitlessArgs` say."""

    def register(self, cfg: Any) -> None:
        """Checks Axolotl's release and the hooks that are used; raises UnsupportedHostError for others."""
        check_version("axolotl", TESTED)
        check_parameters(_host.BasePlugin.post_model_load, "self", "cfg", "model")
        check_parameters(_host.BasePlugin.post_trainer_create, "self", "cfg", "trainer")

    def get_input_args(self) -> str:
        """The path of the class of the plugin's keys."""
        return f"{__name__}.LogitlessArgs"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Patches the model, with its adapters in place and before a trainer wraps it."""
        if cfg.logitless and not is_patched(model):
            patch(inner_model(model), loss=_loss(cfg), backend=cfg.logitless_backend, backward=cfg.logitless_backward)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Serves `use_eaft` and metrics that read logits; refuses a trainer with a loss of its own."""
        from axolotl.core.trainers.base import AxolotlTrainer

        if not cfg.logitless:
            return
        if type(trainer).compute_loss is not AxolotlTrainer.compute_loss:
            raise UnsupportedHostError(
                f"{type(trainer).__name__}: it computes its own loss; only AxolotlTrainer is served"
            )
        if trainer.label_smoother is not None:
            raise UnsupportedHostError(
                "label_smoothing_factor: Trainer would take the labels out of the batch; "
                "logitless_loss_args: {label_smoothing: ...} gives it to the loss"
            )
        patch_of(trainer.model).eval_logits = trainer.compute_metrics is not None
        if cfg.use_eaft:
            alpha = 1.0 if cfg.eaft_alpha is None else cfg.eaft_alpha
            _serve_eaft(trainer, alpha, 20 if cfg.eaft_k is None else cfg.eaft_k)


def _loss(cfg: Any) -> Loss:
    return losses.get(cfg.logitless_loss, **dict(cfg.logitless_loss_args or {}))


def _serve_eaft(trainer: Any, alpha: float, k: int) -> None:
    """EAFT as Axolotl has it: NLL times the entropy of the k likeliest, to the power of alpha."""

    def loss(model: Any, hidden: Tensor, labels: Tensor, items: Any) -> Tensor:
        weight = top_entropy(model, hidden, labels, k).pow(alpha)
        total: Tensor = loss_of_hidden(model, hidden, labels, num_items_in_batch=items, token_weight=weight)["loss"]
        return total

    read_hidden_states(trainer, loss)
