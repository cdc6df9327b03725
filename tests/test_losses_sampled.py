"""The preference losses that read more of a pair, or an answer, than its mark: BCO on pairs, REBEL, A*-PO, XPO.

Each is restated from its paper in Python's floats. What they share with every pair loss: test_losses_preference.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless import linear_loss, losses
from logitless.losses import (
    A2PO,
    BCO,
    DPO,
    MPO,
    REBEL,
    RPO,
    XPO,
    BCOPair,
    ChosenNLL,
    Loss,
    WeightedSum,
    bco_reward_shift,
    kl_estimate,
    optimal_value,
)
from logitless.losses.layout import token_layout
from logitless.types import TokenStats

PAIRS = [BCOPair(), BCOPair(beta=0.7), REBEL(), REBEL(eta=3.0), XPO(), XPO(beta=0.5, alpha=0.2)]
QUADRATIC = (REBEL, A2PO)


def doubles(*values: float, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def given_to(loss: Loss, count: int) -> dict[str, Tensor]:
    """Sequence inputs as a batch of pairs might have them, of both sides."""
    steps = torch.arange(count)
    named = {
        "chosen_reward_shift": torch.tensor(-0.3),
        "rejected_reward_shift": torch.tensor(-0.3),
        "chosen_reward": 0.5 + 0.25 * steps,
        "rejected_reward": 0.75 - 0.5 * steps,
        "chosen_from_reference": steps % 2 == 1,
        "rejected_from_reference": steps % 2 == 0,
    }
    return {name: x for name, x in named.items() if name.partition("_")[2] in loss.sequence_inputs}


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def by_hand(loss: Any, c: float, r: float, ref_c: float, ref_r: float, named: dict[str, float]) -> float:
    """The papers' formulas of one pair."""
    gap = (c - ref_c) - (r - ref_r)
    if isinstance(loss, BCOPair):
        shift = named["chosen_reward_shift"]
        return -log_sigmoid(loss.beta * (c - ref_c) - shift) - log_sigmoid(-(loss.beta * (r - ref_r) - shift))
    if isinstance(loss, REBEL):
        of_ratios = 1 / loss.eta * gap - (named["chosen_reward"] - named["rejected_reward"])
        return loss.eta**2 * of_ratios**2
    return -log_sigmoid(loss.beta * gap) + loss.alpha * (c if named["chosen_from_reference"] else r)


LOGPROB = st.floats(-90, -1)


@pytest.mark.parametrize("loss", PAIRS, ids=str)
@settings(max_examples=15)
@given(v=st.tuples(st.floats(-9, 9), st.floats(-9, 9)), ref=st.tuples(LOGPROB, LOGPROB), second=st.booleans())
def test_pair_losses_are_their_formulas(
    loss: Any, v: tuple[float, float], ref: tuple[float, float], second: bool
) -> None:
    values = (ref[0] + v[0], ref[1] + v[1], *ref)
    named = {name: x if x.dim() == 0 else x[int(second)][None] for name, x in given_to(loss, 2).items()}
    found = loss(*(doubles(x) for x in values), **named)
    expected = by_hand(loss, *values, {name: float(x) for name, x in named.items()})
    assert found.loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    scale = 1 / loss.eta if isinstance(loss, REBEL) else loss.beta
    assert found.chosen_reward.item() == pytest.approx(scale * (values[0] - ref[0]), abs=1e-9)
    assert found.margin.item() == pytest.approx(scale * (values[0] - ref[0] - values[1] + ref[1]), abs=1e-9)


@settings(max_examples=15)
@given(v=st.floats(-9, 9), ref=LOGPROB, reward=st.floats(-2, 2), value=st.floats(-2, 2), beta=st.floats(1e-3, 2))
def test_a2po_is_its_formula(v: float, ref: float, reward: float, value: float, beta: float) -> None:
    found = A2PO(beta=beta)(doubles(ref + v), doubles(ref), advantages=doubles(reward - value))
    implied = beta * (ref + v - ref)
    assert found.loss.item() == pytest.approx((implied - (reward - value)) ** 2, rel=1e-9, abs=1e-12)
    assert found.reward.item() == pytest.approx(implied, abs=1e-12) and found.logprob.item() == ref + v


