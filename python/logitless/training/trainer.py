"""The training loop.

    for every step:  read its micro-batches  ->  loss of each over the step's token (pair) count  ->  backward
                     clip  ->  AdamW  ->  log, evaluate, checkpoint

Everything a step depends on is in the options, the data, the weights, the optimizer's moments and the generators, so a
checkpoint that holds them continues the run bit for bit on a CPU.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.nn.parallel import DistributedDataParallel

from logitless.losses import Loss, PairLoss
from logitless.training import checkpoint, files, model, parallel, reference
from logitless.training.batching import Batch, Plan
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError, NonFiniteLossError
from logitless.training.evaluation import PREFERENCE_METRICS, evaluate
from logitless.training.feeding import Feeder, load_data
from logitless.training.metrics import Record, Reporter, peak_memory, reset_peak_memory
from logitless.training.objective import Engine, Linear, Materialised, Objective, count, reads_sequences
from logitless.training.optimizer import learning_rate, make_optimizer, peak_learning_rate, set_learning_rate
from logitless.training.setup import (
    find_checkpoint,
    identity,
    prepared_source,
    require_same,
    seed,
    stored_reference,
    use_bf16,
)
from logitless.types import BackendName, BackwardName


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
        InputError: options, data or model that can not be used.
        NonFiniteLossError: a loss or gradient became NaN or infinite.
    """
    options.require_inputs()
    world = parallel.start(options.use_cpu)
    try:
        return Trainer(options, world).run()
    finally:
        parallel.stop(world)


