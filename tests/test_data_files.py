"""Data files as they come: endings, compression, layouts of JSON, CSV, Parquet; whatever is broken is a sentence."""

from __future__ import annotations

import bz2
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_fixtures import make_tokenizer

from logitless.training import InputError
from logitless.training.data import Row, has_split, read_rows
from logitless.training.render import Renderer

pyarrow = pytest.importorskip("pyarrow")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d\né"}]
TOKENIZER = make_tokenizer()


def _zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstandard,
}


def separated(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(columns: dict[str, Any] | Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow_parquet.write_table(pyarrow.table(columns) if isinstance(columns, dict) else columns, sink)
    return bytes(sink.getvalue())


def contents() -> dict[str, bytes]:
    """`ROWS` in every format, by ending."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    return {
        ".jsonl": lines,
        ".ndjson": lines,
        ".json": json.dumps(ROWS, ensure_ascii=False).encode(),
        ".csv": separated(ROWS, ","),
        ".tsv": separated(ROWS, "\t"),
        ".parquet": parquet({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    }


def read(path: Path, content: bytes | str) -> list[tuple[dict[str, Any], str]]:
    """The rows of a file of this content, and their places behind the file's name."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(dict(row.values), row.origin.removeprefix(f"{path}, ")) for row in read_rows(str(path))]


def refusal(path: Path, content: bytes | str) -> str:
    with pytest.raises(InputError) as caught:
        read(path, content)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    return message.removeprefix(str(path))


# Names


@pytest.mark.parametrize("packed", ["", *PACKERS])
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_ending_is_read_plain_and_compressed_and_in_any_case(tmp_path: Path, ending: str, packed: str) -> None:
    content = contents()[ending]
    content = PACKERS[packed](content) if packed else content
    for name in (f"rows{ending}{packed}", f"ROWS.v2{ending}{packed}".upper()):
        assert [values for values, _ in read(tmp_path / name, content)] == ROWS
        assert not has_split(str(tmp_path / name), "test")


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.gz", "rows.tar.gz", "rows.jsonl.zip", ".jsonl"])
def test_another_ending_is_refused_with_those_that_are_read(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path / name, contents()[".jsonl"])
    assert ".jsonl, .ndjson, .json, .csv, .tsv, .parquet" in message and ".gz, .bz2, .xz, .zst" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}/none.jsonl.gz", "data file not found: .*none.jsonl.gz"),
        ("{}/none", "data file not found"),
        ("./none.txt", "data file not found"),
        ("~/none.data", "data file not found"),
        ("none.txt", "data file not found"),
        ("{}/*.jsonl", "data file not found: .*no pattern and no list"),
        ("a.jsonl,b.jsonl", "no pattern and no list"),
        ("https://example.org/rows.jsonl", "data file not found: https"),
        ("none\0.x", "data file not found"),
        ("n" * 5000, "cannot be read: File name too long"),
        (["a.jsonl", "b.jsonl"], r"expected the name of one file, folder or dataset, got \['a.jsonl', 'b.jsonl'\]"),
    ],
)
def test_a_name_that_nothing_has_is_said_to_be_missing(tmp_path: Path, name: Any, message: str) -> None:
    name = name.format(tmp_path) if isinstance(name, str) else name
    for function in (read_rows, lambda it: has_split(it, "test")):
        with pytest.raises(InputError, match=message):
            function(name)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    expected = {
        "dangling": "is a link to .*gone, which is not there",
        "loop": "symbolic links",
        "folder": "cannot be read as a save_to_disk folder or a folder of data files",
        "pipe": "neither a file nor a folder",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=message):
            read_rows(str(tmp_path / f"{name}.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="everything can be read by root")
def test_a_file_without_permission_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.touch(mode=0o000)
    with pytest.raises(InputError, match=r"cannot be read as .jsonl: Permission denied"):
        read_rows(str(path))


# Content of another kind


@pytest.mark.parametrize("packed", PACKERS)
def test_a_broken_archive_is_reported_with_its_file(tmp_path: Path, packed: str) -> None:
    whole = PACKERS[packed](contents()[".jsonl"] * 500)
    for content in (whole[:-20], whole[:7], b"no archive"):
        assert "cannot be read as .jsonl in " + packed in refusal(tmp_path / f"rows.jsonl{packed}", content)
    assert ": no rows" in refusal(tmp_path / f"empty.jsonl{packed}", PACKERS[packed](b""))


@pytest.mark.parametrize("packed", PACKERS)
def test_an_archive_in_several_parts_is_read_whole(tmp_path: Path, packed: str) -> None:
    parts = b"".join(PACKERS[packed](json.dumps(row).encode() + b"\n") for row in ROWS)
    assert [values for values, _ in read(tmp_path / f"rows.jsonl{packed}", parts)] == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), "gzip data; its name must end in .gz"),
        (_zstandard(b"{}"), "Zstandard data"),
        (bz2.compress(b"{}"), "bzip2 data"),
        (lzma.compress(b"{}"), "xz data"),
        (b"PK\x03\x04....", "ZIP archive"),
        (b"PAR1....", "Parquet"),
        ('{"text": "x"}'.encode("utf-16"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
def test_what_is_no_text_is_named(tmp_path: Path, ending: str, content: bytes, message: str) -> None:
    assert message in refusal(tmp_path / f"rows{ending}", content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', ", line 2: not UTF-8 text: byte 0xe9 at column 11"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xed\xa0\xbd"}\n', ", line 2: not UTF-8 text: byte 0xed"),
        ("a.json", b'[{"text": "x"},\n\n{"text": "\xe9"}]', ", line 3: not UTF-8 text"),
        ("a.csv", b"text\nx\n\xe9\n", ", line 3: not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n' + bytes(40), ", line 2: a NUL byte"),
        ("a.csv", b"text\nx\na\0b\n", ", line 3: a NUL byte"),
        ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le"), ", line 1: a NUL byte"),
    ],
)
def test_text_that_is_not_utf_8_is_reported_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    assert message in refusal(tmp_path / name, content)


# JSON


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("content", "places"),
    [
        ("\n  " + json.dumps(ROWS), ["line 2, row 1", "line 2, row 2"]),
        ("\ufeff\r\n" + json.dumps(ROWS, indent=1), ["line 3, row 1", "line 7, row 2"]),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), ["line 1", "line 5"]),
        ("".join(json.dumps(row) for row in ROWS), ["line 1", "line 1"]),
        ("\r".join(json.dumps(row) for row in ROWS), ["line 1", "line 2"]),
        (json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1], indent=1), ["line 1", "line 2"]),
        (json.dumps({"data": ROWS}, indent=1), ["line 1, data, row 1", "line 1, data, row 2"]),
        (json.dumps({"version": "1", "rows": ROWS}), ["line 1, rows, row 1", "line 1, rows, row 2"]),
        (json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}), ["line 1, row 1", "line 1, row 2"]),
    ],
)
def test_every_layout_of_json_is_read(tmp_path: Path, ending: str, content: str, places: list[str]) -> None:
    assert read(tmp_path / f"rows{ending}", content) == list(zip(ROWS, places, strict=True))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"data": [{"role": "user", "content": "a"}]},
        {"data": [{"from": "human", "value": "a"}]},
        {"conversation": [{"speaker": "a", "text": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"text": "a", "rows": [{"text": "b"}], "weight": [1.0, 2.0]},
        {"prompt": "a", "completion": "b", "weight": [1.0, 2.0]},
        {},
    ],
)
def test_one_object_that_may_be_a_row_is_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    for indent in (None, 1):
        assert read(tmp_path / "rows.json", json.dumps(row, indent=indent)) == [(row, "line 1")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},]', ", line 1, row 2: not valid JSON"),
        ('[{"a": 1}\n{"a": 2}]', ", line 1, row 1: not valid JSON: expected a comma or the array's end"),
        ('[{"a": 1},\n{"a": 2}', ", line 2, row 2: not valid JSON"),
        ('[{"a": 1}]\n[{"a": 2}]', ", line 2: more text behind the array of rows"),
        ('[\n{"a": 1},\n3]', ", line 3, row 2: expected an object with named columns, got int"),
        ('{"a": 1},\n{"a": 2}', ", line 1: not valid JSON: Expecting value (column 9)"),
        ('{\n"a": 1\n"b": 2\n}', ", line 1: not valid JSON: .* read on over several lines: .* (line 3)"),
        ('{"a": 1}\n{"a": "b\n{"a": 3}\n', ", line 2: not valid JSON: Invalid control character"),
        ("{'a': 1}", ", line 1: not valid JSON"),
        ("3", ", line 1: expected an object with named columns, got int"),
        ("null", ", line 1: expected an object with named columns, got NoneType"),
        ("[]", ": no rows"),
        (" \n", ": no rows"),
        ('{"a": ["x", "y"], "b": ["z"]}', ", line 1: columns of different lengths: {'a': 2, 'b': 1}"),
        ('{"a": {"0": "x"}, "b": {"0": "z"}}', ", line 1: one object of objects, named 'a', 'b'; .*orient='records'"),
        ('{"a": 1}\n{"a": 1, "a": 2}', ", line 2: .* the name 'a' stands twice in one object"),
        ('[{"a": 1},\n{"b": {"c": 1, "c": 1}}]', ", line 2, row 2: .* the name 'c' stands twice"),
        ('{"a": 1}\n{"a": ' + "9" * 5000 + "}", ", line 2: a value that cannot be read: .*5000 digits"),
        ('[{"a": 1},\n{"a": ' + "9" * 5000 + "}]", ", line 2, row 2: a value that cannot be read"),
        ('{"a": 1}\n{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", ", line 2: lists or objects are nested too deeply"),
        ('[{"a": 1},\n{"a": ' + '{"a":' * 10**5, ", line 2, row 2: lists or objects are nested too deeply"),
    ],
)
def test_json_that_cannot_be_read_is_reported_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    for name in ("rows.json", "rows.jsonl"):
        found, at = refusal(tmp_path / name, content), 0
        for part in message.split(".*"):
            assert part in found[at:], found
            at = found.index(part, at) + len(part)


