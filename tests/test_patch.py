"""`patch`: what the patched forward takes, gives and leaves alone, on tiny Llamas."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from patch_models import B, H, T, V, llama  # noqa: E402
from processes import in_processes  # noqa: E402

from logitless import linear_logprobs, losses  # noqa: E402
from logitless.integrations.families import UnsupportedModelError  # noqa: E402
from logitless.integrations.transformers import patch, unpatch  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, V, (B, T))
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2, 6:] = -100
    return {"input_ids": ids, "labels": labels}


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_grads(ours: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    assert ours.keys() == own.keys()
    for name, expected in own.items():
        atol = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """The materialised `[B, T]` log-probabilities of the next token, 0 where it is ignored."""
    targets = shifted(labels)
    found = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return found * (targets != -100)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("tied", [False, True])
def test_training_gives_the_models_own_loss_and_gradients_without_logits(items: Any, tied: bool) -> None:
    model, inputs = llama(tie_word_embeddings=tied), {**batch(), "num_items_in_batch": items}
    own = model(**inputs)
    expected = grads(model, own.loss)
    ours = patch(model)(**inputs)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, own.loss)
    assert_grads(grads(model, ours.loss), expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("backward", ["auto", "recompute"])
def test_backend_and_backward_reach_the_op(backend: Any, backward: Any) -> None:
    model = llama().double()
    own = model(**batch())
    expected = grads(model, own.loss)
    ours = patch(model, backend=backend, backward=backward)(**batch())
    torch.testing.assert_close(ours.loss.float(), own.loss.float())
    assert_grads(grads(model, ours.loss), expected)


def test_shift_labels_are_taken_as_they_are() -> None:
    model, inputs = patch(llama()), batch()
    expected = model(**inputs).loss
    given = {"input_ids": inputs["input_ids"], "shift_labels": shifted(inputs["labels"])}
    torch.testing.assert_close(model(**given).loss, expected)
    torch.testing.assert_close(model.eval()(**given).loss, expected)


def test_ignore_index_is_honoured() -> None:
    model, inputs = patch(llama()), batch()
    expected = model(**inputs).loss
    other = {**inputs, "labels": inputs["labels"].where(inputs["labels"] != -100, -1)}
    torch.testing.assert_close(model(**other, ignore_index=-1).loss, expected)


def test_a_batch_whose_tokens_are_all_ignored_gives_zero_connected_to_the_graph() -> None:
    model, inputs = patch(llama()), batch()
    loss = model(input_ids=inputs["input_ids"], labels=torch.full((B, T), -100)).loss
    assert float(loss) == 0.0
    found = grads(model, loss)
    assert len(found) == len(list(model.parameters())) and not any(g.any() for g in found.values())


def test_positional_arguments_and_other_inputs_pass_through() -> None:
    model, inputs = llama(), batch()
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :3] = 0
    own = model(inputs["input_ids"], mask, labels=inputs["labels"], output_hidden_states=True)
    ours = patch(model)(inputs["input_ids"], mask, labels=inputs["labels"], output_hidden_states=True)
    torch.testing.assert_close(ours.loss, own.loss)
    torch.testing.assert_close(ours.hidden_states, own.hidden_states)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(
        model(inputs_embeds=embedded, attention_mask=mask, labels=inputs["labels"]).loss, own.loss
    )


def test_return_dict_false_gives_a_tuple() -> None:
    model, inputs = llama(), batch()
    own = model(**inputs, return_dict=False, use_cache=False)
    patch(model)
    ours = model(**inputs, return_dict=False, use_cache=False)
    assert isinstance(ours, tuple) and len(ours) == len(own) - 1  # no logits
    torch.testing.assert_close(ours[0], own[0])
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


@pytest.mark.parametrize("asked", [{}, {"skip_logits": False}, {"token_outputs": ("lse",)}], ids=str)
@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_fields_have_the_order_of_the_models_own(loss: str, asked: dict[str, Any]) -> None:
    model, inputs = llama(), batch()
    own = list(model(**inputs, output_hidden_states=True).keys())
    output = patch(model)(**inputs, output_hidden_states=True, loss=loss, **asked)
    skipped = set() if "skip_logits" in asked else {"logits"}
    assert list(output)[: len(own) - len(skipped)] == [name for name in own if name not in skipped]
    assert output[0] is output.loss and output.to_tuple()[0] is output.loss
    assert model(**inputs, loss=loss, return_dict=False, **asked)[0].shape == ()


def test_logits_to_keep_goes_with_labels_of_the_kept_positions() -> None:
    model, inputs = patch(llama()), batch()
    given = {"input_ids": inputs["input_ids"], "shift_labels": shifted(inputs["labels"])}
    whole = model(**given, token_outputs=("logprob",)).token_stats.logprob
    given["shift_labels"] = given["shift_labels"][:, -4:]
    for kept in (4, torch.arange(T - 4, T), torch.arange(T - 4, T).expand(B, -1)):
        part = model(**given, logits_to_keep=kept, token_outputs=("logprob",)).token_stats.logprob
        torch.testing.assert_close(part, whole[:, -4:])
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[:, -4:] = True
    flat = model(
        input_ids=inputs["input_ids"], shift_labels=given["shift_labels"].reshape(-1), logits_to_keep=mask,
        token_outputs=("logprob",),
    )  # fmt: skip
    torch.testing.assert_close(flat.token_stats.logprob, whole[:, -4:].reshape(-1))


def test_a_padded_head_needs_no_matching_vocabulary_size() -> None:
    model, inputs = llama(), batch()
    model.resize_token_embeddings(72)
    model.config.vocab_size = V  # what a padded checkpoint looks like
    logprob, counts = logprobs(model(inputs["input_ids"]).logits, inputs["labels"]), shifted(inputs["labels"]) != -100
    expected = -logprob.sum() / counts.sum()
    torch.testing.assert_close(patch(model)(**inputs).loss, expected)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, inputs = llama(), batch()
    expected = grads(model, model(**inputs).loss)
    patch(model)
    model.gradient_checkpointing_enable()
    assert_grads(grads(model, model(**inputs).loss), expected)


def test_autocast_is_followed() -> None:
    model, inputs = llama(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = model(**inputs)
        expected = grads(model, own.loss)
        patch(model)
        ours = model(**inputs)
    torch.testing.assert_close(ours.loss, own.loss, rtol=1e-2, atol=1e-2)
    found = grads(model, ours.loss)
    assert all((found[n] - g).norm() <= 0.03 * g.norm() for n, g in expected.items())


def test_a_half_precision_model_trains() -> None:
    model, inputs = llama().bfloat16(), batch()
    own = model(**inputs)
    ours = patch(model)(**inputs)
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close(ours.loss, own.loss, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("asked", [{}, {"token_outputs": ("logprob", "entropy")}, {"loss": "dft"}], ids=str)
def test_a_training_step_never_allocates_the_logits(asked: dict[str, Any]) -> None:
    model = patch(llama(vocab_size=16384, hidden_size=16))
    ids = torch.randint(3, 16384, (32, 64))
    model(input_ids=ids[:1], labels=ids[:1])  # the self-check, on five tokens
    with watch_allocations() as seen:
        model(input_ids=ids, labels=ids, **asked).loss.backward()
    assert 0 < seen.largest <= ids.numel() * 16384 * 4 / 3


# ---------------------------------------------------------------------------------------------------------------------
# Other losses, per-token statistics, hidden states


@pytest.mark.parametrize("loss", ["dft", losses.NLL(label_smoothing=0.1, z_loss=0.01)], ids=["dft", "smoothed"])
@pytest.mark.parametrize("with_stats", [False, True])
def test_a_token_loss_equals_its_definition_on_full_logits(loss: Any, with_stats: bool) -> None:
    model, inputs = llama(), batch()
    logits, labels = model(inputs["input_ids"]).logits, inputs["labels"]
    counts = shifted(labels) != -100
    logprob, lse = logprobs(logits, labels), logits.logsumexp(-1)
    if loss == "dft":
        per_token = -logprob.detach().exp() * logprob
    else:
        per_token = -0.9 * logprob + 0.1 * (lse - logits.mean(-1)) + 0.01 * lse.square()
    own = (per_token * counts).sum() / 11
    expected = grads(model, own)
    ours = patch(model, loss=loss)(
        **inputs, num_items_in_batch=torch.tensor(11), token_outputs=("entropy",) if with_stats else ()
    )
    torch.testing.assert_close(ours.loss, own)
    assert_grads(grads(model, ours.loss), expected)
    assert (ours.token_stats is not None) == with_stats


def test_a_loss_for_one_call_and_its_inputs() -> None:
    model, inputs = patch(llama()), batch()
    reference = model(**inputs, token_outputs=("logprob", "lse")).token_stats
    weight = torch.rand(B, T)
    for loss, names in (
        (losses.FDivergenceSFT(beta=0.3), ("logprob",)),
        (losses.FDivergenceSFT(beta=0.3, value="lse"), ("logprob", "lse")),
    ):
        given = {f"ref_{name}": getattr(reference, name).detach() - 0.1 for name in names}
        given["token_weight"] = weight
        plain = model(**inputs, loss=loss, loss_inputs=given)
        with_stats = model(**inputs, loss=loss, loss_inputs=given, token_outputs=("logprob",))
        torch.testing.assert_close(plain.loss, with_stats.loss)
        with_logits = model(**inputs, loss=loss, loss_inputs=given, skip_logits=False)
        torch.testing.assert_close(plain.loss, with_logits.loss)
        torch.testing.assert_close(with_logits.logits, model(inputs["input_ids"]).logits)
    nll = model(**inputs, loss_inputs={"token_weight": weight}, num_items_in_batch=1).loss
    torch.testing.assert_close(nll, -(weight * reference.logprob).sum())


def test_the_reference_may_be_its_hidden_states() -> None:
    model, inputs = patch(llama()), batch()
    loss, hidden = losses.FDivergenceSFT(beta=0.3), model(**inputs, hidden_only=True).logits.detach().flip(0)
    scored = linear_logprobs(hidden, model.lm_head.weight, shifted(inputs["labels"])).logprob.detach()
    expected = model(**inputs, loss=loss, loss_inputs={"ref_logprob": scored}).loss
    for asked in ((), ("logprob",)):
        found = model(**inputs, loss=loss, loss_inputs={"ref_hidden": hidden}, token_outputs=asked)
        torch.testing.assert_close(found.loss, expected)


def test_a_loss_within_the_ids_that_a_sampler_kept() -> None:
    model, inputs = patch(llama()), batch()
    targets = shifted(inputs["labels"])
    kept = torch.stack([targets, (targets + 1) % V, (targets + 7) % V], -1).masked_fill((targets < 0)[..., None], -1)
    hidden = model(**inputs, hidden_only=True).logits.detach()
    scored = linear_logprobs(hidden, model.lm_head.weight, targets, among=kept).logprob.detach()
    given = {"among": kept, "old_logprob": scored, "advantages": torch.ones(B, T)}
    for asked in ((), ("logprob",)):
        found = model(**inputs, loss=losses.PPO(), loss_inputs=given, token_outputs=asked)
        torch.testing.assert_close(found.loss, torch.tensor(-1.0))  # the ratio is 1
        assert all(x.isfinite().all() for x in grads(model, found.loss).values())


def test_a_loss_at_another_temperature_is_no_function_of_the_statistics_asked_for() -> None:
    model, inputs = patch(llama(), loss=losses.GEM(beta=0.3, h="linear")), batch()
    logits = model(inputs["input_ids"]).logits
    tempered = logprobs(logits / 0.3, inputs["labels"])
    counted = shifted(inputs["labels"]) != -100
    for asked in ((), ("logprob",)):
        found = model(**inputs, token_outputs=asked)
        torch.testing.assert_close(found.loss, -0.3 * tempered.sum() / counted.sum())
    torch.testing.assert_close(found.token_stats.logprob, logprobs(logits, inputs["labels"]))


def test_dpo_of_rows_equals_dpo_of_a_packed_batch_and_its_definition() -> None:
    model = patch(llama())
    torch.manual_seed(2)
    ids, ref = torch.randint(3, V, (4, 6)), torch.randn(4, 6)
    labels = ids.clone()
    labels[:, :2] = -100
    loss = losses.DPO(beta=0.5)
    rows = model(input_ids=ids, labels=labels, loss=loss, loss_inputs={"ref_logprob": ref}, num_items_in_batch=2)
    expected = grads(model, rows.loss)
    sums = ((logprobs(model(ids).logits, labels) - ref) * (shifted(labels) != -100)).sum(-1)
    torch.testing.assert_close(rows.loss, -F.logsigmoid(0.5 * (sums[:2] - sums[2:])).mean())
    assert rows.loss_result.margin.shape == (2,)
    packed = {
        "input_ids": ids.reshape(1, -1),
        "labels": labels.reshape(1, -1),
        "position_ids": torch.arange(6).repeat(4)[None],
        "cu_seqlens": torch.tensor([0, 6, 12, 18, 24], dtype=torch.int32),
    }
    flat = model(**packed, loss=loss, loss_inputs={"ref_logprob": ref.reshape(1, -1)}, num_items_in_batch=2)
    torch.testing.assert_close(flat.loss, rows.loss)
    torch.testing.assert_close(flat.loss_result.margin, rows.loss_result.margin)
    assert_grads(grads(model, flat.loss), expected)


def test_cu_seqlens_keep_the_last_token_of_a_sequence_from_predicting_the_next_sequence() -> None:
    model, inputs = patch(llama()), batch()
    ids = inputs["input_ids"][:2]
    rows = model(input_ids=ids, labels=ids)
    flat = ids.reshape(1, -1)
    packed = {"input_ids": flat, "labels": flat, "position_ids": torch.arange(T).repeat(2)[None]}
    cu_seqlens = torch.tensor([0, T, 2 * T])
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(model(**packed, cu_seqlens=cu_seqlens).loss, rows.loss)
    split = torch.tensor([0, 4, T, T + 6, 2 * T])  # two rows of two sequences each
    stats = model(input_ids=ids, labels=ids, cu_seqlens=split, skip_logits=True, token_outputs=("logprob",)).token_stats
    assert (stats.logprob == 0).nonzero().tolist() == [[0, 3], [0, T - 1], [1, 5], [1, T - 1]]


def test_token_stats_are_those_of_the_logits_and_differentiable() -> None:
    model, inputs = llama(), batch()
    logits = model(inputs["input_ids"]).logits
    logprob, counts = logprobs(logits, inputs["labels"]), shifted(inputs["labels"]) != -100
    entropy = torch.distributions.Categorical(logits=logits).entropy() * counts
    upstream = torch.randn(B, T)
    expected = grads(model, (upstream * (logprob + entropy)).sum())
    stats = patch(model)(**inputs, token_outputs=("logprob", "entropy")).token_stats
    torch.testing.assert_close(stats.logprob, logprob)
    torch.testing.assert_close(stats.entropy, entropy)
    assert stats.lse is None
    assert_grads(grads(model, (upstream * (stats.logprob + stats.entropy)).sum()), expected)


@pytest.mark.parametrize("training", [True, False])
def test_hidden_only_gives_hidden_states_in_place_of_logits(training: bool) -> None:
    model, inputs = llama().train(training), batch()
    expected = model.model(inputs["input_ids"]).last_hidden_state
    own = model(**inputs).loss
    patch(model)
    bare = model(inputs["input_ids"], hidden_only=True)
    assert bare.loss is None and bare.logits.shape == (B, T, H)
    torch.testing.assert_close(bare.logits, expected)
    scored = model(**inputs, hidden_only=True)
    torch.testing.assert_close(scored.loss, own)
    torch.testing.assert_close(scored.logits, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Where logits are wanted


def test_calls_without_labels_and_generation_run_the_models_own_forward() -> None:
    model, inputs = llama().eval(), batch()
    own = model(inputs["input_ids"])
    written = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    patch(model)
    torch.testing.assert_close(model(inputs["input_ids"]).logits, own.logits, rtol=0, atol=0)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False), written)
    assert model.train()(inputs["input_ids"]).logits is not None


def test_evaluation_gives_true_logits_where_they_are_wanted() -> None:
    model, inputs = llama().eval(), batch()
    own = model(**inputs)
    bare = patch(model)(**inputs)
    assert bare.logits is None and unpatch(model) is model
    torch.testing.assert_close(bare.loss, own.loss)
    patch(model, eval_logits=True)
    ours = model(**inputs)
    torch.testing.assert_close(ours.logits, own.logits, rtol=0, atol=0)
    torch.testing.assert_close(ours.loss, own.loss, rtol=0, atol=0)
    without = model(**inputs, skip_logits=True)
    assert without.logits is None
    torch.testing.assert_close(without.loss, own.loss)
    other = model(**inputs, loss="dft")
    torch.testing.assert_close(other.logits, own.logits)
    with_logits = model.train()(**inputs, skip_logits=False)
    torch.testing.assert_close(with_logits.logits, own.logits)


# ---------------------------------------------------------------------------------------------------------------------
# Patch, unpatch, the self-check


def test_unpatch_restores_the_model_exactly() -> None:
    model = llama()
    before = set(model.__dict__)
    assert unpatch(patch(model)) is model
    assert set(model.__dict__) == before
    assert model.forward.__func__ is type(model).forward
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)


def test_an_instances_own_forward_comes_back_and_is_used_without_labels() -> None:
    model = llama()
    original = model.forward
    calls = []
    model.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    wrapped = model.forward
    patch(model, check=False)
    model(batch()["input_ids"])
    assert calls == [1]
    unpatch(model)
    assert model.forward is wrapped


def test_the_signature_is_the_classs_own() -> None:
    model = llama()
    expected = inspect.signature(model.forward)
    assert inspect.signature(patch(model).forward) == expected


def test_a_copy_is_patched_and_stands_on_its_own() -> None:
    model, inputs = patch(llama()), batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    assert not torch.equal(model(**inputs).loss, other(**inputs).loss)
    unpatch(other)
    assert other(**inputs).logits is not None and model(**inputs).logits is None
    torch.testing.assert_close(other(inputs["input_ids"]).logits, 2 * unpatch(model)(inputs["input_ids"]).logits)


def test_the_self_check_leaves_no_trace() -> None:
    class Counting(transformers.LlamaForCausalLM):
        """With dropout, a running buffer that every forward changes, and modules in different modes."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            return super().forward(*args, **kwargs)

    model, inputs = llama(Counting, attention_dropout=0.5), batch()
    model.model.layers[0].eval()
    loss = model(**inputs).loss
    before = grads(model, loss)
    modes = [m.training for m in model.modules()]
    patch(model)
    model.seen.fill_(5.0)
    buffer = model.seen
    torch.manual_seed(7)
    checked = model(**inputs).loss
    assert model.seen is buffer and buffer.tolist() == [5.0] * 3
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    torch.manual_seed(7)
    again = model(**inputs).loss  # no check this time
    assert torch.equal(checked, again)


