"""The names that the tables of docs/migration.md use of other libraries.

PyTorch, Liger and TRL are the packages themselves. TRL's configurations stand for the losses of its trainers, which
run on stand-ins (`trl_standins`). Cut Cross-Entropy, torchtune, verl, OpenRLHF and Unsloth are their published
formulas, written here in plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl_standins import FakeAccelerator, FakeModel, fused_outputs, trl_dpo, trl_kto, trl_loss

Names = Mapping[str, Any]

# ---------------------------------------------------------------------------------------------------------------------
# PyTorch and Liger


def of_torch(names: Names) -> dict[str, Any]:
    def owned(module: nn.Module) -> Callable[..., Tensor]:
        return lambda *args: torch.func.functional_call(module, {"linear.weight": names["weight"]}, args)

    return {"owned": owned}


def of_liger_chunks(names: Names) -> dict[str, Any]:
    """Liger's chunked losses, not compiled, which would only take longer."""
    module = pytest.importorskip("liger_kernel.chunked_loss")
    classes = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return {name: functools.partial(value, compiled=False) for name, value in classes.items()}


def of_liger_kernels(names: Names) -> dict[str, Any]:
    """Liger's kernels, and a model that its head's kernel is put on."""
    module = pytest.importorskip("liger_kernel.transformers")
    functions = pytest.importorskip("liger_kernel.transformers.functional")
    pytest.importorskip("transformers")
    from patch_models import llama

    model = llama(vocab_size=names["V"])

    def apply_liger_kernel_to_llama(model: nn.Module) -> nn.Module:
        module.apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False, model=model)
        return model

    own = {"apply_liger_kernel_to_llama": apply_liger_kernel_to_llama, "model": model}
    return {**vars(functions), **vars(module), **own}


# ---------------------------------------------------------------------------------------------------------------------
# TRL


def settings_of(config: type, given: Mapping[str, Any]) -> SimpleNamespace:
    """A configuration's fields: TRL's defaults, and what is given, whose names must be fields."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert set(given) <= set(fields), sorted(set(given) - set(fields))
    defaults = {
        name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for name, field in fields.items()
    }
    return SimpleNamespace(**defaults | dict(given))


def of_trl(names: Names) -> dict[str, Any]:
    trl, cpo = pytest.importorskip("trl"), pytest.importorskip("trl.experimental.cpo")
    orpo, tpo = pytest.importorskip("trl.experimental.orpo"), pytest.importorskip("trl.experimental.tpo")
    a2po, gmpo = pytest.importorskip("trl.experimental.a2po"), pytest.importorskip("trl.experimental.gmpo")
    utils = pytest.importorskip("trl.trainer.utils")
    losses = {
        trl.SFTConfig: _sft,
        trl.DPOConfig: _dpo,
        trl.KTOConfig: _kto,
        trl.GRPOConfig: _grpo,
        trl.RLOOConfig: _grpo,
        gmpo.GMPOConfig: _grpo,
        cpo.CPOConfig: _cpo,
        orpo.ORPOConfig: _orpo,
        tpo.TPOConfig: _tpo,
        a2po.A2POConfig: _a2po,
        trl.DistillationConfig: _distillation,
    }
    return {
        **{config.__name__: functools.partial(_loss_of, config, loss, names) for config, loss in losses.items()},
        "GKDTrainer": pytest.importorskip("trl.experimental.gkd").GKDTrainer,
        "selective_log_softmax": utils.selective_log_softmax,
        "entropy_from_logits": utils.entropy_from_logits,
    }


def _loss_of(config: type, loss: Callable[..., Tensor], names: Names, **given: Any) -> Tensor:
    return loss(settings_of(config, given), names, config.__name__.removesuffix("Config").lower())


def _sft(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    mask = names["mask"]
    outputs = fused_outputs(names["logprob"], names["logprob"].detach())
    outputs.label_mask = mask
    fake = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda x: x, num_processes=1),
        args=settings,
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        get_tp_size=lambda: 1,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    trainer = pytest.importorskip("trl").SFTTrainer
    return trainer.compute_loss(fake, FakeModel(outputs), {"labels": names["targets"], "attention_mask": mask})


def _dpo(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    log_sum_sq = 2 * names["logits"].detach().log_softmax(-1)
    problem = names["logprob"], names["ref_logprob"], names["mask"], log_sum_sq.logsumexp(-1) * names["mask"]
    weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    read = ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting")
    loss, _ = trl_dpo(
        problem, args=settings, loss_types=settings.loss_type, loss_weights=weights,
        **{name: getattr(settings, name) for name in read},
    )  # fmt: skip
    return loss


def _kto(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    mismatched = (names["mismatched"], names["ref_mismatched"]) if settings.loss_type == "kto" else None
    problem = names["logprob"], names["ref_logprob"], names["mask"]
    read = ("loss_type", "beta", "desirable_weight", "undesirable_weight")
    return trl_kto(problem, mismatched, names["desirable"], **{x: getattr(settings, x) for x in read})[0]


def _grpo(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    batch = SimpleNamespace(**names, per_sequence=names["advantages"], sampling_logprob=names["old_logprob"])
    read = dict(vars(settings), epsilon_low=settings.epsilon)
    if settings.epsilon_high is None:
        read["epsilon_high"] = settings.epsilon
    if kind == "rloo":  # its KL is in the rewards
        read["beta"] = 0.0
    own = read.pop("loss_type", None)
    return trl_loss(batch, own if kind == "grpo" else kind, **read)


def _sides(names: Names, *, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen and the rejected completions' log-probabilities, and the NLL of all chosen tokens."""
    logprob, mask = names["logprob"], names["mask"]
    sums = logprob.sum(-1) / mask.sum(-1) if average else logprob.sum(-1)
    chosen, rejected = sums.chunk(2)
    half = len(logprob) // 2
    return chosen, rejected, -logprob[:half].sum() / mask[:half].sum()


