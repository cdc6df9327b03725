"""`logitless reward`: the numbers are those of full logits, and the summary those of its rows."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from training_fixtures import completion_rows, make_model, make_options, make_tokenizer, preference_rows, write_jsonl
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from logitless.cli import REWARD_OPTIONS, app
from logitless.training import InputError
from logitless.training.config import TrainOptions
from logitless.training.implicit_reward.command import write_rewards
from logitless.training.implicit_reward.pieces import token_pieces
from logitless.training.implicit_reward.ranking import SHARES
from logitless.training.implicit_reward.summary import PAGE_ROWS
from logitless.training.objective import PatchedEngine
from logitless.training.statistics import auc, wilson_interval
from logitless.types import TokenStats

TOKENIZER = make_tokenizer()


def steep_model(folder: Path, factor: float) -> str:
    """A model that is far from uniform."""
    make_model(folder, tied=False, sharpness=factor)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(
            0.1 * factor * torch.rand(32, generator=torch.Generator().manual_seed(int(factor)))
        )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model and its reference."""
    folder = tmp_path_factory.mktemp("models")
    return steep_model(folder / "model", 30), steep_model(folder / "reference", 20)


def scored(model: str, data: str, *, reference: str | None = None, labels: str | None = None, **changes: Any) -> Any:
    """The rows that are written, and the summary."""
    folder = Path(data).parent
    options = make_options(folder / "run", model, data, **{"teacher_model_name_or_path": reference} | changes)
    summary = write_rewards(options, str(folder / "out.jsonl"), labels=labels)
    assert json.loads((folder / "out.summary.json").read_text()) == summary
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()], summary


