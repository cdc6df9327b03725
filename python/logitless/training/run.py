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
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from logitless.losses import Loss
from logitless.training import checkpoint, files
from logitless.training.adapters import Adapter, find_adapter, given_weights, idle_options, require_free
from logitless.training.checks import (
    check_finite,
    check_positions,
    check_tokenizers,
    check_vocabulary,
    check_weights,
    embedding_rows,
    head_rows,
    padding_token,
)
from logitless.training.collate import Batch
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.estimates import ESTIMATED_INPUTS, Estimate, current_stats
from logitless.training.inputs import InputSources
from logitless.training.loader import Loaded, Loader, load_data, make_loaders, row_renderer
from logitless.training.metrics import Reporter
from logitless.training.mixture import ComponentOptions, components_of, prefixed, without_prefix
from logitless.training.model import hide_progress_bars, load_tokenizer, load_trained, locate_once
from logitless.training.objective import Engine, computes_in_bf16, engine_of, loss_count
from logitless.training.optimizer import make_optimizer, peak_learning_rate
from logitless.training.parallel import World
from logitless.training.places import require_places
from logitless.training.reference_model import ReferenceModel, load_reference, stored_values
from logitless.training.resume import (
    TEACHER,
    Origin,
    find_checkpoint,
    first_state,
    identity_of,
    parts_of,
    require_same,
    require_same_models,
    require_same_subset,
    seed_generators,
    tokenizer_parts,
)
from logitless.training.rollouts.prompts import Prompts
from logitless.training.rollouts.rounds import Rounds
from logitless.training.rollouts.setup import check_options, make_rounds, require_sampled
from logitless.training.sampler import Sampler
from logitless.training.settings import Settings, read_settings
from logitless.training.sharding import shape_of
from logitless.training.subsets import Everything, make_subset, require_subset
from logitless.training.template_date import with_date

#: The prefix of what rounds keep in a checkpoint.
ROUNDS = "rounds"


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
    estimates: Mapping[str, Estimate]  # the inputs that the run estimates
    sampler: Sampler
    rounds: Rounds | None  # of completions that are sampled; None where the rows hold them
    total_steps: int = 0  # of the run, which all components' data decide

    @property
    def options(self) -> TrainOptions:
        """The run's options with those of the component's own."""
        return self.made_from.options

    @property
    def steps_per_epoch(self) -> int:
        """Updates that read all of the data once."""
        return self.sampler.steps_per_epoch if self.rounds is None else self.rounds.steps_per_epoch(self.world)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step: rows of the data, or completions that were sampled."""
        if self.rounds is not None:
            return self.rounds.batches(self, step)
        return [self.loader.batch(units) for units in self.sampler.micro_batches(step)]

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
        found: dict[str, torch.Tensor] = {}
        for name, estimate in self.estimates.items():
            found |= prefixed(name, estimate.state(self))
        return found if self.rounds is None else found | prefixed(ROUNDS, self.rounds.state(self.world))

    def restore_estimated(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `estimated` gave."""
        for name, estimate in self.estimates.items():
            if own := without_prefix(name, saved):
                estimate.restore(own)
        if self.rounds is not None:
            self.rounds.restore(without_prefix(ROUNDS, saved), self.world)


