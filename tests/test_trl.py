"""TRL's own trainers with logitless under them: losses, weights, metrics and memory; the switch and its guard."""

from __future__ import annotations

import copy
import gc
import importlib
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

import patch_models  # noqa: E402
from training_fixtures import make_tokenizer  # noqa: E402
from trl_runs import assert_same_run, lengths, settings, slowly  # noqa: E402

import logitless  # noqa: E402
from logitless.integrations import trl as ours  # noqa: E402
from logitless.integrations.families import UnsupportedModelError  # noqa: E402
from logitless.integrations.hosts import UnsupportedHostError  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402

utils = importlib.import_module("trl.trainer.utils")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

kernels = importlib.import_module("trl.kernels.chunked_logprob")
compared = pytest.mark.skipif(
    not hasattr(kernels, "_use_triton") and not torch.cuda.is_available(),
    reason="this release of TRL computes its own losses on a GPU alone",
)
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TRAINERS = ("sft", "dpo", "kto", "grpo", "rloo")


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    yield
    ours.disable()


def tiny(**changes: Any) -> Any:
    """A Llama of the tokenizer's vocabulary, if it is given no other."""
    return patch_models.llama(**{"vocab_size": 258, "max_position_embeddings": 256, **changes})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Loads the tiny model as it was saved: TRL makes a reference model from the folder."""
    folder = tmp_path_factory.mktemp("trl")

    def load(**changes: Any) -> Any:
        path = folder / "-".join(["model", *changes])
        if not path.exists():
            tiny(**changes).save_pretrained(path)
        return transformers.AutoModelForCausalLM.from_pretrained(path)

    return load


# ---------------------------------------------------------------------------------------------------------------------
# The trainers

WORDS = ("red", "a longer answer", "x", "blue or green", "four", "no", "maybe so", "7", "the end", "yes", "ok", "one")


def completions() -> Any:
    return datasets.Dataset.from_list([{"prompt": f"q{i} ", "completion": text} for i, text in enumerate(WORDS)])


def pairs() -> Any:
    rows = [{"prompt": f"q{i} ", "chosen": text, "rejected": WORDS[i - 5]} for i, text in enumerate(WORDS)]
    return datasets.Dataset.from_list(rows)


def marked() -> Any:
    rows = [{"prompt": f"q{i} ", "completion": text, "label": i % 3 != 1} for i, text in enumerate(WORDS)]
    return datasets.Dataset.from_list(rows)


def prompts() -> Any:
    return datasets.Dataset.from_list([{"prompt": f"q{i} "} for i in range(12)])


def config(cls: Any, path: Path, **more: Any) -> Any:
    return cls(**settings(path, **more))


SAMPLED = {"max_completion_length": 6, "temperature": 0.8}
GROUPS = {**SAMPLED, "num_generations": 2, "beta": 0.1}
#: Trainer, configuration, rows, options and arguments of a run.
CASES: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "sft": ("SFT", completions, {}),
    "sft-dft": ("SFT", completions, {"loss_type": "dft"}),
    "sft-packed": ("SFT", completions, {"packing": True, "max_length": 24}),
    "sft-padding-free": ("SFT", completions, {"padding_free": True, "max_length": None}),
    "sft-evaluated": ("SFT", completions, {"eval_strategy": "steps", "eval_steps": 2}),
    "dpo": ("DPO", pairs, {}),
    "dpo-ipo": ("DPO", pairs, {"loss_type": ["ipo"]}),
    "dpo-weighted": ("DPO", pairs, {"use_weighting": True}),
    "dpo-precomputed": ("DPO", pairs, {"precompute_ref_log_probs": True}),
    "kto": ("KTO", marked, {}),
    "grpo": ("GRPO", prompts, GROUPS),
    "grpo-entropy": ("GRPO", prompts, {**GROUPS, "entropy_coef": 0.1, "top_entropy_quantile": 0.5}),
    "grpo-cast": ("GRPO", prompts, {**GROUPS, "cast_lm_head_to_fp32": True}),
    "rloo": ("RLOO", prompts, GROUPS),
    "distillation": ("Distillation", prompts, {**SAMPLED, "beta": 0.5}),
    "distillation-forward": ("Distillation", prompts, {**SAMPLED, "beta": 0.0}),
    "distillation-reverse": ("Distillation", prompts, {**SAMPLED, "beta": 1.0}),
}


def trainer_of(case: str, path: Path, model: Any, **more: Any) -> Any:
    """The trainer of a case; `more` holds further arguments of the trainer."""
    name, rows, options = CASES[case]
    args = config(getattr(trl, f"{name}Config"), path, **options)
    arguments: dict[str, Any] = {"train_dataset": rows(), "processing_class": make_tokenizer(), **more}
    if name in ("GRPO", "RLOO"):
        arguments["reward_funcs"] = lengths
    if name == "Distillation":
        arguments["teacher_model"] = tiny(hidden_size=48)
    if "evaluated" in case:
        arguments["eval_dataset"] = rows()
    torch.manual_seed(0)
    return getattr(trl, f"{name}Trainer")(model=model, args=args, **arguments)


def trained(trainer: Any) -> Any:
    torch.manual_seed(0)
    trainer.train()
    return trainer


@compared
@pytest.mark.parametrize("case", slowly(CASES, "sft", "dpo", "kto", "grpo-entropy", "rloo", "distillation"))
def test_a_trainer_is_itself(case: str, tmp_path: Path, saved: Any) -> None:
    """Weights after several steps and every logged number are TRL's, in float32, accumulated over ragged batches."""
    expected = trained(trainer_of(case, tmp_path, saved()))
    with ours.enable():
        found = trained(trainer_of(case, tmp_path, saved()))
    assert_same_run(expected, found)


