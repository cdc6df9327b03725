"""Everything that a training run needs, put together from its options.

    options ──> components ──> loss of each
       ├─────> model's folder ──> tokenizer ──> rows ──> tokens
       ├─────> checkpoint to go on from ──> state
       ├─────> model to train ──> engine, loaders, reference and sampler of each component ──> number of steps
       └─────> optimizer, reporter

A component is one loss over its own data, and a run without a mixture has one. Its loader collates any batch on demand,
and its sampler says which batches a step reads.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from logitless.losses import Loss
from logitless.training import checkpoint, files
from logitless.training.collate import Batch
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.loader import Loader, load_data, make_loaders
from logitless.training.metrics import Reporter
from logitless.training.mixture import ComponentOptions, components_of
from logitless.training.model import hide_progress_bars, load_tokenizer, load_trained, locate_once
from logitless.training.objective import Engine, computes_in_bf16, engine_of
from logitless.training.optimizer import make_optimizer
from logitless.training.parallel import World
from logitless.training.reference_model import (
    ReferenceModel,
    column_inputs,
    load_reference,
    needs_reference,
    stored_values,
)
from logitless.training.resume import find_checkpoint, first_state, identity_of, require_same, seed_generators
from logitless.training.sampler import Sampler
from logitless.training.tokenize import TokenizedData

Data = tuple[TokenizedData, TokenizedData | None]  # to train on, to evaluate on


@dataclass
class Component:
    """One loss of a run, over data of its own; the model is the run's."""

    made_from: ComponentOptions
    world: World
    loss: Loss
    engine: Engine
    model: Any
    loader: Loader
    eval_loader: Loader | None
    reference: ReferenceModel | None  # to ask at every batch; None if the loss needs none or its values are stored
    sampler: Sampler

    @property
    def options(self) -> TrainOptions:
        """The run's options with those of the component's own."""
        return self.made_from.options

    def complete(self, batch: Batch) -> Batch:
        """A batch on the device, with the reference's values."""
        batch = batch.to(self.world.device)
        if self.reference is None:
            return batch
        return dataclasses.replace(batch, loss_inputs={**batch.loss_inputs, **self.reference(batch)})


