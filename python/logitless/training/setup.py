"""Decisions and checks of a run's start: where it begins, on what, and with which reference."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitless.training import checkpoint, model, reference
from logitless.training.batching import consecutive
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.feeding import Feeder
from logitless.training.parallel import World

# What a resumed run must share with the one that wrote the checkpoint, or its data position means nothing.
FIXED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "packing",
    "max_length",
    "use_peft",
    "teacher_model_name_or_path",
)


def seed(value: int) -> None:
    """Seeds every global generator."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def use_bf16(options: TrainOptions, device: torch.device) -> bool:
    """Whether the forward pass runs under bfloat16 autocast."""
    if options.bf16 is not None:
        return options.bf16
    return device.type == "cuda" and options.dtype == "float32" and torch.cuda.is_bf16_supported()


def prepared_source(options: TrainOptions, world: World) -> str:
    """The model's folder or hub id; the main process converts and downloads first."""
    if not world.is_main:
        world.wait()
        return model.locate(options)
    source = model.locate(options)
    world.wait()
    return source


def find_checkpoint(options: TrainOptions) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run.

    Raises:
        InputError: the named checkpoint is incomplete, or a fresh run would mix with an older one's checkpoints.
    """
    if options.resume_from_checkpoint is not None:
        folder = Path(options.resume_from_checkpoint)
        checkpoint.load_state(folder)
        return folder
    found = checkpoint.checkpoints(Path(options.output_dir))
    if found and not options.resume:
        raise InputError(
            f"output_dir {options.output_dir} already holds {found[-1].name}: continue it with --resume, or choose "
            "another --output_dir"
        )
    return found[-1] if found else None


def identity(options: TrainOptions, fingerprint: str, world: World) -> dict[str, Any]:
    """What `require_same` compares."""
    return {name: getattr(options, name) for name in FIXED} | {"data": fingerprint, "processes": world.size}


def require_same(saved: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """Raises InputError naming what a resumed run may not change and did."""
    changed = [f"{name} was {saved.get(name)!r} and is {now[name]!r}" for name in now if saved.get(name) != now[name]]
    if changed:
        raise InputError(f"{source} can not be continued, its data position would mean nothing: {'; '.join(changed)}")


def stored_reference(
    asked: reference.Reference, feeder: Feeder, options: TrainOptions, world: World
) -> reference.Stored:
    """The reference's values of a feeder's items, from the cache, where the main process puts them first."""
    bf16 = use_bf16(options, world.device)
    depends_on = {
        "weights": reference.hash_weights(asked.model),
        "data": feeder.data.fingerprint(),
        "inputs": asked.names,
        "dtype": options.dtype,
        "bf16": bf16,
        "attention": asked.model.config._attn_implementation,
    }
    path = reference.cache_file(model.cache_folder(options), depends_on)
    if world.is_main and not path.is_file():
        unpacked = Feeder(feeder.data, feeder.pad_token, flat=feeder.flat and feeder.capacity is None)
        batches = consecutive(len(feeder.data.items), options.per_device_eval_batch_size)
        reference.write(path, reference.compute(asked, feeder.data.items, batches, unpacked.batch, world.device))
    world.wait()
    return reference.read(path, feeder.data.items)
