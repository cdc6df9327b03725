"""ms-swift: its SFT trainer with a loss from hidden states. The real package where it is installed, a stub everywhere.

The stub has the published interface of 4.6.0: `loss_map`, a trainer that takes the labels out of the batch for a
`loss_type`, calls the loss with what is left, and reads `logits` for the accuracy. The template of the real trainer,
which renders chats, is replaced by one that hands on token ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from host_cases import (  # noqa: E402
    LARGE,
    TRAINING,
    assert_no_logits,
    assert_same_run,
    collate,
    rows,
    train,
)
from host_stubs import real_or_stub, stubbed  # noqa: E402
from patch_models import llama  # noqa: E402

from logitless import losses  # noqa: E402
from logitless.integrations import hosts, swift  # noqa: E402


class OwnCrossEntropy:
    """What `--loss_type cross_entropy` computes, from logits."""

    def __init__(self, args: Any, trainer: Any) -> None:
        self.power = 0.0

    def __call__(
        self, outputs: Any, labels: Tensor, *, num_items_in_batch: Any = None, loss_scale: Any = None, **_: Any
    ) -> Tensor:
        targets = torch.roll(labels, -1, -1)
        nll = F.cross_entropy(outputs.logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        nll = nll * torch.exp(-self.power * nll).detach()
        if loss_scale is not None:
            nll = nll * loss_scale
        count = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return nll.sum() / count


class OwnDFT(OwnCrossEntropy):
    def __init__(self, args: Any, trainer: Any) -> None:
        self.power = 1.0


class StubMixin:
    def __init__(self, model: Any, args: Any, template: Any, train_dataset: Any, **kwargs: Any) -> None:
        self.template, self.metrics = template, defaultdict(list)
        kwargs.update(self.create_loss_and_eval_metric(args))
        super().__init__(  # type: ignore[call-arg]
            model=model, args=args, data_collator=template.data_collator, train_dataset=train_dataset, **kwargs
        )

    def create_loss_and_eval_metric(self, args: Any) -> dict[str, Any]:
        from swift.trainers import mixin

        return {} if args.loss_type is None else {"compute_loss_func": mixin.loss_map[args.loss_type](args, self)}


class StubTrainer(StubMixin, transformers.Seq2SeqTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True

    def _prepare_inputs(self, inputs: Any) -> Any:
        return {**super()._prepare_inputs(inputs), "compute_loss_func": self.compute_loss_func}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        function = inputs.pop("compute_loss_func")
        scale, labels = inputs.pop("loss_scale", None), inputs.pop("labels")
        outputs = model(**inputs)
        if scale is not None:
            assert outputs.logits.shape[-1] == self.model.config.vocab_size
            scale = torch.roll(scale, -1, -1).view(-1)
        loss = function(outputs, labels, num_items_in_batch=num_items_in_batch, loss_scale=scale, trainer=self)
        if outputs.logits is not None:
            self._compute_acc(outputs, labels)
        return (loss, outputs) if return_outputs else loss

    def _compute_acc(self, outputs: Any, labels: Tensor, cu_seqlens: Any = None) -> None:
        hits = (outputs.logits.argmax(dim=-1)[:, :-1] == labels[:, 1:])[labels[:, 1:] != -100]
        self.metrics["token_acc"] += hits.tolist()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        hits = self.metrics.pop("token_acc", [])
        super().log({**logs, **({"token_acc": sum(hits) / len(hits)} if hits else {})}, *args, **kwargs)


class StubArguments(transformers.Seq2SeqTrainingArguments):
    def __init__(self, **kwargs: Any) -> None:
        own = ("loss_type", "enable_dft_loss", "enable_channel_loss", "eval_metric", "acc_strategy")
        mine = {name: kwargs.pop(name, None) for name in own}
        super().__init__(**kwargs)
        vars(self).update(mine)


OWN_MAP = {"cross_entropy": OwnCrossEntropy}
STUB: dict[str, dict[str, Any]] = {
    "swift.trainers": {"Seq2SeqTrainer": StubTrainer, "Seq2SeqTrainingArguments": StubArguments},
    "swift.trainers.mixin": {"loss_map": OWN_MAP, "SwiftMixin": StubMixin},
}


@pytest.fixture(params=["stub", "real"])
def host(request: pytest.FixtureRequest) -> Iterator[str]:
    with real_or_stub(request.param, "ms-swift", "4.6.0", STUB, "swift"):
        yield request.param
        swift.disable()


def weighted(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch with the weights that `loss_scale` gives."""
    batch = collate(examples)
    scale = 0.25 + (batch["input_ids"] % 4).float() / 4
    return {**batch, "loss_scale": scale * (batch["labels"] != -100)}


