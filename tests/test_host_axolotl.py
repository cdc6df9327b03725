"""Axolotl: its trainer with LogitlessPlugin. The real package where it is installed, a stub everywhere.

The stub has the published interface of 0.19.0: the base class of the plugins, the merged schema, a trainer, and the
loss that `use_eaft` puts into `compute_loss_func`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pydantic = pytest.importorskip("pydantic")

from host_cases import (  # noqa: E402
    LARGE,
    TRAINING,
    Run,
    assert_no_logits,
    assert_same_run,
    collate,
    rows,
    train,
)
from host_stubs import installed, real_or_stub, stubbed  # noqa: E402
from patch_models import V, llama  # noqa: E402

from logitless import losses  # noqa: E402
from logitless.integrations.hosts import UnsupportedHostError  # noqa: E402

MODULE = "logitless.integrations.axolotl"


def own_eaft(outputs: Any, labels: Tensor, num_items_in_batch: Any = None, alpha: float = 1.0, k: int = 20) -> Tensor:
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    counts = targets != -100
    z = outputs.logits[counts]
    p = z.detach().topk(k, dim=-1).values.softmax(-1)
    weighted = F.cross_entropy(z, targets[counts], reduction="none") * torch.special.entr(p).sum(-1).pow(alpha)
    return weighted.sum() / (len(z) if num_items_in_batch is None else num_items_in_batch)


class Rows(list[Any]):
    """Rows with what Axolotl asks a data set."""

    column_names = ("input_ids", "labels")


class StubPlugin:
    def register(self, cfg: Any) -> None: ...
    def get_input_args(self) -> str | None: ...
    def post_model_load(self, cfg: Any, model: Any) -> None: ...
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


class StubTrainer(transformers.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


STUB = {
    "axolotl.integrations.base": {"BasePlugin": StubPlugin},
    "axolotl.core.trainers.base": {"AxolotlTrainer": StubTrainer},
    "axolotl.core.training_args": {"AxolotlTrainingArguments": transformers.TrainingArguments},
    "axolotl.monkeypatch.loss.eaft": {"eaft_loss": own_eaft},
}


@pytest.fixture(params=["stub", "real"])
def plugin(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module of the plugin, imported under the real Axolotl or under the stub."""
    sys.modules.pop(MODULE, None)
    with real_or_stub(request.param, "axolotl", "0.19.0", STUB, "axolotl"):
        yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def configuration(plugin: Any, **options: Any) -> Any:
    """What Axolotl hands to a plugin: options that nobody set are None."""
    own = plugin.LogitlessArgs(**options).model_dump()
    return SimpleNamespace(**{"use_eaft": None, "eaft_alpha": None, "eaft_k": None, **options, **own})


def make(cfg: Any, plugin: Any, folder: Any, *, model: Any = None, data: Any = None, **options: Any) -> Any:
    """The trainer as Axolotl's builder makes it, with the plugin's hooks called where Axolotl calls them, if any."""
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from axolotl.monkeypatch.loss.eaft import eaft_loss

    model = model or llama()
    metrics = {"compute_metrics": options.pop("compute_metrics")} if "compute_metrics" in options else {}
    hooks = plugin.LogitlessPlugin() if plugin is not None else None
    if hooks is not None:
        hooks.register(cfg)
        hooks.post_model_load(cfg, model)
    more = {}
    if cfg.use_eaft:
        alpha, k = cfg.eaft_alpha or 1.0, cfg.eaft_k or 20
        more["compute_loss_func"] = lambda outputs, labels, num_items_in_batch=None: eaft_loss(
            outputs, labels, num_items_in_batch, alpha, k
        )
    trainer = AxolotlTrainer(
        model=model,
        args=AxolotlTrainingArguments(output_dir=str(folder), **{**TRAINING, **options}),
        train_dataset=Rows(data or rows()),
        eval_dataset=Rows(rows()[:3]),
        data_collator=collate,
        **metrics,
        **more,
    )
    if hooks is not None:
        hooks.post_trainer_create(cfg, trainer)
    return trainer


CASES = [{}, {"use_eaft": True}, {"use_eaft": True, "eaft_alpha": 0.5, "eaft_k": 7}]


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(case) or "nll")
def test_a_run_is_the_hosts_own(plugin: Any, options: dict[str, Any], tmp_path: Any) -> None:
    cfg = configuration(plugin, **options)
    own = train(make(cfg, None, tmp_path, eval_strategy="steps", eval_steps=2))
    ours = train(make(cfg, plugin, tmp_path, eval_strategy="steps", eval_steps=2))
    assert_same_run(ours, own)
    assert any("eval_loss" in log for log in own.logs)


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES[:2], ids=lambda case: "-".join(case) or "nll")
def test_no_logits_are_allocated(plugin: Any, options: dict[str, Any], tmp_path: Any) -> None:
    cfg = configuration(plugin, **options)

    def run(hooks: Any) -> Run:
        model = llama(vocab_size=LARGE, max_position_embeddings=256)
        return train(make(cfg, hooks, tmp_path, model=model, data=rows(vocabulary=LARGE, times=10), max_steps=1))

    assert_no_logits(run(plugin), run(None))