def test_the_self_check_runs_once_and_only_where_a_loss_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = llama(), batch()
    with caplog.at_level(logging.INFO, logger="logitless"):
        patch(model)
        assert "LlamaForCausalLM: head [65, 32], logit_scale 1, softcap None, bias False" in caplog.text
        model(inputs["input_ids"])
        assert "agrees with its own logits" not in caplog.text
        model(**inputs)
        model(**inputs)
    assert caplog.text.count("agrees with its own logits: largest error") == 1


def test_the_self_check_refuses_what_it_does_not_know() -> None:
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.001
            return out

    model = patch(llama(Scaled))
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=r"Scaled.*differ by .* \(allowed"):
            model(**batch())
    assert model.training
    assert unpatch(model)(**batch()).loss is not None
    assert patch(llama(Scaled), check=False)(**batch()).loss is not None
    own_loss = llama()
    own_loss.loss_function = lambda **kwargs: kwargs["logits"].square().mean()
    with pytest.raises(UnsupportedModelError, match="differ by"):
        patch(own_loss)(**batch())


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def lora(model: Any, **changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, **changes}
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj"]},
        {},
        {"lora_dropout": 0.3},
        {"lora_bias": True},
        {"use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["elsewhere", "head", "dropout", "bias", "rslora", "modules_to_save"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_as_peft_has_it(changes: dict[str, Any], patch_first: bool, tied: bool) -> None:
    inputs = batch()
    model = lora(llama(tie_word_embeddings=tied), **changes).train()
    torch.manual_seed(4)
    own = model(**inputs)
    expected = grads(model, own.loss)
    if patch_first:
        ours_model = lora(patch(llama(tie_word_embeddings=tied)), **changes).train()
    else:
        ours_model = patch(model)
    torch.manual_seed(4)
    ours = ours_model(**inputs)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, own.loss)
    assert_grads(grads(ours_model, ours.loss), expected)
    assert unpatch(ours_model)(**inputs).logits is not None


