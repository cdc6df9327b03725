"""The arguments of a patched model's call: which are refused, with what advice, and which pass to the model."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")

from patch_models import B, H, T, V, batch, llama  # noqa: E402

from logitless import Head, linear_logprobs, losses  # noqa: E402
from logitless.arguments import LossArguments  # noqa: E402
from logitless.integrations.transformers import patch, unpatch  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402

HOST_ARGUMENTS = {
    "action_mask": torch.ones(B, T),
    "adapter_names": None,
    "alora_offsets": None,
    "cache_position": None,
    "cu_seq_lens_k": torch.tensor([0, T], dtype=torch.int32),
    "cu_seq_lens_q": torch.tensor([0, T], dtype=torch.int32),
    "is_causal": True,
    "label": torch.zeros(B),
    "label_ids": torch.zeros(B),
    "length": torch.full((B,), T),
    "logits_to_keep": 0,
    "max_length_k": T,
    "max_length_q": T,
    "num_items_in_batch": torch.tensor(20),
    "num_logits_to_keep": 0,
    "output_attentions": None,
    "output_hidden_states": True,
    "output_router_logits": False,
    "options": [["a"]] * B,
    "embeddings": torch.zeros(B),
    "past_key_values": None,
    "position_ids": None,
    "seq_idx": None,
    "seq_lengths": [T] * B,
    "text": ["a"] * B,
    "token_type_ids": torch.zeros(B, T, dtype=torch.long),
    "use_cache": False,
}


class Forgiving(transformers.LlamaForCausalLM):
    """A model of somebody's own code: its `**kwargs` have no type, and it reads some of them by name."""

    def forward(self, input_ids: Any = None, labels: Any = None, scale: float = 1.0, **kwargs: Any) -> Any:
        kwargs.pop("power", None)
        kwargs.get("gamma")
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Names that are refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("token_weight", r"; give it as loss_inputs=\{\"token_weight\": \.\.\.\}"),
        ("ref_logprob", r"loss_inputs=\{\"ref_logprob\""),
        ("advantages", r"loss_inputs=\{\"advantages\""),
        ("reduction", r"loss_inputs=\{\"reduction\""),
        ("max_length", r"loss_inputs=\{\"max_length\""),
        ("ref_head", r"loss_inputs=\{\"ref_head\""),
        ("ref_hidden", r"loss_inputs=\{\"ref_hidden\""),
        ("among", r"loss_inputs=\{\"among\""),
        ("label_smoothing", r"loss=NLL\(label_smoothing=\.\.\.\)"),
        ("z_loss", r"loss=NLL\(z_loss=\.\.\.\)"),
        ("gamma", r"loss=\w+\(gamma=\.\.\.\)"),
        ("beta", r"loss=DPO\(beta=\.\.\.\)"),
        ("normalizer", "num_items_in_batch"),
        ("outputs", "token_outputs"),
        ("targets", "labels"),
        ("weight", "token_weight"),
        ("softcap", "read from the model"),
        ("chunk_bytes", "linear_loss.*hidden_only"),
        ("backend", r"patch\(model, backend=\.\.\.\)"),
        ("eval_logits", r"patch\(model, eval_logits=\.\.\.\)"),
        ("los", r"did you mean 'loss'"),
        ("LOSS", r"did you mean 'loss'\?\)$"),
        ("skip_logit", r"did you mean 'skip_logits'"),
        ("token_output", r"did you mean 'token_outputs'"),
        ("loss_input", r"did you mean 'loss_inputs'"),
        ("hiddenonly", r"did you mean 'hidden_only'"),
        ("temprature", r"did you mean 'temperature'"),
        ("cu_seqlen", r"did you mean 'cu_seqlens'"),
        ("shift_label", r"did you mean 'shift_labels'"),
        ("lables", r"did you mean 'labels'"),
        ("num_item_in_batch", r"did you mean 'num_items_in_batch'"),
        ("token_weights", r"did you mean 'token_weight'.*loss_inputs=\{\"token_weight\""),
        ("ref_logprobs", r"did you mean 'ref_logprob'.*loss_inputs"),
        ("advantage", r"did you mean 'advantages'.*loss_inputs"),
        ("ref_logps", r"did you mean 'ref_logprob'\?\); ref_logprob: give it as loss_inputs=[^;]*$"),
        ("old_per_token_logps", r"did you mean 'old_logprob'"),
        ("only_hidden", r"did you mean 'hidden_only'"),
        ("skip_all_logits", r"did you mean 'skip_logits'"),
        ("return_logits", r"did you mean 'skip_logits'"),
        ("loss_kwargs", r"did you mean 'loss_inputs'"),
        ("loss_weights", r"; token_weight is of tokens"),
        ("temp", r"did you mean 'temperature'"),
        ("lse_square_scale", r"did you mean 'z_loss'.*loss=NLL\(z_loss"),
        ("accum_dtype", r"; sums of gradients are float32"),
        ("class_weight", "linear_cross_entropy.*hidden_only"),
        ("label_smoothing_factor", r"did you mean 'label_smoothing'.*loss=NLL\(label_smoothing"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_a_misplaced_or_misspelt_argument_of_ours_is_refused_with_its_place(
    name: str, message: str, labelled: bool
) -> None:
    model, inputs = patch(llama()), batch()
    given = inputs if labelled else {"input_ids": inputs["input_ids"]}
    for training in (True, False):
        with pytest.raises(TypeError, match=rf"^{name}: no argument of a patched LlamaForCausalLM's call.*{message}"):
            model.train(training)(**given, **{name: 1.0})


def test_a_misspelt_name_is_named_before_what_is_missing_without_it() -> None:
    ids = batch()["input_ids"]
    with pytest.raises(TypeError, match="lables: no argument"):
        patch(llama())(input_ids=ids, lables=ids, loss="dft")


@pytest.mark.parametrize(
    ("loss", "name", "message"),
    [
        ("nll", "token_weights", r"'nll' does not take it \(did you mean 'token_weight'"),
        ("nll", "ref_logprob", r"'nll' does not take it.*it takes reduction, max_length, ref_head, token_weight"),
        ("nll", "label_smoothing", r"; give it as loss=NLL\(label_smoothing=\.\.\.\)"),
        ("dpo", "ref_logprobs", r"'dpo' does not take it \(did you mean 'ref_logprob'.*it takes ref_logprob, "),
        ("dpo", "beta", r"; give it as loss=DPO\(beta=\.\.\.\)"),
        ("ppo", "temperature", r"; give it as temperature=\.\.\."),
        ("ppo", "normalizer", r"; give it as num_items_in_batch=\.\.\."),
        ("nll", "num_items_in_batch", r"; give it as num_items_in_batch=\.\.\."),
        ("nll", "loss", r"; give it as loss=\.\.\."),
        ("ppo", "backend", r"; give it as patch\(model, backend=\.\.\.\)"),
    ],
)
def test_a_key_of_loss_inputs_that_the_loss_does_not_take_is_refused(loss: str, name: str, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^loss_inputs\['{name}'\]: .*{message}"):
        patch(llama(), check=False)(**batch(), loss=loss, loss_inputs={name: torch.ones(B, T)})


def names_of_losses() -> list[str]:
    """Every input and every hyper-parameter of a loss, and every argument of `linear_loss`."""
    found = {*LossArguments.__annotations__}
    for loss in map(losses.get, losses.names()):
        found.update(loss.inputs, loss.sequence_inputs, loss.optional_inputs, inspect.signature(type(loss)).parameters)
    return sorted(found - {"cu_seqlens", "temperature", "ignore_index"})


def test_every_name_of_a_loss_is_refused_outside_its_place() -> None:
    model, inputs = patch(llama()), batch()
    assert len(names_of_losses()) > 100
    for name in names_of_losses():
        with pytest.raises(TypeError, match=f"^{name}: no argument of .* call; (give|it is read|the head)"):
            model(**inputs, **{name: torch.ones(B, T)})


def test_the_loss_in_use_is_the_one_that_the_advice_names() -> None:
    model = patch(llama(), loss=losses.SimPO())
    with pytest.raises(TypeError, match=r"beta: .*give it as loss=SimPO\(beta=\.\.\.\)"):
        model(**batch(), beta=0.1)


def test_a_model_reached_through_peft_or_in_the_middle_of_a_run_is_checked_too() -> None:
    peft = pytest.importorskip("peft")
    model = patch(peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])))
    for _ in range(2):
        model(**batch(), use_cache=False)
        with pytest.raises(TypeError, match="token_weight: no argument"):
            model(**batch(), token_weight=torch.ones(B, T))