@compared
@pytest.mark.parametrize("case", slowly(("sft", "dpo", "grpo", "distillation"), "sft", "dpo"))
def test_lora_and_tied_heads(case: str, tmp_path: Path, saved: Any) -> None:
    """An adapter that leaves a tied head frozen, as TRL trains it."""
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def run() -> Any:
        torch.manual_seed(1)
        model = saved(tie_word_embeddings=True)
        return trained(trainer_of(case, tmp_path, model, peft_config=copy.deepcopy(lora)))

    expected = run()
    with ours.enable():
        assert_same_run(expected, run())


# ---------------------------------------------------------------------------------------------------------------------
# The head alone

LABELS = patch_models.batch()["labels"].clone()
LABELS[0, :4] = LABELS[1] = -100


def outputs_of(add: Any, model: Any, call: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, list[Any]]:
    """The output of a model with the head that `add` puts on it, and the gradients of a function of it."""
    add(model, outputs=FIELDS, **settings)
    given = {"input_ids": patch_models.batch()["input_ids"], "labels": LABELS, **(call or {})}
    output = model(**given, fused_lm_head=True)
    # The mean: of the sum, whose gradients reach 470, TRL's own in float32 are 2e-3 from float64's.
    (output.loss + (output.log_probs * output.entropy).mean()).backward()
    return output, [p.grad for p in model.parameters()]


def assert_same_output(expected: tuple[Any, list[Any]], found: tuple[Any, list[Any]]) -> None:
    assert type(found[0]) is utils.FusedCausalLMOutput and expected[0].keys() == found[0].keys()
    for name, value in expected[0].items():
        assert found[0][name].requires_grad == value.requires_grad, name
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-5)
    for x, y in zip(expected[1], found[1], strict=True):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


CALLS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "items": {"call": {"num_items_in_batch": torch.tensor(5)}},
    "shift_labels": {"call": {"labels": None, "shift_labels": LABELS}},
    "cast": {"cast_lm_head_to_fp32": True},
}


