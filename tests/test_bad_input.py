"""Every mistake gets a ValueError or TypeError that names the argument, before anything is computed."""

from __future__ import annotations

import math

import pytest
import torch

import logitless
from logitless import Head, losses
from logitless.testing import make_problem

META = torch.device("meta")


def base() -> dict:
    p = make_problem((4, 3), 5, 9, bias=True)
    return dict(hidden=p.hidden, weight=p.weight, targets=p.targets)


def nll(stats, *inputs):
    return -stats.logprob


REF, MARKS = torch.zeros(4, 3), torch.ones(4, dtype=torch.bool)
ONES, MASK = torch.ones(9), torch.tensor([-math.inf] + [0.0] * 8)
VALUES, CE = losses.FDivergenceSFT(value="lse"), "linear_cross_entropy"
FUNCTIONS = {
    "linear_logprobs": logitless.linear_logprobs,
    "linear_token_loss": lambda **k: logitless.linear_token_loss(per_token_loss=nll, **k),
    "linear_loss": lambda **k: logitless.linear_loss("dft", **k),
    "linear_cross_entropy": logitless.linear_cross_entropy,
    "linear_dft": logitless.linear_dft,
    "linear_f_divergence_sft": lambda **k: logitless.linear_f_divergence_sft(ref_logprob=REF, **k),
    "linear_dpo": lambda **k: logitless.linear_dpo(ref_logprob=REF, **k),
}

#: (argument that the message names, the error, what replaces what)
COMMON = {
    "hidden is no tensor": ("hidden", TypeError, dict(hidden=[[1.0]])),
    "hidden is None": ("hidden", TypeError, dict(hidden=None)),
    "hidden's width": ("hidden", ValueError, dict(hidden=torch.randn(4, 3, 6))),
    "hidden is a number": ("hidden", ValueError, dict(hidden=torch.tensor(1.0))),
    "hidden is integral": ("hidden", TypeError, dict(hidden=torch.ones(4, 3, 5, dtype=torch.long))),
    "hidden is complex": ("hidden", TypeError, dict(hidden=torch.ones(4, 3, 5, dtype=torch.complex64))),
    "hidden is elsewhere": ("weight|ref_logprob", ValueError, dict(hidden=torch.ones(4, 3, 5, device=META))),
    "weight is no tensor": ("weight", TypeError, dict(weight=3)),
    "weight's dims": ("weight", ValueError, dict(weight=torch.randn(2, 9, 5))),
    "weight is a vector": ("weight", ValueError, dict(weight=torch.randn(5))),
    "weight's dtype": ("weight", TypeError, dict(weight=torch.randn(9, 5).bfloat16())),
    "weight is elsewhere": ("weight", ValueError, dict(weight=torch.randn(9, 5, device=META))),
    "weight is empty": ("weight", ValueError, dict(weight=torch.randn(0, 5))),
    "weight is transposed": ("hidden", ValueError, dict(weight=torch.randn(5, 9))),
    "bias is no tensor": ("bias", TypeError, dict(bias=0.0)),
    "bias's shape": ("bias", ValueError, dict(bias=torch.zeros(8))),
    "bias's dims": ("bias", ValueError, dict(bias=torch.zeros(1, 9))),
    "bias's dtype": ("bias", TypeError, dict(bias=torch.zeros(9).double())),
    "bias is elsewhere": ("bias", ValueError, dict(bias=torch.zeros(9, device=META))),
    "targets are no tensor": ("targets", TypeError, dict(targets=[1, 2])),
    "targets' shape": ("targets", ValueError, dict(targets=torch.zeros(4, 4, dtype=torch.long))),
    "targets are flat": ("targets", ValueError, dict(targets=torch.zeros(12, dtype=torch.long))),
    "targets are floats": ("targets", TypeError, dict(targets=torch.zeros(4, 3))),
    "targets are bools": ("targets", TypeError, dict(targets=torch.zeros(4, 3, dtype=torch.bool))),
    "targets are elsewhere": ("targets", ValueError, dict(targets=torch.zeros(4, 3, dtype=torch.long, device=META))),
    "target beyond": ("targets", ValueError, dict(targets=torch.full((4, 3), 9))),
    "target negative": ("targets", ValueError, dict(targets=torch.full((4, 3), -1))),
    "target of another ignore_index": ("targets", ValueError, dict(targets=torch.full((4, 3), -100), ignore_index=-1)),
    "ignore_index is a float": ("ignore_index", TypeError, dict(ignore_index=1.0)),
    "ignore_index is None": ("ignore_index", TypeError, dict(ignore_index=None)),
    "softcap 0": ("softcap", ValueError, dict(softcap=0.0)),
    "softcap negative": ("softcap", ValueError, dict(softcap=-30.0)),
    "softcap infinite": ("softcap", ValueError, dict(softcap=math.inf)),
    "softcap is a string": ("softcap", TypeError, dict(softcap="30")),
    "temperature 0": ("temperature", ValueError, dict(temperature=0.0)),
    "temperature negative": ("temperature", ValueError, dict(temperature=-1.0)),
    "temperature NaN": ("temperature", ValueError, dict(temperature=math.nan)),
    "temperature is None": ("temperature", TypeError, dict(temperature=None)),
    "temperature is a tensor": ("temperature", TypeError, dict(temperature=torch.tensor(1.0))),
    "logit_scale NaN": ("logit_scale", ValueError, dict(logit_scale=math.nan)),
    "logit_scale 0": ("logit_scale", ValueError, dict(logit_scale=0.0)),
    "logit_scale is a bool": ("logit_scale", TypeError, dict(logit_scale=True)),
    "backend unknown": ("backend", ValueError, dict(backend="chunky")),
    "backward unknown": ("backward", ValueError, dict(backward="recompte")),
    "chunk_bytes 0": ("chunk_bytes", ValueError, dict(chunk_bytes=0)),
    "chunk_bytes negative": ("chunk_bytes", ValueError, dict(chunk_bytes=-5)),
    "chunk_bytes is a float": ("chunk_bytes", TypeError, dict(chunk_bytes=1e6)),
    "chunk_bytes is a bool": ("chunk_bytes", TypeError, dict(chunk_bytes=True)),
}


