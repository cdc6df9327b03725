"""`patch` on tiny random models of every family: its own loss and gradients, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from logitless.integrations.families import FAMILIES, REFUSED, UnsupportedModelError  # noqa: E402
from logitless.integrations.transformers import patch, unpatch  # noqa: E402

V = 65
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
LLAMA = {**BASE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
QWEN = {**LLAMA, "head_dim": 8}
LEGACY = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
ROUTED = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
LOCAL = {**QWEN, "num_local_experts": 4, **ROUTED}
EXPERTS = {**QWEN, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, **ROUTED}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CAP = {"final_logit_softcapping": 2.0}

# class: (configuration class, its arguments)
# fmt: off
CAUSAL = {
    "BambaForCausalLM": ("BambaConfig", {**LLAMA, **SSM, "attn_layer_indices": [1], "z_loss_coefficient": 0.1}),
    "BioGptForCausalLM": ("BioGptConfig", {**LLAMA}),
    "BloomForCausalLM": ("BloomConfig", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS}),
    "CodeGenForCausalLM": ("CodeGenConfig", {**LEGACY, "rotary_dim": 4}),
    "Cohere2ForCausalLM": ("Cohere2Config", {**QWEN, "logit_scale": 0.25, "sliding_window": 8}),
    "CohereForCausalLM": ("CohereConfig", {**LLAMA, "logit_scale": 0.25}),
    "DbrxForCausalLM": (
        "DbrxConfig",
        {
            "vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, **IDS,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "output_router_logits": True,
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.1},
        },
    ),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {
            **LLAMA, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        },
    ),
    "FalconForCausalLM": ("FalconConfig", BASE),
    "FalconH1ForCausalLM": (
        "FalconH1Config",
        {**QWEN, **SSM, "lm_head_multiplier": 0.25, "mamba_d_ssm": 64},
    ),
    "FalconMambaForCausalLM": ("FalconMambaConfig", {**BASE, "state_size": 8}),
    "GPT2LMHeadModel": ("GPT2Config", LEGACY),
    "GPTJForCausalLM": ("GPTJConfig", {**LEGACY, "rotary_dim": 4}),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {
            "vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, **IDS,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**BASE, "intermediate_size": 48}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**QWEN, **CAP}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**QWEN, **CAP}),
    "Gemma3nForCausalLM": (
        "Gemma3nTextConfig",
        {**QWEN, **CAP, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": V, "num_kv_shared_layers": 0},
    ),
    "Gemma4ForCausalLM": (
        "Gemma4TextConfig",
        {**LLAMA, **CAP, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": V},
    ),
    "GemmaForCausalLM": ("GemmaConfig", QWEN),
    "GptOssForCausalLM": ("GptOssConfig", LOCAL),
    "GraniteForCausalLM": ("GraniteConfig", {**LLAMA, "logits_scaling": 3.0}),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", {**LLAMA, **ROUTED, "num_local_experts": 4, "logits_scaling": 3.0}),
    "GraniteMoeHybridForCausalLM": (
        "GraniteMoeHybridConfig",
        {
            **LLAMA, **ROUTED, **SSM, "num_local_experts": 4, "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16, "logits_scaling": 3.0,
        },
    ),
    "GraniteMoeSharedForCausalLM": (
        "GraniteMoeSharedConfig",
        {**LLAMA, **ROUTED, "num_local_experts": 4, "shared_intermediate_size": 16, "logits_scaling": 3.0},
    ),
    "HyperCLOVAXForCausalLM": ("HyperCLOVAXConfig", {**QWEN, "logits_scaling": 3.0}),
    "Inkling2ForCausalLM": ("Inkling2TextConfig", {**QWEN, **CAP, "unpadded_vocab_size": 61}),
    "InklingForCausalLM": (
        "InklingTextConfig",
        {
            **QWEN, "unpadded_vocab_size": 61, "logits_mup_width_multiplier": 3.0, "moe_intermediate_size": 16,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "swa_head_dim": 8, "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2, "rel_extent": 16,
        },
    ),
    "JambaForCausalLM": (
        "JambaConfig",
        {
            **LLAMA, **ROUTED, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False,
        },
    ),
    "JetMoeForCausalLM": (
        "JetMoeConfig",
        {**BASE, "intermediate_size": 48, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, **ROUTED},
    ),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {**QWEN, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "LlamaForCausalLM": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": False}),
    "Mamba2ForCausalLM": (
        "Mamba2Config",
        {
            "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, **IDS,
            "state_size": 8, "n_groups": 1, "chunk_size": 8,
        },
    ),
    "MambaForCausalLM": ("MambaConfig", {**BASE, "state_size": 8}),
    "MiniCPM3ForCausalLM": ("MiniCPM3Config", {**LLAMA, **LATENT, "num_key_value_heads": 4}),
    "MistralForCausalLM": ("MistralConfig", QWEN),
    "MixtralForCausalLM": ("MixtralConfig", LOCAL),
    "MptForCausalLM": (
        "MptConfig",
        {"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "logit_scale": 0.5, **IDS},
    ),
    "NanoChatForCausalLM": ("NanoChatConfig", {**QWEN, **CAP}),
    "NemotronForCausalLM": ("NemotronConfig", QWEN),
    "OPTForCausalLM": (
        "OPTConfig",
        {**BASE, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    ),
    "Olmo2ForCausalLM": ("Olmo2Config", LLAMA),
    "OlmoeForCausalLM": ("OlmoeConfig", {**LLAMA, "num_experts": 4, **ROUTED}),
    "PersimmonForCausalLM": ("PersimmonConfig", LLAMA),
    "Phi3ForCausalLM": ("Phi3Config", LLAMA),
    "PhiForCausalLM": ("PhiConfig", LLAMA),
    "PhimoeForCausalLM": ("PhimoeConfig", {**LLAMA, "num_local_experts": 4, **ROUTED}),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**EXPERTS, "decoder_sparse_step": 1}),
    "Qwen3ForCausalLM": ("Qwen3Config", QWEN),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", EXPERTS),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", {**EXPERTS, **LINEAR_ATTENTION}),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", {**QWEN, **LINEAR_ATTENTION}),
    "RecurrentGemmaForCausalLM": (
        "RecurrentGemmaConfig",
        {**QWEN, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8, "logits_soft_cap": 2.0},
    ),
    "RwkvForCausalLM": (
        "RwkvConfig",
        {"vocab_size": V, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, **IDS},
    ),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {**LLAMA, "tie_word_embeddings": True}),
    "StableLmForCausalLM": ("StableLmConfig", LLAMA),
    "Starcoder2ForCausalLM": ("Starcoder2Config", LLAMA),
    "VaultGemmaForCausalLM": ("VaultGemmaConfig", {**QWEN, **CAP}),
    "XGLMForCausalLM": (
        "XGLMConfig",
        {"vocab_size": V, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, **IDS},
    ),
    "xLSTMForCausalLM": (
        "xLSTMConfig",
        {
            "vocab_size": V, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 4, "qk_dim_factor": 1.0, **IDS,
            "output_logit_soft_cap": 2.0,
        },
    ),
}

# A superset of what the configurations of mixtures of experts call their sizes: each reads its own.
MIXTURE = {
    **EXPERTS, "num_local_experts": 4, "n_routed_experts": 4, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
    "decoder_sparse_step": 1,
}
MIXTURES = {
    "AfmoeForCausalLM": ("AfmoeConfig", {**MIXTURE, "num_dense_layers": 1}),
    "DeepseekV4ForCausalLM": ("DeepseekV4Config", {**MIXTURE, **LATENT, "mlp_layer_types": ["hash_moe", "moe"]}),
    "DogeForCausalLM": ("DogeConfig", {**LLAMA, **ROUTED, "is_moe": True, "num_experts": 4}),
    "Ernie4_5_MoeForCausalLM": (
        "Ernie4_5_MoeConfig",
        {**MIXTURE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    ),
    "ExaoneMoeForCausalLM": ("ExaoneMoeConfig", MIXTURE),
    "FlexOlmoForCausalLM": ("FlexOlmoConfig", MIXTURE),
    "FlintForCausalLM": ("FlintConfig", {**MIXTURE, "layer_types": ["full_attention"] * 2, "mlp_only_layers": []}),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", MIXTURE),
    "GraniteMoeSWAForCausalLM": ("GraniteMoeSWAConfig", {**MIXTURE, "logits_scaling": 3.0}),
    "HYV3ForCausalLM": ("HYV3Config", MIXTURE),
    "LagunaForCausalLM": ("LagunaConfig", MIXTURE),
    "LaraMiniForCausalLM": ("LaraMiniConfig", MIXTURE),
    "MellumForCausalLM": ("MellumConfig", MIXTURE),
    "MiniMaxForCausalLM": ("MiniMaxConfig", MIXTURE),
    "MiniMaxM2ForCausalLM": ("MiniMaxM2Config", MIXTURE),
    "MiniMaxM3VLForCausalLM": ("MiniMaxM3VLTextConfig", MIXTURE),
    "Qwen3_5MoeForCausalLM": ("Qwen3_5MoeTextConfig", {**MIXTURE, **LINEAR_ATTENTION}),
}

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {**VISION, "image_size": 16, "patch_size": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
VISION_LANGUAGE = {
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {"text_config": {**QWEN, **CAP}, "vision_config": VISION, "image_token_id": 60, "mm_tokens_per_image": 4},
    ),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **LLAMA},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            "image_token_id": 60,
        },
    ),
    "PaliGemmaForConditionalGeneration": (
        "PaliGemmaConfig",
        {
            "text_config": {"model_type": "gemma2", **QWEN, **CAP},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            "image_token_id": 60, "projection_dim": 32, "hidden_size": 32,
        },
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {**LLAMA, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
            "vision_config": {**VISION, "out_hidden_size": 32, "depth": 1, "num_heads": 4},
            "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63,
        },
    ),
    "SmolVLMForConditionalGeneration": (
        "SmolVLMConfig",
        {
            "text_config": {"model_type": "llama", **LLAMA}, "vision_config": VISION,
            "image_token_id": 60, "scale_factor": 1,
        },
    ),
}
ENCODER = {**VISION, "depth": 1, "num_heads": 4, "out_hidden_size": 32, "num_position_embeddings": 16}
ENCODER = {**ENCODER, "deepstack_visual_indexes": [0], "in_channels": 3}
THREE = {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
HALF = {"rope_parameters": {**THREE["rope_parameters"], "partial_rotary_factor": 0.5}, "head_dim": 16}
PLACES = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
MIXTURES |= {
    "Glm4vMoeForConditionalGeneration": (
        "Glm4vMoeConfig", {"text_config": {**MIXTURE, **HALF}, "vision_config": ENCODER, **PLACES},
    ),
    "MiniMaxM3SparseForConditionalGeneration": (
        "MiniMaxM3VLConfig", {"text_config": MIXTURE, "vision_config": ENCODER, "image_token_id": 60},
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "Qwen3VLMoeConfig", {"text_config": {**MIXTURE, **THREE}, "vision_config": ENCODER, **PLACES},
    ),
    "Qwen3_5MoeForConditionalGeneration": (
        "Qwen3_5MoeConfig", {"text_config": {**MIXTURE, **LINEAR_ATTENTION}, "vision_config": ENCODER, **PLACES},
    ),
}
# fmt: on
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
SERVED = {**CAUSAL, **VISION_LANGUAGE, **MIXTURES}
ROUTERS = [*MIXTURES, *(name for name, (_, arguments) in CAUSAL.items() if "output_router_logits" in arguments)]


def make(name: str) -> nn.Module:
    """A tiny random model whose logits are of the size of a trained one's, so that caps and scales show."""
    if not hasattr(transformers, name):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    kind, arguments = SERVED[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**arguments)
    for dropout in DROPOUTS:
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 59, (2, 8))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 5:] = -100
    return {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(11)}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """Each to the rounding of a float32 backward pass, relative to its own size and to the largest of all."""
    assert ours.keys() == own.keys()
    largest = max(float(g.abs().max()) for g in own.values())
    for name, expected in own.items():
        error = float((ours[name] - expected).abs().max())
        assert error <= 2e-5 * float(expected.abs().max()) + 1e-6 * largest, name


