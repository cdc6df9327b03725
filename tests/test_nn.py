"""The modules are the functions, with their keyword arguments bound."""

from __future__ import annotations

import copy

import pytest
import torch

import logitless
from logitless.testing import make_problem

PROBLEM = dict(shape=(4, 3), hidden_size=5, vocabulary=9, bias=True, ignored=0.3)


def problem():
    return make_problem(PROBLEM["shape"], 5, 9, bias=True, ignored=0.3)


def case(name):
    """A module, its function, and the arguments of a call."""
    p, ref = problem(), -torch.rand(4, 3)
    tensors = (p.hidden, p.weight, p.targets)
    nn = logitless.nn
    return {
        "cross_entropy": (
            nn.LinearCrossEntropyLoss(label_smoothing=0.1, z_loss=0.01, shift=True, logit_scale=1.5),
            lambda: logitless.linear_cross_entropy(
                *tensors, bias=p.bias, label_smoothing=0.1, z_loss=0.01, shift=True, logit_scale=1.5
            ),
            (tensors, dict(bias=p.bias)),
        ),
        "dft": (
            nn.LinearDFTLoss(power=0.5, reduction="sum", softcap=5.0),
            lambda: logitless.linear_dft(*tensors, power=0.5, reduction="sum", softcap=5.0),
            (tensors, {}),
        ),
        "f_divergence": (
            nn.LinearFDivergenceLoss(divergence="js", beta=0.3, chunk_bytes=100),
            lambda: logitless.linear_f_divergence_sft(*tensors, ref, divergence="js", beta=0.3, normalizer=3),
            ((*tensors, ref), dict(normalizer=3)),
        ),
        "dpo": (
            nn.LinearDPOLoss(beta=0.3, loss_type="ipo"),
            lambda: logitless.linear_dpo(*tensors, ref_logprob=ref, beta=0.3, loss_type="ipo").loss,
            (tensors, dict(ref_logprob=ref)),
        ),
    }[name]


NAMES = ["cross_entropy", "dft", "f_divergence", "dpo"]


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_function(name):
    module, function, (args, kwargs) = case(name)
    found = module(*args, **kwargs)
    found = found.loss if name == "dpo" else found
    torch.testing.assert_close(found, function())
    found.backward()


@pytest.mark.parametrize("name", NAMES)
def test_say_what_is_bound_and_have_no_parameters(name):
    module, _, _ = case(name)
    assert not list(module.parameters())
    shown = repr(module)
    for key, value in module.bound.items():
        assert f"{key}={value!r}" in shown
    assert repr(copy.deepcopy(module)) == shown


def test_what_is_bound_can_be_overridden_in_a_call():
    p = problem()
    module = logitless.nn.LinearDFTLoss()
    per_token = module(p.hidden, p.weight, p.targets, reduction="none")
    assert per_token.shape == (4, 3)


def test_class_weights_are_a_buffer():
    p = problem()
    weights = torch.rand(9)
    module = logitless.nn.LinearCrossEntropyLoss(class_weight=weights)
    expected = logitless.linear_cross_entropy(p.hidden, p.weight, p.targets, class_weight=weights)
    torch.testing.assert_close(module(p.hidden, p.weight, p.targets), expected)
    assert torch.equal(module.state_dict()["class_weight"], weights)
    assert module.double().class_weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("LinearCrossEntropyLoss", {"label_smoothing": 2.0}),
        ("LinearCrossEntropyLoss", {"z_loss": -1.0}),
        ("LinearDFTLoss", {"power": -1.0}),
        ("LinearFDivergenceLoss", {"divergence": "chi"}),
        ("LinearDPOLoss", {"beta": -0.1}),
        ("LinearDPOLoss", {"loss_type": "sigmoidal"}),
    ],
)
def test_hyper_parameters_are_checked_when_it_is_made(module, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        getattr(logitless.nn, module)(**options)


@pytest.mark.parametrize("module", logitless.nn.__all__)
def test_an_unknown_option_is_refused_when_it_is_made(module):
    with pytest.raises(TypeError, match="lodgit_scale"):
        getattr(logitless.nn, module)(*(["nll"] if module == "LinearLoss" else []), lodgit_scale=1.0)


def test_any_loss_is_a_module() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randint(7, (2, 3))
    advantages = torch.tensor([1.0, -0.5])
    module = logitless.nn.LinearLoss("dr_grpo", epsilon_low=0.1, max_length=5, softcap=3.0)
    loss = logitless.losses.get("dr_grpo", epsilon_low=0.1)
    expected = logitless.linear_loss(loss, hidden, weight, targets, advantages=advantages, max_length=5, softcap=3.0)
    assert torch.equal(module(hidden, weight, targets, advantages=advantages), expected)
    assert "epsilon_low=0.1" in repr(module)
    with pytest.raises(TypeError, match="no hyper-parameter"):
        logitless.nn.LinearLoss("dpo", betta=0.2)
    with pytest.raises(ValueError, match="softcap"):
        logitless.nn.LinearLoss("dpo", softcap=-1.0)


def test_a_name_that_the_head_and_the_loss_share() -> None:
    """With a loss's name nobody knows which is meant."""
    with pytest.raises(ValueError, match=r"temperature: .*losses\.IWSFT\(temperature"):
        logitless.nn.LinearLoss("iw_sft", temperature=2.0)
    loss = logitless.losses.IWSFT(temperature=2.0)
    module = logitless.nn.LinearLoss(loss, temperature=0.5)
    assert module.bound["loss"] == loss and module.bound["temperature"] == 0.5