@functools.lru_cache
def loaded(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def statistics(folder: str, ids: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and logsumexps of the ids from `start` on, from full float64 logits."""
    with torch.no_grad():
        logits = loaded(folder)(torch.tensor([ids])).logits[0].double()[start - 1 : -1]
    lse = logits.logsumexp(-1)
    return logits.gather(1, torch.tensor(ids[start:])[:, None])[:, 0] - lse, lse


def assert_numbers(
    found: dict[str, Any], ids: list[int], start: int, model: str, reference: str | None, beta: float
) -> None:
    """The formulas of the papers, written down plainly."""
    logprob, lse = statistics(model, ids, start)
    if reference is not None:
        ref_logprob, ref_lse = statistics(reference, ids, start)
        logprob, lse = logprob - ref_logprob, lse - ref_lse
    log_odds, value = beta * logprob, beta * lse
    reward = log_odds + value - torch.cat([value[1:], value.new_zeros(1)])
    expected = {"log_odds": log_odds, "value": value, "q": log_odds + value, "reward": reward}
    expected["returns"] = reward.flip(0).cumsum(0).flip(0)
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]).double(), values, atol=2e-4, rtol=1e-4, msg=name)
    assert found["ids"] == ids[start:] and found["count"] == len(ids) - start
    assert found["sequence_reward"] == pytest.approx(float(log_odds.sum()), abs=1e-3)


def ids_of(row: dict[str, str]) -> tuple[list[int], int]:
    """All ids of a row of strings, and the place of the completion's first."""
    prompt = TOKENIZER(row["prompt"])["input_ids"]
    return [*prompt, *TOKENIZER(row["completion"])["input_ids"], TOKENIZER.eos_token_id], len(prompt)


@pytest.mark.parametrize(("with_reference", "beta"), [(True, None), (True, 0.1), (False, None), (False, 2.0)])
def test_numbers_are_those_of_full_logits(
    models: tuple[str, str], tmp_path: Path, with_reference: bool, beta: float | None
) -> None:
    model, reference = models[0], models[1] if with_reference else None
    data = write_jsonl(tmp_path / "rows.jsonl", completion_rows(6))
    rows, summary = scored(model, data, reference=reference, beta=beta, per_device_eval_batch_size=4)
    assert [row["row"] for row in rows] == list(range(6)) and rows[2]["origin"].endswith("rows.jsonl, line 3")
    for row, found in zip(completion_rows(6), rows, strict=True):
        assert_numbers(found, *ids_of(row), model, reference, beta or 1.0)
        assert found["prompt"] == row["prompt"]
        assert "".join(found["tokens"]) == row["completion"] + TOKENIZER.eos_token
    assert summary["tokens"] == sum(row["count"] for row in rows) and summary["rows_left_out"] == 0
    assert "ranking" not in summary and "preference" not in summary


def test_materialised_logits_give_the_same(models: tuple[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", completion_rows(3))
    ours, _ = scored(models[0], data, reference=models[1])
    theirs, _ = scored(models[0], data, reference=models[1], backend="materialised")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(one["returns"]), torch.tensor(other["returns"]), atol=2e-4, rtol=1e-4)


def test_pairs_have_both_sides_and_a_preference(models: tuple[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", preference_rows())
    rows, summary = scored(models[0], data, reference=models[1], max_length=128)
    for given, row in zip(preference_rows(), rows, strict=True):
        for side in ("chosen", "rejected"):
            turns = [*given["prompt"], *given[side]]
            text = TOKENIZER.apply_chat_template(turns, tokenize=False)
            prompt = TOKENIZER.apply_chat_template(given["prompt"], tokenize=False, add_generation_prompt=True)
            ids = TOKENIZER(text)["input_ids"]
            start = len(TOKENIZER(prompt)["input_ids"])
            stop = start + row[side]["count"]
            assert_numbers(row[side] | {"count": stop - start}, ids[:stop], start, *models, beta=1.0)
        margin = row["chosen"]["sequence_reward"] - row["rejected"]["sequence_reward"]
        assert row["margin"] == margin and row["prefers_chosen"] == (margin > 0)
    won = sum(row["prefers_chosen"] for row in rows)
    assert summary["preference"] == {
        "pairs": 8,
        "prompts": 8,
        "accuracy": won / 8,
        "interval": list(wilson_interval(won, 8)),
        "interval_of": "wilson",
    }
    assert summary["ranking"]["right"] == summary["ranking"]["wrong"] == 8
    first = summary["ranking"]["measures"][0]
    assert first["measure"] == "sequence_reward" and first["auc_within_prompts"] == won / 8


def test_pairs_of_one_prompt_are_resampled_together(models: tuple[str, str], tmp_path: Path) -> None:
    rows = preference_rows(4)
    rows[1]["prompt"] = rows[0]["prompt"]
    _, summary = scored(models[0], write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert summary["preference"]["prompts"] == 3 and summary["preference"]["interval_of"] == "bootstrap"
    assert summary["ranking"]["prompts"] == 3


def label_rows() -> list[dict[str, Any]]:
    """Four answers each to three prompts."""
    return [
        {"prompt": f"{i} + {i} = ", "completion": text, "ok": ok}
        for i in range(3)
        for text, ok in ((str(2 * i), True), (str(2 * i + 1), False), (f"it is {2 * i}", 1), ("no idea", "false"))
    ]


def test_labels_rank_single_answers(models: tuple[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", label_rows())
    rows, summary = scored(models[0], data, reference=models[1], labels="ok", seed=3)
    right = torch.tensor([True, False] * 6)
    assert [row["right"] for row in rows] == right.tolist()
    prompt = torch.arange(3).repeat_interleave(4)
    sums = torch.tensor([row["sequence_reward"] for row in rows])
    found = {each["measure"]: each for each in summary["ranking"]["measures"]}
    assert list(found)[:2] == ["sequence_reward", "mean_log_odds"] and len(found) == 2 + len(SHARES)
    assert summary["ranking"]["prompts"] == 3
    counts = torch.tensor([row["count"] for row in rows])
    for name, score in (("sequence_reward", sums), ("mean_log_odds", sums / counts)):
        assert found[name]["auc"] == pytest.approx(auc(score, right))
        assert found[name]["auc_within_prompts"] == pytest.approx(auc(score, right, prompt))
        low, high = found[name]["interval"]
        assert low <= found[name]["auc"] <= high
    for share in SHARES:
        places = [int(share * (row["count"] - 1) + 0.5) for row in rows]
        values = torch.tensor([row["value"][place] for row, place in zip(rows, places, strict=True)])
        assert found[f"value_at_{share:.0%}"]["auc"] == pytest.approx(auc(values, right))
    again = scored(models[0], data, reference=models[1], labels="ok", seed=3)[1]
    other = scored(models[0], data, reference=models[1], labels="ok", seed=4)[1]
    assert again == summary and other["ranking"] != summary["ranking"]


def test_answers_of_one_kind_have_no_auc(models: tuple[str, str], tmp_path: Path) -> None:
    rows = [row | {"ok": True} for row in completion_rows(3)]
    _, summary = scored(models[0], write_jsonl(tmp_path / "rows.jsonl", rows), labels="ok")
    first = summary["ranking"]["measures"][0]
    assert first["auc"] is None and first["interval"] == [None, None]


def test_conversations_skip_what_does_not_count(models: tuple[str, str], tmp_path: Path) -> None:
    """Between two answers V of the next state is that of the next token that counts."""
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    ((row,), _) = scored(models[0], write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}]), max_length=200)
    assert "".join(row["tokens"]).count("assistant") == 2 and "user" not in "".join(row["tokens"])
    total = sum(row["log_odds"]) + row["value"][0]
    assert sum(row["reward"]) == pytest.approx(total, abs=1e-3)


def test_rows_of_which_nothing_is_left_are_left_out(models: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"prompt": "a long prompt " * 5, "completion": "x", "ok": 1}, {"prompt": "a", "completion": "b", "ok": 0}]
    (found,), summary = scored(models[0], write_jsonl(tmp_path / "rows.jsonl", rows), max_length=16, labels="ok")
    assert found["row"] == 1 and found["right"] is False and summary["rows_left_out"] == 1


@pytest.mark.parametrize("text", ["plain", "a \N{FAMILY} \N{PILE OF POO}\n b", "\N{REPLACEMENT CHARACTER}x", " lead"])
def test_pieces_put_together_are_the_text(text: str) -> None:
    """The tokenizer has one token a byte; a character stands where its last byte is."""
    ids = TOKENIZER(text)["input_ids"]
    pieces = token_pieces(TOKENIZER, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    if text.isascii():
        assert pieces == list(text)


def test_pieces_of_broken_bytes_are_shown() -> None:
    whole = TOKENIZER("\N{PILE OF POO}")["input_ids"]
    assert token_pieces(TOKENIZER, whole)[:3] == ["", "", ""]
    assert "\N{REPLACEMENT CHARACTER}" in "".join(token_pieces(TOKENIZER, [*whole[:2], *TOKENIZER("ab")["input_ids"]]))
    assert len(token_pieces(TOKENIZER, whole[:1] * 9)) == 9


# Command line


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reward", *arguments])  # type: ignore[return-value]


def text_of(result: Result) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def test_the_command_writes_all_files(models: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = write_jsonl(tmp_path / "pairs.jsonl", preference_rows())
    out = tmp_path / "deep" / "out.jsonl"
    files = ("--output", str(out), "--html", str(tmp_path / "page.html"), "--png", str(tmp_path / "plot.png"))
    result = run("--model", models[0], "--reference", models[1], data, *files, "--beta", "0.1", "--use_cpu")
    assert result.exit_code == 0, result.output
    assert len(out.read_text().splitlines()) == 8
    summary = json.loads((tmp_path / "deep" / "out.summary.json").read_text())
    assert (summary["model"], summary["reference"], summary["beta"]) == (*models, 0.1)
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert f"chosen answer preferred: {summary['preference']['accuracy']:.3f}" in text_of(result)
    assert "value_at_25%" in text_of(result)


def test_names_of_train_and_a_file_serve_too(models: tuple[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", completion_rows(2))
    file = tmp_path / "a.yaml"
    file.write_text(
        f"model_name_or_path: {models[1]}\ndataset_name: nowhere.jsonl\nuse_cpu: true\nlearning_rate: 1e-5\n"
    )
    outputs = [str(tmp_path / f"{number}.jsonl") for number in range(3)]
    assert run("-c", str(file), "--model_name_or_path", models[0], data, "--output", outputs[0]).exit_code == 0
    flags = ("--torch_dtype", "float32", "--dataset_name", data, "--output", outputs[1])
    assert run("--model", models[0], "--use_cpu", *flags).exit_code == 0
    assert run("--torch_dtype", "float32", data, "-c", str(file), "--output", outputs[2]).exit_code == 0
    first, second, third = (Path(output).read_text() for output in outputs)
    assert first == second != third


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--output", "a.csv", "x.jsonl"), "output: expected a name that ends in .jsonl, got 'a.csv'"),
        (("--html", "a.txt", "x.jsonl"), "html: expected a name that ends in .html, got 'a.txt'"),
        (("--png", "a.jpg", "x.jsonl"), "png: expected a name that ends in .png, got 'a.jpg'"),
        (("--beta", "0", "x.jsonl"), "beta must be positive, got 0.0"),
        (("x.jsonl", "y.jsonl"), "command line: expected an option (--name), got 'y.jsonl'"),
        (("--max_steps", "3", "x.jsonl"), "--max_steps is an option of train, and of no use to this command"),
        (("--refrence", "3", "x.jsonl"), "command line: unknown option --refrence"),
        ((), "--dataset_name is required"),
        (("no-such.jsonl",), "no-such.jsonl"),
    ],
)
def test_what_cannot_be_read_is_refused(models: tuple[str, str], flags: tuple[str, ...], message: str) -> None:
    result = run("--output", "out.jsonl", "--model", models[0], *flags)
    assert result.exit_code == 2 and message in text_of(result)


def test_options_are_those_of_a_run() -> None:
    shown = set(re.findall(r"--([a-z0-9_]+)", text_of(CliRunner().invoke(app, ["reward", "--help"], env=WIDE))))  # type: ignore[arg-type]
    assert {*REWARD_OPTIONS, "model", "reference", "output", "labels", "html", "png", "config"} <= shown
    assert set(REWARD_OPTIONS) <= set(TrainOptions.__dataclass_fields__)


WIDE = {"COLUMNS": "300", "TERMINAL_WIDTH": "300"}


# Faults


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (preference_rows(2), "ok", r"labels: .*pairs.jsonl has pairs, whose sides say"),
        (completion_rows(2), "ok", r"line 1: labels: expected a column ok; the columns are \['completion', 'prompt'\]"),
        ([row | {"ok": 2} for row in completion_rows(2)], "ok", r"line 1: ok: expected true or false, 1 or 0, got 2"),
        ([row | {"ok": [1]} for row in completion_rows(2)], "ok", r"line 1: ok: expected true or false.*\[1\]"),
        ([*preference_rows(1), *completion_rows(1)], None, r"line 2: chosen and rejected missing"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], None, r"line 2: expected messages"),
    ],
)
def test_bad_rows_are_named(
    models: tuple[str, str], tmp_path: Path, rows: list[Any], labels: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        scored(models[0], write_jsonl(tmp_path / "pairs.jsonl", rows), labels=labels)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_reference_of_other_ids_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    other = make_model(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    file.write_text(json.dumps(tokenizer))
    data = write_jsonl(tmp_path / "rows.jsonl", completion_rows(2))
    with pytest.raises(InputError, match=r"the reference has another tokenizer: .* expected a reference with the same"):
        scored(models[0], data, reference=other)


def test_a_token_without_probability_is_named(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may ban a token by a bias of -inf."""
    ask = PatchedEngine.stats

    def banned(*arguments: Any) -> TokenStats:
        stats = ask(*arguments)
        assert stats.logprob is not None
        return stats._replace(logprob=stats.logprob.masked_fill(arguments[2].input_ids.roll(-1, 1) == TWO, -torch.inf))

    monkeypatch.setattr(PatchedEngine, "stats", banned)
    data = write_jsonl(tmp_path / "rows.jsonl", completion_rows(3))
    with pytest.raises(
        InputError, match=r"rows.jsonl, line 2: a token's reward is not finite: a model gives it no prob"
    ):
        scored(models[0], data, reference=models[1])
    assert not (tmp_path / "out.jsonl").exists()


TWO = TOKENIZER.convert_tokens_to_ids("2")


def test_an_interrupted_run_leaves_the_old_file(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", completion_rows(4))
    (tmp_path / "out.jsonl").write_text("old")
    from logitless.training.implicit_reward.scores import Scorer

    ask, answers = Scorer.__call__, []

    def interrupted(*arguments: Any) -> Any:
        answers.append(ask(*arguments))
        if len(answers) == 2:
            raise KeyboardInterrupt
        return answers[-1]

    monkeypatch.setattr(Scorer, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scored(models[0], data, per_device_eval_batch_size=2)
    assert (tmp_path / "out.jsonl").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_a_page_shows_the_first_rows_and_says_so(models: tuple[str, str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", completion_rows(PAGE_ROWS + 3))
    options = make_options(tmp_path / "run", models[0], data, per_device_eval_batch_size=64)
    write_rewards(options, str(tmp_path / "out.jsonl"), html=str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<section>") == PAGE_ROWS and f"the first {PAGE_ROWS} rows" in page
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == PAGE_ROWS + 3