def test_numbers_that_json_does_not_have_are_read_as_python_writes_them(tmp_path: Path) -> None:
    ((values, _),) = read(tmp_path / "rows.jsonl", '{"a": NaN, "b": -Infinity, "c": 123456789012345678901234567890}')
    assert str(values) == "{'a': nan, 'b': -inf, 'c': 123456789012345678901234567890}"


# CSV


def test_quotations_of_a_csv_are_read(tmp_path: Path) -> None:
    content = 'prompt,completion\r\nq1,"a\r\n1"\r\n\r\nq2,"say ""hi"""\r\nq3,say "hi"\r\n'
    rows = [("q1", "a\r\n1", "line 2"), ("q2", 'say "hi"', "line 5"), ("q3", 'say "hi"', "line 6")]
    expected = [({"prompt": prompt, "completion": completion}, place) for prompt, completion, place in rows]
    assert read(tmp_path / "rows.csv", content) == expected


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('prompt,completion\nq1,a1\nq2,"a2\nq3,a3\nq4,a4\n', 3),
        ('prompt,completion\nq1,"a\n1"\nq2,"a2\nq3,"a3"\n', 4),
        ('prompt,completion\n"x\ny","a2\nq3,a3\n', 3),
        ('prompt,completion\nq1,a1\nq2,"a2" and more\n', 3),
        ('prompt,completion\r\n"x ""y""\r\n","a ""2""\r\nq3,a3', 3),
        ('"prompt,completion\nq,a\n', 1),
    ],
)
def test_a_quotation_that_is_not_closed_is_reported_with_the_line_where_it_begins(
    tmp_path: Path, content: str, line: int
) -> None:
    assert refusal(tmp_path / "rows.csv", content).startswith(f", line {line}: a quotation begins here that is not")
    assert f", line {line}: a quotation" in refusal(tmp_path / "rows.tsv", content.replace(",", "\t"))