# ---------------------------------------------------------------------------------------------------------------------
# Names that pass


@pytest.mark.filterwarnings("ignore::UserWarning")  # a training call without labels
@pytest.mark.parametrize("cls", [None, Forgiving], ids=["llama", "remote"])
@pytest.mark.parametrize("training", [True, False])
def test_what_hosts_pass_reaches_the_model(training: bool, cls: Any) -> None:
    plain, inputs = llama(cls).train(training), batch()
    own = plain(**inputs, **HOST_ARGUMENTS)
    ours = patch(llama(cls)).train(training)(**inputs, **HOST_ARGUMENTS)
    torch.testing.assert_close(ours.loss, own.loss)
    bare = patch(llama(cls)).train(training)(inputs["input_ids"], **HOST_ARGUMENTS)
    torch.testing.assert_close(bare.logits, own.logits)


class Narrow(transformers.LlamaForCausalLM):
    """A model of somebody's own code that takes three arguments and no others."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_model_that_takes_few_arguments_is_served() -> None:
    own = llama(Narrow)(**batch()).loss
    model = patch(llama(Narrow))
    torch.testing.assert_close(model(**batch()).loss, own)
    torch.testing.assert_close(model(**batch(), skip_logits=False).loss, own)
    with pytest.raises(TypeError, match="token_weight: no argument of a patched Narrow's call"):
        model(**batch(), token_weight=torch.ones(B, T))


def test_too_many_positional_arguments_are_counted() -> None:
    names = len(inspect.signature(transformers.LlamaForCausalLM.forward).parameters) - 1
    with pytest.raises(TypeError, match=f"LlamaForCausalLM: takes at most {names} positional arguments, got 30"):
        patch(llama())(*[None] * 30)


def test_what_the_models_own_code_reads_by_name_is_the_models() -> None:
    model = patch(llama(Forgiving), check=False)
    expected = model(**batch()).loss
    for name in ("scale", "power", "gamma"):
        assert torch.equal(model(**batch(), **{name: 2.0}).loss, expected)
    with pytest.raises(TypeError, match="beta: no argument of a patched Forgiving's call"):
        model(**batch(), beta=2.0)


def test_every_argument_of_every_causal_lm_of_transformers_passes() -> None:
    """An argument of one family may reach a model of another, from a host that serves both."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found: set[str] = set()
    for name in sorted(set(mapping.values())):
        cls = getattr(transformers, name, None)
        found.update(inspect.signature(cls.forward).parameters if cls is not None else ())
    found -= {"self", "labels", "shift_labels", "mc_labels"}  # a label of another name has to be looked at
    assert len(found) > 40
    model, inputs = patch(llama(Forgiving), check=False), batch()
    for name in found - {"input_ids", "inputs_embeds", "decoder_input_ids", "encoder_hidden_states"}:
        model.forward.admit((name,), True)
    assert model(**inputs).loss.isfinite()