def _of_pairs(trainer: Any, method: str, names: Names, *, average: bool, **settings: Any) -> Tensor:
    """The loss of a trainer of pairs that runs its model in `concatenated_forward`."""
    chosen, rejected, nll = _sides(names, average=average)
    fake = SimpleNamespace(accelerator=FakeAccelerator(), aux_loss_enabled=False, **settings)
    nothing = torch.zeros_like(chosen)
    fake.concatenated_forward = lambda *_: (chosen, rejected, nothing, nothing, nll)
    setattr(fake, method, functools.partial(getattr(trainer, method), fake))
    loss: Tensor = trainer.get_batch_loss_metrics(fake, None, {})[0]
    return loss


def _cpo(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    if settings.loss_type == "alphapo":  # as the configuration does after it is made
        settings.loss_type, settings.cpo_alpha = "simpo", 0.0
    read = ("beta", "alpha", "loss_type", "simpo_gamma", "label_smoothing", "cpo_alpha")
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    average = settings.loss_type in ("ipo", "simpo")
    return _of_pairs(trainer, "cpo_loss", names, average=average, **{x: getattr(settings, x) for x in read})


def _orpo(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    return _of_pairs(trainer, "odds_ratio_loss", names, average=True, beta=settings.beta)


def _tpo(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    """One more position in front, because the trainer shifts."""
    shifted = {name: F.pad(names[name], (1, 0)) for name in ("ids", "mask")}
    logits = F.pad(names["logits"], (0, 0, 0, 1))
    fake = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=FakeAccelerator(), aux_loss_enabled=False,
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, **vars(settings),
    )  # fmt: skip
    inputs = dict(input_ids=shifted["ids"], completion_mask=shifted["mask"].long(), attention_mask=shifted["mask"])
    trainer = pytest.importorskip("trl.experimental.tpo").TPOTrainer
    loss: Tensor = trainer._compute_loss(fake, FakeModel(SimpleNamespace(logits=logits)), inputs, False)
    return loss


def _a2po(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    fake = SimpleNamespace(
        model=SimpleNamespace(training=False), args=settings, _metrics={"eval": defaultdict(list)},
        _get_sequence_logps=lambda *_: names["logprob"].sum(-1),
    )  # fmt: skip
    inputs = defaultdict(lambda: None, rewards=names["advantages"] + 0.5, v_star=torch.full((names["B"],), 0.5))
    inputs["ref_logps"] = names["ref_logprob"].sum(-1)
    trainer = pytest.importorskip("trl.experimental.a2po").A2POTrainer
    loss: Tensor = trainer.compute_loss(fake, None, inputs)
    return loss


def _distillation(settings: SimpleNamespace, names: Names, kind: str) -> Tensor:
    function = pytest.importorskip("trl.trainer.distillation_trainer")._chunked_divergence_loss
    states = (names[name] for name in ("hidden", "ref_hidden", "weight", "ref_weight", "mask"))
    loss: Tensor = function(*states, settings.beta, temperature=settings.temperature)[0]
    return loss


# ---------------------------------------------------------------------------------------------------------------------
# Cut Cross-Entropy


def of_cut_cross_entropy(names: Names) -> dict[str, Any]:
    """The package's formula; its filter drops gradients below a threshold, and changes no value."""
    module = ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = _cut  # type: ignore[attr-defined]
    module.LinearCrossEntropy = lambda **options: functools.partial(_cut, **options)  # type: ignore[attr-defined]
    return {"cut_cross_entropy": module}


def _cut(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    filter_eps: float | str | None = "high",
    impl: str = "cce",
) -> Tensor:
    if shift:
        e, targets = e[..., :-1, :], targets[..., 1:]
    logits = e @ c.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


# ---------------------------------------------------------------------------------------------------------------------
# torchtune


def _chunked_cross_entropy(logits: tuple[Tensor, ...], labels: Tensor, ignore_index: int = -100) -> Tensor:
    return F.cross_entropy(torch.cat(logits, 1).flatten(0, 1), labels.flatten(), ignore_index=ignore_index)


def _on_a_head(loss: Any, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, labels: loss((F.linear(outputs, weight),), labels)


def _masked_mean(per_token: Tensor, labels: Tensor) -> Tensor:
    return per_token[labels != -100].mean()


def _soft_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return _masked_mean(-(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1), labels)


def _reverse_kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    difference = student.log_softmax(-1) - teacher.log_softmax(-1)
    return _masked_mean((student.softmax(-1) * difference).sum(-1), labels)


def _symmetric_kl(sym_kd_ratio: float = 0.5) -> Callable[..., Tensor]:
    return lambda *x: sym_kd_ratio * _soft_cross_entropy(*x) + (1 - sym_kd_ratio) * _reverse_kl(*x)


def _pairs(of_margin: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """A loss of the difference of both sides' log-ratios, as the first of a tuple."""
    return lambda chosen, rejected, ref_chosen, ref_rejected: (
        of_margin((chosen - rejected) - (ref_chosen - ref_rejected)),
    )


def _smoothed(beta: float, label_smoothing: float) -> Callable[[Tensor], Tensor]:
    eps = label_smoothing
    return lambda h: -(1 - eps) * F.logsigmoid(beta * h) - eps * F.logsigmoid(-beta * h)


def of_torchtune(names: Names) -> dict[str, Any]:
    return {
        "CEWithChunkedOutputLoss": lambda: _chunked_cross_entropy,
        "LinearCrossEntropyLoss": lambda: _chunked_cross_entropy,
        "linear_projection": _on_a_head,
        "ForwardKLLoss": lambda: _soft_cross_entropy,
        "ReverseKLLoss": lambda: _reverse_kl,
        "SymmetricKLLoss": _symmetric_kl,
        "teacher_entropy": lambda logits: torch.distributions.Categorical(logits=logits).entropy().mean(),
        "DPOLoss": lambda beta=0.1, label_smoothing=0.0: _pairs(_smoothed(beta, label_smoothing)),
        "RSOLoss": lambda gamma=0.1: _pairs(lambda h: torch.relu(1 - gamma * h)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# verl


def _aggregated(loss: Tensor, mask: Tensor, loss_agg_mode: str = "token-mean", scale: float | None = None) -> Tensor:
    rows = (loss * mask).sum(-1)
    return {
        "token-mean": lambda: rows.sum() / mask.sum(),
        "seq-mean-token-sum": lambda: rows.mean(),
        "seq-mean-token-mean": lambda: (rows / mask.sum(-1)).mean(),
        "seq-mean-token-sum-norm": lambda: rows.sum() / (mask.shape[-1] if scale is None else scale),
    }[loss_agg_mode]()


def _surrogate(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def _dual_clipped(ratio: Tensor, advantages: Tensor, low: float, high: float, bound: float) -> Tensor:
    clipped = _surrogate(ratio, advantages, low, high)
    return torch.where(advantages < 0, torch.minimum(-advantages * bound, clipped), clipped)


def _with_penalty(x: Tensor, advantages: Tensor, logprob: Tensor, mask: Tensor, share: float, coef: float) -> Tensor:
    """kl_cov: the tokens of greatest covariance are pulled back by |log-ratio|."""
    count = max(1, int(mask.sum() * share))
    covariance = (advantages - advantages[mask].mean()) * (logprob - logprob[mask].mean()).detach()
    largest = covariance.masked_fill(~mask, -torch.inf).flatten().topk(count).indices
    chosen = torch.zeros(mask.numel(), dtype=torch.bool).index_fill(0, largest, True).view_as(mask)
    return -advantages * x.exp() + torch.where(chosen, coef * x.abs(), 0.0)


def of_verl(names: Names) -> dict[str, Any]:
    logprob, old, mask, advantages = (names[x] for x in ("logprob", "old_logprob", "mask", "token_advantages"))

    def policy_loss(
        loss_mode: str,
        *,
        loss_agg_mode: str = "token-mean",
        clip_ratio_low: float = 0.2,
        clip_ratio_high: float = 0.2,
        clip_ratio_c: float = 3.0,
        tau_pos: float = 1.0,
        tau_neg: float = 1.05,
        kl_cov_ratio: float = 0.0002,
        ppo_kl_coef: float = 1.0,
        loss_scale_factor: float | None = None,
        rollout_is_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of `actor.policy_loss.loss_mode` on the page's samples."""
        low, high, x = clip_ratio_low, clip_ratio_high, logprob - old
        ratio = x.clamp(-20, 20).exp()
        if loss_mode in ("gspo", "sapo"):
            loss_agg_mode = "seq-mean-token-mean"
        if loss_mode == "vanilla":
            loss = _dual_clipped(ratio, advantages, low, high, clip_ratio_c)
        elif loss_mode == "gspo":
            mean = ((x * mask).sum(-1) / mask.sum(-1))[:, None].detach()
            loss = _surrogate((logprob - logprob.detach() + mean).exp(), advantages, low, high)
        elif loss_mode == "sapo":
            tau = torch.where(advantages > 0, tau_pos, tau_neg)
            loss = -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
        elif loss_mode == "gpg":
            loss = -logprob * advantages
        elif loss_mode == "cispo":
            loss = -ratio.clamp(1 - low, 1 + high).detach() * advantages * logprob
        elif loss_mode == "kl_cov":
            loss = _with_penalty(x, advantages, logprob, mask, kl_cov_ratio, ppo_kl_coef)
        else:
            assert loss_mode == "geo_mean"
            sign = advantages.sign()
            held = sign * torch.minimum(sign * x, sign * x.clamp(-low, high))
            return (-names["advantages"] * ((held * mask).sum(-1) / mask.sum(-1)).exp()).mean()
        if rollout_is_weights is not None:
            loss = loss * rollout_is_weights
        return _aggregated(loss, mask, loss_agg_mode, loss_scale_factor)

    return {
        "policy_loss": policy_loss,
        "agg_loss": _aggregated,
        "kl_penalty": _kl_penalty,
        "compute_value_loss": _value_loss,
        "logprobs_from_logits": _logprobs,
        "FusedLinearForPPO": lambda: _fused_linear,
    }


def _kl_penalty(logprob: Tensor, ref_logprob: Tensor, kind: str) -> Tensor:
    x = logprob - ref_logprob
    value = {
        "kl": lambda: x,
        "abs": x.abs,
        "mse": lambda: x.square() / 2,
        "low_var_kl": lambda: ((-x).clamp(-20, 20).exp() + x - 1).clamp(-10, 10),
    }[kind.removesuffix("+")]()
    return value if kind[-1] != "+" else x.square() / 2 - (x.square() / 2).detach() + value.detach()


def _value_loss(values: Tensor, returns: Tensor, old: Tensor, mask: Tensor, cliprange_value: float) -> Tensor:
    held = torch.minimum(torch.maximum(values, old - cliprange_value), old + cliprange_value)
    return _aggregated(torch.maximum((values - returns) ** 2, (held - returns) ** 2), mask) / 2


def _logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _fused_linear(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T / temperature
    return _logprobs(logits, ids), torch.distributions.Categorical(logits=logits).entropy()


# ---------------------------------------------------------------------------------------------------------------------
# OpenRLHF and Unsloth


def _policy_loss(
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    policy_loss_type: str = "ppo",
) -> Callable[..., tuple[Tensor]]:
    def loss(logprob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor]:
        x = logprob - old
        if policy_loss_type == "gspo":
            x = ((x * mask).sum(-1) / mask.sum(-1))[:, None].expand_as(mask)
        bound = torch.inf if dual_clip is None else dual_clip
        per_token = _dual_clipped(x.exp(), advantages, clip_eps_low, clip_eps_high, bound)
        by_token = token_level_loss and policy_loss_type != "gspo"
        return (_aggregated(per_token, mask, "token-mean" if by_token else "seq-mean-token-mean"),)

    return loss


def _dpo_loss(beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> Callable[..., tuple[Tensor]]:
    of_margin = (lambda h: (h - 1 / (2 * beta)) ** 2) if ipo else _smoothed(beta, label_smoothing)
    return lambda *sides: (_pairs(of_margin)(*sides)[0].mean(),)


def _fast_cross_entropy(
    logits: Tensor, labels: Tensor, logit_softcapping: float = 0, logit_scaling: float = 0, n_items: int | None = None
) -> Tensor:
    if logit_scaling:
        logits = logit_scaling * logits
    if logit_softcapping:
        logits = logit_softcapping * torch.tanh(logits / logit_softcapping)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / ((labels != -100).sum() if n_items is None else n_items)


def of_openrlhf_and_unsloth(names: Names) -> dict[str, Any]:
    modes = {True: "token-mean", False: "seq-mean-token-mean"}
    return {
        "SFTLoss": lambda token_level_loss=True: lambda x, mask: _aggregated(-x, mask, modes[token_level_loss]),
        "GPTLMLoss": lambda: lambda x, labels: F.cross_entropy(x[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
        "PolicyLoss": _policy_loss,
        "DPOLoss": _dpo_loss,
        "compute_approx_kl": lambda x, ref, kl_estimator="k1": _kl_penalty(
            x, ref, {"k1": "kl", "k2": "mse", "k3": "low_var_kl"}[kl_estimator]
        ),
        "fast_cross_entropy_loss": _fast_cross_entropy,
    }


#: A section's names, by its heading, and the dtype that its peer computes in.
SECTIONS: dict[str, tuple[Callable[[Names], dict[str, Any]], torch.dtype]] = {
    "PyTorch": (of_torch, torch.float64),
    "Liger Kernel: cross-entropy": (of_liger_kernels, torch.float32),
    "Liger Kernel: divergences": (of_liger_kernels, torch.float32),
    "Liger Kernel: chunked losses": (of_liger_chunks, torch.float32),
    "Cut Cross-Entropy": (of_cut_cross_entropy, torch.float64),
    "torchtune": (of_torchtune, torch.float64),
    "TRL": (of_trl, torch.float32),
    "verl": (of_verl, torch.float64),
    "OpenRLHF and Unsloth": (of_openrlhf_and_unsloth, torch.float64),
}
#: Sections of Triton kernels, which run in the interpreter.
INTERPRETED = ("Liger Kernel: cross-entropy", "Liger Kernel: divergences")
