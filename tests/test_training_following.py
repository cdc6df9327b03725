"""A reference that follows the trained model, TR-DPO's: where it stands after every update, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_fixtures import completion_rows, make_model, make_options, preference_rows, write_jsonl

from logitless.training import InputError, TrainOptions, train
from logitless.training.metrics import read_metrics
from logitless.training.reference_model import Following


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("following")
    make_model(folder / "model")
    write_jsonl(folder / "pairs.jsonl", preference_rows())
    write_jsonl(folder / "rows.jsonl", completion_rows())
    return folder


def options(folder: Path, **changes: Any) -> TrainOptions:
    name = f"run-{len(list(folder.iterdir()))}"
    data = "pairs.jsonl" if changes.get("method", "dpo") == "dpo" else "rows.jsonl"
    return make_options(folder / name, str(folder / "model"), str(folder / data), **{"method": "dpo", **changes})


def curve(folder: Path, **changes: Any) -> list[float]:
    result = train(options(folder, **changes))
    return [record["loss"] for record in read_metrics(result.output_dir) if "loss" in record]


def follow(folder: Path, steps: int, alpha: float) -> list[float]:
    return curve(folder, sync_ref_model=True, ref_model_sync_steps=steps, ref_model_mixup_alpha=alpha, max_steps=6)


def test_a_copy_after_every_update_makes_every_loss_that_of_the_start(folder: Path) -> None:
    """DPO's loss is log 2 wherever the model is its reference."""
    assert follow(folder, 1, 1.0) == pytest.approx([math.log(2)] * 6, abs=1e-6)


def test_it_stays_until_it_is_due(folder: Path) -> None:
    """A copy after updates 3 and 6: equal to a resting reference until the third, and log 2 at the fourth."""
    resting, moved = curve(folder, max_steps=6), follow(folder, 3, 1.0)
    assert moved[:3] == resting[:3] and moved[3] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(resting[3] - math.log(2)) > 1e-3 and abs(moved[5] - math.log(2)) > 1e-4


def test_a_mixture_lies_between(folder: Path) -> None:
    """With half of the trained model the loss of the next update is neither the resting reference's nor log 2."""
    resting, half = curve(folder, max_steps=6), follow(folder, 3, 0.5)
    assert half[:3] == resting[:3]
    assert min(abs(half[3] - resting[3]), abs(half[3] - math.log(2))) > 1e-4


def test_every_parameter_moves_by_its_share() -> None:
    """`alpha trained + (1 - alpha) reference` after every `steps` updates, in the reference's own dtype."""
    draw = torch.Generator().manual_seed(0)
    reference, trained = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).double()
    states = []
    for model in (reference, trained):
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        states.append([x.detach().double().clone() for x in model.parameters()])
    following = Following(alpha=0.3, steps=2)
    for done, moves in ((1, 0), (2, 1), (3, 1), (4, 2)):
        following.move(reference, trained, done)
        for found, begin, target in zip(reference.parameters(), *states, strict=True):
            expected = target + 0.7**moves * (begin - target)
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(trained.parameters(), states[1], strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "sft"}, "sync_ref_model: nll compares with no reference"),
        ({"use_peft": True}, "sync_ref_model: use_peft"),
        ({"precompute_ref_log_probs": True}, "sync_ref_model: precompute_ref_log_probs"),
        ({"teacher_model_name_or_path": "model"}, "sync_ref_model: teacher_model_name_or_path"),
    ],
)
def test_what_a_following_reference_does_not_go_with(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        train(options(folder, sync_ref_model=True, **changes))


@pytest.mark.parametrize(
    "changes", [{"ref_model_mixup_alpha": 0.0}, {"ref_model_mixup_alpha": 1.1}, {"ref_model_sync_steps": 0}]
)
def test_settings_out_of_range_are_named(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        options(folder, sync_ref_model=True, **changes)


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_does_not_begin_anew(folder: Path, first: bool) -> None:
    """Resumed with a reference that moved, but without its option, the loss would be another one; and the reverse."""
    saved = options(folder, sync_ref_model=first, max_steps=2, save_strategy="steps", save_steps=2)
    train(saved)
    step = Path(saved.output_dir) / "checkpoint-2"
    assert (step / "reference.safetensors").is_file() == first
    with pytest.raises(InputError, match=r"sync_ref_model: in .*checkpoint-2 the reference"):
        train(options(folder, sync_ref_model=not first, max_steps=4, resume_from_checkpoint=str(step)))