@compared
@pytest.mark.parametrize("name", CALLS)
def test_the_head_answers_as_trl_s(name: str) -> None:
    expected, found = (
        outputs_of(add, patch_models.llama(), **CALLS[name])
        for add in (utils.add_fused_lm_head, ours.add_fused_lm_head)
    )
    assert_same_output(expected, found)


def test_positional_arguments_reach_the_base_model() -> None:
    model, (ids, labels) = patch_models.llama(), patch_models.batch().values()
    ours.add_fused_lm_head(model)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    by_name = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(model(ids, mask, labels=labels, fused_lm_head=True).loss, by_name.loss)


@compared
def test_router_losses_are_trl_s() -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    base = {k: v for k, v in patch_models.config().to_dict().items() if k in SIZES}
    found = []
    for add in (utils.add_fused_lm_head, ours.add_fused_lm_head):
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**base, **changes))
        found.append(outputs_of(add, model))
    assert found[0][0].aux_loss > 0
    assert_same_output(*found)


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "pad_token_id"),
)


@compared
def test_a_softcap_is_applied() -> None:
    base = {k: v for k, v in patch_models.config().to_dict().items() if k in SIZES}
    found = []
    for add in (utils.add_fused_lm_head, ours.add_fused_lm_head):
        torch.manual_seed(0)
        made = transformers.Gemma2Config(**base, head_dim=8, final_logit_softcapping=2.0, attn_implementation="eager")
        found.append(outputs_of(add, transformers.Gemma2ForCausalLM(made)))
    assert_same_output(*found)


def test_the_cast_is_float32_outside_autocast() -> None:
    exact, rounded = (patch_models.llama() for _ in range(2))
    ours.add_fused_lm_head(exact, cast_lm_head_to_fp32=True)
    ours.add_fused_lm_head(rounded)
    given = {**patch_models.batch(), "fused_lm_head": True}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = exact.model(given["input_ids"]).last_hidden_state.float()
        found = [model(**given).log_probs for model in (exact, rounded)]
    logprobs = (hidden @ exact.lm_head.weight.T)[:, :-1].log_softmax(-1)
    errors = [float((x - logprobs.gather(-1, given["labels"][:, 1:, None])[..., 0]).abs().max()) for x in found]
    assert errors[0] < 1e-4 < 1e-3 < errors[1]


def test_a_batch_without_a_label_has_a_loss_of_0_and_gradients() -> None:
    model = patch_models.llama()
    ours.add_fused_lm_head(model, outputs=FIELDS)
    output = model(patch_models.batch()["input_ids"], labels=torch.full_like(LABELS, -100), fused_lm_head=True)
    output.loss.backward()
    assert float(output.loss) == 0 and not output.label_mask.any() and not output.is_top1.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_other_calls_and_generation_are_the_model_s_own() -> None:
    model, plain, batch = patch_models.llama().eval(), patch_models.llama().eval(), patch_models.batch()
    ours.add_fused_lm_head(model)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(model(**batch).loss, plain(**batch).loss)
    ids = batch["input_ids"][:, :3]
    assert torch.equal(model.generate(ids, max_new_tokens=4), plain.generate(ids, max_new_tokens=4))


