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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from logitless.losses import Loss
from logitless.training import files
from logitless.training.adapters import find_adapter, given_weights, holding, settings_of
from logitless.training.collate import Batch, Inputs, Stored, consecutive
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.examples import Item
from logitless.training.inputs import REFERENCE_FIELDS
from logitless.training.loader import Loader
from logitless.training.model import cache_folder, load_model, locate_once, patched
from logitless.training.objective import Engine, PatchedEngine, computes_in_bf16
from logitless.training.parallel import World


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
            for ours, theirs in zip(reference.parameters(), trained.parameters(), strict=True):
                ours.lerp_(theirs.to(ours), self.alpha)


@dataclass(frozen=True)
class ReferenceModel:
    """A frozen model that is asked for its own view of a batch.

    Args:
        engine: how it is asked, in the precision of the run.
        model: the frozen copy, or the trained model under LoRA.
        loss: the loss whose inputs it gives.
        names: those inputs, of `REFERENCE_FIELDS`.
        following: how it follows the trained model; None, the default, where it stays.
        as_given: makes the model what it was at the start, while it is asked. Nothing, the default, for a frozen copy.
    """

    engine: Engine
    model: Any
    loss: Loss
    names: tuple[str, ...]
    following: Following | None = None
    as_given: Callable[[], AbstractContextManager[Any]] = nullcontext

    def follow(self, trained: nn.Module, done: int) -> None:
        """Moves towards the trained model, if it follows it and update `done` is one after which it does."""
        if self.following is not None:
            self.following.move(self.model, trained, done)

    def moved(self) -> dict[str, torch.Tensor]:
        """The parameters of a reference that follows, which a checkpoint holds; none of one that stays."""
        return {} if self.following is None else {name: x.detach() for name, x in self.model.named_parameters()}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> dict[str, Any]:
        """The loss inputs of a batch, `[B, T]` each; position t belongs to the prediction of token t + 1."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self.as_given():
                if isinstance(self.engine, PatchedEngine) and self.loss.compares_distributions:
                    return self.engine.hidden(self.model, batch)
                fields = {name: REFERENCE_FIELDS[name] for name in self.names}
                stats = self.engine.stats(self.model, batch, tuple(fields.values()))
        finally:
            self.model.train(was_training)
        return {name: getattr(stats, field).detach() for name, field in fields.items()}


def load_reference(
    options: TrainOptions, world: World, source: str, engine: Engine, loss: Loss, names: tuple[str, ...], trained: Any
) -> ReferenceModel:
    """The model that gives a loss the inputs of these names, or its whole distributions.

    It is the teacher of the options, or else the trained model as the run found it: the one itself with its adapter as
    it was given, or a frozen copy.
    """
    teacher, following = options.teacher_model_name_or_path, _following(options)
    if loss.compares_distributions and options.precompute_ref_log_probs:
        raise InputError(f"precompute_ref_log_probs: {loss.name} compares distributions, which are not stored")
    if loss.compares_distributions and not isinstance(engine, PatchedEngine):
        raise InputError(f"backend: {loss.name} compares distributions, which 'materialised' does not")
    if options.use_peft and not options.precompute_ref_log_probs and teacher is None:
        as_given = _adapter_as_given(trained, source, options)
        return ReferenceModel(engine, trained, loss, names, as_given=as_given)
    if teacher is not None:
        options = dataclasses.replace(options, model_name_or_path=teacher, use_peft=False)
        source = locate_once(options, world)
    frozen = patched(load_model(source, options, world.device, frozen=True), options, loss)
    if frozen.get_output_embeddings().weight.shape[0] != trained.get_output_embeddings().weight.shape[0]:
        raise InputError(f"teacher_model_name_or_path: {teacher} has another vocabulary than the trained model")
    return ReferenceModel(engine, frozen, loss, names, following)


def _adapter_as_given(trained: Any, source: str, options: TrainOptions) -> Callable[[], AbstractContextManager[Any]]:
    """How the trained adapter becomes what it was at the start: off if it is new, else with its first weights."""
    adapter = find_adapter(source, options)
    if adapter is None:
        off: Callable[[], AbstractContextManager[Any]] = trained.disable_adapter
        return off
    return partial(holding, trained, given_weights(trained, adapter))


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
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return cache / "reference" / f"{key[:32]}.safetensors"


def hash_weights(model: nn.Module) -> str:
    """A hash of every parameter and buffer, its name, dtype and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def compute_values(
    reference: ReferenceModel,
    items: Sequence[Item],
    batches: Sequence[list[int]],
    make: Callable[[list[int]], Batch],
    device: torch.device,
) -> Stored:
    """The reference's values of every item, in float32 on the CPU.

    `batches` holds item indices; `make(indices)` builds their batch: all first examples, then all second ones.
    """
    stored: dict[int, tuple[Inputs, ...]] = {}
    for indices in batches:
        batch = make(indices)
        values = {name: tensor.float().cpu() for name, tensor in reference(batch.to(device)).items()}
        flat = batch.cu_seqlens is not None
        examples = [(index, part) for part in range(len(items[0])) for index in indices]
        start = 0
        parts: dict[int, list[Inputs]] = {index: [] for index in indices}
        for row, (index, part) in enumerate(examples):
            length = len(items[index][part].input_ids)
            place = (0, slice(start, start + length)) if flat else (row, slice(length))
            parts[index].append({name: tensor[place].clone() for name, tensor in values.items()})
            start += length
        stored |= {index: tuple(inputs) for index, inputs in parts.items()}
    return [stored[index] for index in range(len(items))]


def write_values(path: Path, stored: Stored) -> None:
    """Saves the values, whole or not at all."""
    names = stored[0][0].keys()
    flat = {name: torch.cat([inputs[name] for item in stored for inputs in item]) for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(path) as unfinished:
        save_file(flat, unfinished)


def read_values(path: Path, items: Sequence[Item]) -> Stored:
    """The values that `write_values` saved for the same items."""
    lengths = [len(example.input_ids) for item in items for example in item]
    with safe_open(path, "pt") as file:
        flat = {name: file.get_tensor(name).split(lengths) for name in file.keys()}  # noqa: SIM118 (no mapping)
    positions = iter(range(len(lengths)))
    return [
        tuple(
            {name: parts[position] for name, parts in flat.items()}
            for _, position in zip(item, positions, strict=False)
        )
        for item in items
    ]


def stored_values(asked: ReferenceModel, loader: Loader, options: TrainOptions, world: World) -> Stored:
    """The reference's values of a loader's items, from the cache, where the main process puts them first."""
    depends_on = {
        "weights": hash_weights(asked.model),
        "adapters": {name: settings_of(config) for name, config in getattr(asked.model, "peft_config", {}).items()},
        "data": loader.data.fingerprint(),
        "inputs": asked.names,
        "dtype": options.dtype,
        "bf16": computes_in_bf16(options, world.device),
        "attention": asked.model.config._attn_implementation,
    }
    path = cache_file(cache_folder(options), depends_on)
    if world.is_main and not path.is_file():
        unpacked = loader.without_packs()
        batches = consecutive(len(loader.data.items), options.per_device_eval_batch_size)
        write_values(path, compute_values(asked, loader.data.items, batches, unpacked.batch, world.device))
    world.wait()
    return read_values(path, loader.data.items)