@pytest.mark.parametrize("name", SERVED)
def test_loss_and_gradients_equal_those_of_the_models_own_forward(name: str) -> None:
    model, inputs = make(name), batch()
    own = model(**inputs)
    expected = gradients(model, own.loss)
    assert float(own.logits.detach().abs().max()) > 0.5  # else caps and scales would not show
    patch(model)
    ours = model(**inputs)
    torch.testing.assert_close(ours.loss, own.loss, rtol=2e-6, atol=2e-6)
    assert ours.logits is None
    assert_same_gradients(gradients(model, ours.loss), expected)


@pytest.mark.parametrize("name", SERVED)
def test_logits_beside_the_loss_are_the_models_own(name: str) -> None:
    model, inputs = make(name).eval(), batch()
    own = model(**inputs)
    patch(model)
    ours = model(**inputs, skip_logits=False, token_outputs=("logprob",))
    torch.testing.assert_close(ours.logits, own.logits, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(ours.loss, own.loss, rtol=2e-6, atol=2e-6)
    targets = inputs["labels"][:, 1:]
    expected = own.logits[:, :-1].float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(ours.token_stats.logprob[:, :-1], expected * (targets != -100), rtol=1e-5, atol=1e-5)
    assert not ours.token_stats.logprob[:, -1].any()
    unpatch(model)
    torch.testing.assert_close(model(**inputs).logits, own.logits, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) & set(SERVED)))
