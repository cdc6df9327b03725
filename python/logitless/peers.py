"""What other libraries call an argument, and what it is called here: the table that every error asks.

The names are those of PyTorch, Transformers, Liger, Cut Cross-Entropy, torchtune, TRL, verl, OpenRLHF and Unsloth.
docs/migration.md has their calls.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Our name of what another library calls so; the value means the same.
RENAMED = {
    # cross-entropy
    **dict.fromkeys(("lse_square_scale", "z_loss_weight", "z_loss_coef", "return_z_loss"), "z_loss"),
    **dict.fromkeys(("ce_weight", "class_weights"), "class_weight"),
    **dict.fromkeys(("sample_weight", "sample_weights", "loss_weight"), "token_weight"),
    **dict.fromkeys(("smoothing", "label_smoothing_factor"), "label_smoothing"),
    **dict.fromkeys(("n_items", "num_items_in_batch", "batch_num_tokens", "global_batch_size"), "normalizer"),
    **dict.fromkeys(("loss_agg_mode", "agg_mode"), "reduction"),
    **dict.fromkeys(("max_completion_length", "loss_scale_factor"), "max_length"),
    # the head
    **dict.fromkeys(("linear_bias", "lm_head_bias", "lin_bias"), "bias"),
    **dict.fromkeys(("logit_softcapping", "final_logit_softcapping", "softcapping", "soft_cap"), "softcap"),
    **dict.fromkeys(("softmax_scale", "logit_scaling", "lm_head_multiplier", "logits_scale"), "logit_scale"),
    **dict.fromkeys(("temp", "tau"), "temperature"),
    **dict.fromkeys(("tp_group", "vocab_parallel_options", "vocab_group", "process_group"), "group"),
    # the three tensors
    **dict.fromkeys(("_input", "student_input", "hidden_states", "embeddings"), "hidden"),
    **dict.fromkeys(("linear_weight", "lin_weight", "student_weight", "lm_head_weight", "classifier"), "weight"),
    **dict.fromkeys(("target", "true_labels", "selected_token_ids"), "targets"),
    # how it is computed
    "main_grad": "grad_out",
    **dict.fromkeys(("impl", "implementation"), "backend"),
    # the reference and the samples
    **dict.fromkeys(("ref_input", "teacher_input", "teacher_hidden", "teacher_hidden_states"), "ref_hidden"),
    **dict.fromkeys(("ref_weight", "teacher_weight"), "ref_head"),
    **dict.fromkeys(("ref_per_token_logps", "ref_log_prob", "ref_log_probs", "ref_logps", "ref_logp"), "ref_logprob"),
    **dict.fromkeys(("old_per_token_logps", "old_log_prob", "old_log_probs", "old_logps", "old_logp"), "old_logprob"),
    **dict.fromkeys(("sampling_per_token_logps", "rollout_log_probs", "rollout_logprobs"), "sampling_logprob"),
    **dict.fromkeys(("importance_sampling_ratio", "vllm_is_ratio", "rollout_is_weights"), "policy_weight"),
    **dict.fromkeys(("preference_labels", "is_desirable"), "desirable"),
    "rewards": "reward",
    # the losses' hyper-parameters
    "jsd_beta": "beta",
    "kl_loss_coef": "beta",
    "beta2": "beta",
    "simpo_gamma": "gamma",
    "ld_alpha": "tail_weight",
    "f_divergence_type": "divergence",
    **dict.fromkeys(("cpo_alpha", "rpo_alpha", "weight_hard_loss"), "nll_weight"),
    **dict.fromkeys(("epsilon", "clip_ratio_low", "clip_eps_low", "cliprange_low"), "epsilon_low"),
    **dict.fromkeys(("clip_ratio_high", "clip_eps_high", "cliprange_high"), "epsilon_high"),
    **dict.fromkeys(("clip_ratio_c", "dual_clip"), "delta"),
    **dict.fromkeys(("sapo_temperature_pos", "tau_pos"), "tau_positive"),
    **dict.fromkeys(("sapo_temperature_neg", "tau_neg"), "tau_negative"),
    "vespo_k_pos": "k_positive",
    "vespo_lambda_pos": "lambda_positive",
    "vespo_k_neg": "k_negative",
    "vespo_lambda_neg": "lambda_negative",
    "use_bias_correction_kl": "kl_importance",
    **dict.fromkeys(("kl_loss_type", "kl_penalty", "kl_estimator"), "kl"),
    "top_entropy_quantile": "top_entropy",
    "off_policy_mask_threshold": "off_policy_threshold",
    "entropy_coeff": "entropy_coef",
    "kl_cov_ratio": "share",
    "ppo_kl_coef": "kl_coef",
    **dict.fromkeys(("cliprange_value", "clip_eps"), "clip"),
    # a patched model's call
    **dict.fromkeys(("loss_kwargs", "loss_args", "loss_params"), "loss_inputs"),
    **dict.fromkeys(("return_logits", "with_logits", "no_logits", "compute_logits", "output_logits"), "skip_logits"),
    **dict.fromkeys(("return_hidden", "return_hidden_states"), "hidden_only"),
    **dict.fromkeys(("loss_name", "loss_func", "loss_mode", "policy_loss_type"), "loss"),
}

_A_SUM = "sums of gradients are float32 whatever the inputs; leave it out"
_CHUNKS = "chunk_bytes is a budget of bytes for a chunk's logits, and has a default"
_REFERENCE = "the reference is ref_logprob or ref_hidden; losses.CPO and SimPO have none"
_EXACT = 'gradients are exact; backward="tail_corrected" with tail_tolerance= approximates what is small'
_COUNTED = "give the tokens that do not count the target ignore_index, -100"
#: What to do in place of an argument whose name or value is not one of ours.
ADVICE = {
    **dict.fromkeys(("accum_dtype", "accum_e_fp32", "accum_c_fp32", "use_kahan", "acc_policy"), _A_SUM),
    **dict.fromkeys(("chunk_size", "num_output_chunks", "num_chunks", "batch_chunk_size"), _CHUNKS),
    **dict.fromkeys(("chunk_mem_const", "target_gb", "options"), _CHUNKS),
    **dict.fromkeys(("completion_mask", "loss_mask", "response_mask", "attention_mask", "row_mask"), _COUNTED),
    "action_mask": _COUNTED,
    "mask_ignored_tokens": "ignored tokens are always left out",
    **dict.fromkeys(("size_average", "reduce"), 'reduction="mean", "sum" or "none" says it'),
    **dict.fromkeys(("compiled", "compute_ce_loss"), "it has no counterpart; leave it out"),
    "labels": "targets; linear_cross_entropy(..., shift=True) shifts a causal model's labels",
    "shift_labels": "they are the targets, which are aligned with hidden",
    "logits_scaling": "logit_scale=1 / logits_scaling",
    "return_lse": 'linear_logprobs(..., outputs=("lse",)) gives it',
    "return_entropy": 'linear_logprobs(..., outputs=("logprob", "entropy")) gives it',
    "return_token_accuracy": 'linear_logprobs(..., outputs=("correct",)) gives it, one number a token',
    "return_predicted_tokens": "linear_top_k(hidden, weight, 1) gives them",
    **dict.fromkeys(("filter_eps", "filter_e_grad", "filter_c_grad"), _EXACT),
    "use_token_scaling": 'it is a loss of its own, linear_loss("dft", ...)',
    "average_log_prob": 'losses say it: DPO(loss_type="sigmoid_norm") and "ipo", SimPO and ORPO average over tokens',
    "compute_nll_loss": "nll_weight of CPO and RPO says it, or a term of WeightedSum",
    **dict.fromkeys(("use_ref_model", "reference_free"), _REFERENCE),
    "loss_type": 'the loss\'s name, linear_loss("dpo", ...), or a field of some: losses.DPO(loss_type=...)',
    "importance_sampling_level": "losses.GSPO and LUSPO take a sequence's ratio, the other policy losses a token's",
    "f_alpha_divergence_coef": "alpha is 1 less it",
    "sym_kd_ratio": "mixture is 1 less it",
    "weight_soft_loss": "multiply the loss by it",
    "loss_weights": "token_weight is of tokens; losses.WeightedSum(terms, weights) has weights of losses",
    **dict.fromkeys(("ref_bias", "teacher_bias"), "ref_head=logitless.Head(ref_weight, ref_bias)"),
    **dict.fromkeys(("clip_ratio", "cliprange"), "epsilon_low and epsilon_high, one for each side"),
}

#: Values by other names, for each argument that takes one of a few words.
VALUES = {
    "reduction": {
        "batchmean": "mean",
        "token-mean": "mean",
        "seq-mean-token-sum": "sequence_mean",
        "seq-mean-token-mean": "mean_of_means",
        "seq-mean-token-sum-norm": "sum",
    },
    "backend": dict.fromkeys(("cce", "torch_compile", "liger"), "auto"),
    "loss": {
        **dict.fromkeys(("sft", "cross_entropy", "ce"), "nll"),
        **dict.fromkeys(("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard"), "dpo"),
        **dict.fromkeys(("sigmoid_norm", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop"), "dpo"),
        "apo_zero_unpaired": "kto",
        "vanilla": "ppo",
        "gpg": "reinforce",
        "geo_mean": "gmpo",
        "jsd": "gkd",
    },
    "kl": {"low_var_kl": "k3", "mse": "k2", "kl": "k1"},
    "kind": {"kl": "forward_kl", "jsd": "js", "js_divergence": "js", "tvd": "total_variation"},
    "divergence": {"js_divergence": "js", "alpha_divergence": "alpha"},
}


def peer_hint(name: str) -> str:
    """What to append to an error about a name that another library has; nothing for any other name."""
    if name in RENAMED:
        return f"; {name} is {RENAMED[name]!r} here (docs/migration.md)"
    return f"; {name}: {ADVICE[name]} (docs/migration.md)" if name in ADVICE else ""


def value_hint(argument: str, value: object) -> str:
    """What to append to an error about an argument's value; nothing unless another library has it."""
    words = VALUES.get(argument, {})
    return f"; it is {words[value]!r} here" if isinstance(value, str) and value in words else ""


def refuse_unknown(function: str, given: Iterable[str], known: Iterable[str] = ()) -> None:
    """Raises TypeError for a keyword argument that the function does not know, with the name that is meant."""
    for name in given:
        if name not in known:
            raise TypeError(f"{function}: no argument {name!r}{_meant(name, known)}")


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 2, 0.7)
    return peer_hint(name) or (f" (did you mean {' or '.join(map(repr, near))}?)" if near else "")
