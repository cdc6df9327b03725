"""torchtitan: its loss slot. The real package where it is installed, a stub everywhere.

The stub has the published interface of 0.3.0: the base class of the losses, and the wrapper that gets hidden states and
the output head, here without chunks.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host_stubs import real_or_stub, stubbed
from torch import Tensor, nn

from logitless.integrations.hosts import UnsupportedHostError
from logitless.testing import watch_allocations

pytest.importorskip("packaging")

MODULE = "logitless.integrations.torchtitan"
V, H, B, T = 65, 32, 2, 16


class StubBase:
    @dataclass(kw_only=True, slots=True)
    class Config:
        def build(self, **kwargs: Any) -> Any:
            return OWNERS[type(self)](replace(self), **kwargs)


OWNERS: dict[type, Any] = {}


def stub_cross_entropy(logits: Tensor, labels: Tensor, count: Any = None, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return loss if count is None else loss / count, {}


class StubWrapper(StubBase):
    @dataclass(kw_only=True, slots=True)
    class Config(StubBase.Config):
        num_chunks: int = 8
        loss_fn: Any = None

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self.loss_fn = stub_cross_entropy if config.loss_fn is None else config.loss_fn.build()

    def set_lm_head(self, lm_head: nn.Module) -> None:
        self.lm_head = lm_head

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Any = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        found: tuple[Tensor, dict[str, Tensor]] = self.loss_fn(
            self.lm_head(pred), labels, global_valid_tokens, **loss_inputs
        )
        return found


OWNERS[StubWrapper.Config] = StubWrapper
STUB = {"torchtitan.components.loss": {"BaseLoss": StubBase, "ChunkedLossWrapper": StubWrapper}}


@pytest.fixture(params=["stub", "real"])
def host(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module, imported under the real torchtitan or under the stub."""
    sys.modules.pop(MODULE, None)
    with real_or_stub(request.param, "torchtitan", "0.3.0", STUB, "torchtitan"):
        module = importlib.import_module(MODULE)
        if request.param == "stub":
            OWNERS[module.LogitlessLoss.Config] = module.LogitlessLoss
        yield module
    sys.modules.pop(MODULE, None)


