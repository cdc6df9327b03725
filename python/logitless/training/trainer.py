"""The training loop.

    for every step:  for every loss:  read its micro-batches  ->  loss of each over the step's token (pair) count
                                      times the loss's weight  ->  backward
                     clip  ->  AdamW  ->  log, evaluate, checkpoint

Everything a step depends on is in the options, the data, the weights, the optimizer's moments and the generators, so a
checkpoint that holds them continues the run bit for bit on a CPU. `run.prepare` puts a run together.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch

from logitless.losses import PairLoss
from logitless.training import checkpoint, files, parallel
from logitless.training.collate import Batch
from logitless.training.config import TrainOptions
from logitless.training.errors import NonFiniteLossError
from logitless.training.evaluation import PREFERENCE_METRICS, evaluate_loss
from logitless.training.metrics import Record, peak_memory, reset_peak_memory
from logitless.training.model import hide_progress_bars
from logitless.training.objective import Objective
from logitless.training.optimizer import learning_rate, make_optimizer, peak_learning_rate, set_learning_rate
from logitless.training.rollouts.evaluation import evaluate_prompts
from logitless.training.rollouts.prompts import Prompts
from logitless.training.run import Component, Run, prepare
from logitless.training.sharding import gathered_state


class TrainResult(NamedTuple):
    """How a run ended."""

    step: int
    train_loss: float  # mean over the steps of this process
    eval_metrics: dict[str, float]  # of the last evaluation; empty without evaluation data
    peak_memory: int  # bytes
    runtime: float  # seconds, loading not included
    output_dir: Path


def train(options: TrainOptions) -> TrainResult:
    """Runs a training as `logitless train` does.

    Writes to `options.output_dir`: metrics.jsonl, checkpoints, and at the end the model and tokenizer.

    Raises:
        InputError: options, data or model that cannot be used.
        NonFiniteLossError: a loss or gradient became NaN or infinite.
    """
    options.require_inputs()
    world = parallel.start(options.use_cpu)
    try:
        return run_steps(prepare(options, world))
    finally:
        parallel.stop(world)


def run_steps(run: Run) -> TrainResult:
    """Trains from the current step to the last, and saves the model."""
    started, device = time.perf_counter(), run.world.device
    losses: list[float] = []
    eval_metrics: dict[str, float] = {}
    hide_progress_bars()
    reset_peak_memory(device)
    try:
        if run.options.eval_on_start and run.state["step"] == 0:
            evaluate(run, 0)
        for step in range(run.state["step"], run.total_steps):
            record = take_step(run, step)
            losses.append(record["loss"])
            eval_metrics = after_step(run, step + 1, record) or eval_metrics
        _save_final(run)
        runtime, peak = time.perf_counter() - started, peak_memory(device)
        mean = math.fsum(losses) / len(losses) if losses else math.nan
        run.reporter.say(f"done: {run.total_steps} steps in {runtime:.1f} s, model in {run.output}")
    finally:
        run.reporter.close()
    return TrainResult(run.total_steps, mean, eval_metrics, peak, runtime, run.output)


# ---------------------------------------------------------------------------------------------------------------------
# A step


def take_step(run: Run, step: int) -> Record:
    """One optimizer step, from 0; returns its metrics."""
    started, options = time.perf_counter(), run.options
    warmup = options.warmup(run.total_steps)
    peak = peak_learning_rate(options, (component.loss for component in run.components))
    rate = learning_rate(step, run.total_steps, warmup, peak, options.lr_scheduler_type)
    if run.subset.begin(step):
        run.optimizer = make_optimizer(run.subset, options)
    set_learning_rate(run.optimizer, rate)
    run.model.train()
    added = [_add_gradients(run, component, step) for component in run.components]
    loss = weighted_loss(run, [metrics for metrics, _ in added])
    _require_finite(run, step, "loss", loss)
    check = partial(_require_finite, run, step, "gradient norm")
    run.subset.collect()
    norm = run.world.strategy.step(run.parallel, run.optimizer, options.max_grad_norm, check)
    run.subset.write()
    record: Record = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
    for component, (metrics, _) in zip(run.components, added, strict=True):
        record |= component.made_from.named(metrics)
    tokens = run.world.sum(sum(read for _, read in added))
    return record | {"tokens": int(tokens), "seconds": time.perf_counter() - started}


def weighted_loss(run: Run, metrics: Sequence[Record]) -> float:
    """The run's loss: the sum of its components' losses, each times its weight."""
    weights = [component.made_from.weight for component in run.components]
    return math.fsum(weight * each["loss"] for weight, each in zip(weights, metrics, strict=True))


def _add_gradients(run: Run, component: Component, step: int) -> tuple[Record, int]:
    """Adds a component's weighted gradient of a step; returns its metrics, and how many tokens this process read.

    Its loss is normalised over its own micro-batches, so the weights alone say what counts how much.
    """
    batches = component.batches(step)
    normalizer = run.world.sum(sum(map(component.count, batches))) or 1.0  # where nothing counts the sum is 0
    last = len(batches) if component is run.components[-1] else None
    complete = enumerate(component.complete(step, batches), 1)
    objectives = [_add_gradient(run, component, batch, normalizer, number == last) for number, batch in complete]
    loss = run.world.sum(float(torch.stack([objective.loss for objective in objectives]).sum()))
    sampled = {} if component.rounds is None else component.rounds.metrics
    metrics: Record = {"loss": loss} | _preference_metrics(component, objectives, normalizer) | sampled
    return metrics, sum(batch.tokens for batch in batches)


def _add_gradient(run: Run, component: Component, batch: Batch, normalizer: float, last: bool) -> Objective:
    """Adds the gradient of a micro-batch; `last` is the step's very last one."""
    strategy = run.world.strategy
    with strategy.exchange(run.parallel, last):
        objective = component.engine.objective(run.parallel, batch, normalizer)
        strategy.backward(run.parallel, objective.loss * (component.made_from.weight * run.world.size), last)
    return objective._replace(loss=objective.loss.detach())


