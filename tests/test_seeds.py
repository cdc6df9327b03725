"""`logitless train --seeds`: one run a seed, kept when it is started again, and the spread of their metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from training_fixtures import completion_rows, make_model, make_options, write_jsonl
from typer.testing import CliRunner

from logitless.cli import app
from logitless.training import InputError, NonFiniteLossError, TrainOptions, seeds
from logitless.training.metrics import read_metrics
from logitless.training.seeds import over_seeds, read_seeds, student_t, train_seeds


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("seeds")
    return make_model(folder / "model"), write_jsonl(folder / "rows.jsonl", completion_rows())


def options(folder: Path, places: tuple[str, str], **changes: Any) -> TrainOptions:
    return make_options(folder / "run", *places, **{"max_steps": 2, "eval_fraction": 0.3} | changes)


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "seeds.json").read_text())
    return found


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622),
                                            (30, 2.0423), (100, 1.9840)])  # fmt: skip
def test_students_quantile_is_that_of_the_tables(degrees: int, t: float) -> None:
    assert student_t(degrees) == pytest.approx(t, abs=5e-5)


def test_the_spread_of_worked_values() -> None:
    """Mean 2, deviation 1, t of two degrees 4.3027: 2 -+ 4.3027 / sqrt 3."""
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.std, found.runs) == (2.0, 1.0, 3)
    assert found.interval == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)
    one = over_seeds([5.0])
    assert one.mean == 5.0 and math.isnan(one.std) and math.isnan(one.interval.low)
    assert math.isnan(over_seeds([1.0, math.nan]).mean)


def test_each_seed_is_the_run_that_it_would_be_alone(tmp_path: Path, places: tuple[str, str]) -> None:
    from logitless.training import train

    found = train_seeds(options(tmp_path, places), (3, 7))
    train(options(tmp_path / "alone", places, seed=7))
    for alone, among in zip(
        read_metrics(tmp_path / "alone" / "run"), read_metrics(tmp_path / "run" / "seed-7"), strict=True
    ):
        assert alone.get("loss") == among.get("loss") and alone.get("eval_loss") == among.get("eval_loss")
    losses = [read_metrics(tmp_path / "run" / f"seed-{seed}")[-1]["eval_loss"] for seed in (3, 7)]
    assert losses[0] != losses[1]
    assert found["eval_loss"] == over_seeds(losses)
    written = content(tmp_path)
    assert [written["runs"][name]["eval_loss"] for name in ("3", "7")] == losses
    assert written["metrics"]["eval_loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert not {"step", "learning_rate", "eval_runtime"} & set(written["metrics"])
    assert (tmp_path / "run" / "seed-3" / "model.safetensors").is_file()


def test_runs_that_ended_are_not_run_again(
    tmp_path: Path, places: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three fails; with resume, the first is kept, and the other two are run."""
    ran: list[int] = []
    real = seeds.train

    def failing(run: TrainOptions) -> Any:
        ran.append(run.seed)
        if run.seed == 1 and ran.count(1) == 1:
            raise NonFiniteLossError("step 1: the loss is nan")
        return real(run)

    monkeypatch.setattr(seeds, "train", failing)
    with pytest.raises(NonFiniteLossError):
        train_seeds(options(tmp_path, places), (0, 1, 2))
    assert list(content(tmp_path)["runs"]) == ["0"]
    train_seeds(options(tmp_path, places, resume=True), (0, 1, 2))
    assert ran == [0, 1, 1, 2] and set(content(tmp_path)["runs"]) == {"0", "1", "2"}
    train_seeds(options(tmp_path, places), (0,))
    assert ran[4:] == [0]  # without resume everything begins again


def test_other_options_are_no_more_of_the_same_runs(tmp_path: Path, places: tuple[str, str]) -> None:
    train_seeds(options(tmp_path, places), (0,))
    with pytest.raises(InputError, match=r"seeds.json: learning_rate was 0.001 in the runs that ended, and is 0.1"):
        train_seeds(options(tmp_path, places, resume=True, learning_rate=0.1), (0, 1))


@pytest.mark.parametrize("text", ["", "a,b", "1,1", "1.5"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="seeds: expected"):
        read_seeds(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume_from_checkpoint": "run/checkpoint-1"}, "resume_from_checkpoint: a checkpoint is one run's"),
        ({"seed": 3}, "seed: --seeds names the seeds"),
    ],
)
def test_options_of_one_run(tmp_path: Path, places: tuple[str, str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_seeds(options(tmp_path, places, **changes), (0, 1))


def test_a_launcher_is_refused(tmp_path: Path, places: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without a launcher"):
        train_seeds(options(tmp_path, places), (0, 1))


def test_the_command_line(tmp_path: Path, places: tuple[str, str]) -> None:
    flags = ["--model_name_or_path", places[0], "--dataset_name", places[1], "--output_dir", str(tmp_path / "run")]
    more = ["--max_steps", "1", "--save_strategy", "no", "--use_cpu", "--seeds", "0,1"]
    result = CliRunner().invoke(app, ["train", *flags, *more])
    assert result.exit_code == 0, result.output
    assert "2 seeds: 0, 1" in result.output and "95% interval" in result.output
    result = CliRunner().invoke(app, ["train", *flags, *more[:-1], "0,0"])
    assert result.exit_code == 2 and "seeds: expected at least one, each once, got '0,0'" in result.output