@pytest.mark.parametrize("loss", PAIRS, ids=str)
def test_gradients_and_what_is_detached(loss: Any) -> None:
    inputs = [doubles(-5.0, -9.0, -3.0, grad=True) - i for i in range(4)]
    named = {name: x if x.dtype == torch.bool else x.double().requires_grad_() for name, x in given_to(loss, 3).items()}
    ref = [x.detach() for x in inputs[2:]]
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    assert torch.autograd.gradcheck(lambda c, r: loss(c, r, *ref, **named).loss, leaves)
    result = loss(*inputs, **named)
    constants = [*inputs[2:], *(x for x in named.values() if x.requires_grad)]
    found = torch.autograd.grad(result.loss.sum(), [*inputs[:2], *constants], allow_unused=True)
    assert all(x is not None for x in found[:2]) and all(x is None for x in found[2:])
    assert all(x.shape == (3,) for x in result) and not any(x.requires_grad for x in result[1:])
    assert (loss.level, loss.inputs, loss.outputs) == ("pair", ("ref_logprob",), ("logprob",))


def test_gradient_of_a2po_and_what_is_detached() -> None:
    logprob, ref, advantages = doubles(-5.0, -9.0, grad=True), doubles(-5.5, -8.0, grad=True), doubles(1, -1, grad=True)
    loss = A2PO(beta=0.3)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref, advantages=advantages).loss, (logprob,))
    result = loss(logprob, ref, advantages=advantages)
    found = torch.autograd.grad(result.loss.sum(), (logprob, ref, advantages), allow_unused=True)
    torch.testing.assert_close(found[0], 2 * 0.3 * (0.3 * (logprob - ref) - advantages).detach())
    assert found[1:] == (None, None) and not result.reward.requires_grad and not result.logprob.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Limits, and the losses that these are


def some_pairs(count: int = 6) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [-8 * torch.rand(count, dtype=torch.float64, generator=draw) - 0.5 for _ in range(4)]


