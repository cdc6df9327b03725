"""Checkpoints: what a run needs to go on as if it had never stopped.

    checkpoint-<step>/
        model.safetensors, config.json, ...    the model (or the adapter) and tokenizer, as `from_pretrained` reads them
        optimizer.safetensors                  AdamW's moments, named "<moment>.<parameter>"
        rng_state.safetensors                  generator states: torch's CPU and GPU generators of every process
        rng_state.json                         generator states: Python's and NumPy's
        entries.safetensors                    places of the entries that updates move, where they are chosen (SIFT)
    estimated.safetensors                  inputs of the loss that the run estimates (`estimates.py`), if any
        reference.safetensors                  the reference model's parameters, where it follows the trained model
        trainer_state.json                     step, counters, open log window, hashes of data and options

Nothing is pickled, so nothing is executed on loading. A folder appears under its name when it is complete (`files.py`).
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from logitless.training import files
from logitless.training.errors import InputError
from logitless.training.parallel import World
from logitless.training.settings import Settings
from logitless.training.sharding import gathered_state, like, shape_of, whole_weight
from logitless.training.subsets import Everything

STATE = "trainer_state.json"
ENTRIES, ESTIMATED = "entries.safetensors", "estimated.safetensors"
REFERENCE = "reference.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    steps = {int(match[1]): path for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps) if (steps[step] / STATE).is_file()]


def save(
    output_dir: Path,
    step: int,
    *,
    model: Any,
    tokenizer: Any,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    subset: Everything,
    estimated: dict[str, torch.Tensor],
    reference: dict[str, torch.Tensor],
    state: dict[str, Any],
    world: World,
    keep: int | None,
) -> Path:
    """Writes `checkpoint-<step>` and then deletes the oldest beyond `keep`. Every process must call it."""
    folder = output_dir / f"checkpoint-{step}"
    generators = generator_states(world)
    weights = gathered_state(model, keep=world.is_main)
    moments = optimizer_state(subset.held(), optimizer, world)
    entries = subset.state()
    reference = {name: whole_weight(tensor).cpu() for name, tensor in reference.items()}
    if world.is_main:
        with files.new_folder(folder) as unfinished:
            settings.save(unfinished, model, tokenizer, weights)
            save_file(moments, unfinished / "optimizer.safetensors")
            save_file(generators, unfinished / "rng_state.safetensors")
            if entries:
                save_file(entries, unfinished / ENTRIES)
            if estimated:
                save_file(estimated, unfinished / ESTIMATED)
            if reference:
                save_file(reference, unfinished / REFERENCE)
            files.write_json(unfinished / "rng_state.json", python_generators())
            files.write_json(unfinished / STATE, state)
        for old in checkpoints(output_dir)[: -keep if keep else 0]:
            shutil.rmtree(old)
    world.wait()
    return folder


def load_state(folder: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint. Raises InputError where the folder is no complete checkpoint."""
    path = folder / STATE
    if not path.is_file():
        inside = ", ".join(found.name for found in checkpoints(folder))
        hint = f"; there are checkpoints in it: {inside}" if inside else ""
        raise InputError(f"{folder}: not a complete checkpoint, it has no {STATE}{hint}")
    state: dict[str, Any] = _load(path)
    if not isinstance(state, dict) or not state.keys() >= {"step", "num_tokens", "window", "identity"}:
        raise InputError(_damaged(path, "it lacks entries"))
    return state


def _load(path: Path) -> Any:
    """Tensors or JSON of a checkpoint; raises InputError where the file is missing or damaged."""
    try:
        return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(_damaged(path, error)) from error


def _damaged(path: Path, reason: Any) -> str:
    return f"{path}: the checkpoint is damaged: {reason}; delete its folder to go on from an older one"


def load_estimated(folder: Path) -> dict[str, torch.Tensor]:
    """The estimated inputs of a checkpoint; none where it has none."""
    path = folder / ESTIMATED
    return _load(path) if path.is_file() else {}


def restore(folder: Path, subset: Everything, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Puts back what updates move, and the optimizer's and the generators' states."""
    subset.restore(_load(folder / ENTRIES) if (folder / ENTRIES).is_file() else {})
    load_optimizer_state(subset.held(), optimizer, _load(folder / "optimizer.safetensors"), folder, world)
    set_generator_states(_load(folder / "rng_state.safetensors"), world)
    set_python_generators(_load(folder / "rng_state.json"))


@torch.no_grad()
def restore_reference(folder: Path, reference: dict[str, torch.Tensor]) -> None:
    """Puts back a reference that follows the trained model, parameter by parameter.

    Raises:
        InputError: the checkpoint has one and the run does not, or the other way round: it would begin anew.
    """
    saved = _load(folder / REFERENCE) if (folder / REFERENCE).is_file() else {}
    if saved.keys() != reference.keys():
        more = len(saved) > len(reference)
        was, now = ("followed the trained model", "stays") if more else ("stayed", "follows it")
        raise InputError(f"sync_ref_model: in {folder} the reference {was}, and now it {now}")
    for name, tensor in reference.items():
        tensor.copy_(like(saved[name], tensor))


def optimizer_state(
    held: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, world: World
) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by moment and name of what it moves, of the main process; the others take part in it."""
    found = {}
    for name, parameter in held.items():
        for moment, tensor in world.strategy.moments(optimizer, parameter).items():
            if world.is_main:
                found[f"{moment}.{name}"] = tensor.cpu().contiguous()
    return found


def load_optimizer_state(
    held: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    source: Path,
    world: World,
) -> None:
    """The inverse of `optimizer_state`. Raises InputError where the two models' parameters differ."""
    for key, tensor in tensors.items():
        moment, _, name = key.partition(".")
        parameter = held.get(name)
        if parameter is None or (moment != "step" and tensor.shape != shape_of(parameter)):
            raise InputError(f"{source}: its optimizer state {key} fits no trainable parameter of this model")
        world.strategy.set_moment(optimizer, parameter, moment, tensor)


def generator_states(world: World) -> dict[str, torch.Tensor]:
    """torch's generator states of every process, gathered."""
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    if world.size == 1:
        return {f"{kind}.0": state for kind, state in states.items()}
    gathered: dict[str, torch.Tensor] = {}
    for kind, state in states.items():
        parts = [torch.empty_like(state, device=world.device) for _ in range(world.size)]
        dist.all_gather(parts, state.to(world.device))
        gathered |= {f"{kind}.{rank}": part.cpu() for rank, part in enumerate(parts)}
    return gathered


def set_generator_states(states: dict[str, torch.Tensor], world: World) -> None:
    """Restores this process's generators; one that the saved run did not have keeps its state."""
    if f"cpu.{world.rank}" in states:
        torch.set_rng_state(states[f"cpu.{world.rank}"])
    if world.device.type == "cuda" and f"cuda.{world.rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{world.rank}"], world.device)


def python_generators() -> dict[str, Any]:
    """The states of Python's and NumPy's global generators as plain JSON values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy_state = [kind, np.asarray(keys).tolist(), position, has_gauss, gauss]
    version, internal, following = random.getstate()
    return {"numpy": numpy_state, "python": [version, list(internal), following]}


def set_python_generators(states: dict[str, Any]) -> None:
    """The inverse of `python_generators`."""
    version, internal, following = states["python"]
    random.setstate((version, tuple(internal), following))
    np.random.set_state(tuple(states["numpy"]))
