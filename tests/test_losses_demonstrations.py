"""Losses that mix demonstrations with a policy's own samples: their token weights, masks, schedules and extremes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitless import losses
from logitless.losses import (
    CHORD,
    DFT,
    LUFFY,
    PPO,
    SRFT,
    UFT,
    CHORDPhi,
    DensePathReinforce,
    PolicyLoss,
    PrefixRFT,
    Reinforce,
    chord_mu,
    discounted_sum,
    prefix_rft_length,
    top_entropy_mask,
    uft_hint_length,
)
from logitless.types import TokenStats

MIXED = [LUFFY(), CHORD(), CHORD(imitation="nll", mu=0.4), CHORD(imitation="dft"), UFT(), SRFT(), SRFT(entropy_sign=1),
         PrefixRFT(), PrefixRFT(keep=1.0), PrefixRFT(keep=1.0, clip_demonstration=False)]  # fmt: skip
ALL = [*MIXED, DensePathReinforce(), DensePathReinforce(credit="token", reward_clip=0.5), DensePathReinforce(gamma=0.7)]


def ident(loss: PolicyLoss) -> str:
    changed = [f for f in dataclasses.fields(loss) if getattr(loss, f.name) != f.default]
    return "-".join([loss.name, *(f"{f.name}={getattr(loss, f.name)}" for f in changed)])


EVERY = pytest.mark.parametrize("loss", ALL, ids=ident)
MASK = torch.arange(7) < torch.tensor([7, 4, 5])[:, None]
DEMONSTRATION = torch.zeros(3, 7, dtype=torch.bool)
DEMONSTRATION[1] = True
DEMONSTRATION[2, :3] = True


def inputs(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logprob = -3 * torch.rand(3, 7, generator=draw, dtype=torch.float64)
    found = {
        name: logprob + 0.4 * torch.randn(3, 7, generator=draw, dtype=torch.float64)
        for name in ("old_logprob", "ref_logprob", "sft_logprob")
    }
    found["logprob"] = logprob.requires_grad_()
    found["entropy"] = 2 * torch.rand(3, 7, generator=draw, dtype=torch.float64)
    found["advantages"] = torch.randn(3, 7, generator=draw, dtype=torch.float64)
    return found | {"demonstration": DEMONSTRATION}


def call(loss: PolicyLoss, given: dict[str, Tensor], mask: Tensor = MASK, **where: Tensor) -> Tensor:
    stats = TokenStats(logprob=given["logprob"], entropy=given["entropy"])
    known = {name: given[name] for name in (*loss.inputs, *loss.optional_inputs) if name in given}
    return loss(stats, **known, **({"mask": mask, **where} if not loss.token_wise else {}))


def weights(loss: PolicyLoss, given: dict[str, Tensor]) -> Tensor:
    """w = -d loss / d logprob."""
    return -torch.autograd.grad(call(loss, given).sum(), given["logprob"])[0]


def own(given: dict[str, Tensor], **fields: Any) -> tuple[Tensor, Tensor]:
    """Value and weights of the clipped surrogate by itself."""
    loss = PPO(**fields)
    return call(loss, given).detach(), weights(loss, given)


def assert_parts(loss: PolicyLoss, value: Tensor, weight: Tensor, ours: tuple[Tensor, Tensor]) -> None:
    """The loss is `value` with `weight` on demonstrations, and the given pair on own tokens."""
    got = inputs()
    torch.testing.assert_close(call(loss, got).detach(), torch.where(DEMONSTRATION, value, ours[0]))
    torch.testing.assert_close(weights(loss, got), torch.where(DEMONSTRATION, weight, ours[1]))


def test_luffy() -> None:
    got = inputs()
    p, a, g = got["logprob"].detach().exp(), got["advantages"], 0.3
    assert_parts(LUFFY(gamma=g), -a * p / (p + g), a * g * p / (p + g) ** 2, own(got))
    assert weights(LUFFY(), got | {"advantages": torch.ones(3, 7, dtype=torch.float64)})[DEMONSTRATION].max() <= 0.25


@pytest.mark.parametrize(("imitation", "sft"), [("phi", CHORDPhi()), ("nll", None), ("dft", DFT())])
def test_chord(imitation: str, sft: Any) -> None:
    got = inputs()
    lp = got["logprob"].detach()
    p = lp.exp()
    weight = {"phi": p * (1 - p), "nll": torch.ones_like(p), "dft": p}[imitation]
    value, ours = own(got)
    assert_parts(CHORD(mu=0.3, imitation=imitation), -0.3 * weight * lp, 0.3 * weight, (0.7 * value, 0.7 * ours))
    if sft is not None:
        torch.testing.assert_close(sft(TokenStats(logprob=lp)), -weight * lp)
    torch.testing.assert_close(call(CHORD(mu=0.0), got)[~DEMONSTRATION], call(PPO(), got)[~DEMONSTRATION])


def test_uft() -> None:
    got = inputs()
    lp = got["logprob"].detach()
    assert_parts(UFT(hint_weight=0.01, delta=2.0), -0.01 * lp, torch.full_like(lp, 0.01), own(got, delta=2.0))


@pytest.mark.parametrize("sign", [-1, 1])
def test_srft(sign: int) -> None:
    got = inputs()
    lp, a, h = got["logprob"].detach(), got["advantages"], got["entropy"].clamp(max=1.5)
    p = lp.exp()
    imitation, rollout = 0.5 * (sign * h).exp(), torch.where(a > 0, 0.1 * h.exp(), 1.0) * a
    loss = SRFT(entropy_sign=sign, entropy_cap=1.5)
    assert_parts(loss, -imitation * lp - a * p, imitation + a * p, (-rollout * lp, rollout))
    entropy = got["entropy"].clone().requires_grad_()
    total = call(loss, got | {"entropy": entropy}).sum()
    assert torch.autograd.grad(total, entropy, allow_unused=True) == (None,), "detached"


def test_srft_weights_rewarded_answers_alone() -> None:
    """`w_RL E[-log p(y+)] + E[log p(y-)]`, w_RL = 0.1 exp(H): an answer without the reward weighs 1."""
    stats = TokenStats(logprob=torch.tensor([-2.0, -2.0]), entropy=torch.tensor([1.0, 1.0]))
    found = SRFT()(stats, advantages=torch.tensor([1.0, -1.0]), demonstration=torch.tensor([False, False]))
    torch.testing.assert_close(found, torch.tensor([0.2 * math.e, -2.0]))


def test_prefix_rft_keeps_the_prefix_tokens_of_highest_entropy() -> None:
    got = inputs()
    prefix = DEMONSTRATION & MASK
    kept = ~prefix | top_entropy_mask(got["entropy"], 0.3, prefix)
    assert 0 < (prefix & kept).sum() < prefix.sum()
    value, weight = own(got, delta=3.0)
    for loss, v, w in (
        (PrefixRFT(keep=0.3), value, weight),
        (PrefixRFT(keep=1.0), value, weight),
    ):
        counted = MASK & (kept if loss.keep < 1 else True) if not loss.token_wise else torch.ones_like(MASK)
        torch.testing.assert_close(call(loss, got).detach(), torch.where(counted, v, 0.0))
        torch.testing.assert_close(weights(loss, got), torch.where(counted, w, 0.0))
    ratio = (got["logprob"] - got["old_logprob"]).exp().detach()
    free = PrefixRFT(keep=1.0, clip_demonstration=False)
    assert_parts(free, -got["advantages"] * ratio, got["advantages"] * ratio, (value, weight))


def test_prefix_rft_is_batch_wide_and_top_entropy_adds_to_it() -> None:
    assert PrefixRFT().batch_wide and PrefixRFT().level == "sequence" and PrefixRFT().outputs == ("logprob", "entropy")
    plain = PrefixRFT(keep=1.0)
    assert not plain.batch_wide and plain.level == "token" and plain.outputs == ("logprob",)
    got = inputs()
    both = call(PrefixRFT(keep=0.3, top_entropy=0.5), got)
    kept = top_entropy_mask(got["entropy"], 0.5, MASK)
    torch.testing.assert_close(both, torch.where(kept, call(PrefixRFT(keep=0.3), got), 0.0))


def test_prefix_rft_keeps_the_code_s_number_of_tokens() -> None:
    """Prefix-RFT's code zeroes `int(n * 0.8)` of the sorted tokens."""
    for n in range(1, 40):
        entropy = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()
        assert n - int(top_entropy_mask(entropy, 0.2).sum()) == int(n * 0.8 + 1e-9)