class Trainer:
    """One run: everything it needs, put together from the options."""

    def __init__(self, options: TrainOptions, world: parallel.World) -> None:
        self.options, self.world, self.device = options, world, world.device
        self.loss: Loss = options.make_loss()
        self.output = Path(options.output_dir)
        resumed = find_checkpoint(options)
        self.state: dict[str, Any] = (
            {"step": 0, "num_tokens": 0, "window": []} if resumed is None else checkpoint.load_state(resumed)
        )
        seed(options.seed)

        source = prepared_source(options, world)
        if Path(source).is_dir():  # a download's bars stay
            model.hide_progress_bars()
        self.tokenizer = model.load_tokenizer(source, options)
        self.data, self.eval_data = load_data(options, self.tokenizer, self.loss)
        self.identity = identity(options, self.data.fingerprint(), world)
        if resumed is not None:
            require_same(self.state["identity"], self.identity, resumed)

        engine = Materialised if options.backend == "materialised" else Linear
        self.engine: Engine = engine(self.loss, self.device, use_bf16(options, self.device), options.max_length)
        self.model = self._load_trained(source, resumed)
        self.feeder, self.eval_feeder = self._feeders()
        self.reference = self._reference(source)
        self.optimizer = make_optimizer(self.model, options)
        self.plan = Plan(
            len(self.feeder.units),
            options.per_device_train_batch_size,
            options.gradient_accumulation_steps,
            options.seed,
            world.rank,
            world.size,
        )
        epochs_of_steps = math.ceil(options.num_train_epochs * self.plan.steps_per_epoch)
        self.total_steps = options.max_steps if options.max_steps > 0 else epochs_of_steps
        self.reporter = self._reporter()
        if resumed is not None:
            checkpoint.restore(resumed, self.model, self.optimizer, world)
            self.reporter.say(f"resumed from {resumed}")

    # Setting up

    def _patched(self, plain: Any) -> Any:
        if self.options.backend == "materialised":
            return plain
        from logitless.integrations.transformers import patch

        try:
            strategy = cast(BackwardName, self.options.backward)
            return patch(plain, loss=self.loss, backend=cast(BackendName, self.options.backend), backward=strategy)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.options.model_name_or_path}: {error}") from error

    def _load_trained(self, source: str, resumed: Path | None) -> Any:
        """The model to train, from the checkpoint where there is one."""
        options = self.options
        full_checkpoint = str(resumed) if resumed is not None and not options.use_peft else source
        trained = self._patched(model.load_model(full_checkpoint, options, self.device, frozen=options.use_peft))
        if options.use_peft:
            trained = model.add_lora(trained, options, resumed)
        if options.disable_dropout or (options.disable_dropout is None and reference.needs_reference(self.loss)):
            model.disable_dropout(trained)
        if options.gradient_checkpointing:
            model.checkpoint_activations(trained)
        self._confirm(trained)
        self.parallel: Any = DistributedDataParallel(trained) if self.world.size > 1 else trained
        return trained

    def _confirm(self, trained: Any) -> None:
        """Has the patch compare itself with the model's logits now, before data and time are spent."""
        ids = torch.tensor([[1, 2, 3]], device=self.device)
        try:
            with torch.no_grad():
                self.engine.stats(trained, Batch(ids, ids), ("logprob",))
        except ValueError as error:
            raise InputError(f"{self.options.model_name_or_path}: {error}") from error

    def _feeders(self) -> tuple[Feeder, Feeder | None]:
        options = self.options
        flash = model.uses_flash_attention(self.model)
        flat = flash if options.padding_free is None else options.padding_free
        if options.packing and reads_sequences(self.loss):
            raise InputError(f"packing: {self.loss.name} looks at whole sequences; use --padding_free instead")
        if options.packing or flat:
            model.check_packing(self.model)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        # flash attention finds boundaries in a single row only
        train = Feeder(
            self.data, pad, flat or (options.packing and flash), options.max_length if options.packing else None
        )
        return train, None if self.eval_data is None else Feeder(self.eval_data, pad, flat)

    def _reference(self, source: str) -> reference.Reference | None:
        """The model to ask during training, or None where the loss needs none or its values are stored."""
        names = reference.reference_inputs(self.loss)
        if not reference.needs_reference(self.loss):
            return None
        hidden = self._hidden_of_reference() if self.loss.compares_distributions else None
        teacher = self.options.teacher_model_name_or_path
        if self.options.use_peft and not self.options.precompute_ref_log_probs and teacher is None:
            return reference.Reference(self.engine.stats, self.model, names, hidden)
        if teacher is not None:
            source = prepared_source(dataclasses.replace(self.options, model_name_or_path=teacher), self.world)
        frozen = self._patched(model.load_model(source, self.options, self.device, frozen=True))
        if frozen.get_output_embeddings().weight.shape[0] != self.model.get_output_embeddings().weight.shape[0]:
            raise InputError(f"teacher_model_name_or_path: {teacher} has another vocabulary than the trained model")
        asked = reference.Reference(self.engine.stats, frozen, names, hidden)
        if not self.options.precompute_ref_log_probs:
            return asked
        for feeder in (self.feeder, self.eval_feeder):
            if feeder is not None:
                feeder.stored = stored_reference(asked, feeder, self.options, self.world)
        del asked, frozen
        gc.collect()
        return None

    def _hidden_of_reference(self) -> Callable[[Any, Batch], dict[str, Any]]:
        """How a distribution loss's reference is asked; what cannot be is an error."""
        if self.options.precompute_ref_log_probs:
            raise InputError(f"precompute_ref_log_probs: {self.loss.name} compares distributions, which are not stored")
        if not isinstance(self.engine, Linear):
            raise InputError(f"backend: {self.loss.name} compares distributions, which 'materialised' does not")
        return self.engine.hidden

    def _reporter(self) -> Reporter:
        self.output.mkdir(parents=True, exist_ok=True)
        if self.world.is_main:
            files.clean(self.output)
        reporter = Reporter(
            self.output,
            report_to=self.options.report_to,
            resumed_step=self.state["step"],
            total_steps=self.total_steps,
            is_main=self.world.is_main,
        )
        reporter.say(self._description())
        reporter.say(f"training data: {self.data.summary()}")
        if self.eval_data is not None:
            reporter.say(f"evaluation data: {self.eval_data.summary()}")
        if self.feeder.capacity is not None:
            reporter.say(f"packing: {len(self.data.items)} rows in {len(self.feeder.units)} packs")
        return reporter

    def _description(self) -> str:
        """What is trained, how, and with what."""
        trainable = sum(parameter.numel() for parameter in self._trainable())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        precision = "bfloat16 autocast" if use_bf16(self.options, self.device) else str(self.model.dtype).split(".")[-1]
        return (
            f"training {self.options.model_name_or_path}: {trainable} of {total} parameters, loss {self.loss}, backend "
            f"{self.options.backend}, {precision} on {self.device}, {self.model.config._attn_implementation} attention"
        )

    # Running

    def run(self) -> TrainResult:
        """Trains from the current step to the last, and saves the model."""
        started = time.perf_counter()
        losses: list[float] = []
        evaluated: dict[str, float] = {}
        model.hide_progress_bars()
        reset_peak_memory(self.device)
        try:
            if self.options.eval_on_start and self.state["step"] == 0:
                self.evaluate(0)
            for step in range(self.state["step"], self.total_steps):
                record = self._step(step)
                losses.append(record["loss"])
                evaluated = self._after(step + 1, record) or evaluated
            self._save_final()
            runtime = time.perf_counter() - started
            mean = math.fsum(losses) / len(losses) if losses else math.nan
            peak = peak_memory(self.device)
            self.reporter.say(f"done: {self.total_steps} steps in {runtime:.1f} s, model in {self.output}")
        finally:
            self.reporter.close()
        return TrainResult(self.total_steps, mean, evaluated, peak, runtime, self.output)

    def _step(self, step: int) -> Record:
        """One optimizer step; returns its metrics."""
        started = time.perf_counter()
        micro = self.plan.micro_batches(step)
        batches = [self.feeder.batch(units) for units in micro]
        normalizer = self.world.sum(sum(count(self.loss, batch) for batch in batches))
        rate = learning_rate(
            step,
            self.total_steps,
            self.options.warmup(self.total_steps),
            peak_learning_rate(self.options, self.loss),
            self.options.lr_scheduler_type,
        )
        set_learning_rate(self.optimizer, rate)
        self.model.train()
        objectives = [
            self._backward(batch, normalizer, index == len(batches) - 1) for index, batch in enumerate(batches)
        ]
        loss = self.world.sum(float(torch.stack([objective.loss for objective in objectives]).sum()))
        self._require_finite("loss", loss, step)
        norm = float(torch.nn.utils.clip_grad_norm_(self._trainable(), self.options.max_grad_norm or math.inf))
        self._require_finite("gradient norm", norm, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = self.world.sum(sum(batch.tokens for batch in batches))
        record: Record = {"loss": loss, "grad_norm": norm, "learning_rate": rate}
        record |= self._preference(objectives, normalizer)
        return record | {"tokens": int(tokens), "seconds": time.perf_counter() - started}

    def _backward(self, batch: Batch, normalizer: float, last: bool) -> Objective:
        """Adds the gradient of a micro-batch; processes exchange gradients at the last one only."""
        batch = self._complete(batch)
        wait: AbstractContextManager[Any] = nullcontext() if last or self.world.size == 1 else self.parallel.no_sync()
        with wait:
            objective = self.engine.objective(self.parallel, batch, normalizer)
            (objective.loss * self.world.size).backward()
        return objective._replace(loss=objective.loss.detach())

    def _complete(self, batch: Batch) -> Batch:
        """The batch on the device, with the reference's values."""
        batch = batch.to(self.device)
        if self.reference is None:
            return batch
        return dataclasses.replace(batch, loss_inputs={**batch.loss_inputs, **self.reference(batch)})

    def _trainable(self) -> Iterable[torch.nn.Parameter]:
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def _preference(self, objectives: list[Objective], pairs: float) -> Record:
        """Means of the preference metrics over all pairs of the step."""
        results = [objective.result for objective in objectives]
        if not isinstance(self.loss, PairLoss):
            return {}
        return {
            name: self.world.sum(sum(float(getattr(result, part).sum()) for result in results)) / pairs
            for name, part in PREFERENCE_METRICS.items()
        }

    def _require_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            saved = checkpoint.checkpoints(self.output)
            kept = f"the newest checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
            raise NonFiniteLossError(
                f"step {step + 1}: the {what} is {value}; the step was not taken, {kept}. Lower --learning_rate, add "
                "--warmup_steps, or look at the rows of this step for extreme values"
            )

    def _after(self, done: int, record: Record) -> dict[str, float]:
        """What is due after a step: log, evaluation, checkpoint. Returns the evaluation's metrics if there was one."""
        options = self.options
        evaluated: dict[str, float] = {}
        self.state["step"] = done
        self.state["num_tokens"] += record["tokens"]
        self.state["window"].append(record)
        self.reporter.advance(done)
        if done == 1 or done % options.logging_steps == 0 or done == self.total_steps:
            self._log(done)
        if self._is_due(done, options.eval_strategy, options.eval_steps or options.logging_steps):
            evaluated = self.evaluate(done)
        if self._is_due(done, options.save_strategy, options.save_steps) and options.save_strategy != "no":
            self._save(done)
        return evaluated

    def _is_due(self, done: int, strategy: str, every: int) -> bool:
        """Whether something happens after step `done`; after the last one everything does."""
        if done == self.total_steps:
            return True
        return strategy != "no" and done % (every if strategy == "steps" else self.plan.steps_per_epoch) == 0

    def _log(self, step: int) -> None:
        """Averages the steps since the last log."""
        window: list[Record] = self.state["window"]
        averaged = [name for name in window[0] if name == "loss" or name in PREFERENCE_METRICS]
        record = self._stamp(step) | {name: math.fsum(r[name] for r in window) / len(window) for name in averaged}
        record |= {name: window[-1][name] for name in ("grad_norm", "learning_rate")}
        record["num_tokens"] = self.state["num_tokens"]
        record["tokens_per_second"] = sum(r["tokens"] for r in window) / sum(r["seconds"] for r in window)
        record["peak_memory"] = peak_memory(self.device)
        self.reporter.record(record)
        self.state["window"] = []

    def _stamp(self, step: int) -> Record:
        return {"step": step, "epoch": step / self.plan.steps_per_epoch}

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluates, records the metrics with `eval_` in front, and returns them; nothing without evaluation data."""
        if self.eval_feeder is None:
            return {}
        started, batch_size = time.perf_counter(), self.options.per_device_eval_batch_size
        found = evaluate(self.model, self.loss, self.engine, self.eval_feeder, self._complete, batch_size, self.world)
        metrics = {f"eval_{name}": value for name, value in found.items()}
        metrics["eval_runtime"] = time.perf_counter() - started
        self.reporter.record(self._stamp(step) | metrics)
        return metrics

    def _save(self, step: int) -> None:
        checkpoint.save(
            self.output,
            step,
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            state=self.state | {"identity": self.identity, "options": self.options.to_dict()},
            world=self.world,
            keep=self.options.save_total_limit,
        )

    def _save_final(self) -> None:
        """The trained model (or adapter) in the output folder itself."""
        if self.world.is_main:
            with files.new_folder(self.output / "final") as unfinished:
                checkpoint.save_model(unfinished, self.model, self.tokenizer)
            files.move_into(self.output / "final", self.output)
            (self.output / "final").rmdir()
        self.world.wait()