def both(name: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {f"chosen_{name}": chosen, f"rejected_{name}": rejected}


def test_without_a_shift_bco_on_pairs_is_dpos_loss_type() -> None:
    inputs, none = some_pairs(), both("reward_shift", doubles(0.0)[0], doubles(0.0)[0])
    for a, b in zip(BCOPair()(*inputs, **none), DPO(loss_type="bco_pair")(*inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bco_on_pairs_is_bco_on_their_completions() -> None:
    chosen, rejected, ref_chosen, ref_rejected = some_pairs()
    shift = bco_reward_shift(0.1 * torch.cat([chosen - ref_chosen, rejected - ref_rejected])).mean
    mark = torch.ones(6, dtype=torch.bool)
    good = BCO()(chosen, ref_chosen, desirable=mark, reward_shift=shift).loss
    bad = BCO()(rejected, ref_rejected, desirable=~mark, reward_shift=shift).loss
    found = BCOPair()(chosen, rejected, ref_chosen, ref_rejected, **both("reward_shift", shift, shift))
    torch.testing.assert_close(found.loss, good + bad)


def test_the_shift_forgives_a_policy_that_lost_mass_everywhere() -> None:
    """All log-probabilities fall by one number: the loss with the mean reward as its shift does not see it."""
    inputs = some_pairs()
    drifted = [inputs[0] - 7, inputs[1] - 7, *inputs[2:]]

    def value(pairs: list[Tensor]) -> Tensor:
        rewards = 0.1 * torch.cat([pairs[0] - pairs[2], pairs[1] - pairs[3]])
        shift = bco_reward_shift(rewards).mean
        return BCOPair()(*pairs, **both("reward_shift", shift, shift)).loss

    torch.testing.assert_close(value(drifted), value(inputs))


def test_small_beta_is_a_coin() -> None:
    inputs, none = some_pairs(), both("reward_shift", doubles(0.0)[0], doubles(0.0)[0])
    half = torch.full((6,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(BCOPair(beta=1e-9)(*inputs, **none).loss, 2 * half)
    marks = both("from_reference", torch.zeros(6).bool(), torch.ones(6).bool())
    torch.testing.assert_close(XPO(beta=1e-9, alpha=1e-15)(*inputs, **marks).loss, half)
    torch.testing.assert_close(A2PO(beta=1e-12)(*inputs[::2], advantages=doubles(2.0)[0]).loss, 8 * half / math.log(4))


def test_xpo_without_its_push_is_dpo() -> None:
    inputs, marks = some_pairs(), both("from_reference", torch.arange(6) > 2, torch.arange(6) <= 2)
    torch.testing.assert_close(XPO(alpha=1e-15)(*inputs, **marks).loss, DPO()(*inputs).loss)
    pushed = XPO(alpha=0.5)(*inputs, **marks).loss - DPO()(*inputs).loss
    torch.testing.assert_close(pushed, 0.5 * torch.cat([inputs[1][:3], inputs[0][3:]]))


def test_rebel_does_not_know_which_answer_is_chosen() -> None:
    chosen, rejected, ref_chosen, ref_rejected = some_pairs()
    one, other = torch.linspace(0, 1, 6), torch.linspace(2, -1, 6)
    found = REBEL()(chosen, rejected, ref_chosen, ref_rejected, **both("reward", one, other))
    swapped = REBEL()(rejected, chosen, ref_rejected, ref_chosen, **both("reward", other, one))
    torch.testing.assert_close(found.loss, swapped.loss)
    torch.testing.assert_close(found.margin, -swapped.margin)


def test_rebel_of_a_fixed_difference_is_ipo_of_sums() -> None:
    inputs, beta, eta = some_pairs(), 0.2, 4.0
    rewards = both("reward", doubles(*[1 / (2 * beta * eta)] * 6), doubles(*[0.0] * 6))
    torch.testing.assert_close(REBEL(eta=eta)(*inputs, **rewards).loss, DPO(loss_type="ipo", beta=beta)(*inputs).loss)


def test_rebel_and_a2po_vanish_at_the_optimal_policy() -> None:
    """pi = ref exp(R / beta) / Z over four answers: beta v = R - V* with the whole reference in V*."""
    beta, reward = 0.4, doubles(0.0, 1.0, 0.3, -0.6)
    ref = doubles(0.1, 0.2, 0.3, 0.4).log()
    value = beta * torch.logsumexp(ref + reward / beta, -1)
    best = ref + (reward - value) / beta
    torch.testing.assert_close(best.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    found = A2PO(beta=beta)(best, ref, advantages=reward - value)
    torch.testing.assert_close(found.loss, torch.zeros_like(ref), atol=1e-15, rtol=0)
    pair = best[:2], best[2:], ref[:2], ref[2:]
    found = REBEL(eta=1 / beta)(*pair, **both("reward", reward[:2], reward[2:]))
    torch.testing.assert_close(found.loss, torch.zeros(2, dtype=torch.float64), atol=1e-13, rtol=0)


def test_sppo_is_a2po_of_win_rates() -> None:
    """The authors' two forms, of a pair: with measured win rates, and with 1 and 0 (`sppo_hard`)."""
    chosen, rejected, ref_chosen, ref_rejected = some_pairs()
    beta, win = 0.01, torch.linspace(0.5, 1, 6, dtype=torch.float64)
    loss = A2PO(beta=beta)
    for p in (win, torch.ones_like(win)):
        ours = loss(chosen, ref_chosen, advantages=p - 0.5).loss + loss(rejected, ref_rejected, advantages=0.5 - p).loss
        theirs = (chosen - ref_chosen - (p - 0.5) / beta) ** 2 + (rejected - ref_rejected + (p - 0.5) / beta) ** 2
        torch.testing.assert_close(ours / beta**2, theirs)
    hard = DPO(loss_type="sppo_hard", beta=beta)(chosen, rejected, ref_chosen, ref_rejected).loss
    torch.testing.assert_close(hard, theirs)


def test_nash_md_is_reinforce_with_k2() -> None:
    """Nash-MD's surrogate, `beta sum_t sg(kappa_t) logprob_t - (P - 1/2) sum_t logprob_t`, has the gradient of
    REINFORCE with advantages P - 1/2 and the KL estimate k2."""
    draw = torch.Generator().manual_seed(3)
    logprob, ref = (-3 * torch.rand(4, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    logprob.requires_grad_()
    win, beta = torch.tensor([0.1, 0.4, 0.8, 1.0], dtype=torch.float64), 0.2
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    ratio = (logprob - ref).detach()
    theirs = ((beta * ratio - (win[:, None] - 0.5)) * logprob * mask).sum(1).mean()
    ours = losses.get("reinforce", beta=beta, kl="k2").evaluate(
        TokenStats(logprob=logprob),
        token_layout(mask, None),
        {"advantages": (win - 0.5)[:, None].expand(4, 5), "ref_logprob": ref},
        reduction="constant_length",
        max_length=1,
    )
    found, expected = (torch.autograd.grad(x, logprob)[0] for x in (ours, theirs))
    torch.testing.assert_close(found, expected)
    assert kl_estimate(logprob, ref, estimator="k2").min() >= 0


def test_tpo_is_cpo_or_simpo_and_the_nll_of_a_third_answer() -> None:
    """TPO's authors subtract `gamma / beta` from averages and multiply by beta: SimPO's formula. Without averages and
    margin it is CPO's without its NLL."""
    chosen, rejected, *_ = some_pairs()
    beta, gamma = 0.7, 0.5
    theirs = -torch.log(torch.sigmoid(beta * (chosen - rejected - gamma / beta)))
    torch.testing.assert_close(losses.get("simpo", beta=beta, gamma=gamma)(chosen, rejected).loss, theirs)
    theirs = -torch.log(torch.sigmoid(beta * (chosen - rejected)))
    torch.testing.assert_close(losses.get("cpo", beta=beta, nll_weight=0.0)(chosen, rejected).loss, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# In sums


def test_sums_hand_their_terms_the_shift() -> None:
    """MPO as its authors trained it, and LLaMA-Factory's weight of BCO beside DPO."""
    inputs, shift = some_pairs(), torch.tensor(-0.4, dtype=torch.float64)
    named = both("reward_shift", shift, shift)
    length = torch.full((6,), 4.0, dtype=torch.float64)
    terms = DPO()(*inputs).loss, BCOPair()(*inputs, **named).loss, -inputs[0] / length
    mpo = WeightedSum(terms=["dpo", "bco_pair", "chosen_nll"], weights=[0.8, 0.2, 1.0])
    assert mpo.sequence_inputs == ("reward_shift",) and MPO().sequence_inputs == () == RPO().sequence_inputs
    found = mpo(*inputs, **named, chosen_length=length, rejected_length=length)
    torch.testing.assert_close(found.loss, 0.8 * terms[0] + 0.2 * terms[1] + terms[2])
    unshifted = MPO()(*inputs, chosen_length=length, rejected_length=length)
    assert not torch.allclose(found.loss, unshifted.loss)
    torch.testing.assert_close(found.margin, unshifted.margin)
    w = 0.25
    factory = WeightedSum(terms=["dpo", "bco_pair"], weights=[1 / (1 + w), w / (1 + w)])
    torch.testing.assert_close(factory(*inputs, **named).loss, (terms[0] + w * terms[1]) / (1 + w))
    with pytest.raises(TypeError, match="rejected_reward_shift"):
        factory(*inputs, chosen_reward_shift=shift)


def test_optimal_value() -> None:
    """Between the mean and the greatest reward; exact where exp(R / beta) overflows."""
    rewards = doubles(0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0).reshape(2, 4).requires_grad_()
    expected = [0.5 * math.log((2 * math.exp(2) + 2) / 4), 0.5 * math.log((math.exp(4) + 3) / 4)]
    found = optimal_value(rewards)
    torch.testing.assert_close(found, doubles(*expected))
    assert not found.requires_grad
    torch.testing.assert_close(optimal_value(rewards, beta=1e-5), doubles(1.0, 2.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(optimal_value(rewards, beta=1e6), doubles(0.5, 0.5), atol=1e-5, rtol=0)
    assert optimal_value(torch.full((3, 5), 1000.0)).tolist() == [1000.0] * 3
    assert optimal_value(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.float32
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta: expected a positive number"):
            optimal_value(rewards, beta=beta)
    with pytest.raises(ValueError, match=r"rewards: expected \[..., n\]"):
        optimal_value(torch.zeros(3, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Extreme values, bad input


@pytest.mark.parametrize("loss", PAIRS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_for_finite_input(loss: Any, dtype: torch.dtype) -> None:
    values = torch.tensor([-1e4, -104, -1, -1e-9, 0], dtype=dtype)
    chosen, rejected = (x.flatten().clone().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    for reference in (0.0, -1e4):
        ref = torch.full_like(chosen, reference)
        result = loss(chosen, rejected, ref, ref, **given_to(loss, 25))
        assert all(x.isfinite().all() for x in result) and result.loss.dtype == dtype
        assert all(x.isfinite().all() for x in torch.autograd.grad(result.loss.sum(), (chosen, rejected)))


@pytest.mark.parametrize("loss", PAIRS, ids=str)
@pytest.mark.parametrize("side", [0, 1])
def test_an_impossible_answer(loss: Any, side: int) -> None:
    """The gradient is finite, but for quadratic losses; the value is the documented one."""
    inputs = [doubles(-2.0, grad=True), doubles(-2.0, grad=True), doubles(-2.5), doubles(-2.5)]
    inputs[side] = doubles(-math.inf, grad=True)
    result = loss(*inputs, **given_to(loss, 1))  # the reference's answer is the rejected one
    found = torch.autograd.grad(result.loss.sum(), inputs[:2])
    if isinstance(loss, REBEL):
        assert result.loss.item() == math.inf and all(x.isinf().all() for x in found)
        return
    assert all(x.isfinite().all() for x in found)
    of_rejected = -math.inf if isinstance(loss, XPO) else pytest.approx(result.loss.item(), rel=0)
    assert result.loss.item() == (math.inf if side == 0 else of_rejected)


def test_bad_input_is_named() -> None:
    two, mark = torch.zeros(2), torch.tensor([True, False])
    for loss in (BCOPair(), REBEL(), XPO()):
        with pytest.raises(ValueError, match="rejected must have the shape of chosen"):
            loss(two, torch.zeros(3), two, two, **given_to(loss, 2))
    with pytest.raises(ValueError, match="chosen_reward must have shape"):
        REBEL()(two, two, two, two, chosen_reward=torch.zeros(3), rejected_reward=two)
    with pytest.raises(ValueError, match="chosen_reward_shift must have shape"):
        BCOPair()(two, two, two, two, **both("reward_shift", torch.zeros(3), two))
    with pytest.raises(TypeError, match=r"xpo: from_reference must be bool, got torch\.float32"):
        XPO()(two, two, two, two, **both("from_reference", mark, two))
    with pytest.raises(ValueError, match="advantages must have shape"):
        A2PO()(two, two, advantages=torch.zeros(3))
    for make in (lambda: BCOPair(beta=0), lambda: REBEL(eta=0), lambda: A2PO(beta=0), lambda: XPO(beta=0)):
        with pytest.raises(ValueError, match=r"(beta|eta) must be a finite number in \(0.0"):
            make()
    with pytest.raises(ValueError, match="XPO: alpha"):
        XPO(alpha=0.0)


@pytest.mark.parametrize("name", ["bco_pair", "rebel", "xpo", "a2po", "bco", "kto"])
def test_a_sequence_input_is_one_number_a_sequence_or_one_for_all(name: str) -> None:
    """One number a pair is not one number a sequence: it would be read for other sequences than it was meant for."""
    hidden, weight, targets = torch.randn(4, 3, 5), torch.randn(7, 5), torch.randint(7, (4, 3))
    loss = losses.get(name)
    marks = {"desirable", "from_reference"}
    each = {x: torch.rand(4) < 0.5 if x in marks else torch.rand(4) for x in loss.sequence_inputs}
    call = dict(ref_logprob=-torch.rand(4, 3))
    assert linear_loss(loss, hidden, weight, targets, **call, **each).loss.isfinite()
    for wrong in (2, 8):
        for x in each:
            of_shape = {**each, x: each[x].new_zeros(wrong)}
            with pytest.raises(ValueError, match=rf"{x}: expected \[4\], one number a sequence.*got \[{wrong}\]"):
                linear_loss(loss, hidden, weight, targets, **call, **of_shape)


@pytest.mark.parametrize("loss", [*PAIRS, WeightedSum(terms=["dpo", "bco_pair", ChosenNLL(average=False)])], ids=str)
def test_from_hidden_states_each_side_gets_its_own(loss: Any) -> None:
    """In one sweep and from statistics: sequence i is chosen over sequence B + i."""
    draw = torch.Generator().manual_seed(7)
    hidden = torch.randn(6, 4, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, generator=draw, dtype=torch.float64, requires_grad=True)
    targets, ref = torch.randint(9, (6, 4), generator=draw), -torch.rand(6, 4, generator=draw, dtype=torch.float64)
    by_side = given_to(loss, 3)
    named = {x: torch.cat([by_side[f"chosen_{x}"].expand(3), by_side[f"rejected_{x}"].expand(3)]) for x in
             loss.sequence_inputs}  # fmt: skip
    logprob = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(-1)
    expected = loss(*logprob.chunk(2), *ref.sum(-1).chunk(2), **by_side)
    wanted = torch.autograd.grad(expected.loss.mean(), (hidden, weight), retain_graph=True)
    for options in ({}, {"backward": "recompute"}, {"chunk_bytes": 1}):
        found = linear_loss(loss, hidden, weight, targets, ref_logprob=ref, **named, **options)
        torch.testing.assert_close(found.loss, expected.loss.mean())
        for a, b in zip(torch.autograd.grad(found.loss, (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b)
