"""TRL's fused head on logitless: `model(..., labels=labels, fused_lm_head=True)` with the output that TRL's has.

The statistics are computed inside the head's own call, as in a patched model. So an adapter on the head takes part, a
tied head is one parameter, and the hooks of sharded training see the call.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...losses.sft.likelihood import NLL
from ...types import TokenStats
from ..families import UnsupportedModelError, router_loss
from ..forward import PatchedForward
from ..heads import find_head
from ..scoring import Patch, Request, check_temperature, score
from ..selfcheck import self_check
from ..support import causal_lm, check_architecture
from ..tags import refuse_other_loss

#: TRL's per-token fields, and the statistics that they hold.
FUSED_FIELDS = {
    "log_probs": "logprob",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq",
    "mean_logits": "mean_logit",
    "is_top1": "correct",
}


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    metrics: tuple[str, ...] = ("mean_logits",),
) -> None:
    """Gives the model a fused head as TRL's function of this name does, computed by logitless.

    A call with `fused_lm_head=True` and labels returns TRL's `FusedCausalLMOutput`. Its per-token fields are
    `[B, T - 1]`, or `[B, T]` for `shift_labels`; they are 0 where the label is -100, and such positions cost nothing.
    Every other call runs the forward that the model had, the patched one included. Before the first loss, and where
    another kind of head has been put on since, five tokens are compared with the model's own logits
    (`selfcheck.self_check`).

    What differs from TRL's: logits are never rounded to a half type; a target that shares the largest logit counts as
    `is_top1`; a loss term that the model itself adds to its loss, such as a z-loss, is in `loss`.

    Args:
        model: a causal LM of Transformers, or a `PeftModel` around one.
        temperature: the sampler's, by which logits are divided. 1 by default.
        cast_lm_head_to_fp32: whether the head multiplies in float32, outside autocast. False leaves it to the model.
        outputs: which of `FUSED_FIELDS` to compute; `log_probs` always is. mean_logits, log_sum_sq_probs and is_top1
            have no gradient.
        metrics: which of the differentiable fields come without a gradient, as TRL's mean_logits does. With "entropy"
            among them a frozen head costs two products.

    Raises:
        UnsupportedModelError: (a ValueError) the model, or the adapter on its head, is known not to fit. Also in the
            first call with labels, if its logits differ from the model's own.
        ValueError: the model is patched for another loss than NLL, the temperature is not positive, or an output is
            unknown.
    """
    inner = causal_lm(model)
    check_architecture(inner)
    _check_arguments(inner, cast_lm_head_to_fp32, outputs)
    state = _state(inner, check_temperature(temperature), torch.float32 if cast_lm_head_to_fp32 else None)
    wanted = tuple(dict.fromkeys(("log_probs", *outputs)))
    patched = "_logitless_patch" in inner.__dict__

    @functools.wraps(type(inner).forward)  # generate reads the signature
    def fused_forward(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            return _FusedCall(self, state, wanted, metrics).run(args, kwargs)
        patch = self.__dict__.get("_logitless_patch") if patched else None
        return state.original(self, *args, **kwargs) if patch is None else patch.forward(*args, **kwargs)

    inner.forward = MethodType(fused_forward, inner)


#: The head of the trainers that log the entropy, and never train on it.
add_head_of_metrics = functools.partial(add_fused_lm_head, metrics=("mean_logits", "entropy"))


def _check_arguments(model: nn.Module, cast: bool, outputs: tuple[str, ...]) -> None:
    kind = type(model).__name__
    if "_logitless_patch" in model.__dict__:
        refuse_other_loss(model, "TRL's trainer")
    unknown = [name for name in outputs if name not in FUSED_FIELDS]
    if unknown:
        raise ValueError(f"outputs: expected names of {list(FUSED_FIELDS)}, got {unknown}")
    if cast and hasattr(find_head(model).inner, "base_layer"):
        raise UnsupportedModelError(
            f"{kind}: cast_lm_head_to_fp32=True and an adapter on the output head exclude one another in TRL, which "
            "replaces the forward of the head and so the adapter; leave the cast out, or the head out of target_modules"
        )


def _state(model: nn.Module, temperature: float, head_dtype: torch.dtype | None) -> Patch:
    """What `score` needs to know of the model. It is of TRL's head alone, beside the patch of a patched model."""
    from ..outputs import LinearCausalLMOutput

    patch = model.__dict__.get("_logitless_patch")  # its own self-check would run inside this one
    return Patch(
        loss=NLL(),
        backend="auto",
        backward="auto",
        temperature=temperature,
        eval_logits=False,
        check=True,
        forward=PatchedForward(model),
        shadowed=model.__dict__.get("forward") if patch is None else patch.shadowed,
        names=tuple(inspect.signature(model.forward).parameters),
        router=router_loss(model),
        output=LinearCausalLMOutput,
        head_dtype=head_dtype,
    )


@dataclass
class _FusedCall:
    """One call with `fused_lm_head=True`: its arguments by name, the scores, and these as TRL names them."""

    model: nn.Module
    state: Patch
    wanted: tuple[str, ...]
    metrics: tuple[str, ...]

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request = self._request({**dict(zip(self.state.names, args, strict=False)), **kwargs})
        self._check_once()
        scored = score(self.model, self.state, request, self.state.loss, skip=True)
        stats, mask = trl_layout(scored, request.labels, request.shift_labels)
        return trl_output(stats, mask, self.wanted, scored)

    def _request(self, inputs: dict[str, Any]) -> Request:
        taken = {name: inputs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
        inputs.pop("return_dict", None)
        if "use_cache" in self.state.names:
            inputs["use_cache"] = False
        names = tuple(FUSED_FIELDS[name] for name in self.wanted)
        constants = tuple(FUSED_FIELDS[name] for name in self.wanted if name in self.metrics)
        request = Request(inputs, token_outputs=names, token_constants=constants, **taken)
        if not request.scored:
            raise ValueError("fused_lm_head=True: needs labels or shift_labels, got neither")
        return request

    def _check_once(self) -> None:
        """Runs the self-check, if it has not seen this kind of head."""
        kind = type(find_head(self.model).inner)
        if self.state.checked is not kind:
            self_check(self.model, self.state)
            self.state.checked = kind


def trl_layout(result: Any, labels: Tensor | None, shift_labels: Tensor | None) -> tuple[TokenStats, Tensor]:
    """A patched forward's statistics `[B, T - 1]`, or `[B, T]` for `shift_labels`, and the mask of what counts."""
    assert result.token_stats is not None
    if shift_labels is not None:
        return result.token_stats, shift_labels.to(result.loss.device) != -100
    assert labels is not None
    stats = TokenStats(*(None if x is None else x[:, :-1] for x in result.token_stats))
    return stats, labels[:, 1:].to(result.loss.device) != -100


def trl_output(stats: TokenStats, mask: Tensor, fields: tuple[str, ...], result: Any) -> Any:
    """TRL's output of a call: statistics `[B, T]` under its names, and loss and router's loss of our own output."""
    from trl.trainer.utils import FusedCausalLMOutput

    values: dict[str, Any] = {name: getattr(stats, FUSED_FIELDS[name]) for name in fields}
    for name in ("log_sum_sq_probs", "mean_logits"):
        if name in values:
            values[name] = values[name].detach()
    if "is_top1" in values:
        values["is_top1"] = values["is_top1"].bool()
    return FusedCausalLMOutput(loss=result.loss, label_mask=mask, aux_loss=result.aux_loss, **values)
