"""A tiny Llama for the tests of the patch, whose logits are large enough to tell losses apart."""

from __future__ import annotations

from typing import Any

import torch
import transformers

V, H, B, T = 65, 32, 3, 9


def config(**changes: Any) -> Any:
    """The sizes of the model, with changes."""
    sizes = {"vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    return transformers.LlamaConfig(**{**sizes, **more, "tie_word_embeddings": False, **changes})


def llama(cls: Any = None, **changes: Any) -> Any:
    """The model in training mode, of another class than Llama's if one is given."""
    torch.manual_seed(0)
    model = (cls or transformers.LlamaForCausalLM)(config(**changes))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    """Tokens that are their own labels, all of which count."""
    torch.manual_seed(1)
    ids = torch.randint(3, V, (B, T))
    return {"input_ids": ids, "labels": ids}
