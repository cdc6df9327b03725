"""One run for each of several seeds, one after the other, and what their final metrics have in common.

    output_dir/seed-<seed>/    a run as `logitless train --seed <seed>` leaves it
    output_dir/seeds.json      the final metrics of every run that ended, and over them mean, deviation and interval

A run's seed decides the order of its data, its adapter, dropout and what it samples. The spread over seeds is how much
of a difference between two methods may be chance.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from logitless.training import files
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.metrics import read_metrics
from logitless.training.statistics import LEVEL, Interval
from logitless.training.tables import print_table
from logitless.training.trainer import train

SEEDS_FILE = "seeds.json"
#: What a log line has that is no result.
_NO_RESULTS = ("step", "epoch", "learning_rate", "num_tokens", "tokens_per_second", "peak_memory", "eval_runtime")
#: Options that differ from seed to seed, or from start to start.
_OWN_OF_RUN = ("seed", "output_dir", "resume")


class OverSeeds(NamedTuple):
    """A metric over runs."""

    mean: float
    std: float
    """Of a sample, divided by n - 1; NaN for one run."""
    interval: Interval
    """Student's, of the mean."""
    runs: int


def read_seeds(text: str) -> tuple[int, ...]:
    """The seeds of a text such as `0,1,2`.

    Raises:
        InputError: something else, or a seed that stands twice.
    """
    try:
        seeds = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError as error:
        raise InputError(f"seeds: expected whole numbers with commas between, got {text!r}") from error
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds: expected at least one, each once, got {text!r}")
    return seeds


def train_seeds(options: TrainOptions, seeds: Sequence[int]) -> dict[str, OverSeeds]:
    """Runs a training once for each seed, as `logitless train --seeds` does.

    With `resume` the runs that ended are not run again, and one that was interrupted goes on from its checkpoint.

    Returns:
        Every metric of the last log line and of the last evaluation, over the runs.

    Raises:
        InputError: options that belong to one run, or that are other ones than those of the runs that ended.
        NonFiniteLossError: of a run; those before it are kept.
    """
    _check_one_process(options)
    runs = {seed: dataclasses.replace(options, seed=seed, output_dir=str(Path(options.output_dir) / f"seed-{seed}"))
            for seed in seeds}  # fmt: skip
    path = Path(options.output_dir) / SEEDS_FILE
    shared = {name: value for name, value in options.to_dict().items() if name not in _OWN_OF_RUN}
    shared = json.loads(json.dumps(shared))  # as they are read back
    done = _ended_before(path, shared) if options.resume else {}
    done = {seed: done[seed] for seed in seeds if seed in done}
    for seed, run in runs.items():
        if seed in done:
            print(f"seed {seed}: ended before")
            continue
        print(f"seed {seed}: {len(done) + 1} of {len(seeds)} runs", flush=True)
        train(run)
        done[seed] = final_metrics(Path(run.output_dir))
        files.write_json(path, _as_json_of_runs(shared, done))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    files.write_json(path, _as_json_of_runs(shared, done))
    found = of_all_metrics(list(done.values()))
    print_table(f"{len(done)} seeds: {', '.join(map(str, done))}", ("metric", "mean", "std", "95% interval"),
                [(name, f"{own.mean:.4g}", f"{own.std:.4g}", "{:.4g} to {:.4g}".format(*own.interval))
                 for name, own in found.items()])  # fmt: skip
    return found


def _check_one_process(options: TrainOptions) -> None:
    if options.resume_from_checkpoint is not None:
        raise InputError("resume_from_checkpoint: a checkpoint is one run's; --resume goes on with those of all seeds")
    if options.seed != TrainOptions.seed:
        raise InputError(f"seed: --seeds names the seeds, and --seed {options.seed} another one; give one of them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("seeds: several seeds run one after the other in one process, without a launcher; start a "
                         "launcher once for each --seed")  # fmt: skip


def _ended_before(path: Path, shared: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """The metrics of the runs that the file holds, by seed."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    before = content["options"]
    for name, value in shared.items():
        if before.get(name) != value:
            raise InputError(f"{path}: {name} was {before.get(name)!r} in the runs that ended, and is {value!r}; "
                             "expected the same, or another output_dir")  # fmt: skip
    return {int(seed): metrics for seed, metrics in content["runs"].items()}


def final_metrics(output_dir: Path) -> dict[str, float]:
    """The results of a run: its last log line of training, and its last evaluation."""
    records = read_metrics(output_dir)
    trained = [record for record in records if "loss" in record]
    evaluated = [record for record in records if any(name.startswith("eval_") for name in record)]
    last = {name: value for found in (trained, evaluated) if found for name, value in found[-1].items()}
    return {name: float(value) for name, value in last.items() if name not in _NO_RESULTS}


def of_all_metrics(runs: Sequence[Mapping[str, float]]) -> dict[str, OverSeeds]:
    """Every metric that all runs have, over them."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: over_seeds([run[name] for run in runs]) for name in names}


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean and standard deviation of runs, and the interval `mean -+ t std / sqrt(n)` of the mean.

    t is the quantile of Student's distribution with n - 1 degrees of freedom. Deviation and interval are NaN for one
    value, and everything is if one of them is not finite.
    """
    count, nothing = len(values), Interval(math.nan, math.nan)
    if not all(map(math.isfinite, values)):
        return OverSeeds(math.nan, math.nan, nothing, count)
    mean = fmean(values)
    if count < 2:
        return OverSeeds(mean, math.nan, nothing, count)
    std = stdev(values)
    half = student_t(count - 1) * std / math.sqrt(count)
    return OverSeeds(mean, std, Interval(mean - half, mean + half), count)


def student_t(degrees: int, level: float = LEVEL) -> float:
    """The t that a Student variable stays within, on both sides of 0, with the probability `level`, 0.95 by default.

    By bisection of `P(|T| < sqrt(degrees) tan(angle))`, whose sum is finite.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, degrees) < level else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 if not odd else 3, degrees - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def _as_json_of_runs(shared: Mapping[str, Any], done: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    def known(value: float) -> float | None:
        return value if math.isfinite(value) else None

    over = {
        name: {"mean": known(own.mean), "std": known(own.std), "low": known(own.interval.low),
               "high": known(own.interval.high), "runs": own.runs}
        for name, own in of_all_metrics(list(done.values())).items()
    }  # fmt: skip
    return {"options": shared, "runs": {str(seed): dict(metrics) for seed, metrics in done.items()}, "metrics": over}
