"""The head that TRL's trainers call with `fused_lm_head=True`, as a patched model answers it.

TRL's trainers ask the model for per-token values in place of logits. The patched forward has these values, and with
them LoRA on the head, tied and sharded heads, and every scale and softcap that the patch knows.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...losses import Loss
from ...types import TokenStats
from ..support import causal_lm, fused_by_trl
from ..transformers import patch
from .fused_head import FUSED_FIELDS, trl_layout, trl_output


@dataclass
class FusedCall:
    """One call of a model with `fused_lm_head=True`: what a loss needs of it."""

    stats: TokenStats
    mask: Tensor
    output: Any


@dataclass
class Recorder:
    """The calls of a trainer's models while it computes one loss, and what the policy's next call has to compute."""

    calls: list[FusedCall] | None = None
    request: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def recording(self, **request: Any) -> Iterator[list[FusedCall]]:
        """Keeps the calls made inside; `request` holds arguments of the patched forward for the first of them."""
        calls: list[FusedCall] = []
        self.calls, self.request = calls, request
        try:
            yield calls
        finally:
            self.calls, self.request = None, {}


@dataclass
class LinearHead:
    """The state of a model that answers `fused_lm_head=True`."""

    recorder: Recorder
    temperature: float
    fields: tuple[str, ...]
    read: tuple[str, ...]  # the statistics that the trainer's loss differentiates

    def score(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """TRL's output of one call, from the patched forward."""
        shift_labels = kwargs.get("shift_labels")
        labels = kwargs.pop("labels", None) if shift_labels is not None else kwargs["labels"]
        request, self.recorder.request = self.recorder.request, {}
        settings = {"loss": "nll", "temperature": self.temperature, "skip_logits": True, **request}
        wanted = tuple(FUSED_FIELDS[name] for name in self.fields)
        settings["token_constants"] = tuple(name for name in wanted if name not in self.read)
        kwargs = {**kwargs, **settings, "use_cache": False, "return_dict": True, "token_outputs": wanted}
        result = model._logitless_patch.forward(*args, **kwargs)
        stats, mask = trl_layout(result, labels, shift_labels)
        output = trl_output(stats, mask, self.fields, result)
        if self.recorder.calls is not None:
            self.recorder.calls.append(FusedCall(stats, mask, output))
        return output


def add_linear_head(
    model: nn.Module,
    recorder: Recorder,
    loss: Loss,
    *,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    **options: Any,
) -> None:
    """Makes `model(..., labels=labels, fused_lm_head=True)` return what TRL's trainers read, without logits.

    Every other call runs as that of a patched model. The model is patched, if it was not yet. The head that an earlier
    trainer has put on it is replaced.

    Args:
        model: a causal LM that `logitless.patch` takes.
        recorder: keeps the calls for the trainer's loss.
        loss: the loss that reads them; its statistics are computed beside those that TRL asks for.
        temperature, outputs: what the logits are divided by, and the fields of TRL's output, as TRL passes them.
        cast_lm_head_to_fp32: refused where it is True.
        **options: of `logitless.patch`.

    Raises:
        UnsupportedModelError: the model cannot be patched.
        ValueError: `cast_lm_head_to_fp32`, or the patch has another temperature.
    """
    if cast_lm_head_to_fp32:
        raise ValueError(
            "cast_lm_head_to_fp32: expected False with loss=..., whose statistics are float32 for a head of any dtype; "
            "got True"
        )
    inner: Any = causal_lm(model)
    if "_logitless_patch" not in vars(inner):
        earlier = vars(inner).pop("forward") if fused_by_trl(inner.forward) else None
        patch(inner, **options)
        inner._logitless_patch.shadowed = earlier or inner._logitless_patch.shadowed
    if inner._logitless_patch.temperature not in (1.0, temperature):
        got = inner._logitless_patch.temperature
        raise ValueError(f"temperature: the trainer's is {temperature}, and the model was patched with {got}")
    statistics = (*loss.outputs, *(("logprob",) if loss.outputs else ()))
    names = {statistic: name for name, statistic in FUSED_FIELDS.items()}
    fields = dict.fromkeys((*outputs, *(names[statistic] for statistic in statistics)))
    inner._logitless_head = LinearHead(recorder, temperature, tuple(fields), ("logprob", *loss.outputs))
    cls: Any = type(inner)
    inner.forward = types.MethodType(_forward_of(cls), inner)


@functools.cache
def _forward_of(cls: Any) -> Any:
    """The forward of a class, which `generate` and Trainer inspect, with TRL's argument served."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            return self._logitless_head.score(self, args, kwargs)
        return self._logitless_patch.forward(*args, **kwargs)

    return forward


def last(call: FusedCall, length: int) -> FusedCall:
    """The last positions of a call: prompt-learning adapters put virtual tokens before them."""
    stats = TokenStats(*(None if x is None else x[:, -length:] for x in call.stats))
    return FusedCall(stats, call.mask[:, -length:], call.output)


def at_first_token(sums: Tensor, mask: Tensor) -> Tensor:
    """Per-token values `[S, T]` whose sums over counted tokens are the sequences' `[S]`: all at the first of them."""
    first = mask & (mask.cumsum(1) == 1)
    return torch.where(first, sums.to(torch.float32)[:, None], 0.0)