def test_an_argument_of_a_loss_function_that_the_patch_does_not_run_is_refused() -> None:
    model = llama()
    own = model.loss_function

    def weighted(logits: Any, labels: Any, vocab_size: int, penalty: float = 0.0, extra: float = 0.0, **kw: Any) -> Any:
        return own(logits=logits, labels=labels, vocab_size=vocab_size, **kw) + penalty + extra

    model.loss_function = weighted
    patch(model)
    assert model(**batch()).loss.isfinite()
    kept = model(**batch(), skip_logits=False).loss
    for name in ("penalty", "extra"):  # the first is a hyper-parameter of ours too
        with pytest.raises(TypeError, match=f"{name}: an argument of the loss function of LlamaForCausalLM"):
            model(**batch(), **{name: 1.0})
        torch.testing.assert_close(model(**batch(), skip_logits=False, **{name: 1.0}).loss, kept + 1)


def test_generation_passes_what_it_passes() -> None:
    model, ids = patch(llama()).eval(), batch()["input_ids"]
    expected = unpatch(patch(llama())).eval().generate(ids, max_new_tokens=4, do_sample=True, temperature=0.7, top_k=1)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=True, temperature=0.7, top_k=1), expected)


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_a_compiler_checks_the_names_while_it_traces(labelled: bool) -> None:
    torch._dynamo.reset()
    inputs = batch() if labelled else {"input_ids": batch()["input_ids"]}
    compiled = torch.compile(patch(llama()).eval(), backend="aot_eager", fullgraph=True)
    own = llama().eval()(**inputs, use_cache=False)
    found = compiled(**inputs, use_cache=False)
    torch.testing.assert_close(found.loss if labelled else found.logits, own.loss if labelled else own.logits)
    with pytest.raises(Exception, match=r"token_weight: no argument.*; give it as loss_inputs"):
        compiled(**inputs, use_cache=False, token_weight=torch.ones(B, T))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_a_patched_model_is_exported(labelled: bool, strict: bool) -> None:
    model, inputs = patch(llama(), check=False).eval(), batch()
    ids = inputs.pop("input_ids")
    given = {**(inputs if labelled else {}), "use_cache": False}
    program = torch.export.export(model, (ids,), given, strict=strict)
    found, expected = program.module()(ids, **given), model(ids, **given)
    assert found.keys() == expected.keys() == {"loss" if labelled else "logits"}
    torch.testing.assert_close(found, expected)


