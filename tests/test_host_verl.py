"""verl: log-probabilities and entropies of its fused slot. The real package where it is installed, a stub everywhere.

The stub has the published interface of 0.9.1: the class that computes both numbers, and the function that gives a model
the forward which asks that class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from host_cases import LARGE, assert_same_steps, policy_steps  # noqa: E402
from host_stubs import real_or_stub, stubbed  # noqa: E402
from patch_models import V, llama  # noqa: E402

from logitless.integrations import hosts, verl  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402


class StubFused(nn.Module):
    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        logp = ((hidden_states @ vocab_weights.T) / temperature).float().log_softmax(-1)
        return logp.gather(-1, input_ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def stub_patch(model: Any, use_fused_kernels: bool = False, fused_kernels_backend: Any = None) -> None:
    def forward(
        self: Any, input_ids: Tensor, attention_mask: Any = None, temperature: float = 1.0, **_: Any
    ) -> transformers.modeling_outputs.ModelOutput:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        logp, entropy = StubFused()(hidden, self.lm_head.weight, torch.roll(input_ids, -1, -1), temperature)
        return transformers.modeling_outputs.ModelOutput(log_probs=logp, entropy=entropy)

    if use_fused_kernels:
        type(model).forward = forward


STUB = {
    "verl.models.transformers.monkey_patch": {"patch_forward_with_backends": stub_patch},
    "verl.utils.experimental.torch_functional": {"FusedLinearForPPO": StubFused},
}


@pytest.fixture(params=["stub", "real"])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    with real_or_stub(request.param, "verl", "0.9.1", STUB, "verl"):
        yield request.param
        verl.disable()


def fused_model(backend: str = "torch", **changes: Any) -> Any:
    """A model of a class of its own, because verl replaces the forward of the class."""
    from verl.models.transformers import monkey_patch

    model = llama(type("Fused", (transformers.LlamaForCausalLM,), {}), **changes)
    monkey_patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_steps_are_the_hosts_own(host: str, temperature: float) -> None:
    def scored(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        output = model(input_ids=ids, attention_mask=mask, temperature=temperature, return_dict=True)
        return output.log_probs[:, :-1], output.entropy[:, :-1]

    own = policy_steps(fused_model(), scored)
    with verl.enable():
        ours = policy_steps(fused_model(), scored)
    assert_same_steps(ours, own)


def test_a_chunk_is_no_larger_than_asked(host: str) -> None:
    model = fused_model(vocab_size=LARGE, max_position_embeddings=512)
    ids = torch.randint(3, LARGE, (2, 400))

    def allocated() -> Any:
        with watch_allocations() as seen:
            output = model(input_ids=ids, temperature=1.0, return_dict=True)
            (output.log_probs.sum() + output.entropy.sum()).backward()
        return seen

    own = allocated()
    model.zero_grad()
    with verl.enable(chunk_bytes=2**24):
        ours = allocated()
    assert own.largest > 100 * 2**20 and ours.largest <= 2**24 and ours.peak < own.peak / 2


def test_what_is_not_served_is_refused_by_name(host: str) -> None:
    with verl.enable():
        with pytest.raises(hosts.UnsupportedHostError, match="impl_backend='triton'"):
            fused_model("triton")
        with pytest.raises(hosts.UnsupportedHostError, match="enabled already"):
            verl.enable()
    with verl.enable(chunk_bites=3), pytest.raises(TypeError, match="chunk_bites"):
        fused_model()(input_ids=torch.randint(3, V, (1, 4)), return_dict=True)


def test_it_is_off_again_afterwards(host: str) -> None:
    from verl.models.transformers import monkey_patch
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    before = FusedLinearForPPO.forward, monkey_patch.patch_forward_with_backends
    with pytest.raises(ZeroDivisionError), verl.enable():
        assert FusedLinearForPPO.forward is not before[0]
        _ = 1 / 0
    assert (FusedLinearForPPO.forward, monkey_patch.patch_forward_with_backends) == before


def test_another_release_or_interface_changes_nothing() -> None:
    class Changed(StubFused):
        def forward(self, hidden: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    changed = {**STUB, "verl.utils.experimental.torch_functional": {"FusedLinearForPPO": Changed}}
    for version, stub, message in (
        ("0.9.0", STUB, "verl 0.9.0: logitless was tested with"),
        ("0.10.0", STUB, "verl 0.10.0: logitless was tested with"),
        ("0.9.1", changed, "Changed.forward: expected the parameters"),
    ):
        with stubbed("verl", version, stub):
            with pytest.raises(hosts.UnsupportedHostError, match=message):
                verl.enable()
            from verl.models.transformers import monkey_patch

            assert monkey_patch.patch_forward_with_backends is stub_patch
