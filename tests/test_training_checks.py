"""What a run refuses before its first step: ids, positions, weights, teachers that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import completion_rows, make_model, make_options, make_tokenizer, preference_rows, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from logitless.training import InputError, train, trainer
from logitless.training.checks import learned_positions
from logitless.training.collate import Piece, packed
from logitless.training.tokenize import Example

ADDED = "<tool>"


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model of 258 rows whose tokenizer has got one token more, of id 258."""
    folder = make_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([ADDED], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal comes before the first step."""
    if "refused" in request.node.name:
        monkeypatch.setattr(trainer, "take_step", lambda run, step: pytest.fail("a step was taken"))


def run(tmp_path: Path, model: str, rows: list[Any], **changes: Any) -> trainer.TrainResult:
    return train(make_options(tmp_path / "run", model, write_jsonl(tmp_path / "rows.jsonl", rows), **changes))


# ---------------------------------------------------------------------------------------------------------------------
# Ids


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"padding_free": True}, {"backend": "materialised"}])
def test_ids_beyond_the_embedding_are_refused(tmp_path: Path, model: str, changes: dict[str, Any]) -> None:
    rows = [{"text": "plain"}, {"text": f"a {ADDED} b"}]
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: the token '<tool>' has the id 258.* has 258 rows"):
        run(tmp_path, model, rows, **changes)


def test_pairs_with_ids_beyond_the_embedding_are_refused(tmp_path: Path, model: str) -> None:
    rows = [*preference_rows(), {"prompt": "q", "chosen": "a", "rejected": ADDED}]
    with pytest.raises(InputError, match=r"line 9: the token '<tool>'"):
        run(tmp_path, model, rows, method="dpo")


def test_evaluation_rows_and_components_with_such_ids_are_refused(tmp_path: Path, model: str) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": ADDED}])
    with pytest.raises(InputError, match=r"bad\.jsonl, line 1: the token '<tool>'"):
        run(tmp_path, model, completion_rows(), eval_dataset_name=bad)
    mixture = [{"method": "sft", "dataset_name": write_jsonl(tmp_path / "good.jsonl", completion_rows())},
               {"method": "dft", "dataset_name": bad}]  # fmt: skip
    with pytest.raises(InputError, match=r"mixture, dft: .*bad\.jsonl, line 1"):
        train(make_options(tmp_path / "run", model, "", mixture=mixture))


def test_a_dropped_row_does_not_shift_the_line_that_is_refused(tmp_path: Path, model: str) -> None:
    rows = [{"prompt": "x" * 80, "completion": "y"}, {"prompt": "q", "completion": ADDED}]
    with pytest.raises(InputError, match=r"line 2: the token '<tool>'"):
        run(tmp_path, model, rows)


def test_targets_beyond_the_head_are_refused(tmp_path: Path) -> None:
    """A head of fewer rows than the embedding, and lists of ids that another model has."""
    folder = make_model(tmp_path / "model", tied=False)
    rows = [{"prompt": "q", "completion": "a", "target_ids": [[5], [258]], "teacher_logprob": [[-1.0], [-1.0]]}]
    with pytest.raises(InputError, match=r"line 1: target_ids lists the id 258, but the output head .* has 258 rows"):
        run(tmp_path, folder, rows, method="top_k_distillation")


def test_an_added_token_that_no_row_uses_is_no_obstacle(tmp_path: Path, model: str) -> None:
    assert run(tmp_path, model, completion_rows()).step == 4


@pytest.mark.parametrize("changes", [{}, {"packing": True}])
def test_a_padding_token_beyond_the_embedding_pads_all_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Nothing reads padding, so that the losses are those of a run with another padding token."""
    folder = make_model(tmp_path / "model")
    want = run(tmp_path, folder, completion_rows(), **changes).train_loss
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == 258
    assert run(tmp_path, folder, completion_rows(), **changes).train_loss == want


# ---------------------------------------------------------------------------------------------------------------------
# Positions


def make_gpt2(folder: Path, positions: int = 32) -> str:
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 258, "n_positions": positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_rows_beyond_the_learned_positions_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "x" * 31}, {"text": "x" * 40}]  # with the end token 32 and 41 tokens
    folder = make_gpt2(tmp_path / "model")
    with pytest.raises(InputError, match=r"line 2: the row has 41 tokens, .* learned 32 positions; .* max_length"):
        run(tmp_path, folder, rows)


