"""A real model's training step with each provider as its loss: values, gradients, memory, and refused models."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import torch.nn.functional as F
import training_fixtures
from torch import Tensor

from logitless import losses
from logitless.bench import measure, memory
from logitless.bench.environment import describe
from logitless.bench.machine import Cpu
from logitless.bench.measure import Method, silent
from logitless.bench.model_step import ModelInputs, ModelPart
from logitless.bench.problem import Inputs, Problem
from logitless.bench.provider import Provider
from logitless.bench.providers import materialised, own, peers
from logitless.integrations.families import FAMILIES
from logitless.training.errors import InputError

transformers = pytest.importorskip("transformers")

OF_NLL = (materialised.NLL, own.NLL, own.NLL_RECOMPUTE, *own.STRATEGIES, *peers.ON_PROCESSOR)
OF_DPO = (materialised.DPO, own.DPO, own.of_registry("dpo"), peers.TRL_DPO, peers.LIGER_DPO)
#: Marks of the providers that compile. Cut Cross-Entropy is in no extra: a user installs it to have it measured.
COMPILED = {
    peers.CCE.name: [
        pytest.mark.slow,
        pytest.mark.skipif(not find_spec("cut_cross_entropy"), reason="Cut Cross-Entropy is not installed"),
    ],
    peers.LIGER_DPO.name: [pytest.mark.slow],
}
RUNNING = [
    pytest.param(provider, id=provider.name, marks=COMPILED.get(provider.name, []))
    for provider in (*OF_NLL, *OF_DPO)
    if not provider.frozen and not provider.name.startswith(("cuda", "triton")) and "tail" not in provider.name
]
#: Roundings of float32 through two layers, relative to the whole gradient.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny tied Llama, V 258 and H 32, of dropout 0.1, and its tokenizer."""
    return training_fixtures.make_model(tmp_path_factory.mktemp("tied"), dropout=0.1, sharpness=20.0)


def part_of(
    model: str, *providers: Provider, loss: str = "nll", sequences: int = 4, length: int = 12, **changes: Any
) -> ModelPart:
    """Sequences of a model with V 258 and H 32, in pairs where the loss has several."""
    pairs = 0 if losses.get(loss).level in ("token", "distribution") else sequences // 2
    sizes = {"hidden": 32, "vocabulary": 258, "dtype": torch.float32}
    given = {name: changes.pop(name) for name in sizes if name in changes}
    problem = Problem(sequences * length, pairs=pairs, **sizes | given)
    options = {"method": Method(rounds=2), "length": length, "loss": loss, "model": model}
    return ModelPart("model", problem, providers, **options | changes)


def measured(part: ModelPart) -> dict[str, Any]:
    return part.measure(Cpu(), time.monotonic() + 600, {}, silent)


