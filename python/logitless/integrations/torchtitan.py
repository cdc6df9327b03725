"""torchtitan's loss slot without logits: `loss=LogitlessLoss.Config(loss="dft")` in a trainer's configuration.

torchtitan hands hidden states to a `ChunkedLossWrapper`, and gives it the output head. This one computes the loss from
both in one call, inside the head's own call, so that FSDP has the weight there. It does not cut the sequence itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..linear import linear_loss
from .heads import HeadModules, own_product
from .hosts import UnsupportedHostError, check_parameters, check_version, host_module

#: Releases of torchtitan that the tests ran.
TESTED = ">=0.3.0,<0.4"
_loss_slot: Any = host_module("torchtitan", TESTED, "torchtitan.components.loss")
#: What torchtitan's trainers pass to a loss, and the name of that input here; None is what no loss reads.
INPUT_NAMES = {"generator_logprobs": "old_logprob", "advantages": "advantages", "positions": None}


class LogitlessLoss(_loss_slot.ChunkedLossWrapper):
    """A token loss of the registry on hidden states and torchtitan's `lm_head`.

    It returns the sum of the token losses over `global_valid_tokens`, as torchtitan's own losses do, whatever reduction
    the loss has elsewhere; without a count it returns the sum. The metrics are empty.

    In reinforcement learning torchtitan passes `generator_logprobs`, `advantages` and `loss_mask`, `[B, T]`. They are
    the loss's `old_logprob` and `advantages`, and the tokens that count. A token whose `generator_logprobs` is not
    finite does not count.

    Raises:
        UnsupportedHostError: another release than `TESTED`, a loss that is not of single tokens, a head that is no
            plain linear layer, or tensor parallelism.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(_loss_slot.BaseLoss.Config):
        """The loss by its name, its hyper-parameters, and options of `linear_loss`."""

        loss: str = "nll"
        loss_args: dict[str, Any] = field(default_factory=dict)
        backend: str = "auto"
        backward: str = "auto"
        chunk_bytes: int | None = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        check_version("torchtitan", TESTED)
        check_parameters(
            _loss_slot.ChunkedLossWrapper.__call__, "self", "pred", "labels", "global_valid_tokens", "loss_inputs"
        )
        check_parameters(_loss_slot.ChunkedLossWrapper.set_lm_head, "self", "lm_head")
        self.loss = losses.get(config.loss, **config.loss_args)
        if not self.loss.token_wise or self.loss.lists:
            raise UnsupportedHostError(f"loss={config.loss!r}: torchtitan's slot is for losses of single tokens")
        self.options = {name: getattr(config, name) for name in ("backend", "backward", "chunk_bytes")}
        self.lm_head: nn.Module | None = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Takes the output head, which the trainer gives before the first call."""
        if not isinstance(lm_head, nn.Linear) or type(lm_head).forward is not nn.Linear.forward:
            raise UnsupportedHostError(f"lm_head: expected a plain torch.nn.Linear, got {type(lm_head).__name__}")
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Any = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of hidden states `[B, T, H]` and labels `[B, T]`, which are shifted already."""
        if self.lm_head is None:
            raise UnsupportedHostError("lm_head: set_lm_head comes before the first call")
        mask, inputs = self._inputs(loss_inputs)
        targets = labels if mask is None else labels.masked_fill(~mask, -100)
        if global_valid_tokens is None:
            divisor: dict[str, Any] = {"reduction": "sum"}
        else:
            divisor = {"reduction": "mean", "normalizer": torch.as_tensor(global_valid_tokens).clamp(min=1)}

        head = HeadModules(self.lm_head, self.lm_head)

        def score(hidden: Tensor) -> dict[str, Tensor]:
            weight, bias = own_product(head)
            if any(hasattr(x, "device_mesh") for x in (hidden, weight)):
                raise UnsupportedHostError("pred: a DTensor; tensor parallelism of the head is not served here")
            arguments = {"bias": bias, **inputs, **divisor, **self.options}
            return {"loss": linear_loss(self.loss, hidden, weight, targets, **arguments)}

        return head.call(pred, score)["loss"], {}

    def _inputs(self, given: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """The mask of tokens that count, and the loss's inputs by the names that it has for them."""
        mask = given.pop("loss_mask", None)
        inputs = {INPUT_NAMES.get(name, name): value for name, value in given.items()}
        inputs.pop(None, None)
        old = inputs.get("old_logprob")
        if old is not None:
            finite = torch.isfinite(old)
            mask = finite if mask is None else mask & finite
            inputs["old_logprob"] = old.masked_fill(~finite, 0.0)
        return mask, inputs  # type: ignore[return-value]
