"""Per-token values of the reference model, for the losses that compare with one.

The reference is the model as the run found it, or follows the trained one (`Following`). Its values are computed batch
by batch while training (from a frozen copy, or from the model itself with its adapter as it was given), or once
before training and kept in a file whose name is a hash of everything they depend on: weights, tokens, precision and the
values asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from logitless import __version__
from logitless.losses import Loss
from logitless.training import files
from logitless.training.adapters import holding, settings_of
from logitless.training.checks import check_finite, head_rows
from logitless.training.collate import Batch, Inputs, Stored, by_sequence, consecutive
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.examples import Item
from logitless.training.inputs import REFERENCE_FIELDS
from logitless.training.loader import Loader
from logitless.training.model import cache_folder, evaluating, load_model, locate_once, patched
from logitless.training.objective import Engine, PatchedEngine, computes_in_bf16
from logitless.training.parallel import World
from logitless.training.resume import IDLE_SETTINGS
from logitless.training.sharding import parameters_of, whole_state
from logitless.types import Head


@dataclass(frozen=True)
class Following:
    """TR-DPO's moving reference: after every `steps` updates `alpha trained + (1 - alpha) reference`.

    alpha = 1 copies the trained model, and a small alpha after every update is an exponential moving average. The
    latter needs float32 weights: bfloat16 loses a change below half a unit of a weight's last place.

    Source: arXiv 2404.09656; its authors' code (turbo-llm/turbo-alignment) and TRL's `SyncRefModelCallback` agree.
    """

    alpha: float
    steps: int

    @torch.no_grad()
    def move(self, reference: nn.Module, trained: nn.Module, done: int) -> None:
        """Moves the reference if it is due after update `done`; both models have the same parameters, in one order."""
        if done % self.steps == 0:
            both = (parameters_of(model).values() for model in (reference, trained))
            for ours, theirs in zip(*both, strict=True):
                ours.lerp_(theirs.to(ours.dtype), self.alpha)


@dataclass(frozen=True)
class ReferenceModel:
    """A frozen model that is asked for its own view of a batch.

    Args:
        engine: how it is asked, in the precision of the run.
        model: the frozen copy, or the trained model under LoRA.
        loss: the loss whose inputs it gives.
        names: those inputs, of `REFERENCE_FIELDS`.
        following: how it follows the trained model; None, the default, where it stays.
        rows: of its head that the trained model has too, over which distributions are compared; None, the default, is
            all of them.
        as_given: makes the model what it was at the start, while it is asked. Nothing, the default, for a frozen copy.
    """

    engine: Engine
    model: Any
    loss: Loss
    names: tuple[str, ...]
    following: Following | None = None
    rows: int | None = None
    as_given: Callable[[], AbstractContextManager[Any]] = nullcontext

    def follow(self, trained: nn.Module, done: int) -> None:
        """Moves towards the trained model, if it follows it and update `done` is one after which it does."""
        if self.following is not None:
            self.following.move(self.model, trained, done)

    def moved(self) -> dict[str, torch.Tensor]:
        """The parameters of a reference that follows, which a checkpoint holds; none of one that stays."""
        return {} if self.following is None else {name: x.detach() for name, x in parameters_of(self.model).items()}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The loss inputs of a batch, `[B, T]` each; position t belongs to the prediction of token t + 1."""
        with evaluating(self.model), self.as_given():
            if isinstance(self.engine, PatchedEngine) and self.loss.compares_distributions:
                given = self.engine.hidden(self.model, batch)
                return given | {"ref_head": first_rows(given["ref_head"], self.rows)}
            fields = {name: REFERENCE_FIELDS[name] for name in self.names}
            stats = self.engine.stats(self.model, batch, tuple(fields.values()))
        return {name: getattr(stats, field).detach() for name, field in fields.items()}