def refused(function, name: str, error: type[Exception], **arguments) -> str:
    with pytest.raises(error, match=rf"\b({name})\b") as caught:
        function(**arguments)
    assert type(caught.value) is error
    return str(caught.value)


@pytest.mark.parametrize("mistake", COMMON)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_every_function_takes(function, mistake):
    name, error, change = COMMON[mistake]
    arguments = {**base(), **change}
    before = torch.get_rng_state()
    refused(FUNCTIONS[function], name, error, **arguments)
    assert torch.equal(torch.get_rng_state(), before)
    assert base()["hidden"].grad is None


@pytest.mark.parametrize("mistake", [m for m in COMMON if m != "backend unknown"])
def test_the_reference_backend_refuses_the_same(mistake):
    name, error, change = COMMON[mistake]
    refused(logitless.linear_logprobs, name, error, **{**base(), "backend": "reference", **change})


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f != "linear_logprobs"])
@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("reduction", ValueError, dict(reduction="avg")),
        ("normalizer", ValueError, dict(normalizer=0)),
        ("normalizer", ValueError, dict(normalizer=-3.0)),
        ("normalizer", ValueError, dict(normalizer=math.nan)),
        ("normalizer", ValueError, dict(normalizer=torch.ones(2))),
        ("normalizer", TypeError, dict(normalizer="4")),
        ("normalizer", ValueError, dict(normalizer=4, reduction="sum")),
        ("targets", TypeError, dict(targets=None)),
    ],
)
def test_what_every_loss_takes(function, name, error, change):
    refused(FUNCTIONS[function], name, error, **{**base(), **change})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_keyword(function):
    refused(FUNCTIONS[function], "softcpa", TypeError, **base(), softcpa=3.0)


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("outputs", ValueError, dict(outputs=("logprobs",))),
        ("outputs", TypeError, dict(outputs="logprob")),
        ("outputs", TypeError, dict(outputs=3)),
        ("targets", ValueError, dict(targets=None)),
        ("targets", ValueError, dict(targets=None, outputs=("correct",))),
        ("targets", ValueError, dict(targets=None, outputs=("lse", "logprob"))),
        ("backward", ValueError, dict(backward="single_pass")),
    ],
)
def test_linear_logprobs(name, error, change):
    refused(logitless.linear_logprobs, name, error, **{**base(), **change})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(outputs=("entropy",)), "entropy"),
        (dict(outputs=("mean_logit",), softcap=3.0), "mean logit"),
        (dict(bias=torch.zeros(9, requires_grad=True)), "trainable"),
    ],
)
def test_single_pass_that_cannot_be_is_refused_with_its_reason(change, reason):
    arguments = {**base(), "weight": base()["weight"].detach(), "backward": "single_pass", **change}
    assert reason in refused(logitless.linear_logprobs, "backward", ValueError, **arguments)