def test_several_disabled_and_merged_adapters_are_followed() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = lora(llama()).eval(), batch()
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["lm_head"], "init_lora_weights": False}
    model.add_adapter("second", peft.LoraConfig(**settings))
    model.base_model.set_adapter(["default", "second"])
    patch(model)

    def assert_same() -> None:
        torch.testing.assert_close(model(**inputs).loss, model(**inputs, skip_logits=False).loss)

    assert_same()
    model.base_model.set_adapter("second")
    assert_same()
    with model.disable_adapter():
        assert_same()
    model.merge_adapter()
    assert_same()
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, model(**inputs, skip_logits=False).loss)
    assert_same()


def test_rows_of_several_adapters_are_followed_from_the_first_call_on() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**settings)).eval()
    model.add_adapter("second", peft.LoraConfig(**settings))
    inputs = batch()
    named = {**inputs, "adapter_names": ["second", "__base__", "default"][: len(inputs["labels"])]}
    own, alone = model(**named).loss, model(**inputs).loss
    patch(model)
    torch.testing.assert_close(model(**named).loss, own)
    torch.testing.assert_close(model(**inputs).loss, alone)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("patch_first", [True, False])
def test_trained_tokens_are_followed_into_a_tied_head(tied: bool, patch_first: bool) -> None:
    tokens, inputs = [5, 6, 20], batch()

    def trained(model: Any) -> Any:
        return lora(model, target_modules=["q_proj"], trainable_token_indices=tokens)

    model = trained(llama(tie_word_embeddings=tied)).train()
    ours_model = trained(patch(llama(tie_word_embeddings=tied))).train() if patch_first else copy.deepcopy(model)
    for each in (model, ours_model):
        for name, parameter in each.named_parameters():
            if "trainable_tokens_delta" in name:
                torch.manual_seed(6)
                parameter.data.add_(torch.randn_like(parameter))
    own = model(**inputs)
    expected = grads(model, own.loss)
    assert any("trainable_tokens_delta" in name for name in expected)
    ours_model = ours_model if patch_first else patch(ours_model)
    ours = ours_model(**inputs)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, own.loss)
    assert_grads(grads(ours_model, ours.loss), expected)
    with model.disable_adapter(), ours_model.disable_adapter():
        bare = model(**inputs).loss
        assert not torch.allclose(bare, own.loss)
        torch.testing.assert_close(ours_model(**inputs).loss, bare)
    ours_model.merge_adapter()
    torch.testing.assert_close(ours_model(**inputs).loss, own.loss)
    ours_model.unmerge_adapter()
    torch.testing.assert_close(ours_model(**inputs).loss, own.loss)


