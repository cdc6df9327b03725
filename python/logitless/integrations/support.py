"""The models that can be patched. Every other model is refused with the reason."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .families import UnsupportedModelError, base_of, refusal
from .heads import check_output_head, find_head


def causal_lm(model: Any) -> nn.Module:
    """The causal LM itself. It may be inside a PeftModel; any other wrapper is refused."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Transformers causal LM, got {type(model).__name__}")
    kind = type(model).__name__
    if type(model).__module__.partition(".")[0] == "peft" and hasattr(model, "get_base_model"):
        return causal_lm(model.get_base_model())  # type: ignore[operator]
    if kind == "DataParallel":
        raise TypeError("model: nn.DataParallel is not supported; start one process per GPU (torchrun)")
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "DeepSpeedEngine"):
        raise TypeError(f"model: expected the causal LM itself, got it inside {kind}; patch it before it is wrapped")
    return model


def check_model(model: nn.Module) -> None:
    """Raises if the model cannot be patched; the message says why."""
    kind = type(model).__name__
    if "_logitless_patch" in model.__dict__:
        raise ValueError(f"patch: {kind} is patched already; unpatch(model) first to change the loss or the backend")
    _check_interface(model)
    if "fused_lm_head" in inspect.signature(model.forward).parameters or fused_by_trl(model.forward):
        raise UnsupportedModelError(
            f"{kind}: a trainer of TRL has put its own fused head on it; logitless.integrations.trl.with_loss("
            "trl.SFTTrainer) makes a trainer whose head is ours, with any loss, and enable() puts TRL's own on ours"
        )
    check_architecture(model)


def check_architecture(model: nn.Module) -> None:
    """Raises unless the model is a causal LM with a base model and a linear head, of a class that is not refused."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind}: an encoder-decoder; only causal language models are served")
    reason = refusal(model)
    if reason is not None:
        raise UnsupportedModelError(f"{kind}: {reason}")
    if base_of(model) is model:
        raise UnsupportedModelError(f"{kind}: it has no base model beside its head")
    check_output_head(model, find_head(model))


def _check_interface(model: nn.Module) -> None:
    if not all(hasattr(model, name) for name in ("config", "base_model", "get_output_embeddings")):
        raise TypeError(f"model: expected a Transformers causal LM, got {type(model).__name__}")


def fused_by_trl(forward: Any) -> bool:
    """Whether a forward is a fused head: it shows the class's signature, and its own parameters are one level below."""
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return code is not None and "fused_lm_head" in code.co_varnames
