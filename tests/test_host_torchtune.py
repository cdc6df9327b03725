"""torchtune: a recipe's steps with LogitlessLoss. The real package where it is installed, a stub everywhere.

The stub has the published interface of 0.6.1: a decoder that ends in `unembed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host_stubs import real_or_stub, stubbed
from torch import Tensor, nn

from logitless import losses
from logitless.integrations import torchtune
from logitless.integrations.hosts import UnsupportedHostError
from logitless.testing import watch_allocations

pytest.importorskip("packaging")

V, H, T = 65, 32, 12


class StubDecoder(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tok_embeddings, self.layers = nn.Embedding(vocabulary, H), nn.GRU(H, H, batch_first=True)
        self.norm, self.output = nn.LayerNorm(H), nn.Linear(H, vocabulary, bias=False)
        self.num_output_chunks = 0

    def unembed(self, h: Tensor) -> Tensor:
        return self.output(self.norm(h)).float()  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.layers(self.tok_embeddings(tokens))[0])


STUB = {"torchtune.modules.transformer": {"TransformerDecoder": StubDecoder}}


@pytest.fixture(params=["stub", "real"])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    with real_or_stub(request.param, "torchtune", "0.6.1", STUB, "torchtune", "torchao"):
        yield request.param
        torchtune._UNEMBEDDING.off()


def decoder(host: str, vocabulary: int = V, tied: bool = False) -> Any:
    torch.manual_seed(0)
    if host == "stub":
        return StubDecoder(vocabulary)
    sizes = dict(num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=H, max_seq_len=256)
    if tied:
        from torchtune.models.llama3_2 import llama3_2

        return llama3_2(vocab_size=vocabulary, **sizes)
    from torchtune.models.llama3 import llama3

    return llama3(vocab_size=vocabulary, **sizes)


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def recipe(model: Any, loss_fn: Any) -> tuple[list[float], dict[str, Tensor]]:
    """The steps of torchtune's recipes: a micro-batch's mean times its tokens, gradients over all of them."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.2), []
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        total = 0
        for length in (T, T - 3):
            tokens = torch.randint(V, (2, length), generator=generator)
            labels = tokens.clone()
            labels[0, : length // 2] = -100
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
            count = int((labels != -100).sum())
            logits = model(tokens)
            loss = loss_fn(logits.reshape(-1, logits.size(-1)), labels.reshape(-1)) * count
            loss.backward()
            total += count
            seen.append(loss.item())
        for p in model.parameters():
            p.grad /= total
        optimizer.step()
        optimizer.zero_grad()
    return seen, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_steps_are_the_hosts_own(host: str, tied: bool) -> None:
    if tied and host == "stub":
        pytest.skip("the stub's head is not tied")
    own, expected = recipe(decoder(host, tied=tied), own_loss)
    loss_fn = torchtune.LogitlessLoss()
    ours, weights = recipe(decoder(host, tied=tied), loss_fn)
    assert ours == pytest.approx(own, rel=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)
    model = decoder(host, tied=tied).eval()
    assert model(torch.randint(V, (1, 4))).shape[-1] == V
    loss_fn.close()
    assert model.train()(torch.randint(V, (1, 4))).shape[-1] == V


def test_another_loss_of_the_registry_trains(host: str) -> None:
    model, loss_fn = decoder(host), torchtune.LogitlessLoss("dft", power=0.5)
    tokens = torch.randint(V, (2, T))
    found = loss_fn(model(tokens), tokens)
    loss_fn.close()
    nll = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="none")
    torch.testing.assert_close(found, (nll * (-0.5 * nll).exp()).mean())
    assert loss_fn.loss == losses.DFT(power=0.5)


def test_no_logits_are_allocated(host: str) -> None:
    large = 65536
    tokens = torch.randint(large, (2, 128))

    def allocated(loss_fn: Any) -> Any:
        model = decoder(host, large)
        with watch_allocations() as seen:
            logits = model(tokens)
            loss_fn(logits.reshape(-1, logits.size(-1)), tokens.reshape(-1)).backward()
        return seen

    own = allocated(own_loss)
    ours = allocated(torchtune.LogitlessLoss())
    assert own.largest >= 64 * 2**20 and ours.largest <= 2**25 and ours.peak < own.peak


def test_what_is_not_served_is_refused_by_name(host: str) -> None:
    with pytest.raises(UnsupportedHostError, match="loss='dpo': torchtune has batches of tokens"):
        torchtune.LogitlessLoss("dpo")
    loss_fn, model = torchtune.LogitlessLoss(), decoder(host)
    with pytest.raises(UnsupportedHostError, match="enabled already"):
        torchtune.LogitlessLoss()
    with pytest.raises(UnsupportedHostError, match="no TransformerDecoder has run"):
        loss_fn(torch.randn(3, H), torch.zeros(3, dtype=torch.long))
    hidden = model(torch.randint(V, (1, 4)))
    model.output = nn.Sequential(model.output)
    with pytest.raises(UnsupportedHostError, match="got Sequential"):
        loss_fn(hidden, torch.zeros(1, 4, dtype=torch.long))
    model.num_output_chunks = 4
    with pytest.raises(UnsupportedHostError, match="set_num_output_chunks"):
        model(torch.randint(V, (1, 4)))


def test_another_release_or_interface_changes_nothing() -> None:
    class Changed(StubDecoder):
        def unembed(self, h: Tensor, more: Any) -> Tensor:  # type: ignore[override]
            raise NotImplementedError

    for version, cls, message in (
        ("0.6.0", StubDecoder, "torchtune 0.6.0: logitless was tested with"),
        ("0.7.0", StubDecoder, "torchtune 0.7.0: logitless was tested with"),
        ("0.6.1", Changed, "Changed.unembed: expected the parameters"),
    ):
        before = cls.unembed
        with stubbed("torchtune", version, {"torchtune.modules.transformer": {"TransformerDecoder": cls}}):
            with pytest.raises(UnsupportedHostError, match=message):
                torchtune.LogitlessLoss()
            assert cls.unembed is before