def load_reference(
    options: TrainOptions,
    world: World,
    source: str,
    engine: Engine,
    loss: Loss,
    names: tuple[str, ...],
    trained: Any,
    given: Mapping[str, torch.Tensor] | None = None,
) -> ReferenceModel:
    """The model that gives a loss the inputs of these names, or its whole distributions.

    It is the teacher of the options, or else the trained model as the run found it: the one itself with its adapter as
    it was given, or a frozen copy.

    Args:
        source: where the trained model came from.
        engine: how the reference is asked.
        names: inputs of the loss, of `REFERENCE_FIELDS`; none for a loss that compares distributions.
        trained: the model that is trained.
        given: the weights of its adapter as it was given; None where it is new, or is not compared with.

    Raises:
        InputError: options that exclude one another, or a teacher that is not there or has fewer rows of the head.
    """
    teacher, following = options.teacher_model_name_or_path, _following(options)
    if loss.compares_distributions and options.precompute_ref_log_probs:
        raise InputError(f"precompute_ref_log_probs: {loss.name} compares distributions, which are not stored")
    if loss.compares_distributions and not isinstance(engine, PatchedEngine):
        raise InputError(f"backend: {loss.name} compares distributions, which 'materialised' does not")
    if options.use_peft and not options.precompute_ref_log_probs and teacher is None:
        as_given = trained.disable_adapter if given is None else partial(holding, trained, given)
        return ReferenceModel(engine, trained, loss, names, as_given=as_given)
    if teacher is not None:
        options = dataclasses.replace(options, model_name_or_path=teacher, use_peft=False)
        source = locate_once(options, world)
    frozen = patched(load_model(source, options, world, frozen=True), options, loss)
    if teacher is not None:
        check_finite(frozen, teacher)
    world.strategy.place(frozen)
    return ReferenceModel(engine, frozen, loss, names, following, _shared_rows(frozen, trained, loss, teacher))


def _shared_rows(frozen: Any, trained: Any, loss: Loss, teacher: str | None) -> int | None:
    """How many rows of a longer head of the teacher are compared; None where all are, or none is.

    Heads of one family are padded to different lengths. The rows behind the trained model's are left out of the
    teacher's distribution. A shorter head is no distribution over the trained model's rows.
    """
    ours, theirs = head_rows(trained), head_rows(frozen)
    if not loss.compares_distributions or theirs == ours:
        return None
    if theirs < ours:
        raise InputError(
            f"teacher_model_name_or_path: the head of {teacher} has {theirs} rows and that of the trained model "
            f"{ours}, over which {loss.name} compares distributions. Expected a teacher with as many rows or more; "
            f"rows that are no token's can be cut off the trained model (resize_token_embeddings({theirs}))"
        )
    return ours


def first_rows(head: Head, rows: int | None) -> Head:
    """A view of a head's first rows; all of them if None."""
    return head._replace(weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])


def _following(options: TrainOptions) -> Following | None:
    """How the reference follows the trained model; None where it is not asked to.

    Raises:
        InputError: the run compares with a reference that must not move.
    """
    if not options.sync_ref_model:
        return None
    reasons = {
        "use_peft: the reference is the trained model with its adapter as it was given": options.use_peft,
        "precompute_ref_log_probs: the values are those of the start": options.precompute_ref_log_probs,
        "teacher_model_name_or_path: a teacher stays as it is": options.teacher_model_name_or_path is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"sync_ref_model: {reason}")
    return Following(options.ref_model_mixup_alpha, options.ref_model_sync_steps)


# ---------------------------------------------------------------------------------------------------------------------
# Values that are computed once and kept


def cache_file(cache: Path, depends_on: dict[str, Any]) -> Path:
    """The file of reference values that depend on exactly this."""
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True, default=str).encode()).hexdigest()
    return cache / "reference" / f"{key[:32]}.safetensors"


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of every tensor, its name, dtype and shape, in this order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def compute_values(
    reference: ReferenceModel,
    items: Sequence[Item],
    batches: Sequence[list[int]],
    make: Callable[[list[int]], Batch],
    world: World,
) -> Stored:
    """The reference's values of every item, in float32 on the CPU; processes share the batches out.

    `batches` holds item indices; `make(indices)` builds their batch: all first examples, then all second ones.
    """
    own: dict[str, torch.Tensor] = {}
    for (number, indices), counts in world.share(list(enumerate(batches))):
        values = reference(make(indices).to(world.device))
        own |= {f"{number}.{name}": tensor.float().cpu() for name, tensor in values.items()} if counts else {}
    found = {name: tensor for each in world.gather(own) for name, tensor in each.items()}
    stored: dict[int, tuple[Inputs, ...]] = {}
    for number, indices in enumerate(batches):
        batch = make(indices)
        values = {name: iter(by_sequence(batch, found[f"{number}.{name}"])) for name in reference.names}
        parts: dict[int, list[Inputs]] = {index: [] for index in indices}
        for _ in range(len(items[0])):
            for index in indices:
                parts[index].append({name: next(own) for name, own in values.items()})
        stored |= {index: tuple(inputs) for index, inputs in parts.items()}
    return [stored[index] for index in range(len(items))]


