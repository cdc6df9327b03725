"""Losses of hidden states that a patched model has returned, as the hosts' integrations compute them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from host_cases import collate, rows  # noqa: E402
from patch_models import config, llama  # noqa: E402

from logitless import losses, patch  # noqa: E402
from logitless.integrations.hidden_loss import (  # noqa: E402
    check_host_loss,
    drop_logits,
    inner_model,
    is_patched,
    loss_of_hidden,
    patched_or_not,
    stats_of_hidden,
    top_entropy,
)
from logitless.integrations.hosts import Change, Switch, UnsupportedHostError  # noqa: E402


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["nll", "dft"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_loss_of_hidden_states_is_the_forwards(loss: str, lora: bool) -> None:
    model = patch(llama())
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    batch = collate(rows()[:3])
    weight = torch.rand(batch["labels"].shape)
    inputs = dict(num_items_in_batch=11, loss_inputs={"token_weight": weight})
    expected = model(**batch, loss=loss, **inputs).loss
    labels = batch.pop("labels")
    hidden = model(**batch, hidden_only=True).logits
    found = loss_of_hidden(model, hidden, labels, loss, num_items_in_batch=11, token_weight=weight)["loss"]
    torch.testing.assert_close(found, expected)
    own, ours = gradients(model, expected), gradients(model, found)
    assert own.keys() == ours.keys() and own
    for name in own:
        torch.testing.assert_close(ours[name], own[name], rtol=1e-4, atol=1e-6)


def test_statistics_have_the_temperature_asked_for() -> None:
    model = patch(llama())
    batch = collate(rows()[:2])
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], hidden_only=True).logits
    stats = stats_of_hidden(model, hidden, batch["input_ids"], ("logprob", "entropy"), 0.7)
    logp = (model.lm_head(hidden) / 0.7).log_softmax(-1)
    torch.testing.assert_close(stats.logprob, logp.gather(-1, batch["input_ids"][..., None])[..., 0])
    torch.testing.assert_close(stats.entropy, -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Cohere"])
def test_the_entropy_of_the_likeliest_is_that_of_the_logits(family: str) -> None:
    """Cohere scales its logits."""
    if family == "Llama":
        model = llama()
    else:
        torch.manual_seed(0)
        model = transformers.CohereForCausalLM(
            transformers.CohereConfig(**{**config().to_diff_dict(), "model_type": "cohere", "logit_scale": 0.3})
        )
    model = patch(model.train())
    batch = collate(rows()[:3])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, skip_logits=False).logits
        hidden = model(**batch, hidden_only=True).logits
    p = logits.topk(7).values.softmax(-1)
    counts = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] != -100
    torch.testing.assert_close(top_entropy(model, hidden, labels, 7), torch.special.entr(p).sum(-1) * counts)


def test_hidden_states_come_with_the_routers_loss() -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=65, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    experts = dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts, router_aux_loss_coef=0.3))
    batch = collate(rows()[:2])
    expected = model(**batch)
    patch(model)
    torch.testing.assert_close(model(**batch).loss, expected.loss)
    del batch["labels"]
    output = model(**batch, hidden_only=True)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert output.loss is None and output.logits.shape[-1] == 32


def test_models_are_unpatched_if_the_host_raises() -> None:
    first, second = llama(), patch(llama())
    with pytest.raises(ZeroDivisionError), patched_or_not(first, second, loss="dft"):
        assert is_patched(first) and first._logitless_patch.loss == losses.DFT()
        _ = 1 / 0
    assert not is_patched(first) and is_patched(second)
    with pytest.raises(TypeError), patched_or_not(first, nn.Linear(2, 2)):
        raise AssertionError("a linear layer is no causal LM")
    assert not is_patched(first)


def test_hidden_states_are_taken_out_of_an_output() -> None:
    output = transformers.modeling_outputs.CausalLMOutputWithPast(loss=torch.ones(()), logits=torch.ones(2))
    drop_logits(output)
    assert output.logits is None and list(output.keys()) == ["loss"]


def test_a_model_is_found_in_its_wrappers() -> None:
    model = llama()

    class DistributedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    assert inner_model(DistributedDataParallel()) is model
    assert inner_model(torch.compile(model, backend="eager")) is model


def test_losses_that_a_host_cannot_feed_are_refused() -> None:
    served = []
    for name in losses.names():
        try:
            served.append(check_host_loss(losses.get(name), "the host").name)
        except UnsupportedHostError as error:
            assert f"loss={name!r}: the host has batches of tokens" in str(error)
    assert {"nll", "dft", "focal"} <= set(served) and not {"dpo", "grpo", "asft", "f_divergence_sft"} & set(served)


def test_a_switch_changes_all_or_nothing() -> None:
    class Host:
        def first(self, x: int) -> int:
            return x

        def second(self, x: int, y: int) -> int:
            return x + y

    class Inherits(Host):
        pass

    def doubled(own: Any) -> Any:
        return lambda self, x: 2 * own(self, x)

    def failing(own: Any) -> Any:
        raise ZeroDivisionError

    switch = Switch("torch", ">=2")
    before = Host.first
    for second in (Change(Host, "second", ("self", "x"), doubled), Change(Host, "second", ("self", "x", "y"), failing)):
        with pytest.raises((UnsupportedHostError, ZeroDivisionError)):
            switch.on(lambda change=second: [Change(Host, "first", ("self", "x"), doubled), change])
        assert Host.first is before
    with switch.on(lambda: [Change(Inherits, "first", ("self", "x"), doubled)]):
        assert Inherits().first(3) == 6 and Host().first(3) == 3
    assert "first" not in vars(Inherits)
    with pytest.raises(UnsupportedHostError, match=r"torch .*: logitless was tested with >=99"):
        Switch("torch", ">=99").on(list)
    with pytest.raises(UnsupportedHostError, match="no-such-host: not installed; expected >=1"):
        Switch("no-such-host", ">=1").on(list)