@pytest.mark.parametrize("function", ["linear_token_loss", "linear_dft", "linear_cross_entropy", "linear_dpo"])
def test_single_pass_without_reduction_and_a_trainable_head(function):
    refused(FUNCTIONS[function], "backward", ValueError, **base(), reduction="none", backward="single_pass")


def test_single_pass_of_a_pair_that_does_not_fit():
    message = refused(
        FUNCTIONS["linear_dpo"], "chunk_bytes", ValueError, **base(), backward="single_pass", chunk_bytes=9
    )
    assert "backward" in message


# ---------------------------------------------------------------------------------------------------------------------
# linear_token_loss


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize(
    ("error", "value"),
    [
        (ValueError, torch.zeros(12)),
        (ValueError, torch.zeros(3, 4)),
        (ValueError, torch.zeros(4, 3, requires_grad=True)),
        (ValueError, torch.zeros(4, 3, device=META)),
        (TypeError, [0.0] * 12),
        (TypeError, None),
    ],
    ids=["flat", "transposed", "requires grad", "elsewhere", "list", "None"],
)
def test_token_inputs(error, value, backward):
    arguments = dict(per_token_loss=nll, token_inputs=(REF, value), backward=backward)
    refused(logitless.linear_token_loss, r"token_inputs\[1\]|token_inputs", error, **base(), **arguments)


@pytest.mark.parametrize("backward", ["auto", "recompute"])
@pytest.mark.parametrize(
    ("error", "function"),
    [
        (TypeError, lambda stats: None),
        (TypeError, lambda stats: 1.0),
        (TypeError, lambda stats: (stats.logprob, stats.logprob)),
        (ValueError, lambda stats: stats.logprob.mean()),
        (ValueError, lambda stats: stats.logprob[..., None]),
    ],
    ids=["None", "number", "tuple", "reduced", "another dimension"],
)
def test_what_per_token_loss_returns(error, function, backward):
    refused(logitless.linear_token_loss, "per_token_loss", error, **base(), per_token_loss=function, backward=backward)


@pytest.mark.parametrize("leaf", [True, False])
def test_per_token_loss_that_closes_over_a_parameter(leaf):
    parameter = torch.ones((), requires_grad=True)
    factor = parameter if leaf else parameter * 2
    refused(
        logitless.linear_token_loss, "per_token_loss", ValueError, **base(), per_token_loss=lambda s: factor * s.logprob
    )


@pytest.mark.parametrize("function", ["linear_logprobs", "linear_token_loss"])
@pytest.mark.parametrize(
    ("error", "change"),
    [
        (ValueError, dict(logit_weight=torch.ones(8))),
        (ValueError, dict(logit_weight=torch.ones(9, 1))),
        (ValueError, dict(logit_weight=torch.ones(9, requires_grad=True))),
        (ValueError, dict(logit_weight=torch.ones(9, device=META))),
        (TypeError, dict(logit_weight=[1.0] * 9)),
        (ValueError, dict(logit_weight=ONES, outputs=("logprob",))),
    ],
)
def test_weights_of_the_mean_logit(function, error, change):
    refused(FUNCTIONS[function], "logit_weight", error, **{**base(), "outputs": ("logprob", "mean_logit"), **change})


def test_a_loss_takes_no_weights_of_the_mean_logit():
    refused(FUNCTIONS[CE], "logit_weight", TypeError, **base(), label_smoothing=0.1, logit_weight=ONES)


def test_per_token_loss_that_is_nothing_to_call():
    refused(logitless.linear_token_loss, "per_token_loss", TypeError, **base(), per_token_loss="nll")


# ---------------------------------------------------------------------------------------------------------------------
# Losses by name


def test_an_unknown_loss_lists_near_names():
    for name, near in (("dfft", "dft"), ("dpo2", "dpo"), ("f_divergence", "f_divergence_sft")):
        with pytest.raises(ValueError, match=rf"{name}.*{near}"):
            logitless.linear_loss(name, **base())
    with pytest.raises(ValueError, match=", ".join(losses.names())):
        logitless.linear_loss("zzz", **base())