def test_a_copy_of_a_model_has_a_head_of_its_own() -> None:
    model = patch_models.llama()
    ours.add_fused_lm_head(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    given = {**patch_models.batch(), "fused_lm_head": True}
    assert float(twin(**given).loss) == pytest.approx(float(torch.tensor(patch_models.V).log()))
    assert float(model(**given).loss) != pytest.approx(float(twin(**given).loss))


@pytest.mark.parametrize("trainer", ["sft", "dpo", "kto"])
def test_a_frozen_head_costs_two_products_where_the_entropy_is_a_metric(trainer: str) -> None:
    """The trainers that only log the entropy never ask for its gradient, which would take the logits again."""
    from logitless.ops.registered import logprobs

    model = patch_models.llama(tie_word_embeddings=False)
    model.lm_head.weight.requires_grad_(False)
    with ours.enable():
        importlib.import_module(f"trl.trainer.{trainer}_trainer").add_fused_lm_head(
            model, outputs=("log_probs", "entropy")
        )
    out = model(**patch_models.batch(), fused_lm_head=True)
    with mock.patch.object(logprobs, "logprobs_backward", side_effect=AssertionError("the logits, again")):
        out.loss.backward()
    assert not out.entropy.requires_grad


def test_a_release_that_is_not_known_is_an_error_of_a_host_like_any_other() -> None:
    assert issubclass(ours.UnsupportedTRLError, UnsupportedHostError)


def test_what_is_not_served_is_refused_by_name() -> None:
    given = {**patch_models.batch(), "fused_lm_head": True}
    with pytest.raises(ValueError, match="TRL's trainer computes a loss of its own, and would ignore"):
        ours.add_fused_lm_head(logitless.patch(patch_models.llama(), loss="dft"))
    with pytest.raises(ValueError, match="outputs: expected names of"):
        ours.add_fused_lm_head(patch_models.llama(), outputs=("logits",))
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        ours.add_fused_lm_head(patch_models.llama(), temperature=0)
    model = patch_models.llama()
    ours.add_fused_lm_head(model)
    with pytest.raises(ValueError, match="fused_lm_head=True: needs labels or shift_labels"):
        model(given["input_ids"], fused_lm_head=True)
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel"):
        ours.add_fused_lm_head(transformers.BertLMHeadModel(transformers.BertConfig(**BERT, is_decoder=True)))


BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_model_that_does_something_unknown_to_its_logits_is_refused_at_its_first_loss() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = patch_models.llama(Doubled)
    ours.add_fused_lm_head(model)
    with pytest.raises(UnsupportedModelError, match=r"log-probabilities and the model's own differ by"):
        model(**patch_models.batch(), fused_lm_head=True)


# ---------------------------------------------------------------------------------------------------------------------
# An adapter on the head, which TRL refuses


def head_lora(**more: Any) -> Any:
    targets = ["q_proj", "lm_head"]
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False, **more)


@pytest.mark.parametrize("case", slowly(("sft", "dpo", "kto", "grpo", "rloo"), "sft"))
def test_lora_on_the_head_is_trained(case: str, tmp_path: Path, saved: Any) -> None:
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        trainer_of(case, tmp_path, saved(), peft_config=head_lora())
    with ours.enable():
        trainer = trainer_of(case, tmp_path, saved(), peft_config=head_lora())
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lm_head.lora" in n}
        trained(trainer)
    after = dict(trainer.model.named_parameters())
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())


def test_lora_on_the_head_has_the_gradient_of_peft_s_logits() -> None:
    torch.manual_seed(1)
    model = peft.get_peft_model(patch_models.llama(), head_lora())
    plain = copy.deepcopy(model)
    ours.add_fused_lm_head(model.get_base_model())
    given = {**patch_models.batch(), "labels": LABELS}
    losses = model(**given, fused_lm_head=True).loss, plain(**given).loss
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, x), (_, y) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if x.requires_grad:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_that_are_not_served_on_the_head_are_refused_as_before(tmp_path: Path, saved: Any) -> None:
    with ours.enable():
        with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
            trainer_of("sft", tmp_path, saved(), peft_config=head_lora(use_dora=True))
        with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
            trainer_of("distillation", tmp_path, saved(), peft_config=head_lora())
        with pytest.raises(UnsupportedModelError, match="cast_lm_head_to_fp32=True and an adapter"):
            trainer_of("grpo-cast", tmp_path, saved(), peft_config=head_lora())


# ---------------------------------------------------------------------------------------------------------------------
# Memory


