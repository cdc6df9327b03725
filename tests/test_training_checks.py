"""What a run refuses before its first step: ids, positions, weights, teachers that do not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from training_fixtures import completion_rows, make_model, make_options, make_tokenizer, preference_rows, write_jsonl
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
)

from logitless.training import InputError, reference_model, train, trainer
from logitless.training.checks import Extreme, Reach, check_vocabulary, learned_positions
from logitless.training.collate import Piece, packed
from logitless.training.examples import Example

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
    """Lists of ids, as of a teacher whose head is longer."""
    folder = make_model(tmp_path / "model", tied=False)
    rows = [{"prompt": "q", "completion": "a", "target_ids": [[5], [258]], "teacher_logprob": [[-1.0], [-1.0]]}]
    with pytest.raises(InputError, match=r"line 1: target_ids lists the id 258, but the output head .* has 258 rows"):
        run(tmp_path, folder, rows, method="top_k_distillation")


def test_predicted_tokens_beyond_the_head_are_refused(tmp_path: Path) -> None:
    """A head of fewer rows than the embedding has."""
    model = LlamaForCausalLM.from_pretrained(make_model(tmp_path / "model", tied=False))
    model.lm_head = torch.nn.Linear(32, 200, bias=False)
    read = Reach(read=Extreme(257, "line 4"), target=Extreme(199, "line 5"))
    check_vocabulary(model, make_tokenizer(), read, "it")
    with pytest.raises(InputError, match=r"line 6: the token 'Ċ' has the id 200, but the output head of it has 200"):
        check_vocabulary(model, make_tokenizer(), read._replace(target=Extreme(200, "line 6")), "it")


@pytest.mark.parametrize(
    ("method", "columns", "message"),
    [
        ("reinforce", {"advantages": math.nan}, "line 13: the column advantages has nan; expected finite"),
        ("reinforce", {"advantages": math.inf}, "line 13: the column advantages has inf; expected finite"),
        ("top_k_distillation", {"target_ids": [[5, -7], [6]]}, "line 13: target_ids lists -7; expected ids from 0 on"),
    ],
)
def test_values_that_no_loss_can_read_are_refused(
    tmp_path: Path, method: str, columns: dict[str, Any], message: str
) -> None:
    good = {"advantages": 1.0, "target_ids": [[5]], "teacher_logprob": [[-1.0]]}
    lists = {"teacher_logprob": [[-1.0, -2.0], [-1.0]]} if method != "reinforce" else {}
    rows = [*(row | good for row in completion_rows(12)), {"prompt": "q", "completion": "a"} | good | lists | columns]
    with pytest.raises(InputError, match=message):
        run(tmp_path, make_model(tmp_path / "model"), rows, method=method)


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


LEGACY = {"vocab_size": 65, "n_positions": 24, "n_embd": 32, "n_layer": 1, "n_head": 4}
TABLES = {
    "OPT": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
            "vocab_size": 65, "max_position_embeddings": 24, "word_embed_proj_dim": 32},
    "GPT2": LEGACY,
    "GPTBigCode": LEGACY,
    "GPTJ": {**LEGACY, "rotary_dim": 4},
    "Mpt": {"vocab_size": 65, "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 24},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_model_reads_as_many_positions_as_it_has_learned(name: str) -> None:
    """One more fails. OPT keeps two rows of its table for itself."""
    config = getattr(transformers, f"{name}Config")(**TABLES[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert learned_positions(model) == 24
    model(input_ids=torch.ones(1, 24, dtype=torch.long))
    with pytest.raises((IndexError, RuntimeError)):
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


def make_gpt_neo(folder: Path, positions: int = 32) -> str:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "max_position_embeddings": positions, "hidden_size": 32, "num_layers": 2}
    config = GPTNeoConfig(**sizes, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8)
    GPTNeoForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "changes",
    [{"packing": True, "max_length": 128}, {"padding_free": True, "per_device_train_batch_size": 3}],
)
def test_packs_that_a_mask_is_too_narrow_for_are_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    """GPT-Neo's mask of the past is as wide as its table of positions."""
    folder, rows = make_gpt_neo(tmp_path / "model"), [{"text": "x" * (13 + i)} for i in range(7)]
    with pytest.raises(InputError, match=r"GPTNeo.* has 32 positions and cannot read a packed row of \d+ tokens"):
        run(tmp_path, folder, rows, **changes)
    assert run(tmp_path, folder, rows, **changes | {"max_length": 32, "per_device_train_batch_size": 1}).step == 4