@pytest.mark.parametrize("kind", ["dora", "ia3", "loha"])
def test_other_adapters_on_the_head_are_refused_by_name(kind: str) -> None:
    peft = pytest.importorskip("peft")
    target = {"target_modules": ["lm_head"]}
    if kind == "dora":
        model = lora(llama(), use_dora=True, **target)
    elif kind == "ia3":
        model = peft.get_peft_model(llama(), peft.IA3Config(feedforward_modules=[], **target))
    else:
        model = peft.get_peft_model(llama(), peft.LoHaConfig(r=2, **target))
    with pytest.raises(UnsupportedModelError, match="adapter of kind"):
        patch(model)
    unpatched = patch(llama())
    unpatched.lm_head = model.get_base_model().lm_head
    with pytest.raises(UnsupportedModelError, match="adapter of kind"):
        unpatched(**batch())


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_quantised_and_unusual_heads_are_refused_by_name() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(V, H))

    class Normalised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, F.normalize(self.weight))

    model = llama()
    for head in (Other(), Normalised(H, V)):
        model.lm_head = head
        with pytest.raises(UnsupportedModelError, match=f"LlamaForCausalLM.*{type(head).__name__}"):
            patch(model)
    model.lm_head = nn.Linear(H, V)
    model.lm_head.weight = nn.Parameter(torch.zeros(V, H, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"torch\.int8"):
        patch(model)


def test_what_is_not_a_bare_causal_lm_is_refused() -> None:
    model = llama()
    with pytest.raises(TypeError, match="model: expected a Transformers causal LM, got str"):
        patch("gpt2")  # type: ignore[type-var]
    with pytest.raises(TypeError, match="got Linear"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="DataParallel"):
        patch(nn.DataParallel(model))
    with pytest.raises(TypeError, match="OptimizedModule"):
        patch(torch.compile(model))
    patch(model)
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    with pytest.raises(TypeError, match="one process per GPU"):
        model._replicate_for_data_parallel()


def test_a_model_that_trl_has_fused_is_refused() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL does not fuse heads")
    model = llama()
    utils.add_fused_lm_head(model)
    with pytest.raises(UnsupportedModelError, match="TRL"):
        patch(model)


def test_a_forward_wrapped_after_the_patch_is_not_lost_by_unpatch() -> None:
    model = patch(llama())
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="wrapped after the patch"):
        unpatch(model)
    model.forward = inner
    unpatch(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": "dtf"}, ValueError, "dft"),
        ({"loss": 3}, TypeError, "loss"),
        ({"backend": "cudnn"}, ValueError, "backend: expected one of .*got 'cudnn'"),
        ({"backward": "twice"}, ValueError, "backward: expected one of .*got 'twice'"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a positive number, got -1.0"),
    ],
)
def test_bad_arguments_of_patch_are_named(arguments: dict[str, Any], error: Any, message: str) -> None:
    model = llama()
    with pytest.raises(error, match=message):
        patch(model, **arguments)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": torch.zeros(B, T)}, TypeError, "labels: expected .*integer.*float32"),
        ({"labels": torch.zeros(B, T - 1, dtype=torch.long)}, ValueError, r"labels: expected shape \[3, 9\].*\[3, 8\]"),
        ({"labels": torch.full((B, T), V)}, (ValueError, IndexError), "target"),
        ({"labels": None, "skip_logits": True}, ValueError, "skip_logits=True: needs labels"),
        ({"labels": None, "loss": "dft"}, ValueError, "loss: needs labels"),
        ({"labels": None, "token_outputs": ("logprob",)}, ValueError, "token_outputs: needs labels"),
        ({"labels": None, "loss_inputs": {"ref_logprob": torch.zeros(B, T)}}, ValueError, "loss_inputs: needs labels"),
        ({"token_outputs": "logprob"}, ValueError, "token_outputs: expected a tuple"),
        ({"token_outputs": ("logits",)}, ValueError, "token_outputs.*logits"),
        ({"loss": "dfft"}, ValueError, "dft"),
        ({"loss": "dpo"}, ValueError, "ref_logprob"),
        ({"loss_inputs": [1]}, TypeError, "loss_inputs: expected a dict"),
        ({"loss_inputs": {"ref_logprob": torch.zeros(B, T)}}, (TypeError, ValueError), "ref_logprob"),
        (
            {"loss_inputs": {"ref_logprob": torch.zeros(B, T)}, "token_outputs": ("lse",)},
            (TypeError, ValueError),
            "ref_logprob",
        ),
        (
            {"loss": "f_divergence_sft", "loss_inputs": {"ref_logprob": torch.zeros(B, T - 1)}},
            ValueError,
            r"loss_inputs\['ref_logprob'\]: expected a tensor \[3, 9\]",
        ),
        ({"loss": "f_divergence_sft", "token_outputs": ("lse",)}, ValueError, "ref_logprob"),
        ({"num_items_in_batch": "7"}, TypeError, "num_items_in_batch: expected a number"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch: expected one number.*\[2\]"),
        ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch: expected a finite number, 0 or more, got -1"),
        ({"num_items_in_batch": torch.tensor(float("nan"))}, ValueError, "num_items_in_batch: .* got nan"),
        ({"num_items_in_batch": float("inf")}, ValueError, "num_items_in_batch: .* got inf"),
        ({"num_items_in_batch": 3, "loss_inputs": {"reduction": "sum"}}, ValueError, "num_items_in_batch: divides"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"temperature": "hot"}, ValueError, "temperature: expected a positive number, got 'hot'"),
        ({"labels": None, "temperature": 0.7}, ValueError, "temperature: needs labels"),
        ({"cu_seqlens": torch.tensor([[0, T]])}, ValueError, r"cu_seqlens: expected a tensor of S \+ 1 integers"),
        ({"cu_seqlens": torch.tensor([0, T])}, ValueError, "cu_seqlens: expected boundaries that rise from 0 to .* 27"),
    ],
)
def test_bad_arguments_of_a_call_are_named(changes: dict[str, Any], error: Any, message: str) -> None:
    model = patch(llama(), check=False)
    with pytest.raises(error, match=message):
        model(**{**batch(), **changes})
    assert "forward" not in model.lm_head.__dict__  # the head is as it was, whatever happened inside it