def test_a_family_without_its_entry_in_the_table_is_refused_by_the_self_check(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown family with a scale, a cap, a cut vocabulary or a z-loss is refused, though its logits are small."""
    model = make(name)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    monkeypatch.delitem(FAMILIES, name)
    patch(model)
    with pytest.raises(UnsupportedModelError, match=f"{name}.*differ by|{name}.*cannot run"):
        model(**batch())


DECODER = {"vocab_size": V, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
SMALL = {**BASE, "intermediate_size": 48}
UNSUPPORTED = {
    "BartForCausalLM": ("BartConfig", {**DECODER, "encoder_layers": 1, "encoder_attention_heads": 4}, "does not shift"),
    "BertLMHeadModel": ("BertConfig", {**SMALL, "is_decoder": True}, "does more than multiply"),
    "ElectraForCausalLM": ("ElectraConfig", {**SMALL, "is_decoder": True}, "prediction head"),
    "GPT2DoubleHeadsModel": ("GPT2Config", LEGACY, "second head"),
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA, "no output head"),
    "LlamaModel": ("LlamaConfig", LLAMA, "no base model"),
    "ModernBertDecoderForCausalLM": ("ModernBertDecoderConfig", SMALL, "prediction head"),
    "RobertaForCausalLM": ("RobertaConfig", {**SMALL, "is_decoder": True}, "does more than multiply"),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
        "encoder-decoder",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_be_served_is_refused_by_name(name: str) -> None:
    config, arguments, reason = UNSUPPORTED[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**arguments))
    with pytest.raises(UnsupportedModelError, match=f"{name}.*{reason}"):
        patch(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("name", sorted({*ROUTERS} - {"PhimoeForCausalLM"}))  # whose router draws random numbers
def test_what_a_router_reports_is_the_models_own_beside_any_loss(name: str) -> None:
    """The logits of every layer and the auxiliary loss, added with its coefficient to the loss that the patch has."""
    model, inputs = make(name), {**batch(), "output_router_logits": True}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :2] = 0
    own = model(**inputs)
    expected = gradients(model, own.loss)
    patch(model)
    ours = model(**inputs)
    torch.testing.assert_close(ours.loss, own.loss, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(model, ours.loss), expected)
    assert len(own.router_logits) > 0
    torch.testing.assert_close(ours.router_logits, own.router_logits, rtol=0, atol=0)
    silent = model(**{**inputs, "output_router_logits": False}, loss="dft")
    added = model(**inputs, loss="dft").loss - silent.loss
    if getattr(own, "aux_loss", None) is None:  # a family that balances its experts by a bias
        assert ours.aux_loss is None and not added
        return
    torch.testing.assert_close(ours.aux_loss, own.aux_loss)
    coefficient = {"DbrxForCausalLM": 0.1, "JetMoeForCausalLM": 0.01}.get(name, 0.5)
    torch.testing.assert_close(added, coefficient * own.aux_loss, rtol=1e-5, atol=1e-5)
    assert silent.aux_loss is None and silent.router_logits is None


def test_a_routers_loss_is_added_to_every_micro_batch_as_the_model_adds_it() -> None:
    """The number of items divides the tokens' losses alone, under accumulation too."""
    model, inputs = make("MixtralForCausalLM"), batch()
    rows = [{name: x[i : i + 1] if x.dim() else x for name, x in inputs.items()} for i in range(2)]
    own = [model(**row).loss for row in rows]
    expected = gradients(model, own[0] + own[1])
    patch(model)
    ours = [model(**row).loss for row in rows]
    torch.testing.assert_close(torch.stack(ours), torch.stack(own), rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(model, ours[0] + ours[1]), expected)


def test_a_router_loss_of_an_unknown_form_is_refused_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_balancing_loss_func(gate_logits, num_experts, top_k, attention_mask, capacity=None):
        return gate_logits[0].sum()

    model = make("MixtralForCausalLM")
    model.config.output_router_logits = False
    module = transformers.models.mixtral.modeling_mixtral
    monkeypatch.setattr(module, "load_balancing_loss_func", load_balancing_loss_func)
    patch(model)
    assert model(**batch()).loss.isfinite()
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM.*output_router_logits.*\['capacity'\]"):
        model(**batch(), output_router_logits=True)


def test_every_class_in_the_tables_exists() -> None:
    """A name that is misspelt, or that Transformers has dropped, would be a rule that never applies."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("the tables were made from Transformers 5.23")
    missing = [name for name in (*FAMILIES, *REFUSED) if not hasattr(transformers, name)]
    assert not missing
