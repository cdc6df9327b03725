"""One model after another in TRL's trainers: patched, enabled, given a loss, refused, unpatched, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("datasets")

import torch  # noqa: E402
from test_trl_losses import pair_rows, run, same_run, sft_rows  # noqa: E402
from training_fixtures import make_model, make_tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl_runs import settings  # noqa: E402

import logitless  # noqa: E402
from logitless import losses  # noqa: E402
from logitless.integrations.trl import LinearLossMixin, disable, enable, with_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    yield
    disable()


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    folder = make_model(tmp_path_factory.mktemp("trl") / "model", tied=False)
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


def trainer_of(cls: Any, model: Any, path: Path, **more: Any) -> Any:
    args = trl.SFTConfig(**settings(path))
    return cls(model=model, args=args, train_dataset=sft_rows(), processing_class=make_tokenizer(), **more)


def sft(model: Any, path: Path, cls: Any = trl.SFTTrainer, **more: Any) -> tuple[Any, Any]:
    """A run on a model: its trainer and what it logged."""
    options = more.pop("options", {})
    return run(cls, "", trl.SFTConfig(**settings(path, **options)), sft_rows(), model=model, **more)


def test_a_model_patched_for_nll_trains_under_enable(load: Any, tmp_path: Path) -> None:
    """In every other call it is a patched model, also after the head of TRL has gone."""
    model = logitless.patch(load())
    expected = sft(load(), tmp_path)
    with enable():
        same_run(expected, sft(model, tmp_path))
    ids = torch.tensor([[5, 6, 7, 8]])
    model.train()
    assert model(ids, labels=ids).logits is None and model(ids, labels=ids).loss > 0
    logitless.unpatch(model)
    assert model(ids, labels=ids).logits is not None


def test_a_loss_follows_on_an_enabled_trainer(load: Any, tmp_path: Path) -> None:
    """Supervised training and then preferences, on one model: TRL's head goes, whoever computed it."""

    def both(*, ours: bool) -> tuple[Any, Any]:
        model = load()
        if ours:
            with enable():
                sft(model, tmp_path)
        else:
            sft(model, tmp_path)
        args = trl.DPOConfig(**settings(tmp_path))
        more = {"loss": "dpo"} if ours else {}
        cls = with_loss(trl.DPOTrainer) if ours else trl.DPOTrainer
        reference = {"ref_model": load()}
        return run(cls, "", args, pair_rows(), model=model, **reference, **more)

    same_run(both(ours=False), both(ours=True))


def test_a_refused_model_is_given_back_as_it_was(load: Any, tmp_path: Path) -> None:
    model = logitless.patch(load(), loss="dft")
    with pytest.raises(ValueError, match="would ignore"):
        trainer_of(trl.SFTTrainer, model, tmp_path)
    served = sft(model, tmp_path, with_loss(trl.SFTTrainer))
    same_run(sft(load(), tmp_path, options={"loss_type": "dft"}), served)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_patched_loss_is_not_ignored_after_a_trainer_that_served_it(load: Any, tmp_path: Path, enabled: bool) -> None:
    model = logitless.patch(load(), loss="dft")
    trainer_of(with_loss(trl.SFTTrainer), model, tmp_path)
    if enabled:
        enable()
    with pytest.raises(ValueError, match="would ignore"):
        trainer_of(trl.SFTTrainer, model, tmp_path)


@pytest.mark.parametrize("how", ["refused", "plain", "with_loss"])
def test_unpatching_leaves_the_class_s_own_forward(load: Any, tmp_path: Path, how: str) -> None:
    model = logitless.patch(load(), loss="dft" if how == "refused" else "nll")
    if how == "refused":
        with pytest.raises(ValueError, match="would ignore"):
            trainer_of(trl.SFTTrainer, model, tmp_path)
    else:
        more = {"loss": "dft"} if how == "with_loss" else {}
        trainer_of(with_loss(trl.SFTTrainer) if more else trl.SFTTrainer, model, tmp_path, **more)
    logitless.unpatch(model)
    assert not {name for name in vars(model) if "logitless" in name} and "forward" not in vars(model)
    same_run(sft(load(), tmp_path), sft(model, tmp_path))


def test_the_trainer_whose_model_went_to_another_says_so(load: Any, tmp_path: Path) -> None:
    model = load()
    first = trainer_of(with_loss(trl.SFTTrainer), model, tmp_path, loss="dft")
    trainer_of(with_loss(trl.SFTTrainer), model, tmp_path, loss="eaft")
    with pytest.raises(RuntimeError, match="given to another trainer since"):
        first.train()


def test_a_class_that_has_the_mixin_is_returned_as_it_is() -> None:
    class Mine(LinearLossMixin, trl.SFTTrainer):
        """A user's."""

    made = with_loss(trl.SFTTrainer)
    assert with_loss(made) is made and with_loss(Mine) is Mine


@pytest.mark.parametrize("given", ["SFTTrainer", 3])
def test_what_is_no_class_is_named(given: Any) -> None:
    with pytest.raises(TypeError, match=f"expected SFTTrainer, .* got {given!r}, which is no class"):
        with_loss(given)


@pytest.mark.parametrize("name", ["gkd.GKDTrainer", "gold.GOLDTrainer"])
def test_a_subclass_of_trl_with_another_loss_is_refused(name: str) -> None:
    """Both derive from SFTTrainer, and never ask for the per-token values that a loss of the registry reads."""
    module, _, kind = name.partition(".")
    cls = getattr(pytest.importorskip(f"trl.experimental.{module}"), kind)
    with pytest.raises(TypeError, match=f"got {kind}, whose loss trl.experimental.{module}.* in another way"):
        with_loss(cls)


def test_a_subclass_that_asks_for_the_same_values_is_served() -> None:
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    assert issubclass(with_loss(gmpo.GMPOTrainer), gmpo.GMPOTrainer)
    with pytest.raises(TypeError, match=r"got RLOOTrainer, whose .* Under logitless.integrations.trl.enable\(\)"):
        with_loss(trl.RLOOTrainer)


@pytest.mark.parametrize(
    ("kind", "options", "loss"),
    [
        ("SFT", {"loss_type": "dft"}, "dft"),
        ("DPO", {"loss_type": ["ipo"], "beta": 0.3}, losses.DPO(loss_type="ipo", beta=0.3)),
        ("GRPO", {"loss_type": "grpo", "epsilon": 0.3, "num_generations": 2}, losses.GRPO(epsilon_low=0.3)),
    ],
)
def test_options_that_say_what_the_loss_says_are_accepted(
    load: Any, tmp_path: Path, kind: str, options: dict[str, Any], loss: Any
) -> None:
    args = getattr(trl, f"{kind}Config")(**settings(tmp_path, **options))
    rows = pair_rows() if kind == "DPO" else sft_rows()
    more = {"reward_funcs": len} if kind == "GRPO" else {}
    cls = with_loss(getattr(trl, f"{kind}Trainer"))
    cls(load(), args=args, train_dataset=rows, processing_class=make_tokenizer(), loss=loss, **more)
    setattr(args, "epsilon" if kind == "GRPO" else "loss_type", 0.4 if kind == "GRPO" else "hinge")
    with pytest.raises(ValueError, match="belongs to TRL's own loss"):
        cls(load(), args=args, train_dataset=rows, processing_class=make_tokenizer(), loss=loss, **more)


def test_a_reference_by_name_is_refused(load: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ref_model: expected a model, got 'model'"):
        trainer_of(with_loss(trl.SFTTrainer), load(), tmp_path, loss="asft", ref_model="model")