@pytest.mark.parametrize("loss", [None, 3, nll, losses.DFT])
def test_what_is_no_loss(loss):
    refused(lambda **k: logitless.linear_loss(loss, **k), "loss", TypeError, **base())


@pytest.mark.parametrize(
    ("loss", "name", "error", "change"),
    [
        ("f_divergence_sft", "ref_logprob", ValueError, {}),
        ("f_divergence_sft", "ref_logprob", ValueError, dict(ref_logprob=None)),
        ("f_divergence_sft", "ref_logprob", ValueError, dict(ref_logprob=torch.zeros(12))),
        ("f_divergence_sft", "ref_logprob", ValueError, dict(ref_logprob=REF.clone().requires_grad_())),
        ("f_divergence_sft", "ref_logprob", TypeError, dict(ref_logprob=0.0)),
        ("f_divergence_sft", "ref_lse", TypeError, dict(ref_logprob=REF, ref_lse=REF)),
        (VALUES, "ref_lse", ValueError, dict(ref_logprob=REF)),
        (VALUES, "cu_seqlens", ValueError, dict(ref_logprob=REF, ref_lse=REF, cu_seqlens=torch.tensor([0, 5]))),
        ("dft", "ref_logprob", TypeError, dict(ref_logprob=REF)),
        ("dpo", "ref_logprob", ValueError, {}),
        ("dpo", "token_weight", ValueError, dict(ref_logprob=REF, token_weight=REF)),
        ("dpo", "ref_hidden", ValueError, dict(ref_logprob=REF, ref_hidden=torch.randn(4, 3, 5))),
        ("dpo", "ref_head", ValueError, dict(ref_logprob=REF, ref_head=torch.randn(9, 5))),
        ("distillation", "ref_hidden", TypeError, dict(ref_hidden=[[1.0]])),
        ("kto", r"desirable.*\[4\], one", ValueError, dict(ref_logprob=REF)),
        ("bco", r"reward_shift.*\[4\], one", TypeError, dict(ref_logprob=REF, desirable=MARKS, reward_shift=0.0)),
        ("dpo", r"beta.*losses\.DPO\(beta", TypeError, dict(ref_logprob=REF, beta=0.2)),
        ("dft", "token_weight", ValueError, dict(token_weight=torch.ones(3))),
        ("dft", "token_weight", ValueError, dict(token_weight=torch.ones(4, 3, requires_grad=True))),
        ("dft", "token_weight", TypeError, dict(token_weight=2.0)),
    ],
)  # fmt: skip
def test_inputs_of_losses(loss, name, error, change):
    refused(lambda **k: logitless.linear_loss(loss, **k), name, error, **base(), **change)


@pytest.mark.parametrize(
    ("function", "name", "error", "change"),
    [
        (CE, "label_smoothing", ValueError, dict(label_smoothing=-0.1)),
        (CE, "label_smoothing", ValueError, dict(label_smoothing=1.1)),
        (CE, "label_smoothing", TypeError, dict(label_smoothing="a")),
        (CE, "z_loss", ValueError, dict(z_loss=-1e-4)),
        (CE, "class_weight", ValueError, dict(class_weight=torch.ones(8))),
        (CE, "class_weight", ValueError, dict(class_weight=torch.ones(9, requires_grad=True))),
        (CE, "class_weight", ValueError, dict(class_weight=torch.ones(9, device=META))),
        (CE, "class_weight", TypeError, dict(class_weight=[1.0] * 9)),
        (CE, "token_weight", ValueError, dict(token_weight=torch.ones(3))),
        (CE, "token_weight", ValueError, dict(token_weight=torch.ones(3), shift=True)),
        (CE, "token_weight", ValueError, dict(token_weight=torch.ones(3), class_weight=ONES)),
        (CE, "token_weight", TypeError, dict(token_weight=3.0, shift=True)),
        (CE, "targets", TypeError, dict(targets=[1], shift=True)),
        (CE, "targets", ValueError, dict(targets=torch.zeros(4, 2, dtype=torch.long), shift=True)),
        (CE, "targets", ValueError, dict(targets=torch.full((4, 3), 9), class_weight=ONES)),
        (CE, "label_smoothing", ValueError, dict(label_smoothing=0.1, bias=MASK)),
        ("linear_dft", "power", ValueError, dict(power=-1.0)),
        ("linear_f_divergence_sft", "divergence", ValueError, dict(divergence="pearson")),
        ("linear_f_divergence_sft", "beta", ValueError, dict(beta=0.0)),
        ("linear_f_divergence_sft", "beta", ValueError, dict(beta=-0.1)),
        ("linear_f_divergence_sft", "value", ValueError, dict(value="lsee")),
        ("linear_dpo", "beta", ValueError, dict(beta=-0.1)),
        ("linear_dpo", "beta", TypeError, dict(beta=None)),
        ("linear_dpo", "loss_type", ValueError, dict(loss_type="sigmod")),
        ("linear_dpo", "label_smoothing", ValueError, dict(label_smoothing=0.6)),
        ("linear_dpo", "divergence", ValueError, dict(divergence="kl")),
    ],
)  # fmt: skip
def test_hyper_parameters(function, name, error, change):
    refused(FUNCTIONS[function], name, error, **{**base(), **change})