@pytest.mark.parametrize("credit", ["return", "token"])
def test_dense_path_reinforce(credit: str) -> None:
    """REINFORCE whose advantage is the log-ratio of two frozen models, with a KL to the first."""
    got = inputs()
    reward = got["sft_logprob"] - got["ref_logprob"]
    gain = discounted_sum(reward.clamp(-0.3, 0.3), 0.9, mask=MASK) if credit == "return" else reward.clamp(-0.3, 0.3)
    fields: dict[str, Any] = {"gamma": 0.9} if credit == "return" else {}
    loss = DensePathReinforce(credit=credit, reward_clip=0.3, beta=0.2, **fields)
    expected = call(Reinforce(beta=0.2), got | {"advantages": gain, "ref_logprob": got["sft_logprob"]})
    counted = MASK if credit == "return" else torch.ones_like(MASK)
    torch.testing.assert_close(call(loss, got), torch.where(counted, expected, 0.0))
    assert loss.inputs == ("sft_logprob", "ref_logprob") and "advantages" not in loss.optional_inputs
    names = ("sft_logprob", "ref_logprob")
    leaves = {name: got[name].clone().requires_grad_() for name in names}
    found = torch.autograd.grad(call(loss, got | leaves).sum(), list(leaves.values()), allow_unused=True)
    assert found == (None, None)