# ---------------------------------------------------------------------------------------------------------------------
# Hosts


def train(folder: Any, patched: bool, checkpointing: bool) -> tuple[list[tuple[float, float]], float, list[int]]:
    """Three steps of Trainer, ragged and padded; its losses and gradient norms, eval loss, shape of eval logits."""
    rows = []
    for i in range(11):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(3, V, (4 + i % 5,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (i % 3) + ids[i % 3 :]})

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)

        def padded(name: str, value: int) -> Tensor:
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch])

        ids = padded("input_ids", 0)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded("labels", -100)}

    seen: list[int] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.extend(prediction.predictions.shape)
        return {}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", gradient_checkpointing=checkpointing, use_cpu=True, learning_rate=1e-3,
        disable_tqdm=True, per_device_eval_batch_size=4, logging_steps=1,
    )  # fmt: skip
    model = patch(llama(), eval_logits=True) if patched else llama()  # compute_metrics reads them
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows,
        data_collator=collate, compute_metrics=metrics,
    )  # fmt: skip
    trainer.train()
    logs = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "grad_norm" in e]
    return logs, trainer.evaluate()["eval_loss"], seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_sees_the_same_losses_gradient_norms_and_logits(tmp_path: Any, checkpointing: bool) -> None:
    pytest.importorskip("accelerate")
    own_logs, own_eval, own_shape = train(tmp_path, False, checkpointing)
    our_logs, our_eval, our_shape = train(tmp_path, True, checkpointing)
    assert len(own_logs) == 3
    for own, ours in zip(own_logs, our_logs, strict=True):
        assert ours == pytest.approx(own, rel=2e-6)
    assert our_eval == pytest.approx(own_eval, rel=2e-6)
    assert our_shape == own_shape and our_shape[-1] == V


