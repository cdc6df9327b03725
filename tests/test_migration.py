"""docs/migration.md: every row of its tables is run, and every loss of Liger and TRL stands in one of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib.util import find_spec

import pytest
import torch
from interpreter import run_suite
from migration_peers import INTERPRETED, SECTIONS, of_cut_cross_entropy
from migration_rows import HEADER, NONE, PAGE, Row, check_row, names_of_page, read_rows

ROWS = read_rows()
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("row", [row for row in ROWS if row.section not in INTERPRETED], ids=str)
def test_a_row_is_right(row: Row) -> None:
    if re.search(r"F\.linear_cross|nn\.LinearCross", row.theirs) and not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("torch 2.13 has the first linear_cross_entropy")
    check_row(row, *SECTIONS[row.section])


@pytest.mark.slow  # Triton's interpreter takes half of the file's time
@pytest.mark.skipif(not find_spec("triton") or not find_spec("liger_kernel"), reason="Liger's kernels are Triton's")
def test_the_rows_of_ligers_kernels_are_right() -> None:
    run_suite("migration_suite", "not slow")


def test_every_table_is_read() -> None:
    """No row of three columns is missed: each begins with code, under a heading that has a peer."""
    assert {row.section for row in ROWS} == set(SECTIONS)
    lines = [line for line in TEXT.splitlines() if line.startswith("| `") and line.count(" | ") == 2]
    assert len(ROWS) == len(lines) and TEXT.count(HEADER) == len(SECTIONS)
    assert len({(row.section, row.theirs, row.ours) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("`F.cross_entropy(flat_logits, flat_targets)`", "`2 * linear_cross_entropy(hidden, weight, targets)`"),
        ("`logits.detach().sum()`", "`linear_cross_entropy(hidden, weight, targets)`"),
        ("`F.cross_entropy(flat_logits, flat_targets)`", "`linear_cross_entropy(hidden, weight.detach(), targets)`"),
        ("`F.cross_entropy(flat_logits, flat_targets)`", "`linear_cross_entropy(hidden, weight, targets)[None]`"),
    ],
)
def test_a_wrong_row_fails(theirs: str, ours: str) -> None:
    with pytest.raises(AssertionError):
        check_row(Row("", 1, theirs, ours, ""), *SECTIONS["Cut Cross-Entropy"])


def test_a_row_without_a_counterpart_says_why() -> None:
    theirs = "`F.cross_entropy(flat_logits, flat_targets)`"
    with pytest.raises(AssertionError, match="says why"):
        check_row(Row("", 1, theirs, NONE, ""), *SECTIONS["Cut Cross-Entropy"])
    with pytest.raises(NameError):
        check_row(Row("", 1, "`no_such_call()`", NONE, "Why."), *SECTIONS["Cut Cross-Entropy"])


def test_liger_is_complete() -> None:
    """Every public loss of Liger is named, with all options."""
    liger = pytest.importorskip("liger_kernel.transformers")
    chunked = pytest.importorskip("liger_kernel.chunked_loss")
    section = "\n".join(row.theirs + row.note for row in ROWS if row.section.startswith("Liger")) + TEXT
    losses = {
        name: value
        for module in (liger, chunked)
        for name, value in vars(module).items()
        if inspect.isclass(value) and re.search("Loss$|JSD$|Entropy$", name)
    }
    assert len(losses) > 15
    for name, value in losses.items():
        assert f"`{name}(" in section or f"({name}(" in section or f" {name}(" in section, name
        for option in inspect.signature(value).parameters:
            known = f"{option}=" in section or f"`{option}`" in section
            assert known or option in ("ignore_index", "reduction", "args", "kwargs"), (name, option)


def test_trls_loss_types_are_complete() -> None:
    """Every loss type has a row that the help of a configuration lists."""
    trl = pytest.importorskip("trl")
    rows = "\n".join(row.theirs for row in ROWS if row.section == "TRL")
    for config in (trl.SFTConfig, trl.DPOConfig, trl.KTOConfig, trl.GRPOConfig):
        (field,) = (field for field in dataclasses.fields(config) if field.name == "loss_type")
        names = set(re.findall(r"`'(\w+)'`", field.metadata["help"])) - {"nll", "kto", "dapo", "sigmoid"}
        for name in names:
            assert f'"{name}"' in rows, (config.__name__, name)


def test_the_formula_of_cut_cross_entropy_is_the_packages() -> None:
    package = pytest.importorskip("cut_cross_entropy")
    own = of_cut_cross_entropy({})["cut_cross_entropy"]
    names = names_of_page()
    for options in ({}, {"shift": True}, {"softcap": 2.0, "reduction": "sum"}, {"shift": True, "reduction": "none"}):
        found, expected = (
            module.linear_cross_entropy(
                names["hidden"], names["weight"], names["labels"], impl="torch_compile", **options
            )
            for module in (own, package)
        )
        torch.testing.assert_close(found, expected)