@pytest.mark.parametrize("provider", RUNNING)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_provider_gives_the_gradients_of_the_model_s_own_logits(
    tied: str, provider: Provider, checkpointing: bool
) -> None:
    inputs = part_of(tied, provider, loss=provider.compared, checkpointing=checkpointing).inputs()
    hidden, weight, rest = inputs.operands()
    loss = provider.loss(hidden, weight, rest)
    loss.backward()
    own_loss, expected = _own_gradients(tied, inputs.ids, provider.compared)
    assert float(loss.detach()) == pytest.approx(own_loss, rel=TOLERANCE)
    found = {name: parameter.grad for name, parameter in inputs.model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= TOLERANCE * float(gradient.norm()), name


def _own_gradients(folder: str, ids: Tensor, loss: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the model as Transformers has it, in evaluation mode: its own NLL, or DPO of its logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    output = model(input_ids=ids, labels=ids)
    value = output.loss
    if loss == "dpo":
        logprob = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].sum(-1)
        chosen, rejected = logprob.view(2, -1)
        value = -F.logsigmoid(materialised.BETA * (chosen - rejected)).mean()
    value.backward()
    return float(value.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_a_part_measures_every_provider_in_turns(tmp_path: Path, tie: bool) -> None:
    model = training_fixtures.make_model(tmp_path / "model", tied=tie)
    part = part_of(model, materialised.NLL, own.NLL, peers.TRL, method=Method(rounds=2))
    told: list[str] = []
    found = part.measure(Cpu(), time.monotonic() + 600, {}, lambda doing, so_far: told.append(doing))
    assert found["complete"] and told[:3] == [provider.name for provider in part.providers]
    for row in found["rows"]:
        assert row["failure"] is None and len(row["seconds"]) == 2 and len(row["backward"]) == 2
        assert row["error"].keys() == {"loss", "d_hidden", "d_weight"} and max(row["error"].values()) < TOLERANCE
    parameters = transformers.AutoModelForCausalLM.from_pretrained(model).num_parameters()
    facts = {"kind": "model", "model": model, "loss": "nll", "sequences": 4, "length": 12, "tokens": 48}
    assert {name: found[name] for name in facts} == facts and found["parameters"] == parameters
    schema = json.loads(Path(measure.__file__).with_name("schema.json").read_text())
    of_model = {"$ref": "#/$defs/model", "$defs": schema["$defs"]}
    jsonschema.validate(json.loads(json.dumps({**found, "environment": describe()})), of_model)
    assert found["problem"] == "N 48 H 32 V 258 float32" and found["text"] == "Python's language reference"


def test_pairs_are_the_chosen_sequences_and_then_the_rejected(tied: str) -> None:
    part = part_of(tied, *OF_DPO[:3], loss="dpo")
    assert str(part.problem) == "N 48 H 32 V 258 float32, 2 pairs of 2 x 12 tokens"
    for row in measured(part)["rows"]:
        assert max(row["error"].values()) < TOLERANCE, row
    with pytest.raises(InputError, match="tokens: expected 2 pairs of sequences of 24 tokens, got 48"):
        replace(part, length=24)
    with pytest.raises(InputError, match="tokens: expected a multiple of 7 tokens, got 48"):
        replace(part_of(tied, own.NLL), length=7)


@pytest.mark.parametrize("name", ["kto", "grpo", "distillation", "top_k_distillation"])
def test_any_registered_loss_works_on_a_model(tied: str, name: str) -> None:
    provider = own.of_registry(name)
    [row] = measured(part_of(tied, provider, loss=name))["rows"]
    assert losses.get(name).level and row["failure"] is None and max(row["error"].values()) < 10 * TOLERANCE, row


def test_a_loss_whose_gradient_is_half_of_what_it_should_be_is_seen(tied: str) -> None:
    def halved(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        value = materialised.materialised_nll(hidden, weight, inputs)
        return (value + value.detach()) / 2

    [row] = measured(part_of(tied, Provider("halved", "peer", halved)))["rows"]
    assert row["failure"].startswith("wrong: d_hidden is off by 5.0e-01")
    assert row["error"]["loss"] < TOLERANCE and row["error"]["d_hidden"] == pytest.approx(0.5, rel=1e-3)
    assert row["error"]["d_weight"] > 0.1  # the embedding's part of a tied head's gradient is halved too


def test_a_step_that_fails_leaves_no_gradient_for_the_next(tied: str) -> None:
    def fails(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        materialised.materialised_nll(hidden, weight, inputs).backward()
        raise RuntimeError("too late")

    failed, ours = measured(part_of(tied, Provider("fails", "peer", fails), own.NLL))["rows"]
    assert failed["failure"] == "RuntimeError: too late" and failed["seconds"] == []
    assert max(ours["error"].values()) < TOLERANCE


def test_a_step_leaves_no_gradient_and_watches_hidden_states_only_where_few(tied: str) -> None:
    inputs = part_of(tied, own.NLL).inputs()
    for subject, watched in ((inputs, False), (inputs.brief(), True)):
        outcome = own.NLL.step(subject)
        assert (outcome.d_hidden is not None) == watched and outcome.d_weight is not None
        assert all(parameter.grad is None for parameter in inputs.model.parameters())
    frozen = replace(own.NLL, frozen=True)
    assert frozen.step(inputs).d_weight is None


@pytest.mark.parametrize(
    ("loss", "sequences", "length", "expected"),
    [("nll", 1, 2000, (1, 256)), ("nll", 40, 8, (10, 8)), ("nll", 1, 2, (1, 1)), ("dpo", 4, 300, (4, 128))],
)
def test_few_tokens_have_the_structure_of_all(
    tied: str, loss: str, sequences: int, length: int, expected: tuple[int, int]
) -> None:
    part = part_of(tied, own.NLL, loss=loss, sequences=sequences, length=length)
    ids = torch.zeros(sequences, length + 1, dtype=torch.long)
    few = ModelInputs(None, torch.nn.Parameter(torch.empty(0)), ids, part.problem, {}).brief()
    assert few.ids.shape == (expected[0], expected[1] + 1)
    assert few.problem.tokens == expected[0] * expected[1] and few.problem.pairs == part.problem.pairs


def test_a_model_in_bfloat16_is_held_against_a_loss_in_float64(tied: str) -> None:
    part = part_of(tied, materialised.NLL, own.NLL, dtype=torch.bfloat16)
    theirs, ours = (row["error"] for row in measured(part)["rows"])
    for name in theirs:
        assert 0 < ours[name] < max(2e-2, 2 * theirs[name]), (ours, theirs)


def test_a_tiny_part_has_the_same_sequences(tied: str) -> None:
    tiny = part_of(tied, own.DPO, loss="dpo").tiny()
    assert tiny.problem.shape == (4, 8) and measured(tiny)["complete"]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_sequences_are_consecutive_and_a_short_text_is_repeated(tied: str) -> None:
    inputs = part_of(tied, own.NLL).inputs()
    assert inputs.ids.shape == (4, 13) and torch.equal(inputs.ids[:-1, -1], inputs.ids[1:, 0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tied)
    assert tokenizer.decode(inputs.ids[0]).startswith('The "assert"')
    whole = part_of(tied, own.NLL, sequences=5000, length=100).inputs()
    assert whole.ids.shape == (5000, 101)


def test_without_a_tokenizer_the_ids_are_random_and_the_part_says_so(tmp_path: Path) -> None:
    model = Path(training_fixtures.make_model(tmp_path / "model"))
    for path in model.glob("tokenizer*"):
        path.unlink()
    part = part_of(str(model), own.NLL)
    found = measured(part)
    assert found["text"].startswith("random ids (") and "no tokenizer could be loaded" in found["text"]
    assert torch.equal(part.inputs().ids, part.inputs().ids) and part.inputs().ids.unique().numel() > 20


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = training_fixtures.make_model(tmp_path / "model", vocabulary=100)
    with pytest.raises(InputError, match=r"the embedding of .* has 100 rows"):
        part_of(model, own.NLL, vocabulary=100).inputs()
    with pytest.raises(InputError, match=r"its output head is \[100, 32\]; expected \[258, 32\], V and H"):
        part_of(model, own.NLL).inputs()


# ---------------------------------------------------------------------------------------------------------------------
# Models that are refused

SMALL = {"vocab_size": 258, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "pad_token_id": 0}
MORE = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
REFUSED = {
    "a bias": ("PhiForCausalLM", "PhiConfig", SMALL | MORE),
    "a scale of 0.25": ("CohereForCausalLM", "CohereConfig", SMALL | MORE | {"logit_scale": 0.25}),
    "a softcap of 2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL | MORE | {"final_logit_softcapping": 2.0}),
}


def _save(folder: Path, model: str, config: str, settings: dict[str, Any]) -> str:
    getattr(transformers, model)(getattr(transformers, config)(**settings)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("what", REFUSED)
def test_a_head_that_does_more_than_multiply_is_refused_by_name(tmp_path: Path, what: str) -> None:
    model = _save(tmp_path / "model", *REFUSED[what])
    with pytest.raises(InputError, match=f"model: the output head of {REFUSED[what][0]} has {what}; expected logits"):
        part_of(model, own.NLL).inputs()


def test_logits_that_differ_from_the_product_are_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class of which nobody knows what it does to its logits."""
    monkeypatch.delitem(FAMILIES, "CohereForCausalLM")
    model = _save(tmp_path / "model", *REFUSED["a scale of 0.25"])
    with pytest.raises(InputError, match="CohereForCausalLM: the patch's log-probabilities and the model's own differ"):
        measured(part_of(model, own.NLL))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model folder not found"):
        part_of(str(tmp_path / "absent"), own.NLL).inputs()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no causal language model could be loaded"):
        part_of(str(tmp_path), own.NLL).inputs()


def test_a_table_of_positions_bounds_the_length(tmp_path: Path) -> None:
    settings = {"vocab_size": 258, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
    model = _save(tmp_path / "model", "GPT2LMHeadModel", "GPT2Config", settings)
    assert measured(part_of(model, own.NLL, length=16))["complete"]
    with pytest.raises(InputError, match="has learned 16 positions"):
        part_of(model, own.NLL, length=17).inputs()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def _holding(size: int) -> Provider:
    """A loss with so many bytes of scratch, far more than the rest of a tiny model's step takes."""

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        value = own.nll(hidden, weight, inputs)
        scratch = torch.empty(size, dtype=torch.uint8)
        del scratch
        return value

    return Provider("holding", "peer", loss)


def test_a_mebibyte_more_is_counted_to_the_byte(tied: str) -> None:
    part = part_of(tied)
    less, more = (memory.of_step(part, _holding(size * 2**20))["allocated"] for size in (64, 65))
    assert less is not None and more is not None and more - less == 2**20


def test_memory_of_a_step_has_gradients_and_activations_in_it_and_no_weights(tied: str) -> None:
    part = part_of(tied, own.NLL, sequences=2, length=128)
    kept, again = (
        memory.of_step(replace(part, checkpointing=checkpointing), own.NLL)["allocated"]
        for checkpointing in (False, True)
    )
    weights = 4 * sum(parameter.numel() for parameter in part.inputs().model.parameters())
    assert kept is not None and again is not None
    assert weights <= again < kept


@pytest.mark.slow
def test_memory_of_a_model_in_a_process_of_its_own(tied: str) -> None:
    found = memory.in_process(part_of(tied, own.NLL), own.NLL)
    assert found["allocated"] is not None and found["allocated"] > 0


@pytest.mark.slow
def test_a_gguf_file_is_a_model(tied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = training_fixtures.write_gguf(tmp_path / "tiny.gguf", tied)
    found = measured(part_of(file, materialised.NLL, own.NLL))
    assert found["complete"] and found["model"] == file