@dataclass
class Run:
    """One training run, ready for its next step."""

    options: TrainOptions
    world: World
    components: tuple[Component, ...]
    tokenizer: Any
    model: Any
    parallel: Any  # the model, in DistributedDataParallel where there are several processes
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int  # until the component of the most steps has read its data; the others begin again meanwhile
    total_steps: int
    identity: dict[str, Any]  # of the data position, which a resumed run must share
    state: dict[str, Any]  # step, counters, open log window
    reporter: Reporter

    @property
    def output(self) -> Path:
        """The folder of checkpoints, metrics and the trained model."""
        return Path(self.options.output_dir)

    def trainable(self) -> Iterable[torch.nn.Parameter]:
        """The parameters that the optimizer updates."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)


class Base(NamedTuple):
    """What all components of a run are made with."""

    world: World
    source: str  # of the model
    pad_token: int | None
    model: Any
    frozen: dict[str | None, Any]  # reference models by teacher


def prepare(options: TrainOptions, world: World) -> Run:
    """The run that the options describe, at step 0 or at the checkpoint that it goes on from.

    Raises:
        InputError: options, data, model or checkpoint that can not be used.
    """
    planned, resumed = components_of(options), find_checkpoint(options)
    losses = [_make_loss(component) for component in planned]
    state = first_state(resumed)
    seed_generators(options.seed)

    source = locate_once(options, world)
    if Path(source).is_dir():  # a download's bars stay
        hide_progress_bars()
    tokenizer = load_tokenizer(source, options)
    data = [_load_data(component, tokenizer, loss) for component, loss in zip(planned, losses, strict=True)]
    identity = identity_of(planned, [training.fingerprint() for training, _ in data], world)
    if resumed is not None:
        require_same(state["identity"], identity, resumed)

    compares = any(map(needs_reference, losses))
    dropout = not (compares if options.disable_dropout is None else options.disable_dropout)
    model = load_trained(options, source, resumed, losses[0], world.device, dropout=dropout)
    _confirm(engine_of(options, losses[0], world.device), model, options, world.device)
    parallel = DistributedDataParallel(model) if world.size > 1 else model
    base = Base(world, source, tokenizer.pad_token_id, model, {})
    components = tuple(_prepared(base, *each) for each in zip(planned, losses, data, strict=True))

    optimizer = make_optimizer(model, options)
    steps_per_epoch = max(component.sampler.steps_per_epoch for component in components)
    epochs_of_steps = math.ceil(options.num_train_epochs * steps_per_epoch)
    total_steps = options.max_steps if options.max_steps > 0 else epochs_of_steps
    reporter = _reporter(options, world, state["step"], total_steps)
    run = Run(
        options, world, components, tokenizer, model, parallel, optimizer, steps_per_epoch, total_steps, identity,
        state, reporter,
    )  # fmt: skip
    _describe(run)
    if resumed is not None:
        checkpoint.restore(resumed, model, optimizer, world)
        reporter.say(f"resumed from {resumed}")
    return run


def _make_loss(component: ComponentOptions) -> Loss:
    with component.blamed():
        return component.options.make_loss()


def _load_data(component: ComponentOptions, tokenizer: Any, loss: Loss) -> Data:
    with component.blamed():
        return load_data(component.options, tokenizer, loss, column_inputs(loss))


def _prepared(base: Base, planned: ComponentOptions, loss: Loss, data: Data) -> Component:
    """A component of the run: its engine, loaders, reference and sampler."""
    options, world = planned.options, base.world
    with planned.blamed():
        engine = engine_of(options, loss, world.device)
        loaders = make_loaders(options, loss, base.model, base.pad_token, *data)
        reference = _reference_of(base, options, engine, loss, loaders)
    batch_size, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    sampler = Sampler(len(loaders[0].units), batch_size, accumulation, options.seed, world.rank, world.size)
    return Component(planned, world, loss, engine, base.model, *loaders, reference, sampler)


def _reference_of(
    base: Base, options: TrainOptions, engine: Engine, loss: Loss, loaders: tuple[Loader, Loader | None]
) -> ReferenceModel | None:
    """The reference to ask at every batch; None if the loss needs none or its values are stored from now on."""
    reference = load_reference(options, base.world, base.source, engine, loss, base.model)
    if reference is not None and options.precompute_ref_log_probs:
        for each in loaders:
            if each is not None:
                each.stored = stored_values(reference, each, options, base.world)
        reference = None
        gc.collect()
    elif reference is not None:  # one frozen copy serves every component that has the same teacher
        frozen = base.frozen.setdefault(options.teacher_model_name_or_path, reference.model)
        reference = dataclasses.replace(reference, model=frozen)
    return reference


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
    loss = " + ".join(_weighted(component) for component in run.components)
    trainable = sum(parameter.numel() for parameter in run.trainable())
    total = sum(parameter.numel() for parameter in model.parameters())
    precision = "bfloat16 autocast" if computes_in_bf16(options, device) else str(model.dtype).split(".")[-1]
    run.reporter.say(
        f"training {options.model_name_or_path}: {trainable} of {total} parameters, loss {loss}, backend "
        f"{options.backend}, {precision} on {device}, {model.config._attn_implementation} attention"
    )
    for component in run.components:
        _describe_data(run.reporter, component)


def _weighted(component: Component) -> str:
    name, weight, _ = component.made_from
    return f"{weight:g} * {component.loss}" if name else str(component.loss)


def _describe_data(reporter: Reporter, component: Component) -> None:
    """Tells what data a loss is trained and evaluated on."""
    name, loader = component.made_from.name, component.loader
    start = f"{name}: " if name else ""
    reporter.say(f"{start}training data: {loader.data.summary()}")
    if component.eval_loader is not None:
        reporter.say(f"{start}evaluation data: {component.eval_loader.data.summary()}")
    if loader.capacity is not None:
        reporter.say(f"{start}packing: {len(loader.data.items)} rows in {len(loader.units)} packs")
