"""The steps between the head's product and the loss in each causal-LM class of Transformers, and where to read them.

Nearly every `*ForCausalLM.forward` is base model, head, `loss_function`. The exceptions stand here by class name,
because the configuration alone does not tell:

- MPT has a `logit_scale` that it does not use.
- Gemma3's vision class ignores the softcap that its text class applies.
- HyperCLOVAX multiplies by the `logits_scaling` that Granite divides by.

A class without a line here is taken to do nothing. The patch's self-check then confirms or refuses it.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..types import LogitTransform


class UnsupportedModelError(ValueError):
    """A model that logitless does not know how to train correctly. The message says which model, and why."""


@dataclass(frozen=True)
class Family:
    """Paths to the numbers that a class applies to its logits, read from the model. `text.` is its text config."""

    scale: str | None = None
    divisor: str | None = None
    softcap: str | None = None
    vocabulary: str | None = None
    z_loss: str | None = None


_CAPPED = Family(softcap="config.final_logit_softcapping")
_TEXT_CAPPED = Family(softcap="text.final_logit_softcapping")
_COHERE = Family(scale="logit_scale")
_GRANITE = Family(divisor="text.logits_scaling")
_MUSE = Family(scale="text.output_multiplier", softcap="text.final_logit_softcapping")
_INKLING = Family(divisor="text.logits_mup_width_multiplier", vocabulary="text.unpadded_vocab_size")
_INKLING2 = Family(softcap="logit_softcap.softcap", vocabulary="text.unpadded_vocab_size")
_CLOVA = Family(scale="text.logits_scaling")

FAMILIES: dict[str, Family] = {
    "BambaForCausalLM": Family(z_loss="z_loss_coefficient"),
    "BeamForCausalLM": _CAPPED,
    "Cohere2ForCausalLM": _COHERE,
    "Cohere2MoeForCausalLM": _COHERE,
    "CohereCompassForCausalLM": _COHERE,
    "CohereCompassForConditionalGeneration": _COHERE,
    "CohereForCausalLM": _COHERE,
    "FalconH1ForCausalLM": Family(scale="model.lm_head_multiplier"),
    "Gemma2ForCausalLM": _CAPPED,
    "Gemma3ForCausalLM": _CAPPED,
    "Gemma3nForCausalLM": _CAPPED,
    "Gemma3nForConditionalGeneration": _TEXT_CAPPED,
    "Gemma4ForCausalLM": _CAPPED,
    "Gemma4ForConditionalGeneration": _TEXT_CAPPED,
    "Gemma4UnifiedForCausalLM": _CAPPED,
    "Gemma4UnifiedForConditionalGeneration": _TEXT_CAPPED,
    "Granite4VisionForConditionalGeneration": _GRANITE,
    "GraniteDoclingForConditionalGeneration": _GRANITE,
    "GraniteForCausalLM": _GRANITE,
    "GraniteMoeForCausalLM": _GRANITE,
    "GraniteMoeHybridForCausalLM": _GRANITE,
    "GraniteMoeSWAForCausalLM": _GRANITE,
    "GraniteMoeSharedForCausalLM": _GRANITE,
    "GraniteSWAForCausalLM": _GRANITE,
    "HyperCLOVAXForCausalLM": _CLOVA,
    "HyperCLOVAXVisionV2ForConditionalGeneration": _CLOVA,
    "Inkling2ForCausalLM": _INKLING2,
    "Inkling2ForConditionalGeneration": _INKLING2,
    "InklingForCausalLM": _INKLING,
    "InklingForConditionalGeneration": _INKLING,
    "MiniCPM3ForCausalLM": _GRANITE,  # divides the hidden states; its head has no bias, so the logits are the same
    "MistralLarge4ForConditionalGeneration": Family(softcap="final_logit_softcapping"),
    "MuseGlimmerForConditionalGeneration": _MUSE,
    "MuseSparkForConditionalGeneration": _MUSE,
    "NanoChatForCausalLM": _CAPPED,
    "PaliGemmaForConditionalGeneration": _TEXT_CAPPED,
    "RecurrentGemmaForCausalLM": Family(softcap="config.logits_soft_cap"),
    "VaultGemmaForCausalLM": _CAPPED,
    "xLSTMForCausalLM": Family(softcap="config.output_logit_soft_cap"),
}

#: Classes whose forward cannot be put as "base model, linear head, next-token loss"; the reason completes the message.
REFUSED: dict[str, str] = {
    "ChameleonForConditionalGeneration": "it overwrites the logits of its image tokens",
    "ClvpForCausalLM": "it normalises between the base model and the head",
    "ElectraForCausalLM": "a prediction head stands between the base model and the output layer",
    "GPT2DoubleHeadsModel": "it has a second head with a loss of its own",
    "GitForCausalLM": "its labels are aligned with a part of the sequence",
    "ModernBertDecoderForCausalLM": "a prediction head stands between the base model and the output layer",
    "OpenAIGPTDoubleHeadsModel": "it has a second head with a loss of its own",
    "Qwen2AudioForConditionalGeneration": "its base model makes the labels and its loss leaves padding out by the mask",
    "VibeVoiceForConditionalGeneration": "its loss mixes in a diffusion loss",
}
_UNSHIFTED = (
    *("BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM"),
    *("CpmAntForCausalLM", "MBartForCausalLM", "MarianForCausalLM", "MvpForCausalLM", "PLBartForCausalLM"),
    *("PegasusForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM", "WhisperForCausalLM", "XLNetLMHeadModel"),
)
REFUSED |= dict.fromkeys(_UNSHIFTED, "its loss does not shift the labels (position t is labelled with token t itself)")


@dataclass(frozen=True)
class HeadRule:
    """The steps from a head's product to a model's logits, with their numbers: transform, cut vocabulary, z-loss."""

    transform: LogitTransform
    vocabulary: int | None = None
    z_loss: float = 0.0

    def finish(self, product: Tensor) -> Tensor:
        """True logits from the head's product, by the operations of the model's own forward."""
        logits = product if self.vocabulary is None else product[..., : self.vocabulary]
        if self.transform.logit_scale != 1.0:
            logits = logits * self.transform.logit_scale
        cap = self.transform.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def family_of(model: nn.Module) -> Family:
    """The table's entry for the model's class, or for the nearest class it derives from; else the plain family."""
    return next((FAMILIES[c.__name__] for c in type(model).__mro__ if c.__name__ in FAMILIES), Family())


def refusal(model: nn.Module) -> str | None:
    """Why the model's class is refused by name, or None."""
    return next((REFUSED[c.__name__] for c in type(model).__mro__ if c.__name__ in REFUSED), None)