def test_a_compiler_takes_a_losss_inputs_and_checks_their_names() -> None:
    torch._dynamo.reset()
    model = patch(llama(), loss="ppo")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    given = {"old_logprob": torch.zeros(B, T), "advantages": torch.randn(B, T), "token_weight": torch.rand(B, T)}
    call = {**batch(), "use_cache": False, "temperature": 0.7, "loss_inputs": given}
    torch.testing.assert_close(compiled(**call).loss, model(**call).loss)
    with pytest.raises(
        Exception, match=r"loss_inputs\['advantage'\]: 'ppo' does not take it \(did you mean 'advantages'"
    ):
        compiled(**{**call, "loss_inputs": {"advantage": given["advantages"]}})


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


@pytest.mark.parametrize("per_call", [False, True])
@pytest.mark.parametrize("asked", [(), ("logprob", "entropy")], ids=["loss", "stats"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_loss_and_statistics_are_those_of_logits_over_the_temperature(
    per_call: bool, asked: tuple[str, ...], softcap: float | None
) -> None:
    if softcap is None:
        model = llama()
    else:
        torch.manual_seed(0)
        config = transformers.Gemma2Config(
            vocab_size=V, hidden_size=H, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=softcap, tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.Gemma2ForCausalLM(config).train()
    inputs, count = batch(), B * (T - 1)
    logits = model(inputs["input_ids"]).logits / 0.7
    targets = shifted(inputs["labels"])
    logprob = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    expected = gradients(model, -logprob.sum() / count)
    patch(model, temperature=1.0 if per_call else 0.7)
    call = {"temperature": 0.7} if per_call else {}
    for training in (True, False):
        output = model.train(training)(**inputs, **call, token_outputs=asked)
        torch.testing.assert_close(output.loss, -logprob.sum() / count)
    if asked:
        torch.testing.assert_close(output.token_stats.logprob, logprob)
        entropy = torch.distributions.Categorical(logits=logits).entropy() * (targets >= 0)
        torch.testing.assert_close(output.token_stats.entropy, entropy)
    found = gradients(model, output.loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", [numpy.float32, numpy.float64, numpy.int64, int])
def test_the_temperature_may_be_any_number_of_two(kind: Any) -> None:
    expected = patch(llama(), temperature=2.0)(**batch()).loss
    assert torch.equal(patch(llama(), temperature=kind(2))(**batch()).loss, expected)
    assert torch.equal(patch(llama())(**batch(), temperature=kind(2)).loss, expected)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got a tensor"):
        patch(llama())(**batch(), temperature=torch.tensor(2.0))


def test_a_policy_losss_ratio_is_one_at_the_samplers_temperature() -> None:
    model, inputs = llama(), batch()
    targets = shifted(inputs["labels"])
    sampled = model(inputs["input_ids"]).logits.detach().div(0.7).log_softmax(-1)
    old = sampled.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    given = {"old_logprob": old, "advantages": torch.ones(B, T)}
    output = patch(model, loss="ppo", temperature=0.7)(**inputs, loss_inputs=given)
    torch.testing.assert_close(output.loss, torch.tensor(-1.0))
    assert not torch.allclose(model(**inputs, loss_inputs=given, temperature=1.0).loss, torch.tensor(-1.0))


def test_a_reference_given_as_hidden_states_has_the_calls_temperature() -> None:
    model, inputs = patch(llama()), batch()
    hidden = model(**inputs, hidden_only=True).logits.detach().flip(0)
    loss, weight, targets = losses.FDivergenceSFT(beta=0.3), model.lm_head.weight.detach(), shifted(inputs["labels"])
    scored = {t: linear_logprobs(hidden, weight, targets, temperature=t).logprob for t in (0.7, 1.0)}

    def value(**given: Any) -> Tensor:
        found: Tensor = model(**inputs, loss=loss, loss_inputs=given, temperature=0.7).loss
        return found

    torch.testing.assert_close(value(ref_hidden=hidden), value(ref_logprob=scored[0.7]))
    torch.testing.assert_close(value(ref_hidden=hidden, ref_head=weight), value(ref_logprob=scored[0.7]))
    torch.testing.assert_close(value(ref_hidden=hidden, ref_head=Head(weight)), value(ref_logprob=scored[1.0]))


def test_logits_and_the_models_own_terms_keep_temperature_one() -> None:
    model, inputs = llama().eval(), batch()
    own = model(**inputs)
    hot = patch(model, temperature=2.0, eval_logits=True)(**inputs)
    torch.testing.assert_close(hot.logits, own.logits)
    assert not torch.allclose(hot.loss, own.loss)
    torch.testing.assert_close(model(**inputs, temperature=1.0).loss, own.loss)


# ---------------------------------------------------------------------------------------------------------------------
# The number of items


@pytest.mark.parametrize(
    "zero", [0, 0.0, torch.tensor(0), torch.zeros(1), numpy.int64(0), numpy.float32(0), numpy.array(0)], ids=repr
)
@pytest.mark.parametrize("asked", [(), ("lse",)], ids=["loss", "stats"])
def test_no_items_give_zero_connected_to_the_graph(zero: Any, asked: tuple[str, ...]) -> None:
    model, ids = patch(llama()), batch()["input_ids"]
    labels = torch.full_like(ids, -100)
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=zero, token_outputs=asked).loss
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())
    beside = model(input_ids=ids, labels=labels, num_items_in_batch=zero, skip_logits=False)
    assert beside.loss.item() == 0 and beside.logits.shape == (B, T, V)


@pytest.mark.parametrize("items", [7, 7.0, torch.tensor([7]), numpy.int64(7), numpy.array([7])], ids=repr)
def test_the_number_of_items_may_be_any_number_of_seven(items: Any) -> None:
    model = patch(llama())
    mean = model(**batch()).loss
    torch.testing.assert_close(model(**batch(), num_items_in_batch=items).loss, mean * (B * (T - 1)) / 7)


def test_a_compiler_takes_one_number_of_items_after_another() -> None:
    torch._dynamo.reset()
    model = patch(llama())
    compiled, mean = torch.compile(model, backend="aot_eager", fullgraph=True), model(**batch()).loss
    for items in (5, 7, 11, torch.tensor(13)):
        found = compiled(**batch(), use_cache=False, num_items_in_batch=items).loss
        torch.testing.assert_close(found, mean * (B * (T - 1)) / items)
    labels = torch.full((B, T), -100)
    assert compiled(batch()["input_ids"], labels=labels, use_cache=False, num_items_in_batch=0).loss.item() == 0


@pytest.mark.parametrize("items", [-1, -0.5, math.nan, -math.inf, math.inf], ids=str)
@pytest.mark.parametrize("kind", [float, torch.tensor, numpy.float64], ids=["float", "tensor", "numpy"])
def test_a_number_of_items_that_is_none_is_refused_by_name(items: float, kind: Any) -> None:
    model = patch(llama())
    with pytest.raises(ValueError, match="num_items_in_batch: expected a finite number, 0 or more, got"):
        model(**batch(), num_items_in_batch=kind(items))
    for other in (True, "7", [7]):
        with pytest.raises(TypeError, match="num_items_in_batch: expected a number or a tensor of one"):
            model(**batch(), num_items_in_batch=other)


# ---------------------------------------------------------------------------------------------------------------------
# Hosts: Trainer's evaluation, and labels that are taken out


LARGE = 16384


def trainer(folder: Any, model: Any, **changes: Any) -> Any:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, LARGE, (32, 64)).tolist()]
    settings = changes.pop("arguments", {})
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=32, per_device_eval_batch_size=32,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, **changes)