def test_long_cells_are_read_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    limit, text = csv.field_size_limit(), "x" * 300_000
    assert read(tmp_path / "rows.csv", f"text\n{text}\n")[0][0] == {"text": text}
    assert csv.field_size_limit() == limit


def test_an_empty_cell_is_absent_and_one_column_may_have_no_name(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "rows.csv", ",text,prompt,completion\n0,hello,,\n")
    assert row == ({"": "0", "text": "hello", "prompt": None, "completion": None}, "line 2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", ": no rows"),
        ("a.csv", "prompt,completion\n", ": no rows"),
        ("a.csv", 'p,c\n"x\ny",z\na,b,c\n', ", line 4: expected 2 fields as in the header, got 3"),
        ("a.csv", "p,c\na\n", ", line 2: expected 2 fields as in the header, got 1"),
        ("a.csv", "p,c,p\na,b,c\n", ", line 1: the header names 'p' more than once"),
        ("a.csv", "p,c\na,b\np,c\nd,e\n", ", line 3: the header stands here again"),
        ("a.csv", "p;c\na;b\n", ", line 1: the header is one column 'p;c'; expected names with ','"),
        ("a.csv", "p\tc\na\tb\n", ", line 1: the header is one column"),
        ("a.tsv", "p,c\na,b\n", ", line 1: the header is one column"),
    ],
)
def test_a_csv_of_another_shape_is_reported(tmp_path: Path, name: str, content: str, message: str) -> None:
    assert message in refusal(tmp_path / name, content)


# Parquet and saved datasets