class Decoder(nn.Module):
    """A decoder as torchtitan's trainer sees it: `_skip_lm_head` makes it return hidden states."""

    def __init__(self, vocabulary: int = V) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(vocabulary, H)
        self.mixing = nn.GRU(H, H, batch_first=True)
        self.lm_head = nn.Linear(H, vocabulary, bias=False)
        self._skip_lm_head = False

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.mixing(self.tok_embeddings(tokens))[0]
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and shifted labels of rows that end at unequal places."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(count):
        tokens = torch.randint(V, (B, T + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        for row in labels:
            row[int(torch.randint(4, T, (1,), generator=generator)) :] = -100
        found.append((tokens[:, :-1], labels))
    return found


def steps(
    config: Any, inputs: Callable[[Tensor, int], dict[str, Any]] = lambda labels, i: {}
) -> tuple[list[float], nn.Module]:
    """Three steps of the trainer's: two micro-batches each, over the count of tokens of both."""
    model, loss_fn = Decoder(), config.build()
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.5), []
    data = batches(6)
    for i in range(0, 6, 2):
        count = sum((labels != -100).sum() for _, labels in data[i : i + 2])
        for j, (tokens, labels) in enumerate(data[i : i + 2]):
            loss, _ = loss_fn(model(tokens), labels, count.float(), **inputs(labels, i + j))  # type: ignore[union-attr]
            loss.backward()
            seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return seen, model


def assert_equal(ours: tuple[list[float], nn.Module], own: tuple[list[float], nn.Module]) -> None:
    assert ours[0] == pytest.approx(own[0], rel=1e-5)
    for (name, mine), theirs in zip(ours[1].named_parameters(), own[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    fresh = Decoder()
    assert not torch.equal(fresh.lm_head.weight, own[1].lm_head.weight)  # type: ignore[arg-type]


def wrapper() -> Any:
    from torchtitan.components.loss import ChunkedLossWrapper

    return ChunkedLossWrapper


def test_steps_are_the_hosts_own(host: Any) -> None:
    assert_equal(steps(host.LogitlessLoss.Config()), steps(wrapper().Config(num_chunks=4)))
    positions = lambda labels, i: {"positions": torch.arange(T).expand(B, T)}  # noqa: E731
    assert_equal(steps(host.LogitlessLoss.Config(), positions), steps(wrapper().Config(num_chunks=4), positions))


def policy(labels: Tensor, i: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    old = -4 + 0.3 * torch.randn(labels.shape, generator=generator)
    old[0, 1] = float("nan")
    advantages = torch.randn(labels.shape, generator=generator)
    return {"generator_logprobs": old, "advantages": advantages, "loss_mask": labels != -100}


class PlainGRPO:
    """The clipped ratio on logits, over the count of tokens."""

    @dataclass(kw_only=True)
    class Config(StubBase.Config):
        pass

    def __init__(self, config: Any) -> None: ...

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        count: Any,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        counts = loss_mask & generator_logprobs.isfinite()
        logprob = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        ratio = (logprob - generator_logprobs)[counts].exp()
        gain = advantages[counts]
        return -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).sum() / count, {}


OWNERS[PlainGRPO.Config] = PlainGRPO


def own_grpo(real: bool) -> Any:
    if not real:
        return PlainGRPO.Config()
    # The package around it imports a generator of rollouts; the loss needs none of that.
    package = ModuleType("torchtitan.experiments.rl")
    package.__path__ = [str(Path(importlib.import_module("torchtitan").__path__[0], "experiments", "rl"))]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.losses.grpo").GRPOLoss.Config()


def test_policy_steps_are_the_hosts_own(host: Any) -> None:
    own = steps(wrapper().Config(num_chunks=4, loss_fn=own_grpo(wrapper() is not StubWrapper)), policy)
    ours = steps(host.LogitlessLoss.Config(loss="grpo", loss_args={"epsilon_low": 0.2, "epsilon_high": 0.2}), policy)
    assert_equal(ours, own)


def test_validation_and_a_plain_sum(host: Any) -> None:
    model, loss_fn, own = Decoder(), host.LogitlessLoss.Config().build(), wrapper().Config(num_chunks=4).build()
    loss_fn.set_lm_head(model.lm_head)
    own.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    with torch.no_grad():
        tokens, labels = batches(1)[0]
        torch.testing.assert_close(loss_fn(model(tokens), labels)[0], own(model(tokens), labels)[0])
        assert loss_fn(model(tokens), torch.full_like(labels, -100), 0)[0] == 0


def test_a_chunk_is_no_larger_than_asked(host: Any) -> None:
    large, length = 65536, 128

    def allocated(config: Any) -> Any:
        model, loss_fn = Decoder(large), config.build()
        loss_fn.set_lm_head(model.lm_head)
        hidden = torch.randn(B, length, H, requires_grad=True)
        with watch_allocations() as seen:
            loss_fn(hidden, torch.randint(large, (B, length)), 10.0)[0].backward()
        return seen

    own = allocated(wrapper().Config(num_chunks=1))
    ours = allocated(host.LogitlessLoss.Config(chunk_bytes=2**24))
    assert own.largest >= 64 * 2**20 and ours.largest <= 2**24 and ours.peak < own.peak / 2


def test_what_is_not_served_is_refused_by_name(host: Any) -> None:
    for name in ("dpo", "distillation", "top_k_distillation"):
        with pytest.raises(UnsupportedHostError, match=f"loss='{name}': torchtitan's slot"):
            host.LogitlessLoss.Config(loss=name).build()
    with pytest.raises(ValueError, match="did you mean 'dft'"):
        host.LogitlessLoss.Config(loss="dtf").build()
    loss_fn = host.LogitlessLoss.Config(loss="grpo").build()
    with pytest.raises(UnsupportedHostError, match="set_lm_head"):
        loss_fn(torch.randn(B, T, H), torch.zeros(B, T, dtype=torch.long))
    with pytest.raises(UnsupportedHostError, match="lm_head: expected a plain"):
        loss_fn.set_lm_head(nn.Sequential())
    loss_fn.set_lm_head(nn.Linear(H, V))
    with pytest.raises((TypeError, ValueError), match="advantages"):
        loss_fn(torch.randn(B, T, H), torch.zeros(B, T, dtype=torch.long))
    with pytest.raises((TypeError, ValueError), match="surprise"):
        loss_fn(torch.randn(B, T, H), torch.zeros(B, T, dtype=torch.long), surprise=torch.ones(B, T))
    assert {field.name for field in fields(host.LogitlessLoss.Config)} == {
        *("loss", "loss_args", "backend", "backward", "chunk_bytes")
    }


def test_another_release_or_interface_changes_nothing() -> None:
    class Changed(StubWrapper):
        def __call__(self, pred: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            raise NotImplementedError

    changed = {"torchtitan.components.loss": {"BaseLoss": StubBase, "ChunkedLossWrapper": Changed}}
    for version, stub, message in (
        ("0.2.1", STUB, "torchtitan 0.2.1: logitless was tested with"),
        ("0.4.0", STUB, "torchtitan 0.4.0: logitless was tested with"),
        ("0.3.0", changed, "Changed.__call__: expected the parameters"),
    ):
        sys.modules.pop(MODULE, None)
        with stubbed("torchtitan", version, stub), pytest.raises(UnsupportedHostError, match=message):
            module = importlib.import_module(MODULE)
            module.LogitlessLoss(module.LogitlessLoss.Config())
        sys.modules.pop(MODULE, None)
