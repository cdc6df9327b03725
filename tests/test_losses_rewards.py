"""The losses of reward models, against their formulas in Python's floats and against two-class cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from logitless.losses import bradley_terry_loss, process_reward_loss

SCORE = st.floats(-20, 20)


def doubles(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@given(chosen=SCORE, rejected=SCORE, margin=st.floats(-3, 3), center=st.floats(0, 1))
def test_bradley_terry_is_its_formula(chosen: float, rejected: float, margin: float, center: float) -> None:
    found = bradley_terry_loss(doubles(chosen), doubles(rejected), doubles(margin), center=center)
    expected = -log_sigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    plain = bradley_terry_loss(doubles(chosen), doubles(rejected)).item()
    assert plain == pytest.approx(math.log(1 + math.exp(rejected - chosen)), rel=1e-6, abs=1e-12)  # LogExp


@given(score=SCORE, label=st.floats(0, 1))
def test_the_loss_of_a_step_is_its_formula(score: float, label: float) -> None:
    found = process_reward_loss(doubles(score), doubles(label)).item()
    expected = -label * log_sigmoid(score) - (1 - label) * log_sigmoid(-score)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_loss_of_steps_is_two_class_cross_entropy() -> None:
    """TRL's form: logits of two classes at every token, labels -100 where no step ends."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 2, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(2, (3, 7), generator=draw).masked_fill(torch.rand(3, 7, generator=draw) < 0.5, -100)
    theirs = cross_entropy(logits.flatten(0, 1), labels.flatten())
    values = process_reward_loss(logits[..., 1] - logits[..., 0], labels)
    ours = values.sum() / (labels >= 0).sum()
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(found, expected)
    assert not values[labels < 0].any() and not found[labels < 0].any()
    assert torch.equal(
        process_reward_loss(logits[..., 0], labels == 1), process_reward_loss(logits[..., 0], labels.clamp(0))
    )


def test_gradients_and_what_is_detached() -> None:
    chosen, rejected = doubles(-1.0, 0.5, 3.0, grad=True), doubles(0.2, 0.4, -2.0, grad=True)
    margin, label = doubles(0.0, 1.0, 0.3, grad=True), doubles(0.0, 1.0, 0.3, grad=True)
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry_loss(c, r, margin, center=0.1), (chosen, rejected))
    assert torch.autograd.gradcheck(lambda s: process_reward_loss(s, label), (chosen,))
    pairs = bradley_terry_loss(chosen, rejected, margin, center=0.1)
    assert pairs.shape == (3,)
    assert torch.autograd.grad(pairs.sum(), margin, allow_unused=True) == (None,)
    assert torch.autograd.grad(process_reward_loss(chosen, label).sum(), label, allow_unused=True) == (None,)


def test_only_the_centre_sees_a_constant() -> None:
    chosen, rejected = doubles(1.0, -2.0), doubles(0.0, -1.0)
    torch.testing.assert_close(bradley_terry_loss(chosen + 9, rejected + 9), bradley_terry_loss(chosen, rejected))
    shift = doubles(3.0, grad=True)
    bradley_terry_loss(chosen + shift, rejected + shift, center=0.01).sum().backward()
    expected = 2 * 2 * 0.01 * ((chosen + rejected).sum() + 4 * 3.0)  # of two pairs, both of whose scores move
    torch.testing.assert_close(shift.grad, expected[None])
    equal = bradley_terry_loss(chosen, chosen)
    torch.testing.assert_close(equal, torch.full((2,), math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_extremes_and_dtypes(dtype: torch.dtype) -> None:
    far = torch.tensor([3e4, -3e4, 0.0], dtype=dtype, requires_grad=True)
    for loss in (
        bradley_terry_loss(far, -far.detach()),
        process_reward_loss(far, torch.tensor([0, 1, -100])),
        process_reward_loss(far, torch.tensor([True, False, True])),
    ):
        assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), far)
        assert gradient.isfinite().all() and gradient.abs().max() <= 1
    # log(sigmoid(1 / 16)) has more digits than half precision could hold.
    chosen, rejected = torch.tensor([8.0 + 1 / 16], dtype=dtype), torch.tensor([8.0], dtype=dtype)
    found = bradley_terry_loss(chosen, rejected).item()
    assert found == pytest.approx(-log_sigmoid(float(chosen) - float(rejected)), rel=1e-6)


def test_nothing_behind_an_ignored_label_is_read() -> None:
    score = torch.tensor([math.nan, math.inf, 1.0], requires_grad=True)
    loss = process_reward_loss(score, torch.tensor([-100, -100, 1]))
    assert loss[:2].tolist() == [0.0, 0.0] and loss.isfinite().all()
    (gradient,) = torch.autograd.grad(loss.sum(), score)
    assert gradient[:2].tolist() == [0.0, 0.0] and gradient.isfinite().all()


def test_bad_input_is_named() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"rejected_reward: expected shape \[2\].*got \[3\]"):
        bradley_terry_loss(two, three)
    with pytest.raises(ValueError, match=r"margin: expected shape \[2\].*got \[3\]"):
        bradley_terry_loss(two, two, three)
    with pytest.raises(ValueError, match=r"label: expected shape \[2\].*got \[3\]"):
        process_reward_loss(two, three)
    for center in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="center: expected a finite number"):
            bradley_terry_loss(two, two, center=center)