def test_a_teacher_in_which_packs_leak_is_refused(tmp_path: Path) -> None:
    """BLOOM's positions are distances, which do not restart."""
    torch.manual_seed(0)
    teacher = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=32, n_layer=1, n_head=4))
    teacher.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    changes = {"method": "distillation", "packing": True, "teacher_model_name_or_path": str(tmp_path / "teacher")}
    with pytest.raises(InputError, match=r"BloomForCausalLM .* lets packed rows see each other"):
        run(tmp_path, make_model(tmp_path / "model"), completion_rows(), **changes)


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
def test_an_epsilon_that_its_weights_cannot_hold_is_refused(tmp_path: Path, epsilon: float, dtype: str) -> None:
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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 3, r"no weights for model\.layers\.2\.input_layernorm\.weight, .* and 6 more"),
        ("vocab_size", 300, "no causal language model could be loaded"),
    ],
)
def test_a_configuration_of_other_weights_is_refused(tmp_path: Path, key: str, value: int, message: str) -> None:
    """Weights that the checkpoint lacks would be random."""
    folder = Path(make_model(tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=message):
        run(tmp_path, str(folder), completion_rows())


def test_weights_that_were_cut_off_are_refused(tmp_path: Path) -> None:
    folder = Path(make_model(tmp_path / "model"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match="no causal language model could be loaded"):
        run(tmp_path, str(folder), completion_rows())


# ---------------------------------------------------------------------------------------------------------------------
# Options and folders


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    """At once: there is no model to load."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output_dir: nothing can be written into"):
        run(tmp_path, "no model", completion_rows(), output_dir=str(tmp_path / name))


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": math.inf}, {"num_train_epochs": math.inf}, {"seed": 2**64}, {"warmup_steps": math.inf},
     {"weight_decay": math.inf}],
)  # fmt: skip
def test_numbers_that_no_run_can_have_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))} must be"):
        make_options(tmp_path, "model", "data", **changes)


def test_a_gguf_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gguf_file: .*none\.gguf"):
        run(tmp_path, make_model(tmp_path / "model"), completion_rows(), gguf_file="none.gguf")


def test_what_is_unusual_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    run(tmp_path, folder, completion_rows(), warmup_steps=7)
    found = capsys.readouterr().out
    assert "note: warmup_steps: the learning rate rises for 7 steps, longer than the run, which has 4" in found
    assert "note: the tokenizer has no end-of-text token" in found


def test_an_ordinary_run_has_no_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, make_model(tmp_path / "model"), completion_rows())
    assert "note: " not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Teachers


def make_teacher(folder: Path, rows: int = 258, swapped: str = "", added: tuple[str, ...] = ()) -> str:
    """Another model, of so many rows; two letters may have changed places in its tokenizer, which may know more."""
    make_model(folder, tied=False)
    torch.manual_seed(5)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows, mean_resizing=False)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.save_pretrained(folder)
    if swapped:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary, (a, b) = content["model"]["vocab"], swapped
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        file.write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_longer_head_of_a_teacher_counts_over_the_shared_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The divergence in float64 between the model and the teacher without its rows behind the model's."""
    folder, teacher = make_model(tmp_path / "model"), make_teacher(tmp_path / "teacher", rows=264)
    texts = ["of two texts", "the other"]
    same = {"method": "distillation", "learning_rate": 0.0, "max_steps": 1, "loss": {"kind": kind}}
    found = run(tmp_path, folder, [{"text": x} for x in texts], teacher_model_name_or_path=teacher, **same).train_loss
    assert f"the head of {teacher} has 264 rows and that of the trained model 258" in capsys.readouterr().out
    ours, theirs = (LlamaForCausalLM.from_pretrained(x).double() for x in (folder, teacher))
    parts = []
    for text in texts:
        ids = torch.tensor([make_tokenizer()(text)["input_ids"] + [1]])
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1, :258].log_softmax(-1) for m in (theirs, ours))
        p, q = (p, q) if kind == "forward_kl" else (q, p)
        parts.append((p.exp() * (p - q)).sum(-1))
    assert found == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4)


def test_a_teacher_of_a_shorter_head_is_refused(tmp_path: Path) -> None:
    folder, teacher = make_teacher(tmp_path / "model", rows=264), make_model(tmp_path / "teacher")
    with pytest.raises(InputError, match="has 258 rows and that of the trained model 264"):
        run(tmp_path, folder, completion_rows(), method="distillation", teacher_model_name_or_path=teacher)


