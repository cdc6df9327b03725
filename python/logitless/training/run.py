"""Everything that a training run needs, put together from its options.

    options ──> loss
       ├─────> model's folder ──> tokenizer ──> rows ──> tokens ──> loaders ──> sampler ──> number of steps
       ├─────> checkpoint to go on from ──> state
       └─────> engine, model to train, reference, optimizer, reporter

A loader collates any batch on demand, and the sampler says which batches a step reads.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from logitless.losses import Loss
from logitless.training import checkpoint, files
from logitless.training.collate import Batch
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.estimates import ESTIMATED_INPUTS, Estimate, current_stats
from logitless.training.loader import Loader, load_data, make_loaders
from logitless.training.metrics import Reporter
from logitless.training.model import hide_progress_bars, load_tokenizer, load_trained, locate_once
from logitless.training.objective import Engine, computes_in_bf16, engine_of, loss_count
from logitless.training.optimizer import make_optimizer
from logitless.training.parallel import World
from logitless.training.reference_model import ReferenceModel, load_reference, stored_values
from logitless.training.resume import find_checkpoint, first_state, identity_of, require_same, seed_generators
from logitless.training.sampler import Sampler


@dataclass
class Run:
    """One training run, ready for its next step."""

    options: TrainOptions
    world: World
    loss: Loss
    tokenizer: Any
    engine: Engine
    model: Any
    parallel: Any  # the model, in DistributedDataParallel where there are several processes
    loader: Loader
    eval_loader: Loader | None
    reference: ReferenceModel | None  # to ask at every batch; None if the loss needs none or its values are stored
    estimates: Mapping[str, Estimate]  # the inputs that the run estimates
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    total_steps: int
    identity: dict[str, Any]  # of the data position, which a resumed run must share
    state: dict[str, Any]  # step, counters, open log window
    reporter: Reporter

    @property
    def output(self) -> Path:
        """The folder of checkpoints, metrics and the trained model."""
        return Path(self.options.output_dir)

    def complete(self, step: int, batches: list[Batch]) -> Iterable[Batch]:
        """The micro-batches of a step on the device, with all inputs of the loss."""
        known = map(self._with_reference, batches)
        if not self.estimates:
            return known  # one after the other: a reference's hidden states are large
        batches = list(known)
        for estimate in self.estimates.values():
            batches = estimate.training(self, step, batches)
        return batches

    def complete_held_out(self, batch: Batch) -> Batch:
        """A batch of evaluation rows on the device, with all inputs of the loss."""
        batch = self._with_reference(batch)
        for estimate in self.estimates.values():
            batch = estimate.evaluation(self, batch)
        return batch

    def count(self, batch: Batch) -> int:
        """What the loss of a batch is divided by."""
        outputs = self.loss.outputs
        return loss_count(self.loss, batch, lambda: current_stats(self, batch.to(self.world.device), outputs))

    def _with_reference(self, batch: Batch) -> Batch:
        batch = batch.to(self.world.device)
        return batch if self.reference is None else batch.with_inputs(**self.reference(batch))

    def estimated(self) -> dict[str, torch.Tensor]:
        """What the estimates keep, of all processes, for a checkpoint."""
        states = {name: estimate.state(self) for name, estimate in self.estimates.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def restore_estimated(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `estimated` gave."""
        for name, estimate in self.estimates.items():
            start = f"{name}/"
            own = {key.removeprefix(start): value for key, value in saved.items() if key.startswith(start)}
            if own:
                estimate.restore(own)

    def moved_reference(self) -> dict[str, torch.Tensor]:
        """The parameters of a reference that follows the trained model; none where there is no such reference."""
        return {} if self.reference is None else self.reference.moved()

    def trainable(self) -> Iterable[torch.nn.Parameter]:
        """The parameters that the optimizer updates."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)


def prepare(options: TrainOptions, world: World) -> Run:
    """The run that the options describe, at step 0 or at the checkpoint that it goes on from.

    Raises:
        InputError: options, data, model or checkpoint that can not be used.
    """
    loss, resumed = options.make_loss(), find_checkpoint(options)
    state = first_state(resumed)
    seed_generators(options.seed)

    source = locate_once(options, world)
    if Path(source).is_dir():  # a download's bars stay
        hide_progress_bars()
    tokenizer = load_tokenizer(source, options)
    sources, data, eval_data = load_data(options, tokenizer, loss, ESTIMATED_INPUTS)
    identity = identity_of(options, data.fingerprint(), world)
    if resumed is not None:
        require_same(state["identity"], identity, resumed)

    engine = engine_of(options, loss, world.device)
    estimates = {name: ESTIMATED_INPUTS[name]() for name in sources.estimates}
    compares = bool(sources.reference or estimates) or loss.compares_distributions
    dropout = not (compares if options.disable_dropout is None else options.disable_dropout)
    model = load_trained(options, source, resumed, loss, world.device, dropout=dropout)
    _confirm(engine, model, options, world.device)
    parallel = DistributedDataParallel(model) if world.size > 1 else model
    loader, eval_loader = make_loaders(options, loss, model, tokenizer.pad_token_id, data, eval_data)
    reference = None
    if options.sync_ref_model and not (sources.reference or loss.compares_distributions):
        raise InputError(f"sync_ref_model: {loss.name} compares with no reference")
    if sources.reference or loss.compares_distributions:
        reference = load_reference(options, world, source, engine, loss, sources.reference, model)
    if loss.lists and options.backend == "materialised":
        raise InputError(f"backend: {loss.name} reads several ids a token, which 'materialised' does not")
    _check_estimates(options, loss, reference, estimates)
    if reference is not None and options.precompute_ref_log_probs:
        for each in (loader, eval_loader):
            if each is not None:
                each.stored = stored_values(reference, each, options, world)
        reference = None
        gc.collect()

    optimizer = make_optimizer(model, options)
    batch_size, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    sampler = Sampler(len(loader.units), batch_size, accumulation, options.seed, world.rank, world.size)
    epochs_of_steps = math.ceil(options.num_train_epochs * sampler.steps_per_epoch)
    total_steps = options.max_steps if options.max_steps > 0 else epochs_of_steps
    reporter = _reporter(options, world, state["step"], total_steps)
    run = Run(
        options, world, loss, tokenizer, engine, model, parallel, loader, eval_loader, reference, estimates, optimizer,
        sampler, total_steps, identity, state, reporter,
    )  # fmt: skip
    _describe(run)
    if resumed is not None:
        checkpoint.restore(resumed, model, optimizer, world)
        run.restore_estimated(checkpoint.load_estimated(resumed))
        checkpoint.restore_reference(resumed, run.moved_reference())
        reporter.say(f"resumed from {resumed}")
    return run


def _check_estimates(
    options: TrainOptions, loss: Loss, reference: ReferenceModel | None, estimates: Mapping[str, Estimate]
) -> None:
    """Refuses a run in which an input cannot be estimated."""
    for name, estimate in estimates.items():
        if not estimate.asks_reference:
            continue
        rows = options.per_device_train_batch_size * options.gradient_accumulation_steps
        if rows < 2:
            raise InputError(f"{loss.name}: {name} is estimated from steps of two rows at least; a column can give it")
        if reference is None or options.precompute_ref_log_probs:
            without = "precompute_ref_log_probs" if reference is not None else "the column ref_logprob"
            raise InputError(f"{loss.name}: {name} is estimated with the reference model, which {without} leaves out; "
                             f"a column {name} can give it")  # fmt: skip


def _confirm(engine: Engine, model: Any, options: TrainOptions, device: torch.device) -> None:
    """Has the patch compare itself with the model's logits now, before data and time are spent."""
    ids = torch.tensor([[1, 2, 3]], device=device)
    try:
        with torch.no_grad():
            engine.stats(model, Batch(ids, ids), ("logprob",))
    except ValueError as error:
        raise InputError(f"{options.model_name_or_path}: {error}") from error