def write_values(path: Path, stored: Stored) -> None:
    """Saves the values with their hash, whole or not at all."""
    names = stored[0][0].keys()
    flat = {name: torch.cat([inputs[name] for item in stored for inputs in item]) for name in names}
    with files.new_file(path) as unfinished:
        save_file(flat, unfinished, metadata={"sha256": hash_tensors(sorted(flat.items()))})


def read_values(path: Path, items: Sequence[Item]) -> Stored | None:
    """The values that `write_values` saved for the same items; None where there is no file, or a damaged one."""
    lengths = [len(example.input_ids) for item in items for example in item]
    try:
        with safe_open(path, "pt") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            whole = (file.metadata() or {}).get("sha256") == hash_tensors(sorted(flat.items()))
    except (OSError, SafetensorError):
        return None
    if not whole:
        return None
    parts = {name: tensor.split(lengths) for name, tensor in flat.items()}
    positions = iter(range(len(lengths)))
    return [
        tuple({name: parts[name][position] for name in parts} for _, position in zip(item, positions, strict=False))
        for item in items
    ]


def stored_values(asked: ReferenceModel, loader: Loader, options: TrainOptions, world: World) -> Stored:
    """The reference's values of a loader's items, from the cache, where they are put first.

    Raises:
        InputError: the cache's folder cannot be written.
    """
    items, path = loader.data.items, cache_file(cache_folder(options), _depends_on(asked, loader, options, world))
    found = read_values(path, items) if world.is_main else None
    if not world.sum(found is not None):
        if world.is_main:
            try:
                files.require_writable(path.parent)
            except OSError as error:
                raise InputError(f"cache_dir: nothing can be kept in {path.parent}: {error}") from error
        batches = consecutive(len(items), options.per_device_eval_batch_size)
        found = compute_values(asked, items, batches, loader.without_packs().batch, world)
        if world.is_main:
            write_values(path, found)
    world.wait()
    found = read_values(path, items) if found is None else found
    if found is None:
        raise InputError(f"cache_dir: {path}, which the main process wrote, cannot be read by process {world.rank}")
    return found


def _depends_on(asked: ReferenceModel, loader: Loader, options: TrainOptions, world: World) -> dict[str, Any]:
    """Everything that changes a reference's values: the model and its code, the tokens, the precision, the versions."""
    configuration = asked.model.config.to_dict()
    for name in IDLE_SETTINGS:
        configuration.pop(name, None)
    return {
        "weights": hash_tensors(whole_state(asked.model)),
        "adapters": {name: settings_of(config) for name, config in getattr(asked.model, "peft_config", {}).items()},
        "configuration": configuration,
        "code": _own_code(asked.model),
        "versions": (__version__, torch.__version__, version("transformers")),
        "data": loader.data.fingerprint(),
        "inputs": asked.names,
        "dtype": options.dtype,
        "bf16": computes_in_bf16(options, world.device),
        "attention": asked.model.config._attn_implementation,
        "backend": options.backend,
        "liger": options.use_liger_kernel,
        "device": world.device.type,
    }


def _own_code(model: nn.Module) -> dict[str, str]:
    """Hashes of the source files of modules that come with the checkpoint instead of a library, all of its folder."""
    modules = {type(module).__module__ for module in model.modules()}
    own = {name for name in modules if name.partition(".")[0] == "transformers_modules"}
    folders = {Path(str(sys.modules[name].__file__)).parent for name in own}
    found = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}
