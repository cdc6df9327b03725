"""The sampler in the process: what it draws, from what, and the log-probabilities that it notes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rollout_cases import cut, taken
from training_fixtures import make_model, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import logitless
from logitless.losses import NLL
from logitless.training.collate import Batch, Piece, padded
from logitless.training.errors import InputError
from logitless.training.examples import Example
from logitless.training.objective import PatchedEngine
from logitless.training.rollouts.generation import Completion, Sampling
from logitless.training.rollouts.model_generator import ModelTextGenerator, ends_of

VOCABULARY, PAD, ENDS = 61, 0, (1, 2)


def make_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=3,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def make_gpt2(positions: int = 64) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=positions,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=3,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config)


FAMILIES = {"llama": make_llama, "gpt2": make_gpt2}


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(4, VOCABULARY, (length,)).int() for length in lengths]


def generator_of(model: Any, ends: Sequence[int] = ENDS, **settings: Any) -> ModelTextGenerator:
    return ModelTextGenerator(model, pad_token=PAD, ends=ends, **settings)


@torch.no_grad()
def logits_of(model: Any, prompt: torch.Tensor, completion: Completion) -> torch.Tensor:
    """`[n, V]`: what each token of the completion was drawn from, in one pass over both."""
    ids = torch.cat([prompt, completion.ids]).long()[None]
    logits: torch.Tensor = model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.double()


def same(left: Sequence[Completion], right: Sequence[Completion]) -> bool:
    return len(left) == len(right) and all(
        a.ids.equal(b.ids) and a.logprob.equal(b.logprob) and a.sampling_logprob.equal(b.sampling_logprob)
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_what_is_noted_is_what_the_model_says(family: str, temperature: float) -> None:
    """Unequal prompts, padded on the left, some of which end long before others."""
    model, prompts = FAMILIES[family](), prompts_of(3, 11, 1, 7, 3, 20)
    sampled = generator_of(model).generate(prompts, Sampling(max_tokens=24, temperature=temperature), 7)
    assert len({len(completion.ids) for completion in sampled}) > 2
    for prompt, completion in zip(prompts, sampled, strict=True):
        expected = taken((logits_of(model, prompt, completion) / temperature).log_softmax(-1), completion.ids)
        torch.testing.assert_close(completion.logprob.double(), expected, rtol=0, atol=1e-5)
        assert completion.sampling_logprob.equal(completion.logprob)
        assert completion.ids.dtype == torch.int32 and completion.logprob.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_patched_model_scores_them_alike(family: str) -> None:
    """The log-probabilities of the loss's own forward pass, over a batch that is padded on the other side."""
    model, prompts = logitless.patch(FAMILIES[family]()), prompts_of(3, 11, 1, 7)
    engine = PatchedEngine(NLL(), torch.device("cpu"), False, temperature=0.7)
    sampled = generator_of(model.train()).generate(prompts, Sampling(max_tokens=16, temperature=0.7), 1)
    assert model.training
    ids = [torch.cat([prompt, each.ids]) for prompt, each in zip(prompts, sampled, strict=True)]
    batch: Batch = padded([Piece(Example(each, each.clone())) for each in ids], PAD)
    with torch.no_grad():
        scored = engine.stats(model.eval(), batch, ("logprob",)).logprob
    assert scored is not None
    for prompt, completion, row in zip(prompts, sampled, scored, strict=True):
        own = row[len(prompt) - 1 :][: len(completion.ids)]
        torch.testing.assert_close(completion.logprob, own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "cuts",
    [{"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}],
    ids=lambda cuts: "+".join(cuts),
)
def test_what_is_cut_off_is_never_drawn_and_the_rest_is_renormalised(cuts: dict[str, Any]) -> None:
    model, prompts = make_llama(), prompts_of(3, 9, 5)
    sampling = Sampling(max_tokens=20, temperature=1.3, **cuts)
    assert sampling.cuts and not Sampling(max_tokens=20).cuts
    differs = 0
    for prompt, completion in zip(prompts, generator_of(model).generate(prompts, sampling, 5), strict=True):
        logits = logits_of(model, prompt, completion) / sampling.temperature
        policy = taken(logits.log_softmax(-1), completion.ids)
        drawn_from = taken(torch.stack([cut(each, sampling) for each in logits]), completion.ids)
        assert drawn_from.isfinite().all()
        torch.testing.assert_close(completion.logprob.double(), policy, rtol=0, atol=1e-5)
        torch.testing.assert_close(completion.sampling_logprob.double(), drawn_from, rtol=0, atol=1e-5)
        differs += int((drawn_from - policy > 1e-3).sum())
    assert differs  # something was cut off at all


def test_frequencies_are_those_of_the_model() -> None:
    model, (prompt,) = make_llama(), prompts_of(4)
    sampled = generator_of(model).generate([prompt] * 4000, Sampling(max_tokens=1, temperature=1.3), 0)
    counts = torch.bincount(torch.cat([each.ids for each in sampled]).long(), minlength=VOCABULARY) / 4000
    expected = (logits_of(model, prompt, sampled[0])[0] / 1.3).softmax(-1)
    assert (counts - expected).abs().max() < 5 * 0.5 / 4000**0.5


def test_a_checkpoints_own_settings_of_generation_change_nothing() -> None:
    """Penalties and cuts of a generation_config.json would make another policy of what is sampled."""
    model, prompts, sampling = make_llama(), prompts_of(5, 2), Sampling(max_tokens=16)
    plain = generator_of(model).generate(prompts, sampling, 2)
    given = GenerationConfig(
        repetition_penalty=1.8,
        top_k=3,
        top_p=0.3,
        temperature=0.2,
        typical_p=0.5,
        no_repeat_ngram_size=2,
        suppress_tokens=list(range(4, 40)),
        begin_suppress_tokens=[5],
        forced_bos_token_id=45,
        forced_eos_token_id=1,
        min_new_tokens=9,
        max_length=3,
        num_beams=4,
        do_sample=False,
        eos_token_id=[11, 12],
        pad_token_id=13,
    )
    model.generation_config = given
    assert same(generator_of(model).generate(prompts, sampling, 2), plain)
    assert model.generation_config is given
    for prompt, completion in zip(prompts, plain, strict=True):
        expected = taken(logits_of(model, prompt, completion).log_softmax(-1), completion.ids)
        torch.testing.assert_close(completion.logprob.double(), expected, rtol=0, atol=1e-5)


def test_the_settings_come_back_when_sampling_fails() -> None:
    model = make_llama()
    given = model.generation_config
    with pytest.raises((IndexError, RuntimeError)):
        generator_of(model.train()).generate([torch.tensor([VOCABULARY + 5])], Sampling(max_tokens=2), 0)
    assert model.generation_config is given and model.training


def _always(model: Any, token: int) -> None:
    """A model that draws this token, whatever it has read."""
    with torch.no_grad():
        head = torch.nn.Linear(model.config.hidden_size, VOCABULARY)
        head.weight.zero_()
        head.bias.fill_(0.0)
        head.bias[token] = 40.0
    model.lm_head = head


@pytest.mark.parametrize("end", ENDS)
def test_a_completion_ends_at_its_first_end_token(end: int) -> None:
    """An end token may be the first, and it stands in the completion."""
    model = make_llama()
    _always(model, end)
    for completion in generator_of(model).generate(prompts_of(3, 5), Sampling(max_tokens=6), 0):
        assert completion.ids.tolist() == [end] and completion.ended and len(completion.logprob) == 1


def test_ended_says_whether_an_end_was_drawn() -> None:
    model = make_llama()
    sampled = generator_of(model).generate(prompts_of(*[4] * 60), Sampling(max_tokens=20, temperature=1.3), 3)
    assert {completion.ended for completion in sampled} == {True, False}
    for completion in sampled:
        ids = completion.ids.tolist()
        assert not set(ids[:-1]) & set(ENDS)
        assert completion.ended == (ids[-1] in ENDS) and (completion.ended or len(ids) == 20)
        assert len(completion.sampling_logprob) == len(completion.logprob) == len(ids)
    assert {completion.ids[-1].item() for completion in sampled if completion.ended} == set(ENDS)
    endless = generator_of(model, ends=()).generate(prompts_of(4, 2), Sampling(max_tokens=20), 3)
    assert [(len(each.ids), each.ended) for each in endless] == [(20, False)] * 2


def test_equal_calls_draw_equally_and_leave_the_generator_alone() -> None:
    model, prompts, sampling = make_llama(), prompts_of(3, 8, 3), Sampling(max_tokens=9)
    first = generator_of(model).generate(prompts, sampling, 4)
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.get_rng_state()
    assert same(generator_of(model).generate(prompts, sampling, 4), first)
    assert torch.get_rng_state().equal(before)
    assert not same(generator_of(model).generate(prompts, sampling, 5), first)


def test_one_prompt_several_times_is_sampled_several_times() -> None:
    (prompt,) = prompts_of(4)
    sampled = generator_of(make_llama()).generate([prompt] * 8, Sampling(max_tokens=8, temperature=1.3), 0)
    assert len({tuple(each.ids.tolist()) for each in sampled}) > 4


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_smaller_batch_mixes_no_rows_up(batch_size: int) -> None:
    """Every completion stands at its prompt's place: the model says of it what was noted, and greedily it is one."""
    model, prompts = make_llama(), prompts_of(9, 2, 14, 5, 2)
    generator = generator_of(model, batch_size=batch_size)
    for prompt, completion in zip(prompts, generator.generate(prompts, Sampling(max_tokens=7), 6), strict=True):
        expected = taken(logits_of(model, prompt, completion).log_softmax(-1), completion.ids)
        torch.testing.assert_close(completion.logprob.double(), expected, rtol=0, atol=1e-5)
    greedy = Sampling(max_tokens=7, temperature=0)
    together = generator_of(model).generate(prompts, greedy, 0)
    for ours, theirs in zip(generator.generate(prompts, greedy, 1), together, strict=True):
        assert ours.ids.equal(theirs.ids)


def test_no_prompts_give_no_completions() -> None:
    assert generator_of(make_llama()).generate([], Sampling(max_tokens=3), 0) == []


def test_temperature_0_takes_the_likeliest_with_certainty() -> None:
    model, prompts = make_gpt2(), prompts_of(6, 2)
    for prompt, completion in zip(
        prompts, generator_of(model).generate(prompts, Sampling(max_tokens=9, temperature=0), 3), strict=True
    ):
        logits = logits_of(model, prompt, completion)
        assert completion.ids.long().equal(logits.argmax(-1))
        assert completion.sampling_logprob.eq(0).all()
        expected = taken(logits.log_softmax(-1), completion.ids)
        torch.testing.assert_close(completion.logprob.double(), expected, rtol=0, atol=1e-5)


def test_a_prompt_that_fills_the_table_of_positions_is_sampled_to_its_end() -> None:
    """A prompt with most of its demonstration behind it leaves less than a whole completion."""
    model, prompts = make_gpt2(positions=24), prompts_of(4, 20, 12, 22)
    sampled = generator_of(model, ends=()).generate(prompts, Sampling(max_tokens=12), 0)
    assert [len(each.ids) for each in sampled] == [12, 4, 12, 2]
    for prompt, completion in zip(prompts, sampled, strict=True):
        expected = taken(logits_of(model, prompt, completion).log_softmax(-1), completion.ids)
        torch.testing.assert_close(completion.logprob.double(), expected, rtol=0, atol=1e-5)


def test_an_adapter_samples_as_it_is_trained() -> None:
    base, prompts = make_llama(), prompts_of(3, 8)
    sampling = Sampling(max_tokens=8, temperature=0.7)
    base.generation_config = GenerationConfig(repetition_penalty=1.9, top_k=2, eos_token_id=7)
    before = generator_of(base).generate(prompts, sampling, 1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    sampled = generator_of(model).generate(prompts, sampling, 1)
    assert not same(sampled, before)
    for prompt, completion in zip(prompts, sampled, strict=True):
        expected = taken((logits_of(model, prompt, completion) / 0.7).log_softmax(-1), completion.ids)
        torch.testing.assert_close(completion.logprob.double(), expected, rtol=0, atol=1e-5)


def test_bfloat16_autocast_is_that_of_training() -> None:
    model, prompts = make_llama(), prompts_of(3, 8)
    sampled = generator_of(model, bf16=True).generate(prompts, Sampling(max_tokens=8), 1)
    for prompt, completion in zip(prompts, sampled, strict=True):
        assert completion.logprob.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_of(model, prompt, completion)
        expected = taken(logits.log_softmax(-1), completion.ids)
        torch.testing.assert_close(completion.logprob.double(), expected, rtol=0, atol=0.08)
        full = taken(logits_of(model, prompt, completion).log_softmax(-1), completion.ids)
        assert (completion.logprob.double() - full).abs().max() > 1e-4  # it did run in bfloat16


def test_ends_are_the_models_the_tokenizers_and_the_templates(tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model")), make_tokenizer()
    assert ends_of(model, tokenizer, "") == (1,)
    model.generation_config.eos_token_id = [7, 9]
    assert ends_of(model, tokenizer, "<|im_start|>") == (0, 1, 7, 9)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    assert ends_of(model, tokenizer, "") == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_completion_length must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0, got -0.1"),
        ({"temperature": float("inf")}, "temperature must be a finite number"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\], got 1.1"),
    ],
)
def test_settings_outside_their_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**{"max_tokens": 4, **settings})
