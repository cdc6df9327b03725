"""Lightning: a patched model inside a LightningModule, of the real package alone: it has no slot to stand in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
lightning = pytest.importorskip("lightning")

from host_cases import LARGE, collate, rows  # noqa: E402
from patch_models import llama  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import logitless  # noqa: E402
from logitless.testing import watch_allocations  # noqa: E402


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: Any, data: Any, folder: Any, steps: int = 2, **options: Any) -> Any:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=str(folder),
        **options,
    )
    module = Module(model)
    loader = DataLoader(data, batch_size=2, collate_fn=collate)
    trainer.fit(module, loader, loader)
    return module, trainer


def test_steps_are_the_hosts_own(tmp_path: Any) -> None:
    own, own_trainer = fit(llama(), rows(), tmp_path)
    ours, trainer = fit(logitless.patch(llama()), rows(), tmp_path)
    assert ours.seen == pytest.approx(own.seen, rel=1e-4) and len(own.seen) == 4
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(
        float(own_trainer.callback_metrics["val_loss"]), rel=1e-4
    )
    for (name, mine), theirs in zip(ours.model.named_parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_no_logits_are_allocated(tmp_path: Any) -> None:
    def allocated(change: Any) -> Any:
        model = change(llama(vocab_size=LARGE, max_position_embeddings=256))
        with watch_allocations() as seen:
            fit(model, rows(vocabulary=LARGE, times=10), tmp_path, steps=1, limit_val_batches=1)
        return seen

    own, ours = allocated(lambda model: model), allocated(logitless.patch)
    assert own.largest > 2**25 >= ours.largest and ours.peak < own.peak