def _preference_metrics(component: Component, objectives: list[Objective], pairs: float) -> Record:
    """Means of the preference metrics over all pairs of the step."""
    results = [objective.result for objective in objectives]
    if not isinstance(component.loss, PairLoss):
        return {}
    return {
        name: component.world.sum(sum(float(getattr(result, part).sum()) for result in results)) / pairs
        for name, part in PREFERENCE_METRICS.items()
    }


def _require_finite(run: Run, step: int, what: str, value: float) -> None:
    if not math.isfinite(value):
        saved = checkpoint.checkpoints(run.output)
        kept = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
        raise NonFiniteLossError(
            f"step {step + 1}: the {what} is {value}; the step was not taken, {kept}. Lower --learning_rate, add "
            "--warmup_steps, or look at the rows of this step for extreme values"
        )


# ---------------------------------------------------------------------------------------------------------------------
# After a step

#: What a log line has of the last step of its window, or makes of the window in another way.
NOT_AVERAGED = ("grad_norm", "learning_rate", "tokens", "seconds")


def after_step(run: Run, done: int, record: Record) -> dict[str, float]:
    """Logs, evaluates and saves what is due after step `done`; returns the evaluation's metrics if there was one."""
    options, metrics = run.options, {}
    run.follow(done)
    run.state["step"] = done
    run.state["num_tokens"] += record["tokens"]
    run.state["window"].append(record)
    run.reporter.advance(done)
    if done == 1 or done % options.logging_steps == 0 or done == run.total_steps:
        _log(run, done)
    if _is_due(run, done, options.eval_strategy, options.eval_steps or options.logging_steps):
        metrics = evaluate(run, done)
    if _is_due(run, done, options.save_strategy, options.save_steps) and options.save_strategy != "no":
        _save_checkpoint(run, done)
    return metrics


def _is_due(run: Run, done: int, strategy: str, every: int) -> bool:
    """Whether something happens after step `done`; after the last one everything does."""
    if done == run.total_steps:
        return True
    return strategy != "no" and done % (every if strategy == "steps" else run.steps_per_epoch) == 0


def _log(run: Run, step: int) -> None:
    """Records the averages of the steps since the last log."""
    window: list[Record] = run.state["window"]
    averaged = dict.fromkeys(name for each in window for name in each if name not in NOT_AVERAGED)
    record = _stamp(run, step) | {name: _mean_where_known(window, name) for name in averaged}
    record |= {name: window[-1][name] for name in ("grad_norm", "learning_rate")}
    record["num_tokens"] = run.state["num_tokens"]
    record["tokens_per_second"] = sum(r["tokens"] for r in window) / sum(r["seconds"] for r in window)
    record["peak_memory"] = peak_memory(run.world.device)
    run.reporter.record(record)
    run.state["window"] = []


def _mean_where_known(window: Sequence[Record], name: str) -> float:
    """The mean over the steps that have a metric of this name; a round of samples may lack some."""
    return statistics.fmean(each[name] for each in window if name in each)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """Evaluates, records the metrics with `eval_` in front, and returns them; nothing without evaluation data."""
    started = time.perf_counter()
    found = [(component, own) for component in run.components if (own := _evaluated(component, step)) is not None]
    if not found:
        return {}
    every = len(found) == len(run.components) and all("loss" in own for _, own in found)
    whole = {"loss": weighted_loss(run, [own for _, own in found])} if every else {}
    named = whole | {key: value for component, own in found for key, value in component.made_from.named(own).items()}
    metrics = {f"eval_{name}": value for name, value in named.items()}
    metrics["eval_runtime"] = time.perf_counter() - started
    run.reporter.record(_stamp(run, step) | metrics)
    return metrics


def _evaluated(component: Component, step: int) -> dict[str, float] | None:
    """Metrics of a component's held-out data after `step` updates; None where it has none."""
    if component.eval_loader is None:
        return None
    if component.rounds is None:
        return evaluate_loss(component, component.eval_loader)
    return evaluate_prompts(component, component.rounds, cast(Prompts, component.eval_loader.data), step)


def _stamp(run: Run, step: int) -> Record:
    return {"step": step, "epoch": step / run.steps_per_epoch}


def _save_checkpoint(run: Run, step: int) -> None:
    checkpoint.save(
        run.output,
        step,
        model=run.model,
        tokenizer=run.tokenizer,
        settings=run.settings,
        optimizer=run.optimizer,
        subset=run.subset,
        estimated=run.estimated(),
        reference=run.moved_references(),
        state=run.state | {"identity": run.identity, "options": run.options.to_dict()},
        world=run.world,
        keep=run.options.save_total_limit,
    )


def _save_final(run: Run) -> None:
    """Writes the trained model (or adapter) into the output folder itself."""
    weights = gathered_state(run.model, keep=run.world.is_main)
    if run.world.is_main:
        with files.new_folder(run.output / "final") as unfinished:
            run.settings.save(unfinished, run.model, run.tokenizer, weights)
        files.move_into(run.output / "final", run.output)
        (run.output / "final").rmdir()
    run.world.wait()