def _reporter(options: TrainOptions, world: World, resumed_step: int, total_steps: int) -> Reporter:
    """The reporter of a run, in an output folder without the leftovers of killed runs."""
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        files.clean(output)
    return Reporter(
        output,
        report_to=options.report_to,
        resumed_step=resumed_step,
        total_steps=total_steps,
        is_main=world.is_main,
    )


def _describe(run: Run) -> None:
    """Tells the reader of the terminal what is trained, how, and with what."""
    options, model, device = run.options, run.model, run.world.device
    trainable = sum(parameter.numel() for parameter in run.trainable())
    total = sum(parameter.numel() for parameter in model.parameters())
    precision = "bfloat16 autocast" if computes_in_bf16(options, device) else str(model.dtype).split(".")[-1]
    run.reporter.say(
        f"training {options.model_name_or_path}: {trainable} of {total} parameters, loss {run.loss}, backend "
        f"{options.backend}, {precision} on {device}, {model.config._attn_implementation} attention"
    )
    run.reporter.say(f"training data: {run.loader.data.summary()}")
    if run.eval_loader is not None:
        run.reporter.say(f"evaluation data: {run.eval_loader.data.summary()}")
    if run.loader.capacity is not None:
        run.reporter.say(f"packing: {len(run.loader.data.items)} rows in {len(run.loader.units)} packs")
