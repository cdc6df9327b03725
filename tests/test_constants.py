"""Statistics without a gradient beside those that a loss differentiates (`constants=`)."""

from __future__ import annotations

import pytest
import torch

from logitless import linear_logprobs
from logitless.testing import make_problem

OUTPUTS = ("logprob", "entropy", "mean_logit")


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("trainable", [("hidden",), ("hidden", "weight")])
def test_constants_have_the_same_values_and_no_gradient(backend: str, trainable: tuple[str, ...]) -> None:
    p = make_problem((7,), 16, 50, ignored=0.3, trainable=trainable, dtype=torch.float64)
    plain = linear_logprobs(p.hidden, p.weight, p.targets, outputs=OUTPUTS, backend=backend)
    stats = linear_logprobs(
        p.hidden, p.weight, p.targets, outputs=OUTPUTS, constants=("entropy", "mean_logit"), backend=backend
    )
    assert stats.logprob.requires_grad
    assert not (stats.entropy.requires_grad or stats.mean_logit.requires_grad)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(stats, name), getattr(plain, name).detach(), check_stride=False)
    inputs = [getattr(p, name) for name in trainable]
    found, expected = (torch.autograd.grad(x.logprob.square().sum(), inputs) for x in (stats, plain))
    torch.testing.assert_close(found, expected)


def test_a_frozen_head_takes_a_single_pass_beside_constants() -> None:
    p = make_problem((7,), 16, 50, trainable=("hidden",))
    outputs = ("logprob", "entropy")
    stats = linear_logprobs(
        p.hidden, p.weight, p.targets, outputs=outputs, constants=("entropy",), backward="single_pass"
    )
    stats.logprob.sum().backward()
    with pytest.raises(ValueError, match="entropy's gradient"):
        linear_logprobs(p.hidden, p.weight, p.targets, outputs=outputs, backward="single_pass")


def test_constants_are_among_the_outputs() -> None:
    p = make_problem((7,), 16, 50)
    with pytest.raises(ValueError, match=r"constants: expected one of \['logprob'\], got 'entropy'"):
        linear_logprobs(p.hidden, p.weight, p.targets, constants=("entropy",))
    with pytest.raises(TypeError, match="constants: expected a tuple"):
        linear_logprobs(p.hidden, p.weight, p.targets, constants="logprob")  # type: ignore[arg-type]
