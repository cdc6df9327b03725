"""Where a run starts: at step 0, or at a checkpoint of a run that it continues exactly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitless.training import checkpoint
from logitless.training.config import TrainOptions
from logitless.training.errors import InputError
from logitless.training.mixture import ComponentOptions
from logitless.training.parallel import World

#: Options that a resumed run must share with the one that wrote the checkpoint, or its data position means nothing.
FIXED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "packing",
    "max_length",
    "use_peft",
    "teacher_model_name_or_path",
)


def seed_generators(value: int) -> None:
    """Seeds every global generator."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def find_checkpoint(options: TrainOptions) -> Path | None:
    """The checkpoint to resume from, or None for a fresh run.

    Raises:
        InputError: the named checkpoint is incomplete, or a fresh run would mix with an older one's checkpoints.
    """
    if options.resume_from_checkpoint is not None:
        folder = Path(options.resume_from_checkpoint)
        checkpoint.load_state(folder)
        return folder
    present = checkpoint.checkpoints(Path(options.output_dir))
    if present and not options.resume:
        raise InputError(
            f"output_dir {options.output_dir} already holds {present[-1].name}: continue it with --resume, or choose "
            "another --output_dir"
        )
    return present[-1] if present else None


def first_state(resumed: Path | None) -> dict[str, Any]:
    """Step, counters and open log window: a checkpoint's, or those of a fresh run."""
    return {"step": 0, "num_tokens": 0, "window": []} if resumed is None else checkpoint.load_state(resumed)


def identity_of(components: Sequence[ComponentOptions], fingerprints: Sequence[str], world: World) -> dict[str, Any]:
    """The values that `require_same` compares, those of a mixture's components under their names."""
    names = [component.name for component in components if component.name]
    identity: dict[str, Any] = {"processes": world.size, "mixture": names or None}
    for component, fingerprint in zip(components, fingerprints, strict=True):
        own = {name: getattr(component.options, name) for name in FIXED}
        identity |= component.named(own | {"data": fingerprint})
    return identity


def require_same(saved: dict[str, Any], now: dict[str, Any], source: Path) -> None:
    """Raises InputError naming what a resumed run may not change and did."""
    changed = [f"{name} was {saved.get(name)!r} and is {now[name]!r}" for name in now if saved.get(name) != now[name]]
    if changed:
        raise InputError(f"{source} can not be continued, its data position would mean nothing: {'; '.join(changed)}")