@pytest.mark.parametrize(("ours", "theirs"), [(258, 264), (264, 258)])
@pytest.mark.parametrize("backend", ["auto", "materialised"])
def test_log_probabilities_of_a_teacher_need_no_equal_heads(
    tmp_path: Path, ours: int, theirs: int, backend: str
) -> None:
    """A teacher normalises over all rows that it has, as its own logits do."""
    folder, teacher = make_teacher(tmp_path / "model", rows=ours), make_teacher(tmp_path / "teacher", rows=theirs)
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"}] * 2
    changes = {"method": "dpo", "learning_rate": 0.0, "max_steps": 1, "backend": backend}
    found = run(tmp_path, folder, rows, teacher_model_name_or_path=teacher, **changes).train_loss
    sums = []
    for name in (folder, teacher):
        model = LlamaForCausalLM.from_pretrained(name).double()
        for answer in ("yes", "no"):
            ids = torch.tensor([make_tokenizer()("q" + answer)["input_ids"] + [1]])
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            sums.append(float(logp.gather(1, ids[0, 1:, None]).sum()))
    margin = 0.1 * (sums[0] - sums[1] - sums[2] + sums[3])
    assert found == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4)


@pytest.mark.parametrize("method", ["dpo", "distillation"])
def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path, method: str) -> None:
    teacher = make_teacher(tmp_path / "teacher", swapped="ab")
    rows = [{"prompt": "q", "chosen": "a", "rejected": "c", "completion": "a"}] * 2
    with pytest.raises(InputError, match=r"the teacher has another tokenizer: the id \d+ is 'a' to .* and 'b' to"):
        run(tmp_path, make_model(tmp_path / "model"), rows, method=method, teacher_model_name_or_path=teacher)


def test_tokens_that_no_row_has_matter_where_distributions_are_compared(tmp_path: Path) -> None:
    folder, teacher = make_model(tmp_path / "model"), make_teacher(tmp_path / "teacher", swapped="ab")
    rows = [{"prompt": "q", "chosen": "x", "rejected": "y", "completion": "z"}] * 2
    assert run(tmp_path, folder, rows, method="dpo", teacher_model_name_or_path=teacher).step == 4
    with pytest.raises(InputError, match="the teacher has another tokenizer"):
        run(tmp_path, folder, rows, method="distillation", teacher_model_name_or_path=teacher)


def test_added_tokens_that_differ_matter_where_rows_have_them(tmp_path: Path) -> None:
    folder, teacher = make_teacher(tmp_path / "model", rows=260, added=("<a>",)), tmp_path / "teacher"
    options = {"method": "distillation", "teacher_model_name_or_path": make_teacher(teacher, rows=260, added=("<b>",))}
    assert run(tmp_path, folder, completion_rows(), **options).step == 4
    with pytest.raises(InputError, match="the id 258 is '<a>' to the data's tokenizer and '<b>' to the teacher's"):
        run(tmp_path, folder, [{"text": "x <a>"}], **options)


@pytest.mark.parametrize("method", ["dpo", "distillation"])
def test_ids_beyond_the_teachers_embedding_are_refused(tmp_path: Path, method: str) -> None:
    folder, teacher = make_teacher(tmp_path / "model", rows=259, added=("<a>",)), make_model(tmp_path / "teacher")
    if method == "distillation":
        folder, teacher = make_teacher(tmp_path / "model", rows=258, added=("<a>",)), folder
    rows = [{"prompt": "q", "chosen": "x", "rejected": "y", "completion": "z"}] * 2
    rows.append(rows[0] | {"chosen": "<a>", "completion": "<a>"})
    with pytest.raises(InputError, match=r"line 3: the token '<a>' has the id 258, but the embedding of .* 258 rows"):
        run(tmp_path, folder, rows, method=method, teacher_model_name_or_path=teacher)


def test_a_padding_token_that_the_teacher_lacks_pads_all_the_same(tmp_path: Path) -> None:
    folder, teacher = make_teacher(tmp_path / "model", rows=260), make_teacher(tmp_path / "teacher")
    options = {"method": "dpo", "teacher_model_name_or_path": teacher}
    want = run(tmp_path, folder, preference_rows(), **options).train_loss
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert run(tmp_path, folder, preference_rows(), **options).train_loss == want


