"""OpenRLHF: log-probabilities and entropies of its actor. The real package where it is installed, a stub everywhere.

The stub has the published interface of 0.11.2: the actor's forward, and the two functions that read logits. The real
package imports flash-attn, whose functions for padding PyTorch's stand in for where it is not installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from host_cases import LARGE, assert_same_steps, policy_steps  # noqa: E402
from host_stubs import installed, real_or_stub, stubbed  # noqa: E402
from patch_models import V, llama  # noqa: E402

from logitless.integrations import hosts, openrlhf  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402


def stub_log_probs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def stub_entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(-1)).sum(-1)


class StubActor(nn.Module):
    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature, self.packing_samples = model, temperature, False

    def forward(
        self,
        sequences: Tensor,
        action_mask: Any = None,
        attention_mask: Any = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: Any = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        from openrlhf.models import actor

        output = self.model(sequences, attention_mask=attention_mask, **mm_inputs)
        output["logits"] = output["logits"].to(torch.float32)
        if self.temperature != 1.0:
            output["logits"].div_(self.temperature)
        if return_entropy:
            output.entropy = actor.compute_entropy(output["logits"])[:, :-1]
        if action_mask is None and not return_logprobs:
            return output
        found = actor.log_probs_from_logits(output["logits"], torch.roll(sequences, -1, 1))[:, :-1]
        if action_mask is not None:
            found = found[:, -action_mask.shape[1] :] * action_mask.float()
        return (found, output) if return_output else found


STUB = {
    "openrlhf.models.actor": {
        "Actor": StubActor,
        "log_probs_from_logits": stub_log_probs,
        "compute_entropy": stub_entropy,
    }
}


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Any, ...]:
    indices = mask.flatten().nonzero().flatten()
    lengths = mask.sum(-1)
    return x.flatten(0, 1)[indices], indices, lengths.cumsum(0), int(lengths.max()), lengths


def pad_input(x: Tensor, indices: Tensor, batch: int, width: int) -> Tensor:
    return x.new_zeros(batch * width, *x.shape[1:]).index_copy(0, indices, x).unflatten(0, (batch, width))


def flash_attention_stand_in() -> dict[str, ModuleType]:
    """The modules that OpenRLHF imports from flash-attn, without kernels."""
    names = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    modules = {name: ModuleType(name) for name in names}
    padding = modules["flash_attn.bert_padding"]
    vars(padding).update(unpad_input=unpad_input, pad_input=pad_input)
    vars(padding).update(index_first_axis=lambda x, indices: x[indices], rearrange=lambda x, _: x.flatten(0, 1))
    vars(modules["flash_attn.utils.distributed"]).update(all_gather=None)
    return modules


def import_actor() -> None:
    """Imports OpenRLHF's actor; the stand-in is there for the import alone, so that nothing else takes it for real."""
    llama()  # Transformers looks for flash-attn when its modelling files are imported
    modules = {} if installed("flash_attn") else flash_attention_stand_in()
    sys.modules.update(modules)
    try:
        importlib.import_module("openrlhf.models.actor")
    finally:
        for name in modules:
            del sys.modules[name]


@pytest.fixture(params=["stub", "real"])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    with real_or_stub(request.param, "openrlhf", "0.11.2", STUB, "openrlhf", "deepspeed"):
        if request.param == "real":
            import_actor()
        yield request.param
        openrlhf.disable()


def make(temperature: float = 1.0, packed: bool = False, **changes: Any) -> Any:
    from openrlhf.models.actor import Actor

    actor = Actor(llama(**changes), temperature=temperature)
    actor.packing_samples = packed
    return actor


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_steps_are_the_hosts_own(host: str, temperature: float, packed: bool) -> None:
    if packed and host == "stub":
        pytest.skip("the stub has no packed rows")

    def scored(actor: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        asked = dict(return_output=True, return_logprobs=True, return_entropy=True)
        logprob, output = actor(batch["input_ids"], attention_mask=batch["attention_mask"], **asked)
        return logprob, output.entropy

    own = policy_steps(make(temperature, packed), scored)
    with openrlhf.enable():
        ours = policy_steps(make(temperature, packed), scored)
    assert_same_steps(ours, own)


def test_what_the_trainers_ask_for_is_the_hosts_own(host: str) -> None:
    ids = torch.randint(3, V, (2, 9))
    mask, actions = torch.ones_like(ids), torch.ones(2, 4)
    asked: list[dict[str, Any]] = [
        {"return_logprobs": True},
        {"action_mask": actions},
        {"action_mask": actions, "return_output": True},
    ]
    own = [first(make(0.7)(ids, attention_mask=mask, **options)) for options in asked]
    with openrlhf.enable():
        actor = make(0.7)
        for options, expected in zip(asked, own, strict=True):
            result = actor(ids, attention_mask=mask, **options)
            torch.testing.assert_close(first(result), expected)
            if isinstance(result, tuple):
                assert result[1].logits is None and "logits" not in result[1]
        assert actor(ids, attention_mask=mask, return_output=True).logits.shape[-1] == V
        assert actor.temperature == 0.7


def first(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found.detach()


def test_no_logits_are_allocated(host: str) -> None:
    ids = torch.randint(3, LARGE, (2, 120))

    def allocated() -> Any:
        actor = make(vocab_size=LARGE, max_position_embeddings=256)
        with watch_allocations() as seen:
            actor(ids, attention_mask=torch.ones_like(ids), return_logprobs=True).sum().backward()
        return seen

    own = allocated()
    with openrlhf.enable():
        ours = allocated()
    assert own.largest >= 60 * 2**20 and ours.largest <= 2**25 and ours.peak < own.peak


def test_an_exception_in_the_host_leaves_the_actor_as_it_was(host: str) -> None:
    with openrlhf.enable():
        actor = make(0.7)
        with pytest.raises((IndexError, TypeError, RuntimeError, AttributeError)):
            actor(torch.tensor([[V + 1, V + 2]]), attention_mask=torch.ones(1, 2), return_logprobs=True)
        assert actor.temperature == 0.7
        actor.is_vlm = True
        with pytest.raises(hosts.UnsupportedHostError, match="is_vlm"):
            actor(torch.tensor([[3, 4]]), attention_mask=torch.ones(1, 2), return_logprobs=True)
    assert openrlhf._CURRENT.get() is None


def test_another_release_or_interface_changes_nothing() -> None:
    class Changed(StubActor):
        def forward(self, sequences: Tensor) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    changed = {"openrlhf.models.actor": {**STUB["openrlhf.models.actor"], "Actor": Changed}}
    for version, stub, message in (
        ("0.11.1", STUB, "openrlhf 0.11.1: logitless was tested with"),
        ("0.12.0", STUB, "openrlhf 0.12.0: logitless was tested with"),
        ("0.11.2", changed, "Changed.forward: expected the parameters"),
    ):
        with stubbed("openrlhf", version, stub):
            with pytest.raises(hosts.UnsupportedHostError, match=message):
                openrlhf.enable()
            from openrlhf.models import actor

            assert actor.compute_entropy is stub_entropy