def head_rule(model: nn.Module) -> HeadRule:
    """The model's rule. Its numbers are read on every call, because a user may have changed them."""
    family = family_of(model)
    scale = _number_at(model, family.scale, 1.0) / _number_at(model, family.divisor, 1.0)
    softcap = None if family.softcap is None else read_path(model, family.softcap)
    vocabulary = None if family.vocabulary is None else read_path(model, family.vocabulary)
    return HeadRule(LogitTransform(scale, softcap), vocabulary, _number_at(model, family.z_loss, 0.0))


def base_of(model: nn.Module) -> nn.Module:
    """The model below the head. Llama4's text model keeps it in `model`, and names another attribute as its base."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    return getattr(model, "model", base) if base is model else base


def text_config(model: nn.Module) -> Any:
    """The language model's part of a configuration. For a text model that is the configuration itself."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def read_path(model: nn.Module, path: str) -> Any:
    """The value at a path: `config.x`, `model.x`, ... from the model, or `text.x` from its text configuration."""
    first, *rest = path.split(".")
    value: Any = text_config(model) if first == "text" else getattr(model, first)
    for name in rest:
        value = getattr(value, name)
    return value


def _number_at(model: nn.Module, path: str | None, default: float) -> float:
    value = default if path is None else read_path(model, path)
    return default if value is None else float(value)


#: The arguments that a load-balancing loss may take.
ROUTER_ARGUMENTS = frozenset(("gate_logits", "num_experts", "num_keys", "top_k", "attention_mask"))


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a mixture of experts, by the function in the model's own module.

    The model adds `coefficient * function(...)` once, after it has normalised the token loss. It does not divide the
    added term by the number of items in the batch.
    """

    function: Callable[..., Any]
    arguments: tuple[str, ...]  # of the function; nearly all take those of Mixtral's

    def __call__(self, model: nn.Module, router_logits: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The auxiliary loss as the model reports it, and as it adds it to the loss."""
        if not ROUTER_ARGUMENTS.issuperset(self.arguments):
            raise UnsupportedModelError(
                f"{type(model).__name__}: output_router_logits=True is not supported for it (its load-balancing loss "
                f"takes {sorted({*self.arguments} - ROUTER_ARGUMENTS)}); call it with output_router_logits=False"
            )
        experts = _first(model, "num_experts", "num_local_experts")
        values = {
            "gate_logits": router_logits,
            "num_experts": experts,
            "num_keys": math.isqrt(experts),  # Doge routes by two halves of a key
            "top_k": _first(model, "num_experts_per_tok"),
            "attention_mask": attention_mask,
        }
        aux: Tensor = self.function(**{name: values[name] for name in self.arguments})
        return aux, float(_first(model, "router_aux_loss_coef", "aux_loss_coef")) * aux


def router_loss(model: nn.Module) -> RouterLoss | None:
    """The load-balancing loss in the module of the model's class, or None."""
    modules = (sys.modules.get(c.__module__) for c in type(model).__mro__)
    function = next((f for m in modules if (f := getattr(m, "load_balancing_loss_func", None)) is not None), None)
    if function is None:
        return None
    return RouterLoss(function, tuple(inspect.signature(function).parameters))


def _first(model: nn.Module, *names: str) -> Any:
    """The first of the names that the model, or else its text configuration, has."""
    for place in (model, text_config(model)):
        for name in names:
            if getattr(place, name, None) is not None:
                return getattr(place, name)
    raise UnsupportedModelError(
        f"{type(model).__name__}: output_router_logits=True needs one of {list(names)}, which neither the model nor "
        "its configuration has; call it with output_router_logits=False"
    )