def make(folder: Any, loss_type: str | None, *, model: Any = None, data: Any = None, **options: Any) -> Any:
    from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    collator = options.pop("collator", collate)
    of_template = {name: options.pop(name) for name in ("sequence_parallel_size", "padding_free") if name in options}
    model = model or llama()
    model.model_meta = SimpleNamespace(is_multimodal=False, model_arch=None)
    model.model_info = SimpleNamespace(is_moe_model=False)
    template = SimpleNamespace(
        **{
            "is_encoder_decoder": False,
            "padding_free": False,
            "packing": False,
            "padding_side": "right",
            "task_type": "causal_lm",
            "tokenizer": None,
            "max_length": None,
            "sequence_parallel_size": 1,
            "model_accepts_loss_kwargs": None,
            "template_meta": SimpleNamespace(stop_words=[]),
            "data_collator": lambda batch, padding_to=None: collator(batch),
            "get_base_model": lambda model: model,
            "remove_post_encode_hook": lambda: None,
            "forward_context": lambda model, inputs: nullcontext(),
            **of_template,
        }
    )
    template.compute_sft_loss = partial(_compute_sft_loss, template)
    more = {"loss_type": loss_type, "output_dir": str(folder)}
    arguments = Seq2SeqTrainingArguments(**{**TRAINING, **more, **options})
    return Seq2SeqTrainer(model, arguments, template, data or rows(), eval_dataset=rows()[:3])


def _compute_sft_loss(template: Any, *args: Any, **kwargs: Any) -> Any:
    from swift.template import Template

    return Template.compute_sft_loss(template, *args, **kwargs)


@pytest.mark.parametrize("collator", [collate, weighted], ids=["plain", "loss_scale"])
def test_a_run_is_the_hosts_own(host: str, collator: Any, tmp_path: Any) -> None:
    options = {"collator": collator, "eval_strategy": "steps", "eval_steps": 2}
    own = train(make(tmp_path, "cross_entropy", **options))
    with swift.enable():
        ours = train(make(tmp_path, "logitless_nll", **options))
    assert_same_run(ours, own)
    assert any("token_acc" in log for log in own.logs) and any("eval_loss" in log for log in own.logs)


def test_dft_is_the_hosts_own(host: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if host == "real":
        own = train(make(tmp_path, None, enable_dft_loss=True))
    else:
        monkeypatch.setitem(OWN_MAP, "dft", OwnDFT)
        own = train(make(tmp_path, "dft"))
    with swift.enable():
        assert_same_run(train(make(tmp_path, "logitless_dft")), own)


@pytest.mark.parametrize("name", [name for name in swift.offered() if name not in ("logitless_nll", "logitless_dft")])
def test_the_registrys_losses_train(name: str, tmp_path: Any) -> None:
    with stubbed("ms-swift", "4.6.0", STUB), swift.enable():
        trainer = make(tmp_path, name, max_steps=1)
        batch = collate(rows()[:2])
        expected = trainer.model(**batch, loss=swift.offered()[name]).loss
        inputs = trainer._prepare_inputs(dict(batch))
        torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), expected)


def test_no_logits_are_allocated(host: str, tmp_path: Any) -> None:
    def run(loss_type: str) -> Any:
        model = llama(vocab_size=LARGE, max_position_embeddings=256)
        return train(make(tmp_path, loss_type, model=model, data=rows(vocabulary=LARGE, times=10), max_steps=1))

    own = run("cross_entropy")
    with swift.enable():
        assert_no_logits(run("logitless_nll"), own)


def test_names_of_ones_own(host: str, tmp_path: Any) -> None:
    with swift.enable(smooth=losses.NLL(label_smoothing=0.2)):
        trainer = make(tmp_path, "smooth")
        batch = collate(rows()[:2])
        expected = trainer.model(**batch, loss=losses.NLL(label_smoothing=0.2)).loss
        got = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
        torch.testing.assert_close(got, expected)
    for loss in (losses.DPO(), losses.GRPO(), losses.TopKDistillation()):
        with pytest.raises(hosts.UnsupportedHostError, match=f"loss={loss.name!r}: ms-swift has batches of tokens"):
            swift.enable(mine=loss)


REFUSED = [
    ({"enable_dft_loss": True}, "take loss_type=logitless_dft"),
    ({"enable_channel_loss": True}, "enable_channel_loss"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ({"eval_metric": "acc"}, "eval_metric"),
    ({"acc_strategy": "seq", "padding_free": True}, "acc_strategy"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
]


@pytest.mark.parametrize(("options", "name"), REFUSED)
def test_what_is_not_served_is_refused_by_name(host: str, options: dict[str, Any], name: str, tmp_path: Any) -> None:
    model = llama()
    with swift.enable(), pytest.raises(hosts.UnsupportedHostError, match=name):
        make(tmp_path, "logitless_nll", model=model, **options)
    assert "forward" not in model.__dict__ and "_logitless_patch" not in model.__dict__


def test_a_loss_of_the_host_stays_its_own(host: str, tmp_path: Any) -> None:
    own = train(make(tmp_path, "cross_entropy"))
    with swift.enable():
        trainer = make(tmp_path, "cross_entropy")
    assert "_logitless_patch" not in trainer.model.__dict__
    assert train(trainer).logs == own.logs


def test_another_release_or_interface_changes_nothing() -> None:
    for version in ("4.5.0", "4.7.0"):
        with (
            stubbed("ms-swift", version, STUB),
            pytest.raises(hosts.UnsupportedHostError, match=f"ms-swift {version}: logitless was tested with"),
        ):
            swift.enable()

    class Changed(StubTrainer):
        def _prepare_inputs(self, inputs: Any, more: Any) -> Any:
            raise NotImplementedError

    changed = {**STUB, "swift.trainers": {"Seq2SeqTrainer": Changed}}
    with stubbed("ms-swift", "4.6.0", changed):
        with pytest.raises(hosts.UnsupportedHostError, match="_prepare_inputs: expected the parameters"):
            swift.enable()
        from swift.trainers import mixin

        assert mixin.loss_map is OWN_MAP