def test_another_loss_of_the_registry_trains(plugin: Any, tmp_path: Any) -> None:
    cfg = configuration(
        plugin, logitless_loss="dft", logitless_loss_args={"power": 0.5}, logitless_backward="recompute"
    )
    trainer = make(cfg, plugin, tmp_path)
    batch = collate(rows()[:2])
    expected = trainer.model(**batch, loss=losses.DFT(power=0.5)).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)
    assert trainer.model._logitless_patch.backward == "recompute"


def test_a_model_is_left_alone_if_the_plugin_is_off(plugin: Any, tmp_path: Any) -> None:
    trainer = make(configuration(plugin, logitless=False, rl="dpo"), plugin, tmp_path)
    assert "forward" not in trainer.model.__dict__


def test_metrics_of_evaluation_see_logits(plugin: Any, tmp_path: Any) -> None:
    seen = []
    for options in CASES[:2]:
        trainer = make(
            configuration(plugin, **options),
            plugin,
            tmp_path,
            compute_metrics=lambda prediction: seen.append(prediction.predictions.shape) or {},  # type: ignore[func-returns-value]
        )
        trainer.evaluate()
        assert seen.pop()[-1] == V and not seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({name: True}, f"{name}: not served by LogitlessPlugin") for name in ("orpo_alpha", "chunked_cross_entropy")],
        ({"rl": "dpo"}, "rl: not served"),
        ({"cut_cross_entropy": True}, "cut_cross_entropy: not served"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: not served"),
        ({"use_eaft": True, "logitless_loss": "dft"}, "use_eaft: logitless_loss='dft' asks for another loss"),
        ({"logitless_loss": "dtf"}, "did you mean 'dft'"),
        ({"logitless_loss": "dft", "logitless_loss_args": {"powr": 1}}, "no hyper-parameter 'powr'"),
        ({"logitless_loss": "grpo"}, "Axolotl has batches of tokens"),
    ],
)
def test_what_is_not_served_is_refused_by_name(plugin: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, UnsupportedHostError), match=message):
        plugin.LogitlessArgs(**options)


def test_a_trainer_with_a_loss_of_its_own_is_refused(plugin: Any, tmp_path: Any) -> None:
    trainer = make(configuration(plugin), None, tmp_path)

    class Other(type(trainer)):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    trainer.__class__ = Other
    with pytest.raises(UnsupportedHostError, match="Other: it computes its own loss"):
        plugin.LogitlessPlugin().post_trainer_create(configuration(plugin), trainer)
    with pytest.raises(UnsupportedHostError, match="label_smoothing_factor"):
        make(configuration(plugin), plugin, tmp_path, label_smoothing_factor=0.1)


def test_another_release_or_interface_changes_nothing() -> None:
    sys.modules.pop(MODULE, None)

    class Changed(StubPlugin):
        def post_model_load(self, cfg: Any, model: Any, more: Any) -> None: ...  # type: ignore[override]

    changed = {**STUB, "axolotl.integrations.base": {"BasePlugin": Changed}}
    for version, stub, message in (
        ("0.18.0", STUB, "axolotl 0.18.0: logitless was tested with"),
        ("0.20.0", STUB, "axolotl 0.20.0: logitless was tested with"),
        ("0.19.0", changed, "post_model_load: expected the parameters"),
    ):
        with stubbed("axolotl", version, stub), pytest.raises(UnsupportedHostError, match=message):
            importlib.import_module(MODULE).LogitlessPlugin().register({})
        sys.modules.pop(MODULE, None)


def test_axolotl_loads_the_plugin_and_merges_its_keys() -> None:
    """The loader, the manager and the schema of the real package."""
    if not installed("axolotl"):
        pytest.skip("axolotl is not installed")
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.config import prepare_plugins

    prepare_plugins({"plugins": [f"{MODULE}.LogitlessPlugin"]})
    _, schema = merge_input_args()
    assert {"logitless", "logitless_loss", "logitless_loss_args", "use_eaft"} <= set(schema.model_fields)
    common = {"datasets": [{"path": "rows.jsonl", "type": "alpaca"}], "micro_batch_size": 1, "learning_rate": 1e-4}
    common |= {"base_model": "model", "gradient_accumulation_steps": 1}
    assert schema(**common, logitless_loss="dft").logitless_loss == "dft"
    with pytest.raises(ValueError, match="cut_cross_entropy: not served by LogitlessPlugin"):
        schema(**common, cut_cross_entropy=True)
    model = llama()
    cfg = SimpleNamespace(logitless=True, logitless_loss="dft", logitless_loss_args={})
    cfg.logitless_backend = cfg.logitless_backward = "auto"
    PluginManager.get_instance().post_model_load(cfg, model)
    assert model._logitless_patch.loss == losses.DFT()