@pytest.mark.parametrize("stats", [(), ("logprob",)], ids=["loss", "stats"])
def test_torch_compile_has_no_graph_break_and_is_checked_while_it_traces(
    stats: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = batch()
    expected = llama()(**inputs).loss
    torch._dynamo.reset()
    model = patch(llama())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with caplog.at_level(logging.INFO, logger="logitless"):
        output = compiled(**inputs, token_outputs=stats)
    assert "agrees with its own logits" in caplog.text
    torch.testing.assert_close(output.loss, expected)
    own = llama()
    assert_grads(grads(model, output.loss), grads(own, own(**inputs).loss))


def test_a_model_that_disagrees_is_refused_while_it_is_compiled() -> None:
    torch._dynamo.reset()
    model = llama()
    model.loss_function = lambda **kwargs: kwargs["logits"].square().mean()
    with pytest.raises(Exception, match="differ by"):
        torch.compile(patch(model), backend="aot_eager", fullgraph=True)(**batch())


def sharded_worker(layout: str) -> dict[str, Tensor]:
    """The full gradients of a step of one of two data-parallel processes, on its own half of the batch."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    model: Any = patch(llama(tie_word_embeddings=layout == "tied"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if layout == "tail":
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    elif layout == "head":
        fully_shard(model.lm_head, mesh=mesh)
    if layout == "ddp":
        model = nn.parallel.DistributedDataParallel(patch(llama()))
    else:
        fully_shard(model, mesh=mesh)
    inputs = {name: value[dist.get_rank() :: 2] for name, value in sharded_batch().items()}
    for _ in range(2):  # the self-check runs within the first
        model.zero_grad()
        loss = model(**inputs, num_items_in_batch=torch.tensor(10.0)).loss
        loss.backward()
    found = {}
    for name, p in model.named_parameters():
        gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        found[name.removeprefix("module.")] = gradient
    return found


def sharded_batch() -> dict[str, Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(3, V, (4, 7))
    labels = ids.clone()
    labels[1::2] = -100  # everything that the second process has
    return {"input_ids": ids, "labels": labels}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["root", "tail", "head", "tied", "ddp"])
def test_sharded_gradients_equal_those_of_one_process(tmp_path: Any, layout: str) -> None:
    found = in_processes(2, tmp_path, sharded_worker, layout)[0]
    model = llama(tie_word_embeddings=layout == "tied")
    expected = grads(model, model(**sharded_batch(), num_items_in_batch=torch.tensor(20.0)).loss)
    assert_grads(found, expected)