@dataclass
class Run:
    """One training run, ready for its next step."""

    options: TrainOptions
    world: World
    components: tuple[Component, ...]
    tokenizer: Any
    settings: Settings  # of model and tokenizer, to be saved as they came
    model: Any
    parallel: Any  # what is called for a gradient: the model, in what its strategy puts around it
    subset: Everything  # what an update may move
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

    def estimated(self) -> dict[str, torch.Tensor]:
        """What the components' estimates keep, of all processes, for a checkpoint."""
        return {
            name: value
            for component in self.components
            for name, value in component.made_from.named(component.estimated()).items()
        }

    def restore_estimated(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `estimated` gave."""
        for component in self.components:
            component.restore_estimated(component.made_from.unnamed(saved))

    def follow(self, done: int) -> None:
        """Moves the references that follow the trained model, where it is due after update `done`."""
        for component in self.components:
            if component.reference is not None:
                component.reference.follow(self.model, done)

    def moved_references(self) -> dict[str, torch.Tensor]:
        """The parameters of the references that follow the trained model, by component."""
        return {
            name: parameter
            for component in self.components
            if component.reference is not None
            for name, parameter in component.made_from.named(component.reference.moved()).items()
        }


class Base(NamedTuple):
    """What all components of a run are made with."""

    world: World
    source: str  # of the model
    tokenizer: Any
    model: Any
    given: Mapping[str, torch.Tensor] | None  # its adapter's weights as they came, where it is compared with
    frozen: dict[str | None, Any]  # reference models by teacher
    notes: list[str]  # for the log, once there is one


class Plan(NamedTuple):
    """What a run is made from: its options, those of each component, and where it starts."""

    options: TrainOptions
    world: World
    components: Sequence[ComponentOptions]
    losses: Sequence[Loss]  # of the components
    resumed: Path | None  # the checkpoint that the run goes on from
    state: dict[str, Any]  # step, counters, date of the start, open log window


class Read(NamedTuple):
    """What a run reads before its model."""

    source: str  # of the model
    adapter: Adapter | None  # at the source
    tokenizer: Any
    dated: Any  # the tokenizer, of which the template writes the date of the run's start
    data: list[Loaded]  # of each component


def prepare(options: TrainOptions, world: World) -> Run:
    """The run that the options describe, at step 0 or at the checkpoint that it goes on from.

    Raises:
        InputError: options, data, model or checkpoint that cannot be used.
    """
    plan = _plan(options, world)
    seed_generators(options.seed)
    read = _read_data(plan)
    identity = _identify(plan, read)
    model, subset, notes = _load_model(plan, read)
    settings = read_settings(model, read.tokenizer, options)
    notes += [*world.strategy.notes, *_notes_on_text(plan, read)]
    given = _given(plan, read, model)
    parallel, optimizer = world.strategy.trained(model, options, partial(make_optimizer, subset, options))
    confirm_patch(engine_of(options, plan.losses[0], world.device), model, options, world.device)
    base = Base(world, read.source, read.tokenizer, model, given, {}, notes)
    components = tuple(_prepared(base, *each) for each in zip(plan.components, plan.losses, read.data, strict=True))

    steps_per_epoch, total_steps = _count_steps(plan, components)
    reporter = _reporter(options, world, plan.state["step"], total_steps)
    run = Run(
        options, world, components, read.tokenizer, settings, model, parallel, subset, optimizer, steps_per_epoch,
        total_steps, identity, plan.state, reporter,
    )  # fmt: skip
    _describe(run, notes)
    if plan.resumed is not None:
        _go_on(run, plan.resumed)
    return run


def _plan(options: TrainOptions, world: World) -> Plan:
    """The plan of a run, whose folders are looked at before anything is read."""
    components, resumed = components_of(options), find_checkpoint(options)
    require_sampled(options, components)
    losses = [_make_loss(component) for component in components]
    for component, loss in zip(components, losses, strict=True):
        if component.options.samples:
            with component.blamed():
                check_options(component.options, loss, world)
    require_output(options, world)
    for component in components:
        with component.blamed():
            require_places(component.options)
            _require_launch(component.options, world)
    return Plan(options, world, components, losses, resumed, first_state(resumed, world))


def _require_launch(options: TrainOptions, world: World) -> None:
    """Raises InputError where the launcher asks for what is not served, or for another precision than the options."""
    world.strategy.require(options)
    require_subset(options, world)
    if options.sync_ref_model and not world.strategy.writes:
        raise InputError(f"sync_ref_model: {world.strategy.name} cannot write the reference's weights; use FSDP2")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    ours = "bf16" if computes_in_bf16(options, world.device) else "no"
    if precision not in ("no", "", ours):
        raise InputError(f"accelerate's configuration: mixed_precision is {precision}, and the option bf16 makes it "
                         f"{ours}; expected no, or the same")  # fmt: skip


def _read_data(plan: Plan) -> Read:
    """The tokenizer and the rows, tokenised with the date of the run's start."""
    source = locate_once(plan.options, plan.world)
    if Path(source).is_dir():  # a download's bars stay
        hide_progress_bars()
    adapter = find_adapter(source, plan.options)
    require_free(plan.options, adapter)
    tokenizer = load_tokenizer(source, plan.options)
    dated = with_date(tokenizer, datetime.fromisoformat(plan.state["date"]))
    data = [_load_data(component, dated, loss) for component, loss in zip(plan.components, plan.losses, strict=True)]
    return Read(source, adapter, tokenizer, dated, data)


def _identify(plan: Plan, read: Read) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint's; the state keeps what explains a difference."""
    state, resumed = plan.state, plan.resumed
    identity = identity_of(plan.components, [loaded.training.fingerprint() for loaded in read.data], plan.world)
    models = _origins(plan, read)
    if resumed is not None:
        keeps = any(ESTIMATED_INPUTS[name].of_rows for data in read.data for name in data.sources.estimates)
        keeps |= any(component.options.samples for component in plan.components)
        options = plan.components[0].options
        require_same(state, identity, options, read.tokenizer, resumed, same_split=keeps)
        require_same_subset(state, plan.options, resumed)
        require_same_models(state, models, resumed)
    state |= {"tokenizer": tokenizer_parts(read.tokenizer), "models": {name: own.parts for name, own in models.items()}}
    return identity


def _origins(plan: Plan, read: Read) -> dict[str, Origin]:
    """The models that a run must find again if it is resumed: an adapter's base, and what it compares with."""
    options, found = plan.options, {}
    if options.use_peft or _any_compares(plan.losses, read.data):
        parts = parts_of(read.source, options.model_revision, read.adapter)
        found["model_name_or_path"] = Origin(options.model_name_or_path, parts)
    for component, loss, loaded in zip(plan.components, plan.losses, read.data, strict=True):
        teacher = component.options.teacher_model_name_or_path
        if teacher is not None and _compares(loss, loaded.sources):
            asked = dataclasses.replace(component.options, model_name_or_path=teacher)
            with component.blamed():
                source = locate_once(asked, plan.world)
                parts = parts_of(source, asked.model_revision, find_adapter(source, asked))
            found |= component.named({TEACHER: Origin(teacher, parts)})
    return found


def _load_model(plan: Plan, read: Read) -> tuple[Any, Everything, list[str]]:
    """The model to train, which can read the rows, what updates may move of it, and notes on it."""
    options, (loss, *_) = plan.options, plan.losses
    compares = _any_compares(plan.losses, read.data)
    compares |= any(component.options.samples for component in plan.components)
    dropout = not (compares if options.disable_dropout is None else options.disable_dropout)
    model = load_trained(options, read.source, plan.resumed, loss, plan.world, dropout=dropout)
    subset = make_subset(model, options, plan.world, plan.state["step"])
    notes = [*idle_options(options), *check_weights(model, options, peak_learning_rate(options, plan.losses))]
    check_finite(model, options.model_name_or_path + (f" in {plan.resumed}" if plan.resumed is not None else ""))
    notes += _check_model(plan, read, model)
    if read.adapter is not None:
        use = "trained on" if options.use_peft else "merged into it"
        notes.append(f"{read.source} holds an adapter of {read.adapter.base}: it is {use}")
    return model, subset, notes


def _given(plan: Plan, read: Read, model: Any) -> Mapping[str, torch.Tensor] | None:
    """The weights of an adapter as it was given, where it is trained and the run compares with it."""
    if read.adapter is None or not plan.options.use_peft or not _any_compares(plan.losses, read.data):
        return None
    if not plan.world.strategy.writes:
        raise InputError(f"use_peft: {plan.world.strategy.name} cannot write the weights of {read.source} back, with "
                         "which the run compares; use FSDP2, or merge the adapter into its base")  # fmt: skip
    return given_weights(model, read.adapter)


def _count_steps(plan: Plan, components: Sequence[Component]) -> tuple[int, int]:
    """Steps of an epoch and of the run, which every component is told."""
    options, done = plan.options, plan.state["step"]
    steps_per_epoch = max(component.steps_per_epoch for component in components)
    steps_of_epochs = math.ceil(options.num_train_epochs * steps_per_epoch)
    total_steps = options.max_steps if options.max_steps > 0 else steps_of_epochs
    if done > total_steps:
        raise InputError(f"{plan.resumed} is at step {done}, and the run ends at step {total_steps}; expected "
                         "max_steps or num_train_epochs beyond the checkpoint")  # fmt: skip
    for component in components:
        component.total_steps = total_steps
    return steps_per_epoch, total_steps


def _go_on(run: Run, checkpoint_folder: Path) -> None:
    """Brings the run to where the checkpoint was written."""
    checkpoint.restore(checkpoint_folder, run.subset, run.optimizer, run.world)
    run.restore_estimated(checkpoint.load_estimated(checkpoint_folder))
    checkpoint.restore_reference(checkpoint_folder, run.moved_references())
    run.reporter.say(f"resumed from {checkpoint_folder}")


def _make_loss(component: ComponentOptions) -> Loss:
    with component.blamed():
        return component.options.make_loss()


def _load_data(component: ComponentOptions, tokenizer: Any, loss: Loss) -> Loaded:
    with component.blamed():
        return load_data(component.options, tokenizer, loss, ESTIMATED_INPUTS)


def _notes_on_text(plan: Plan, read: Read) -> list[str]:
    """Notes on what a tokenizer and its template put into every text."""
    notes = []
    if read.tokenizer.eos_token is None:
        notes.append("the tokenizer has no end-of-text token, so that strings are learned without an end")
    stores = any(component.options.precompute_ref_log_probs for component in plan.components)
    if read.dated is not read.tokenizer and stores:
        notes.append(
            f"the chat template writes the date of the run's start, {plan.state['date'][:10]}, into every text; stored "
            "values of the reference serve the runs of that day"
        )
    return notes


def _check_model(plan: Plan, read: Read, model: Any) -> list[str]:
    """Notes on the model that is trained, which must be able to read the rows of every component."""
    name = plan.options.model_name_or_path
    notes: list[str] = []
    for component, loaded in zip(plan.components, read.data, strict=True):
        with component.blamed():
            notes += _check_rows(model, read.tokenizer, name, loaded)
    return notes


def _check_rows(model: Any, tokenizer: Any, name: str, data: Loaded) -> list[str]:
    """Notes on the rows, which the model of this name must be able to read."""
    for reach in data.reach:
        check_vocabulary(model, tokenizer, reach, name)
    return [note for reach in data.reach for note in check_positions(model, reach, name)]


def _compares(loss: Loss, sources: InputSources) -> bool:
    """Whether values of one batch under two models or at two times meet, which dropout would tell apart."""
    return bool(sources.reference or sources.estimates) or loss.compares_distributions


def _any_compares(losses: Sequence[Loss], data: Sequence[Loaded]) -> bool:
    return any(_compares(loss, loaded.sources) for loss, loaded in zip(losses, data, strict=True))


def _prepared(base: Base, planned: ComponentOptions, loss: Loss, data: Loaded) -> Component:
    """A component of the run: its engine, loaders, reference, estimates and sampler."""
    options, world, (sources, training, held_out, _) = planned.options, base.world, data
    estimates = {name: ESTIMATED_INPUTS[name]() for name in sources.estimates}
    with planned.blamed():
        engine = engine_of(options, loss, world.device)
        reference = None
        if options.sync_ref_model and not (sources.reference or loss.compares_distributions):
            raise InputError(f"sync_ref_model: {loss.name} compares with no reference")
        if loss.lists and options.backend == "materialised":
            raise InputError(f"backend: {loss.name} reads several ids a token, which 'materialised' does not")
        if sources.reference or loss.compares_distributions:
            reference = load_reference(
                options, world, base.source, engine, loss, sources.reference, base.model, base.given
            )
            base.notes.extend(_check_teacher(base, options, reference, data))
        _check_estimates(options, loss, reference, estimates)
        pad_token = padding_token(base.tokenizer, base.model, base.model if reference is None else reference.model)
        loaders = make_loaders(options, loss, _readers(base.model, reference, options), pad_token, training, held_out)
    batch_size, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    sampler = Sampler(len(loaders[0].units), batch_size, accumulation, options.seed, world.rank, world.size)
    rounds = None
    if options.samples:
        with planned.blamed():
            rounds = make_rounds(
                options, loss, world, model=base.model, tokenizer=base.tokenizer, source=base.source,
                prompts=cast(Prompts, training), loader=loaders[0],
                answer_end=row_renderer(options, base.tokenizer).answer_end,
            )  # fmt: skip
    component = Component(planned, world, loss, engine, base.model, *loaders, reference, estimates, sampler, rounds)
    del reference  # the component's alone, which may drop it
    _store_or_share(component, base.frozen)
    return component


def _readers(model: Any, reference: ReferenceModel | None, options: TrainOptions) -> list[Any]:
    """The models that read a component's batches: stored values of a reference are of rows by themselves."""
    if reference is None or reference.model is model or options.precompute_ref_log_probs:
        return [model]
    return [model, reference.model]


def _check_teacher(base: Base, options: TrainOptions, reference: ReferenceModel, data: Loaded) -> list[str]:
    """Notes on a teacher, which must be able to read the rows."""
    teacher = options.teacher_model_name_or_path
    if teacher is None:
        return []
    options = dataclasses.replace(options, model_name_or_path=teacher)
    notes = _check_rows(reference.model, base.tokenizer, teacher, data)
    confirm_patch(reference.engine, reference.model, options, base.world.device)
    try:
        theirs = load_tokenizer(locate_once(options, base.world), options)
    except InputError as error:
        notes.append(f"the teacher's tokens are not compared with the data's: {error}")
    else:
        read = [each for each in (data.training, data.held_out) if each is not None]
        check_tokenizers(base.tokenizer, theirs, read, teacher, whole=reference.loss.compares_distributions)
    if reference.rows is not None:
        notes.append(
            f"the head of {teacher} has {head_rows(reference.model)} rows and that of the trained model "
            f"{reference.rows}; the distributions are compared over these {reference.rows}"
        )
    return notes


def _store_or_share(component: Component, frozen: dict[str | None, Any]) -> None:
    """Stores the reference's values if the options ask for it; else components of one teacher share a frozen copy.

    A reference that follows the trained model is the component's own, since it moves as the component says.
    """
    options = component.options
    if component.reference is None or component.reference.following is not None:
        return
    if not options.precompute_ref_log_probs:
        shared = frozen.setdefault(options.teacher_model_name_or_path, component.reference.model)
        component.reference = dataclasses.replace(component.reference, model=shared)
        return
    for each in (component.loader, component.eval_loader):
        if each is not None:
            each.stored = stored_values(component.reference, each, options, component.world)
    component.reference = None
    gc.collect()


def _check_estimates(
    options: TrainOptions, loss: Loss, reference: ReferenceModel | None, estimates: Mapping[str, Estimate]
) -> None:
    """Raises InputError for a run in which an input cannot be estimated."""
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


def require_output(options: TrainOptions, world: World) -> None:
    """Raises InputError where nothing can be written into the output folder, which it makes."""
    if world.is_main:
        try:
            files.require_writable(Path(options.output_dir))
        except OSError as error:
            raise InputError(f"output_dir: nothing can be written into {options.output_dir}: {error}") from error
    world.wait()


def confirm_patch(engine: Engine, model: Any, options: TrainOptions, device: torch.device) -> None:
    """Has the patch compare itself with the model's logits now, before data and time are spent.

    Raises:
        InputError: they differ.
    """
    ids = torch.tensor([[1, 2, 3]], device=device) % min(embedding_rows(model), head_rows(model))
    try:
        with torch.no_grad():
            engine.stats(model, Batch(ids, ids), ("logprob",))
    except ValueError as error:
        raise InputError(f"{options.model_name_or_path}: {error}") from error


def _reporter(options: TrainOptions, world: World, resumed_step: int, total_steps: int) -> Reporter:
    """The reporter of a run, in an output folder without the leftovers of killed runs."""
    output = Path(options.output_dir)
    if world.is_main:
        files.clean(output)
    return Reporter(
        output,
        report_to=options.report_to,
        resumed_step=resumed_step,
        total_steps=total_steps,
        is_main=world.is_main,
    )


def _describe(run: Run, notes: Sequence[str]) -> None:
    """Tells the reader of the terminal what is trained, how, and with what."""
    options, model, device = run.options, run.model, run.world.device
    loss = " + ".join(_weighted(component) for component in run.components)
    trainable = sum(shape_of(parameter).numel() for parameter in run.subset.held().values())
    total = sum(shape_of(parameter).numel() for parameter in model.parameters())
    precision = "bfloat16 autocast" if computes_in_bf16(options, device) else str(model.dtype).split(".")[-1]
    name, size = run.world.strategy.name, run.world.size
    shared = f", {name or 'copies'} in {size} process{'es' if size > 1 else ''}" if size > 1 or name else ""
    run.reporter.say(
        f"training {options.model_name_or_path}: {trainable} of {total} parameters, loss {loss}, backend "
        f"{options.backend}, {precision} on {device}{shared}, {model.config._attn_implementation} attention"
    )
    for component in run.components:
        _describe_data(run.reporter, component)
    for note in [*notes, *_notes_on_warmup(options, run.total_steps)]:
        run.reporter.say(f"note: {note}")


def _notes_on_warmup(options: TrainOptions, total_steps: int) -> list[str]:
    warmup = options.warmup(total_steps)
    if warmup <= total_steps or options.lr_scheduler_type == "constant":
        return []
    return [f"warmup_steps: the learning rate rises for {warmup} steps, longer than the run, which has {total_steps}"]


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