# ---------------------------------------------------------------------------------------------------------------------
# DPO


def dpo(**options):
    return logitless.linear_dpo(**{**base(), **options})


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [
        ("ref_logprob", ValueError, {}),
        ("ref_logprob", ValueError, dict(ref_logprob=REF, ref_hidden=torch.randn(4, 3, 5))),
        ("ref_logprob", ValueError, dict(ref_logprob=REF[:2])),
        ("ref_logprob", ValueError, dict(ref_logprob=REF.clone().requires_grad_())),
        ("ref_head", ValueError, dict(ref_logprob=REF, ref_head=torch.randn(9, 5))),
        ("ref_hidden", ValueError, dict(ref_hidden=torch.randn(4, 3, 6))),
        ("ref_hidden", ValueError, dict(ref_hidden=torch.randn(4, 2, 5))),
        ("ref_hidden", TypeError, dict(ref_hidden=3)),
        ("ref_head", TypeError, dict(ref_hidden=torch.randn(4, 3, 5), ref_head="lm_head")),
        ("ref_head", ValueError, dict(ref_hidden=torch.randn(4, 3, 5), ref_head=torch.randn(5))),
        ("softcap", ValueError, dict(ref_hidden=torch.randn(4, 3, 5), ref_head=Head(torch.randn(9, 5), softcap=-1.0))),
        ("cu_seqlens", TypeError, dict(ref_logprob=REF, cu_seqlens=[0, 3, 6, 9, 12])),
        ("cu_seqlens", ValueError, dict(ref_logprob=REF, cu_seqlens=torch.tensor([0, 3, 6, 9, 11]))),
        ("cu_seqlens", ValueError, dict(ref_logprob=REF, cu_seqlens=torch.tensor([1, 3, 6, 9, 12]))),
        ("cu_seqlens", ValueError, dict(ref_logprob=REF, cu_seqlens=torch.tensor([0, 6, 3, 9, 12]))),
        ("cu_seqlens", ValueError, dict(ref_logprob=REF, cu_seqlens=torch.tensor([0.0, 6.0, 12.0]))),
        ("cu_seqlens", ValueError, dict(ref_logprob=REF, cu_seqlens=torch.tensor([[0, 6, 12]]))),
        ("2B sequences", ValueError, dict(ref_logprob=REF, cu_seqlens=torch.tensor([0, 4, 8, 12]))),
    ],
)
def test_dpo(name, error, change):
    refused(dpo, name, error, **change)


def test_dpo_of_flat_inputs_needs_their_boundaries():
    p = make_problem((12,), 5, 9)
    refused(
        logitless.linear_dpo,
        "cu_seqlens",
        ValueError,
        hidden=p.hidden,
        weight=p.weight,
        targets=p.targets,
        ref_logprob=REF.reshape(-1),
    )


def test_dpo_of_an_odd_number_of_rows():
    p = make_problem((3, 4), 5, 9)
    arguments = dict(hidden=p.hidden, weight=p.weight, targets=p.targets, ref_logprob=torch.zeros(3, 4))
    refused(logitless.linear_dpo, "2B sequences", ValueError, **arguments)


@pytest.mark.parametrize("option", [dict(chunk_dtype=torch.bfloat16), dict(tail_tolerance=0.1)], ids=str)
def test_what_a_divergence_does_not_take_is_named(option):
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    with pytest.raises(ValueError, match=next(iter(option))):
        logitless.linear_loss("distillation", hidden, weight, targets, ref_hidden=hidden, **option)