def test_rows_as_long_as_the_positions_train(tmp_path: Path) -> None:
    rows = [{"text": "x" * 31}, {"text": "x" * 40}]
    assert run(tmp_path, make_gpt2(tmp_path / "model"), rows, max_length=32).step == 4


def test_opt_keeps_two_rows_of_its_table_for_itself() -> None:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=65, max_position_embeddings=24, word_embed_proj_dim=32, **sizes))
    assert learned_positions(model) == 24
    model(input_ids=torch.ones(1, 24, dtype=torch.long))
    with pytest.raises(IndexError):
        model(input_ids=torch.ones(1, 25, dtype=torch.long))


def test_rotary_models_go_beyond_their_positions_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model")
    assert learned_positions(LlamaForCausalLM.from_pretrained(folder)) is None
    assert run(tmp_path, folder, [{"text": "x" * 299}], max_length=512, max_steps=1).step == 1
    assert "line 1: 300 tokens, more than the 256 positions" in capsys.readouterr().out


def test_packs_longer_than_the_positions_have_the_loss_of_their_rows(tmp_path: Path) -> None:
    """The padding behind a pack is cut into stretches that are no longer than a row."""
    folder, rows = make_gpt2(tmp_path / "model"), [{"text": "x" * (14 + i)} for i in range(7)]
    same = {"learning_rate": 0.0, "max_steps": 1, "max_length": 128}
    packs = run(tmp_path, folder, rows, packing=True, **same)
    apart = run(tmp_path, folder, rows, per_device_train_batch_size=7, **same)
    assert packs.train_loss == pytest.approx(apart.train_loss, rel=1e-6)


def test_the_padding_of_packs_restarts_its_positions() -> None:
    def piece(length: int) -> Piece:
        return Piece(Example(torch.arange(length).int(), torch.arange(length).int()))

    batch = packed([[piece(3), piece(2)], [piece(3), piece(3), piece(3), piece(3)]], pad_token=0)
    assert batch.position_ids is not None and batch.cu_seqlens is not None
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8, 11, 12, 15, 18, 21, 24]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize(
    "changes", [{"dtype": "float16"}, {"dtype": "auto"}, {"dtype": "float16", "adam_epsilon": 1e-3}]
)
def test_weights_that_train_in_float16_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = make_model(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(folder).half().save_pretrained(folder)
    with pytest.raises(InputError, match="dtype: the trained weights are float16"):
        run(tmp_path, folder, completion_rows(), **changes)


def test_an_adapter_over_float16_trains_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, make_model(tmp_path / "model"), completion_rows(), dtype="float16", use_peft=True)
    assert found.step == 4 and found.train_loss < 10
    assert "note: dtype float16" in capsys.readouterr().out


@pytest.mark.parametrize(("epsilon", "dtype"), [(0.0, "float32"), (1e-50, "float32"), (1e-45, "bfloat16")])
def test_an_epsilon_that_its_weights_can_not_hold_is_refused(tmp_path: Path, epsilon: float, dtype: str) -> None:
    with pytest.raises(InputError, match=f"adam_epsilon: .* is 0 in {dtype}"):
        run(tmp_path, make_model(tmp_path / "model"), completion_rows(), adam_epsilon=epsilon, dtype=dtype)


@pytest.mark.parametrize(("rate", "noted"), [(1e-6, True), (1e-3, False)])
def test_updates_that_bfloat16_rounds_away_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rate: float, noted: bool
) -> None:
    """At the low rate a step leaves more than half of the weights as they were, to the last bit."""
    folder = make_model(tmp_path / "model")
    run(tmp_path, folder, completion_rows(), dtype="bfloat16", learning_rate=rate, max_steps=1)
    assert ("is rounded away" in capsys.readouterr().out) is noted
    before, after = (LlamaForCausalLM.from_pretrained(x, dtype=torch.bfloat16) for x in (folder, tmp_path / "run"))
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    same = sum(int((ours == theirs).sum()) for ours, theirs in pairs)
    assert (2 * same > sum(ours.numel() for ours, _ in pairs)) is noted


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    folder = make_model(tmp_path / "model")
    broken = LlamaForCausalLM.from_pretrained(folder)
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    broken.save_pretrained(folder)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        run(tmp_path, folder, completion_rows())