@pytest.mark.parametrize("loss_only", [False, True])
def test_trainers_evaluation_allocates_no_logits(tmp_path: Any, loss_only: bool) -> None:
    host = trainer(tmp_path, patch(llama(vocab_size=LARGE)), arguments={"prediction_loss_only": loss_only})
    with watch_allocations() as seen:
        found = host.evaluate()["eval_loss"]
    assert 0 < seen.largest <= 32 * 64 * LARGE * 4 / 3
    torch.manual_seed(0)
    own = trainer(tmp_path, llama(vocab_size=LARGE))
    own.eval_dataset = host.eval_dataset
    assert found == pytest.approx(own.evaluate()["eval_loss"], rel=2e-6)


def test_compute_metrics_gets_logits_with_eval_logits(tmp_path: Any) -> None:
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    host = trainer(tmp_path, patch(llama(vocab_size=LARGE), eval_logits=True), compute_metrics=metrics)
    host.evaluate()
    assert seen == [(32, 64, LARGE)]
    assert host.predict(host.eval_dataset).predictions.shape == (32, 64, LARGE)
    unpatch(host.model)
    patch(host.model)
    assert trainer(tmp_path, host.model).predict(host.eval_dataset).predictions == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments": {"label_smoothing_factor": 0.1}},
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()},
    ],
    ids=["label_smoothing_factor", "compute_loss_func"],
)
def test_a_host_that_takes_the_labels_out_of_a_training_call_is_named_once(tmp_path: Any, changes: Any) -> None:
    host = trainer(tmp_path, patch(llama(vocab_size=LARGE)), **changes)
    host.args.max_steps = 2
    with pytest.warns(UserWarning, match="no labels, so that it computed full logits") as seen:
        host.train()
    assert len([w for w in seen if "full logits" in str(w.message)]) == 1


def test_the_warning_is_for_training_calls_alone() -> None:
    model, ids = patch(llama()), batch()["input_ids"]
    model.gradient_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**batch()).loss.backward()  # with the self-check, and the layers run again in the backward pass
        model(input_ids=ids, hidden_only=True)
        model(**batch(), skip_logits=False)
        model(ids, skip_logits=False)
        with torch.no_grad():
            model(ids)
        model.generate(ids, max_new_tokens=2)
        model.eval()(ids)
        model(**batch())
    with pytest.warns(UserWarning, match=r'labels.*loss="dft".*hidden_only=True'):
        model.train()(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(ids)
    with pytest.warns(UserWarning, match="full logits"):
        patch(llama())(ids)  # once for every model


def test_a_compiled_training_call_without_labels_warns_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(patch(llama()), backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="full logits"):
        compiled(input_ids=batch()["input_ids"], use_cache=False)