def test_arrow_types_are_read_or_reported_with_their_row(tmp_path: Path) -> None:
    mapping = pyarrow.map_(pyarrow.string(), pyarrow.string())
    columns = {
        "dictionary": pyarrow.array(["x", "x"]).dictionary_encode(),
        "large": pyarrow.array(["y", None], pyarrow.large_string()),
        "null": pyarrow.nulls(2),
        "turns": pyarrow.array([[{"role": "user", "content": None}], None]),
        "map": pyarrow.array([[("city", "Paris")], []], mapping),
    }
    (first, _), (second, place) = read(tmp_path / "rows.parquet", parquet(columns))
    assert first == {"dictionary": "x", "large": "y", "null": None, "turns": [{"role": "user", "content": None}],
                     "map": {"city": "Paris"}}  # fmt: skip
    assert (second["large"], second["map"], place) == (None, {}, "row 2")

    not_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    broken = {
        "text": not_text,
        "date": pyarrow.array([10**15], pyarrow.timestamp("ms")),
        "map": pyarrow.array([[("a", "b"), ("a", "c")]], mapping),
    }
    for name, column in broken.items():
        message = refusal(tmp_path / "broken.parquet", parquet({name: column}))
        assert message.startswith(f", row 1: the column {name} (") and "cannot be read" in message


def test_parquet_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    whole = contents()[".parquet"]
    for content in (b"", b"text", b"PAR1" + b"x" * 40 + b"PAR1", b"PARE" + b"x" * 40 + b"PARE", whole[:-20]):
        assert ": not a readable Parquet file" in refusal(tmp_path / "rows.parquet", content)
    twice = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    assert ": columns of one name" in refusal(tmp_path / "rows.parquet", parquet(twice))
    assert ": no rows" in refusal(tmp_path / "rows.parquet", parquet({"a": pyarrow.array([], pyarrow.string())}))


@pytest.mark.parametrize(
    "value", [b"bytes", decimal.Decimal("1.5"), datetime.datetime(2026, 1, 1), 3, [1], {"a": 1}, [("a", 1)]]
)
def test_a_value_of_another_type_in_place_of_text_is_reported(value: Any) -> None:
    for row in ({"text": value}, {"prompt": value, "completion": "b"}, {"messages": value}):
        with pytest.raises(InputError, match=r"^rows.parquet, row 7: "):
            tokenized(row)


@pytest.mark.parametrize("broken", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_a_broken_saved_dataset_is_reported(tmp_path: Path, broken: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / broken).write_bytes(b"junk")
    with pytest.raises(InputError, match=r"saved' \(split 'train'\): cannot be read as a save_to_disk folder"):
        read_rows(str(tmp_path / "saved"))


# Rows, wherever they come from


def tokenized(values: dict[str, Any], **changes: Any) -> Any:
    return Renderer(TOKENIZER, 128, **changes).sequences([Row(values, "rows.parquet, row 7")], "rows.parquet")


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    "values",
    [
        {"text": "cut \ud83d here"},
        {"prompt": "a", "completion": "\udc4d"},
        {"prompt": "a\ud83d", "completion": "b"},
        {"messages": [TURNS[0], TURNS[1] | {"content": "yo\udcff"}]},
        {"messages": TURNS, "tools": [{"name": "f", "parameters": {"cut \ud83d": 1}}]},
        {"text": "whole", "other": ("a", ["b", "\ud83d"])},
        {"text": "whole", "cut\ud83d": 1},
    ],
)
def test_half_a_character_is_refused_with_its_row(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^rows.parquet, row 7: text with half of a character"):
        tokenized(values)


def test_half_a_character_of_either_side_of_a_pair_is_refused() -> None:
    for side in ("prompt", "chosen", "rejected"):
        values = {"prompt": "q", "chosen": "a", "rejected": "b"} | {side: "\ud83d"}
        with pytest.raises(InputError, match=r"^x, line 3: text with half of a character"):
            Renderer(TOKENIZER, 128).pairs([Row(values, "x, line 3")], "x")


def test_a_pair_of_escapes_is_one_character(tmp_path: Path) -> None:
    ((values, _),) = read(tmp_path / "rows.jsonl", '{"text": "\\ud83d\\udc4d"}')
    (((ids, _, _),),) = tokenized(values).items
    assert TOKENIZER.decode(ids) == "\U0001f44d<|im_end|>"


def test_a_row_may_be_nested_as_deep_as_people_write_and_no_deeper() -> None:
    def nested(levels: int) -> Any:
        return [nested(levels - 1)] if levels else "text"

    assert len(tokenized({"text": "a", "other": nested(90)}).items) == 1
    with pytest.raises(InputError, match=r"^rows.parquet, row 7: lists or objects are nested more than 100 levels"):
        tokenized({"text": "a", "other": nested(200)})


# Inputs of the loss


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("-3", -3),
        (" 2e-3 ", 2e-3),
        ("TRUE", True),
        ("False", False),
        ("[0.5, 0.25]", [0.5, 0.25]),
        ("[true, false]", [True, False]),
        ("[[1, 2], [3]]", [[1, 2], [3]]),
        (["1", "0"], [1, 0]),
    ],
)
def test_text_that_is_a_number_is_that_number(text: Any, value: Any) -> None:
    def column(weight: Any) -> Any:
        (((_, _, inputs),),) = tokenized(
            {"prompt": "q", "completion": "a", "weight": weight}, columns=("weight",)
        ).items
        return inputs["weight"]

    assert column(text).dtype == column(value).dtype and column(text).equal(column(value))