def test_kl_and_entropy_bonus_leave_demonstrations_alone() -> None:
    got = inputs()
    for loss in MIXED:
        plain = call(loss, got)
        more = call(dataclasses.replace(loss, beta=0.3, entropy_coef=0.1), got) - plain
        assert (more[DEMONSTRATION] == 0).all()
        kappa = got["ref_logprob"] - got["logprob"]
        expected = 0.3 * (kappa.exp() - kappa - 1) - 0.1 * got["entropy"]
        counted = MASK if not loss.token_wise else torch.ones_like(MASK)
        ours = counted & ~DEMONSTRATION
        torch.testing.assert_close(more[ours], expected[ours])


@EVERY
def test_extreme_log_probabilities_stay_finite(loss: PolicyLoss) -> None:
    loss = dataclasses.replace(loss, beta=0.1)
    ends = torch.tensor([-1e4, 0.0, -math.inf, -1.0])
    cases = torch.cartesian_prod(ends, ends, ends, torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0]))
    logprob, old, reference, advantages, demonstration = (x[:, None].contiguous() for x in cases.T)
    got = {
        "logprob": logprob.requires_grad_(),
        "entropy": torch.full_like(old, 12.0),
        "old_logprob": old,
        "ref_logprob": reference,
        "sft_logprob": old.flip(0).clamp(min=-1e4),
        "advantages": advantages,
        "demonstration": demonstration.bool(),
    }
    value = call(loss, got, torch.ones_like(old, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value.sum(), logprob)
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("loss", [LUFFY(), CHORD(), UFT()], ids=ident)
def test_old_logprob_of_demonstrations_is_not_looked_at(loss: PolicyLoss) -> None:
    got = inputs()
    spoilt = torch.where(DEMONSTRATION, math.nan, got["old_logprob"])
    assert torch.equal(call(loss, got | {"old_logprob": spoilt}), call(loss, got))
    assert torch.equal(weights(loss, got | {"old_logprob": spoilt}), weights(loss, got))
    known = {name: got[name] for name in loss.inputs}
    metrics = loss.metrics(TokenStats(logprob=got["logprob"]), **known, old_logprob=spoilt)
    assert (metrics.ratio[DEMONSTRATION] == 1).all() and (metrics.ratio[~DEMONSTRATION] != 1).all()


@EVERY
def test_batches_without_demonstrations_or_of_them_alone(loss: PolicyLoss) -> None:
    got = inputs()
    for share in (False, True):
        value = call(loss, got | {"demonstration": torch.full_like(DEMONSTRATION, share)})
        assert value.isfinite().all()
    if not loss.token_wise:
        assert (call(loss, got, torch.zeros_like(MASK)) == 0).all()


@given(step=st.integers(0, 700), length=st.integers(1, 2000), seed=st.integers(0, 2**16))
@settings(max_examples=50)
def test_prefix_rft_length(step: int, length: int, seed: int) -> None:
    shown = prefix_rft_length(length, step, 500, generator=torch.Generator().manual_seed(seed))
    low = 0.05 + 0.5 * (1 + math.cos(math.pi * min(step, 500) / 500)) * 0.9
    assert min(math.floor(low * length), length - 1) <= shown <= min(0.95 * length, length - 1)
    again = prefix_rft_length(length, step, 500, generator=torch.Generator().manual_seed(seed))
    assert shown == again


def test_schedules() -> None:
    assert prefix_rft_length(100, 0, 500) == 95
    assert 5 <= prefix_rft_length(100, 500, 500) <= 95
    assert prefix_rft_length(1, 0, 500) == 0
    draw = torch.Generator().manual_seed(0)
    for step, chance in ((0, 0.95), (150, 0.5), (300, 0.05)):
        shown = [uft_hint_length(50, step, generator=draw) for _ in range(400)]
        assert set(shown) <= {0, 10, 20, 30, 40, 50}
        assert sum(shown) / len(shown) / 50 == pytest.approx(chance, abs=0.05)
    assert uft_hint_length(50, 301) == 0 and uft_hint_length(0, 0) == 0
    assert {uft_hint_length(3, 0, start=1.0, end=1.0) for _ in range(5)} == {3}
    assert chord_mu(0) == chord_mu(10**6) == 0.1
    assert [chord_mu(step, warmup=4, decay=4, peak=0.8, valley=0.2) for step in (0, 2, 4, 6, 8, 99)] == pytest.approx(
        [0, 0.4, 0.8, 0.5, 0.2, 0.2]
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LUFFY(gamma=0.0), "LUFFY: gamma"),
        (lambda: CHORD(mu=1.1), "CHORD: mu"),
        (lambda: CHORD(imitation="sft"), "CHORD: imitation"),
        (lambda: UFT(hint_weight=-1.0), "UFT: hint_weight"),
        (lambda: SRFT(entropy_sign=0), "SRFT: entropy_sign"),
        (lambda: SRFT(rollout_weight=-1.0), "SRFT: rollout_weight"),
        (lambda: PrefixRFT(keep=0.0), "PrefixRFT: keep"),
        (lambda: DensePathReinforce(credit="reward"), "DensePathReinforce: credit"),
        (lambda: DensePathReinforce(gamma=1.1), "DensePathReinforce: gamma"),
        (lambda: DensePathReinforce(gamma=0.9, credit="token"), "gamma belongs to credit='return'"),
        (lambda: DensePathReinforce(reward_clip=-1.0), "DensePathReinforce: reward_clip"),
        (lambda: prefix_rft_length(0, 0, 5), "length"),
        (lambda: prefix_rft_length(5, -1, 5), "step, total_steps"),
        (lambda: prefix_rft_length(5, 0, 5, start=0.99), "start, end, high"),
        (lambda: uft_hint_length(5, 0, pieces=0), "length, pieces"),
        (lambda: uft_hint_length(5, 0, start=2.0), "start, end"),
        (lambda: chord_mu(-1), "chord_mu"),
        (lambda: call(LUFFY(), {k: v for k, v in inputs().items() if k != "demonstration"}), "needs demonstration"),
    ],
)
def test_bad_values(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_registered_by_name() -> None:
    for loss in ALL:
        fields = {f.name: getattr(loss, f.name) for f in dataclasses.fields(loss)}
        assert losses.get(loss.name, **fields) == loss