WIDE, ROWS, LENGTH = 32768, 4, 128
LOGITS = ROWS * LENGTH * WIDE * 4  # bytes; DPO has twice as many rows
LONG = ["".join(chr(97 + (i + j) % 26) for j in range(LENGTH - 4)) for i in range(ROWS)]
LONG_ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": "q ", "completion": text} for text in LONG],
    "dpo": [{"prompt": "q ", "chosen": text, "rejected": text[::-1]} for text in LONG],
    "kto": [{"prompt": "q ", "completion": text, "label": i % 2 == 0} for i, text in enumerate(LONG)],
    "grpo": [{"prompt": "q "}] * ROWS,
    "rloo": [{"prompt": "q "}] * ROWS,
    "distillation": [{"prompt": "q "}] * ROWS,
}


def watched_step(case: str, path: Path, model: Any) -> tuple[int, int]:
    """The largest allocation and the peak of one step of training on four rows of 128 tokens, in bytes."""
    name, _, options = CASES[case]
    sizes = {"max_steps": 1, "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
    if "max_completion_length" in options:
        options = {**options, "max_completion_length": LENGTH - 2, "generation_kwargs": {"min_new_tokens": LENGTH - 2}}
    args = config(getattr(trl, f"{name}Config"), path, **{**options, **sizes})
    rows = datasets.Dataset.from_list(LONG_ROWS[case])
    more: dict[str, Any] = {"reward_funcs": lengths} if name in ("GRPO", "RLOO") else {}
    more |= {"teacher_model": tiny(vocab_size=WIDE, hidden_size=48)} if name == "Distillation" else {}
    more |= {"train_dataset": rows, "processing_class": make_tokenizer()}
    trainer = getattr(trl, f"{name}Trainer")(model=model, args=args, **more)
    gc.collect()  # an earlier trainer that is freed inside the watch would count against this one
    with watch_allocations() as seen:
        trained(trainer)
    return seen.largest, seen.peak


@compared
@pytest.mark.parametrize("case", slowly(LONG_ROWS, "sft"))
def test_no_logits_are_allocated(case: str, tmp_path: Path, saved: Any) -> None:
    """A chunk of 32 MiB stands where the logits are 64, and TRL's step holds several times more at its peak."""
    theirs = watched_step(case, tmp_path, saved(vocab_size=WIDE))
    with ours.enable():
        found = watched_step(case, tmp_path, saved(vocab_size=WIDE))
    print(f"{case}: largest {theirs[0] >> 20} -> {found[0] >> 20}, peak {theirs[1] >> 20} -> {found[1] >> 20} MiB")
    assert found[0] <= LOGITS / 2 and found[1] < theirs[1] / 2


# ---------------------------------------------------------------------------------------------------------------------
# The switch


def in_trl() -> dict[tuple[str, str], Any]:
    """Every object in TRL that the switch may replace, by the module and name that lead to it."""
    modules = [importlib.import_module(f"trl.trainer.{name}_trainer") for name in (*TRAINERS, "distillation")]
    modules.append(utils)
    names = ("add_fused_lm_head", "_chunked_divergence_loss", "BaseTunerLayer")
    return {(m.__name__, n): vars(m)[n] for m in modules for n in names if n in vars(m)}


def test_every_trainer_is_switched_and_switched_back() -> None:
    before = in_trl()
    ours.enable()
    ours.enable()
    during = in_trl()
    for place, value in before.items():
        kept = place == ("trl.trainer.distillation_trainer", "BaseTunerLayer")
        assert (during[place] is value) == kept, place
    assert trl.trainer.add_fused_lm_head is ours.add_fused_lm_head
    ours.disable()
    ours.disable()
    after = in_trl()
    assert all(after[place] is value for place, value in before.items())
    assert trl.trainer.add_fused_lm_head is before["trl.trainer.utils", "add_fused_lm_head"]


def test_every_trainer_is_switched_where_none_was_loaded_before() -> None:
    code = f"""
import sys
from importlib import import_module
from logitless.integrations import trl as ours
modules = ["trl.trainer.%s_trainer" % name for name in {TRAINERS}]
assert not set(modules) & set(sys.modules)
ours.enable()
theirs = [m for m in modules if import_module(m).add_fused_lm_head.__module__.startswith("trl.")]
assert not theirs, theirs
ours.disable()
own = {{import_module(m).add_fused_lm_head for m in modules}}
assert own == {{import_module("trl.trainer.utils").add_fused_lm_head}}, own
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_threads_may_enable_at_once() -> None:
    before, errors, interval = in_trl(), [], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places often, so that calls without a lock meet
    for _ in range(20):
        start = threading.Barrier(8)

        def enable(start: threading.Barrier = start) -> None:
            start.wait()
            try:
                ours.enable()
            except ours.UnsupportedTRLError as error:
                errors.append(error)

        threads = [threading.Thread(target=enable) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ours.disable()
    sys.setswitchinterval(interval)
    assert not errors
    assert in_trl() == before


def test_a_module_that_is_loaded_later_is_switched_too() -> None:
    loaded = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    theirs = utils.add_fused_lm_head
    with ours.enable():
        module = importlib.reload(loaded)
        assert module.add_fused_lm_head is ours.add_fused_lm_head
    assert module.add_fused_lm_head is theirs


def test_the_context_ends_after_an_exception_and_inside_another() -> None:
    theirs = utils.add_fused_lm_head
    with pytest.raises(ZeroDivisionError), ours.enable():
        raise ZeroDivisionError
    assert utils.add_fused_lm_head is theirs
    ours.enable()
    with ours.enable():
        pass
    assert utils.add_fused_lm_head is ours.add_fused_lm_head


@compared
def test_a_trainer_keeps_the_head_that_it_was_made_with(
    tmp_path: Path, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    product = logitless.integrations.scoring.linear_logprobs
    monkeypatch.setattr(
        "logitless.integrations.scoring.linear_logprobs", lambda *a, **k: calls.append("") or product(*a, **k)
    )
    earlier = trainer_of("sft", tmp_path, saved())
    with ours.enable():
        later = trainer_of("sft", tmp_path, saved())
        trained(earlier)
        assert not calls
    trained(later)
    assert calls


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "1.17.0.dev0", "2.0", "0.9", "unknown"])
def test_an_unknown_release_is_named_and_nothing_is_changed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = in_trl()
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(
        ours.UnsupportedTRLError, match=rf"TRL {version} is installed, and logitless knows >=1.15,<1.17"
    ):
        ours.enable()
    assert in_trl() == before


@pytest.mark.parametrize("version", ["1.15.0", "1.15.3", "1.16.0", "1.16.1"])
def test_a_known_release_is_served(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    ours.check_release()


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        ("trl.trainer.utils", "add_fused_lm_head", lambda model, temperature: None, "has .'model', 'temperature'."),
        ("trl.trainer.utils", "FusedCausalLMOutput", None, "FusedCausalLMOutput has None"),
        ("trl.trainer.distillation_trainer", "_chunked_divergence_loss", None, "_chunked_divergence_loss has None"),
    ],
)
def test_an_internal_that_has_changed_is_named(
    module: str, name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module(module), name, value)
    before = in_trl()
    with pytest.raises(ours.UnsupportedTRLError, match=message):
        ours.enable()
    assert in_trl() == before


@pytest.mark.parametrize("module", ("trl.trainer.utils", "trl.trainer.sft_trainer", "trl.trainer.grpo_trainer"))
def test_a_function_that_something_else_replaced_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(model: Any, temperature: Any, cast_lm_head_to_fp32: Any, outputs: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(importlib.import_module(module), "add_fused_lm_head", foreign)
    before = in_trl()
    with pytest.raises(ours.UnsupportedTRLError, match="add_fused_lm_head is not TRL's own but comes from test_trl"):
        ours.enable()
    assert in_trl() == before


def test_the_extra_has_the_range_of_the_check() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert f"trl{ours.RANGE}" in project["project"]["optional-dependencies"]["trl"]