def test_a_csv_trains_what_a_jsonl_does(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "advantages": 0.5, "label": True, "weight": [1, 2]},
            {"prompt": "q", "completion": "b", "advantages": -1, "label": False, "weight": [0.5, 1]}]  # fmt: skip
    cells = [row | {"weight": json.dumps(row["weight"])} for row in rows]
    (tmp_path / "rows.csv").write_bytes(separated(cells, ","))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = Renderer(TOKENIZER, 128, columns=("advantages", "desirable", "weight"))
    data = [reader.sequences(read_rows(str(tmp_path / name)), name) for name in ("rows.csv", "rows.jsonl")]
    assert data[0].fingerprint() == data[1].fingerprint()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *((text, "got '") for text in ("much", "1_000", "0x10", "yes", "", "[1", "0,5", "9" * 5000)),
        *((number, "expected finite numbers") for number in ("nan", "Infinity", "-inf", "1e999", "[0.5, NaN]")),
        *((number, "expected finite numbers") for number in (float("nan"), float("inf"), 1e39, [0.5, float("nan")])),
        *((number, "too large") for number in (10**30, 10**300, str(10**30))),
    ],
)
def test_a_number_that_is_none_or_not_finite_is_refused_with_its_row(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^rows.parquet, row 7: .*the column weight.*{message}"):
        tokenized({"prompt": "q", "completion": "a", "weight": value}, columns=("weight",))


def test_the_logarithm_of_a_teacher_s_0_is_a_number() -> None:
    values = {"prompt": "q", "completion": "a", "teacher_tail": [-float("inf"), -1.0]}
    (((_, _, inputs),),) = tokenized(values, columns=("teacher_tail",)).items
    assert inputs["teacher_tail"].tolist() == [-float("inf"), -1.0, 0.0]


# Anything


def gives_rows_or_a_sentence(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        assert all(dict(row.values) is not None for row in read_rows(str(path)))
    except InputError as error:
        assert str(error).startswith(str(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.binary(max_size=200), ending=st.sampled_from(sorted(contents())), packed=st.sampled_from(["", *PACKERS])
)
def test_any_bytes_are_rows_or_a_sentence(tmp_path: Path, content: bytes, ending: str, packed: str) -> None:
    gives_rows_or_a_sentence(tmp_path / f"rows{ending}{packed}", content)
    if packed:
        gives_rows_or_a_sentence(tmp_path / f"rows{ending}{packed}", PACKERS[packed](content))


PIECES = ['"', '"a"', "{", "}", "[", "]", ",", ":", "\n", "\r", " ", "\t", "é", "\\ud83d", "1", "NaN", '{"a": "b"}',
          "null", "\ufeff", "\0", ";"]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=30),
    ending=st.sampled_from(sorted(contents())),
)
def test_any_text_is_rows_or_a_sentence(tmp_path: Path, pieces: list[str], ending: str) -> None:
    gives_rows_or_a_sentence(tmp_path / f"rows{ending}", "".join(pieces).encode())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text("ab", max_size=2), json_values, max_size=3), min_size=2, max_size=4),
    indent=st.sampled_from([None, 1]),
    ascii_=st.booleans(),
)
def test_valid_json_is_read_whatever_its_layout(
    tmp_path: Path, rows: list[dict[str, Any]], indent: int | None, ascii_: bool
) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_)

    for content in (dump(rows), "\n".join(map(dump, rows)), " ".join(map(dump, rows)), dump({"data": rows, "n": 2})):
        assert [values for values, _ in read(tmp_path / "rows.json", content)] == rows
