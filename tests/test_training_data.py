"""Reading rows, turning them into tokens and labels, packing and batching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_fixtures import completion_rows, make_tokenizer, preference_rows, write_jsonl

from logitless.training import InputError
from logitless.training.collate import Piece, best_fit, consecutive, packed, padded, padding_free
from logitless.training.data import Row, has_split, read_rows
from logitless.training.examples import IGNORED, Example
from logitless.training.loader import Loader, split_rows
from logitless.training.render import Renderer
from logitless.training.sampler import Sampler

TOKENIZER = make_tokenizer()


def renderer(**changes: Any) -> Renderer:
    return Renderer(**{"tokenizer": TOKENIZER, "max_length": 128} | changes)


def one(values: dict[str, Any], **changes: Any) -> Example:
    ((example,),) = renderer(**changes).sequences([Row(values, "data.jsonl, line 7")], "data.jsonl").items
    return example


def counted_text(example: Example) -> str:
    return TOKENIZER.decode(example.input_ids[example.labels != IGNORED])


# Reading


def test_every_file_form_gives_the_same_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = completion_rows(5)
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "lines.json", rows)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "a.json", "lines.json", "a.parquet", "a.csv", "saved", "splits"):
        assert [row.values for row in read_rows(str(tmp_path / name))] == rows, name
    assert has_split(str(tmp_path / "splits"), "test") and not has_split(str(tmp_path / "a.jsonl"), "test")


def test_origins_count_lines_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "three"}\n')
    assert [row.origin for row in read_rows(str(path))] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n["no", "columns"]\n', "line 2: expected an object"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.json", b'[{"text": "x"}, 3]', "row 2: expected an object"),
        ("a.csv", b"prompt,completion\na,b\nc\n", "line 3: expected 2 fields"),
        ("a.parquet", b"not parquet", "not a readable Parquet file"),
    ],
)
def test_broken_files_are_reported_with_their_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(str(tmp_path / name))


def test_missing_data_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data file not found"):
        read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="no such data file, save_to_disk folder or hub dataset"):
        read_rows("nobody/no-such-dataset")


def test_a_saved_dataset_without_the_split_names_those_it_has(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"validation": datasets.Dataset.from_list(completion_rows(2))}).save_to_disk(tmp_path / "d")
    with pytest.raises(InputError, match=r"no split 'train', it has \['validation'\]"):
        read_rows(str(tmp_path / "d"))


# Rendering


def test_completions_count_and_prompts_do_not() -> None:
    assert counted_text(one({"prompt": "2 + 2 = ", "completion": "4"})) == "4<|im_end|>"
    assert one({"prompt": "2 + 2 = ", "completion": "4"}, completion_only=False).labels.tolist().count(IGNORED) == 1


def test_plain_text_counts_from_the_second_token() -> None:
    assert counted_text(one({"text": "hello"})) == "ello<|im_end|>"


def test_chat_prompt_and_completion_use_the_template() -> None:
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    example = one(row)
    assert counted_text(example) == "Hello<|im_end|>\n"
    assert TOKENIZER.decode(example.input_ids).startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_every_assistant_turn_of_a_conversation_counts() -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    row = {"messages": [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]}
    assert counted_text(one(row)) == "text 2<|im_end|>\ntext 4<|im_end|>\n"
    assert "text 3" in counted_text(one(row, completion_only=False))


def test_preference_rows_with_and_without_prompt_are_the_same() -> None:
    explicit = preference_rows(3)
    implicit = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in explicit]
    results = [renderer().pairs([Row(row, "x") for row in rows], "x") for rows in (explicit, implicit)]
    assert results[0].fingerprint() == results[1].fingerprint()
    chosen, rejected = results[0].items[0]
    assert counted_text(chosen) == "1<|im_end|>\n" and counted_text(rejected) == "no idea <|im_end|>\n"


def test_preference_strings_without_prompt_share_their_start() -> None:
    row = Row({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "x")
    ((chosen, rejected),) = renderer().pairs([row], "x").items
    assert counted_text(chosen) == " blue.<|im_end|>" and counted_text(rejected) == " green.<|im_end|>"


def test_truncation_never_leaves_an_empty_completion() -> None:
    rows = [Row({"prompt": "p" * 20, "completion": "c" * 20}, "x"), Row({"prompt": "p", "completion": "c"}, "x")]
    data = renderer(max_length=16).sequences(rows, "x")
    assert (len(data.items), data.rows, data.dropped, data.truncated) == (1, 2, 1, 1)
    assert "1 dropped: no token that counts within max_length" in data.summary()
    kept = renderer(max_length=16, truncation_mode="keep_end").sequences(rows, "x")
    assert kept.dropped == 0 and counted_text(kept.items[0][0]) == "c" * 14 + "<|im_end|>"
    with pytest.raises(InputError, match=r"none of 1 rows has a token that counts within max_length=16"):
        renderer(max_length=16).sequences(rows[:1], "data.jsonl")


def test_a_tie_is_dropped_and_counted() -> None:
    """Equal answers have no gradient, and neither have answers that are equal in all that is left of them."""
    rows = [{"prompt": "x", "chosen": "a", "rejected": b} for b in ("b", "a")]
    rows += [{"prompt": "p" * 6, "chosen": "c" * 20 + end, "rejected": "c" * 20} for end in ("d", "e")]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows += [{"chosen": talk, "rejected": talk}]
    data = renderer(max_length=16).pairs([Row(row, "x") for row in rows[:4]], "x")
    assert (len(data.items), data.rows, data.dropped, data.ties, data.kept) == (1, 4, 0, 3, (0,))
    assert "3 dropped: chosen and rejected are the same tokens" in data.summary()
    with pytest.raises(InputError, match=r"x: none of 2 rows has .* chosen and rejected that differ \(2 are the same"):
        renderer().pairs([Row(rows[1], "x"), Row(rows[4], "x")], "x")


def test_a_pair_is_dropped_whole() -> None:
    row = {"prompt": "p" * 6, "chosen": "c", "rejected": "r"}
    long = {"prompt": "p" * 20, "chosen": "c", "rejected": "r" * 20}
    data = renderer(max_length=16).pairs([Row(row, "x"), Row(long, "x")], "x")
    assert len(data.items) == 1 and data.dropped == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"question": "x"},
            r"expected messages, .* or text, or a form of other .*; the columns are \['question'\]; column_",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "--method dpo"),
        ({"text": 3}, "text must be a string, got int"),
        ({"messages": "hello"}, "messages must be a non-empty list of turns, got text"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": [{"content": "x"}]}, "messages, turn 1: expected role and content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn to learn from; the roles are user"),
        ({"messages": [{"role": "user"}]}, "turn 1: content is missing"),
        ({"prompt": "x", "completion": 4}, "completion must be a string or a list of turns, got int"),
    ],
)
def test_malformed_rows_are_reported_with_their_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"data.jsonl, line 7: .*" + message):
        one(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "x", "chosen": "a"}, "rejected missing"),
        ({"prompt": "x", "chosen": "a", "rejected": 4}, "rejected must be a string or a list of turns, got int"),
        ({"chosen": "a", "rejected": [{"role": "user", "content": "x"}]}, "both be strings or both lists"),
        (
            {
                "chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}],
                "rejected": [{"role": "user", "content": "y"}, {"role": "assistant", "content": "a"}],
            },
            "do not begin with the same turn",
        ),
    ],
)
def test_malformed_preference_rows_are_reported(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"line 7: .*" + message):
        renderer().pairs([Row(values, "data.jsonl, line 7")], "data.jsonl")


def test_a_chat_row_needs_a_chat_template() -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    with pytest.raises(InputError, match=r"line 7: .* has no chat template; name one by chat_template_path"):
        one(row, tokenizer=make_tokenizer(chat_template=None))


def test_a_template_that_refuses_or_rewrites_is_reported() -> None:
    row = {"messages": [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]}
    refusing = make_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(InputError, match=r"line 7: .*refuses this row: no system role"):
        one(row, tokenizer=refusing)
    # keeps the last turn's text only, as templates that strip earlier reasoning do
    rewriting = make_tokenizer(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] if loop.last else '' }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"line 7: .*template leaves content out"):
        one(row, tokenizer=rewriting)


def test_splitting_is_disjoint_and_repeatable() -> None:
    rows = [Row({"text": str(i)}, str(i)) for i in range(10)]
    kept, held = split_rows(rows, 0.25, seed=3)
    assert len(held) == 2 and sorted(kept + held, key=lambda row: int(row.origin)) == rows
    assert split_rows(rows, 0.25, seed=3) == (kept, held) and split_rows(rows, 0.25, seed=4) != (kept, held)
    with pytest.raises(InputError, match="leaves no rows"):
        split_rows(rows[:1], 0.5, seed=3)


# Batches


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 60))
def test_best_fit_packs_everything_once_and_wastes_little(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    sizes = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(size <= capacity for size in sizes)
    # at most one pack is half empty: two such would have been one
    assert sum(2 * size <= capacity for size in sizes) <= 1


def test_best_fit_refuses_what_cannot_fit() -> None:
    with pytest.raises(ValueError, match="length 9 is above the capacity 8"):
        best_fit([3, 9], 8)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_an_epoch_reads_every_unit(units: int, batch: int, accumulation: int, world: int) -> None:
    plans = [Sampler(units, batch, accumulation, seed=1, rank=rank, world=world) for rank in range(world)]
    read = []
    for step in range(plans[0].steps_per_epoch):
        shares = [plan.micro_batches(step) for plan in plans]
        assert len({len(share) for share in shares}) == 1  # every process runs equally often
        read += [unit for share in shares for micro in share for unit in micro]
    assert set(read) == set(range(units))
    assert len(read) == units or world > 1
    assert plans[0].order(0) != plans[0].order(1) or units < 5


def pieces() -> list[Piece]:
    ids = [torch.arange(2, 2 + n, dtype=torch.int32) for n in (3, 5, 2)]
    labels = [row.clone() for row in ids]
    for row in labels:
        row[0] = IGNORED
    return [Piece(Example(a, b), {"ref_logprob": a.float()}) for a, b in zip(ids, labels, strict=True)]


def test_padded_batches() -> None:
    batch = padded(pieces(), pad_token=1)
    assert batch.input_ids.tolist() == [[2, 3, 4, 1, 1], [2, 3, 4, 5, 6], [2, 3, 1, 1, 1]]
    assert batch.attention_mask is not None and batch.attention_mask.sum(1).tolist() == [3, 5, 2]
    assert batch.labels[0].tolist() == [IGNORED, 3, 4, IGNORED, IGNORED]
    assert batch.loss_inputs["ref_logprob"][2].tolist() == [2.0, 3.0, 0.0, 0.0, 0.0]
    assert (batch.tokens, batch.counted) == (10, 2 + 4 + 1)
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask"}


def test_packed_and_padding_free_batches_restart_positions() -> None:
    a, b, c = pieces()
    batch = packed([[b, c], [a]], pad_token=1)
    assert batch.position_ids is not None and batch.cu_seqlens is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 10, 14]
    assert batch.attention_mask is None and batch.counted == 7 and batch.tokens == 10
    flat = padding_free([a, b, c])
    assert flat.input_ids.shape == (1, 10) and flat.cu_seqlens is not None
    assert flat.cu_seqlens.tolist() == [0, 3, 8, 10] and flat.counted == 7


def test_a_pair_batch_has_all_chosen_first() -> None:
    data = renderer().pairs([Row(row, "x") for row in preference_rows(3)], "x")
    batch = Loader(data, pad_token=1, flat=False).batch([2, 0])
    lengths = [len(data.items[i][part].input_ids) for part in (0, 1) for i in (2, 0)]
    assert batch.attention_mask is not None and batch.attention_mask.sum(1).tolist() == lengths
    assert consecutive(5, 2) == [[0, 1], [2, 3], [4]]


# Columns that are inputs of the loss


def column(values: Any, **changes: Any) -> torch.Tensor:
    """The column `weight` of a row, as it goes with the predictions of its tokens."""
    row = {"prompt": "ab", "completion": "cde", "weight": values} | changes.pop("row", {})
    return one(row, columns=("weight",), **changes).inputs["weight"]


def test_a_number_is_every_token_s_and_a_list_goes_with_what_the_tokens_are_predicted_from() -> None:
    assert column(0.5).tolist() == [0.5] * 6  # a b c d e and the end
    assert column(True).dtype == torch.bool and column(3).tolist() == [3] * 6
    assert column([1.5, 2.0, 3.0, 4.0]).tolist() == [0.0, 1.5, 2.0, 3.0, 4.0, 0.0]
    assert column([True, False, True, True]).tolist() == [False, True, False, True, True, False]
    assert column([1, 2, 3, 4], row={"prompt": "", "completion": "cde"}).tolist() == [2, 3, 4, 0]


def test_a_cut_keeps_the_values_of_the_tokens_that_it_keeps() -> None:
    assert column([1, 2, 3, 4], max_length=4).tolist() == [0, 1, 2, 3]  # the 3 goes with a prediction that is cut
    assert column([1, 2, 3, 4], max_length=3, truncation_mode="keep_end").tolist() == [3, 4, 0]


def test_a_list_of_turns_goes_with_the_turns() -> None:
    turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "So?"), ("assistant", "Fine")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns], "weight": [0.25, 4.0]}
    example = one(row, columns=("weight",))
    values = example.inputs["weight"]
    counts = (example.labels != IGNORED)[1:]
    first, second = len("Yo") + 2, len("Fine") + 2  # with the end of a turn and its line feed
    assert values[:-1][counts].tolist() == [0.25] * first + [4.0] * second
    assert values[:-1][~counts].abs().max() == 0


def test_the_sides_of_a_pair_have_columns_of_their_own() -> None:
    row = {"prompt": "p", "chosen": "ab", "rejected": "c", "chosen_weight": [1, 2, 3], "rejected_weight": [4, 5]}
    read = renderer(columns=("weight",))
    ((chosen, rejected),) = read.pairs([Row(row | {"weight": 0.5}, "x")], "x").items
    assert chosen.inputs["weight"].tolist() == [1, 2, 3, 0] and rejected.inputs["weight"].tolist() == [4, 5, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 3], "the column weight has 3 values; expected one, or one for each of the 4 tokens that count"),
        ("high", "a number, true or false, or a list of them; got 'high'"),
        ([0.5, None, 1, 2], r"got \[0.5, None, 1, 2\]"),
        ([], r"got \[\]"),
        (None, "got None"),
    ],
)
def test_a_column_of_another_length_or_kind_is_reported_with_its_line(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=r"data.jsonl, line 7: .*" + message):
        column(values)


def test_a_side_without_its_column_is_named() -> None:
    row = {"prompt": "p", "chosen": "ab", "rejected": "c", "chosen_weight": 1.0}
    with pytest.raises(InputError, match=r"line 7: the loss reads the column rejected_weight, .* got None"):
        renderer(columns=("weight",)).pairs([Row(row, "line 7")], "x")


def test_a_column_of_whole_rows_has_one_value() -> None:
    with pytest.raises(InputError, match=r"line 7: the column weight has 4 values; expected one for the row"):
        column([1, 2, 3, 4], single=("weight",))


def test_lists_of_lists_are_padded_to_one_width_in_rows_and_batches() -> None:
    short, long = [[5], [6, 7], [8], [9]], [[1, 2, 3], [1, 2, 3]]
    rows = [
        Row({"prompt": "ab", "completion": "cde", "ids": short}, "x"),
        Row({"prompt": "a", "completion": "b", "ids": long}, "x"),
    ]
    data = renderer(columns=("ids",)).sequences(rows, "x")
    assert data.items[0][0].inputs["ids"].tolist() == [[0, 0], [5, -100], [6, 7], [8, -100], [9, -100], [0, 0]]
    ids = Loader(data, pad_token=1, flat=False).batch([0, 1]).loss_inputs["ids"]
    assert ids.shape == (2, 6, 3) and ids[0, 2].tolist() == [6, 7, -100] and ids[1, 0].tolist() == [1, 2, 3]
    flat = Loader(data, pad_token=1, flat=True).batch([0, 1]).loss_inputs["ids"]
    assert flat.shape == (1, 9, 3) and flat[0, 6].tolist() == [1, 2, 3]


def test_rows_of_one_group_are_read_together() -> None:
    rows = [Row({"prompt": "a", "completion": "b", "group": group}, "x") for group in (7, 3, 7, 3, 9)]
    data = renderer(columns=("group",)).sequences(rows, "x")
    loader = Loader(data, pad_token=1, flat=False, together="group")
    assert loader.units == [[0, 2], [1, 3], [4]]
    assert loader.batch([2, 0]).loss_inputs["group"][:, 0].tolist() == [9, 7, 7]