def test_a_teacher_with_weights_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    broken = LlamaForCausalLM.from_pretrained(teacher)
    broken.model.norm.weight.data[3] = math.nan
    broken.save_pretrained(teacher)
    with pytest.raises(InputError, match=r"teacher: the weight model\.norm\.weight has values that are not finite"):
        run(tmp_path, make_model(tmp_path / "model"), completion_rows(), method="distillation",
            teacher_model_name_or_path=teacher)  # fmt: skip


def test_rows_beyond_the_teachers_positions_are_refused(tmp_path: Path) -> None:
    teacher = make_gpt2(tmp_path / "teacher")
    rows = [{"prompt": "q", "chosen": "x" * 40, "rejected": "y"}] * 2
    with pytest.raises(InputError, match=r"line 1: the row has 42 tokens, but .* has learned 32 positions"):
        run(tmp_path, make_model(tmp_path / "model"), rows, method="dpo", teacher_model_name_or_path=teacher)


def test_a_teacher_without_a_tokenizer_is_taken_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, teacher = make_model(tmp_path / "model"), make_teacher(tmp_path / "teacher")
    for file in Path(teacher).glob("*token*"):
        file.unlink()
    assert run(tmp_path, folder, preference_rows(), method="dpo", teacher_model_name_or_path=teacher).step == 4
    assert "the teacher's tokens are not compared" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Values of the reference that are kept


def first_loss(tmp_path: Path, model: str, **changes: Any) -> float:
    stored = {"precompute_ref_log_probs": True, "learning_rate": 0.0, "max_steps": 1, "method": "dpo"}
    return run(tmp_path, model, preference_rows(), **stored | changes).train_loss


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "reference").iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 0.5), ("rope_parameters", {"rope_theta": 50.0, "rope_type": "default"}), ("hidden_act", "gelu")],
)
def test_another_configuration_is_another_reference(tmp_path: Path, key: str, value: Any) -> None:
    """Model and reference are one, so that the first loss is log 2 whatever the configuration."""
    folder = make_teacher(tmp_path / "model")
    assert first_loss(tmp_path, folder) == pytest.approx(math.log(2), abs=1e-6)
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert first_loss(tmp_path, folder) == pytest.approx(math.log(2), abs=1e-6)
    assert len(kept(tmp_path)) == 2


def test_a_moved_folder_has_the_same_reference(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "model")
    first_loss(tmp_path, folder)
    first_loss(tmp_path, str(Path(folder).rename(tmp_path / "elsewhere")))
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("changes", [{"attn_implementation": "eager"}, {"dtype": "bfloat16"}, {"backend": "reference"}])
def test_what_changes_the_values_changes_their_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = make_teacher(tmp_path / "model")
    first_loss(tmp_path, folder)
    first_loss(tmp_path, folder, **changes)
    assert len(kept(tmp_path)) == 2


def test_another_version_changes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_teacher(tmp_path / "model")
    first_loss(tmp_path, folder)
    monkeypatch.setattr(reference_model, "__version__", "9.9")
    first_loss(tmp_path, folder)
    assert len(kept(tmp_path)) == 2


def test_code_that_comes_with_the_checkpoint_changes_the_file(tmp_path: Path) -> None:
    """A checkpoint with a model of its own, whose code takes another activation the second time."""
    folder = Path(make_teacher(tmp_path / "model"))
    code = "from transformers import LlamaForCausalLM\n\nclass Own(LlamaForCausalLM):\n"
    code += "    def __init__(self, config):\n        super().__init__(config)\n"
    code += "        for layer in self.model.layers:\n            layer.mlp.act_fn = torch.nn.{act}()\n"
    file = folder / "config.json"
    own = {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    for act in ("ReLU", "Tanh"):
        (folder / "modeling_own.py").write_text("import torch\n" + code.format(act=act))
        loss = first_loss(tmp_path, str(folder), trust_remote_code=True)
        assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_damaged_values_are_computed_again(tmp_path: Path, damage: str) -> None:
    folder = make_teacher(tmp_path / "model")
    first_loss(tmp_path, folder)
    (file,) = kept(tmp_path)
    good = file.read_bytes()
    broken = {
        "flipped": good[:-7] + bytes([good[-7] ^ 0x40]) + good[-6:],
        "cut": good[: len(good) // 2],
        "empty": b"",
        "other": b"text, and no safetensors",
    }
    file.write_bytes(broken[damage])
    assert first_loss(tmp_path, folder) == pytest.approx(math.log(2), abs=1e-6)
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cache_dir: nothing can be kept in"):
        first_loss(tmp_path, folder, cache_dir=str(tmp_path / "file"))
