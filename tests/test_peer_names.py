"""An argument that another library calls so is refused with our name of it, wherever it is given."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make_problem

import logitless
from logitless import linear_cross_entropy, linear_divergence, linear_logprobs, linear_loss, linear_token_loss, losses
from logitless.arguments import LossArguments
from logitless.peers import ADVICE, RENAMED, VALUES, peer_hint
from logitless.types import Head


@pytest.fixture
def tensors() -> tuple[torch.Tensor, ...]:
    problem = make_problem((4, 3), 4, 9)
    return problem.hidden, problem.weight, problem.targets


CALLS: dict[str, Callable[..., Any]] = {
    "linear_cross_entropy": linear_cross_entropy,
    "linear_loss": lambda *tensors, **given: linear_loss("nll", *tensors, **given),
    "linear_dft": logitless.linear_dft,
    "linear_logprobs": linear_logprobs,
    "linear_token_loss": lambda *tensors, **given: linear_token_loss(*tensors, lambda stats: -stats.logprob, **given),
    "linear_divergence": lambda hidden, weight, targets, **given: linear_divergence(
        hidden, weight, hidden, weight, kind="js", **given
    ),
    "linear_top_k": lambda hidden, weight, targets, **given: logitless.linear_top_k(hidden, weight, 2, **given),
    "LinearCrossEntropyLoss": lambda *tensors, **given: logitless.nn.LinearCrossEntropyLoss(**given)(*tensors),
    "LinearLoss": lambda *tensors, **given: logitless.nn.LinearLoss("nll", **given)(*tensors),
    "NLL": lambda *tensors, **given: losses.NLL(**given),
    "get": lambda *tensors, **given: losses.get("nll", **given),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lse_square_scale", "'z_loss'"),
        ("softmax_scale", "'logit_scale'"),
        ("logit_softcapping", "'softcap'"),
        ("ce_weight", "'class_weight'"),
        ("return_z_loss", "'z_loss'"),
        ("chunk_size", "chunk_bytes"),
        ("compute_nll_loss", "nll_weight"),
        ("average_log_prob", "sigmoid_norm"),
        ("loss_type", r"losses\.DPO\(loss_type"),
        ("filter_eps", "tail_tolerance"),
        ("ref_input", "'ref_hidden'"),
        ("old_per_token_logps", "'old_logprob'"),
    ],
)
def test_every_entrance_names_ours(tensors: tuple[torch.Tensor, ...], call: str, theirs: str, ours: str) -> None:
    with pytest.raises(TypeError, match=rf"{theirs}.*{ours}"):
        CALLS[call](*tensors, **{theirs: 1})


@pytest.mark.parametrize("call", sorted(set(CALLS) - {"NLL", "get"}))
def test_a_name_of_nobody_is_refused_without_a_guess(tensors: tuple[torch.Tensor, ...], call: str) -> None:
    with pytest.raises(TypeError, match="quuxly") as caught:
        CALLS[call](*tensors, quuxly=1)
    assert "here" not in str(caught.value) and "did you mean" not in str(caught.value)


def test_a_slip_of_the_pen_has_the_nearest_name(tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(TypeError, match=r"linear_cross_entropy: no argument 'softcp' \(did you mean 'softcap'"):
        linear_cross_entropy(*tensors, softcp=30.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("loss", "theirs", "ours"),
    [
        (losses.DPO, "f_divergence_type", "divergence"),
        (losses.DPO, "ld_alpha", "tail_weight"),
        (losses.SimPO, "simpo_gamma", "gamma"),
        (losses.CPO, "cpo_alpha", "nll_weight"),
        (losses.GRPO, "epsilon", "epsilon_low"),
        (losses.PPO, "clip_ratio_c", "delta"),
        (losses.SAPO, "sapo_temperature_pos", "tau_positive"),
        (losses.GKD, "jsd_beta", "beta"),
    ],
)
def test_a_loss_names_its_own_hyper_parameter(loss: type, theirs: str, ours: str) -> None:
    with pytest.raises(TypeError, match=rf"{loss.__name__}: no argument '{theirs}'; {theirs} is '{ours}' here"):
        loss(**{theirs: 0.1})
    with pytest.raises(TypeError, match=rf"{theirs} is '{ours}' here"):
        losses.get(loss.name, **{theirs: 0.1})  # type: ignore[attr-defined]


def test_a_hyper_parameter_at_the_wrong_place_has_its_place(tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(TypeError, match=r"losses\.NLL\(label_smoothing=\.\.\.\)"):
        linear_loss("nll", *tensors, label_smoothing=0.1)


@pytest.mark.parametrize(("theirs", "ours"), VALUES["reduction"].items())
def test_a_reduction_of_another_name(tensors: tuple[torch.Tensor, ...], theirs: Any, ours: str) -> None:
    for call in (
        linear_cross_entropy,
        *(CALLS[name] for name in ("linear_loss", "linear_token_loss", "linear_divergence")),
    ):
        with pytest.raises(ValueError, match=f"got '{theirs}'; it is '{ours}' here"):
            call(*tensors, reduction=theirs)


def test_values_of_other_names(tensors: tuple[torch.Tensor, ...]) -> None:
    """Each leads to a value that is taken."""
    hidden, weight, _ = tensors
    takes: dict[str, Callable[[Any], Any]] = {
        "reduction": lambda value: linear_loss("nll", *tensors, reduction=value),
        "backend": lambda value: linear_logprobs(*tensors, backend=value),
        "loss": lambda value: losses.get(value),
        "kl": lambda value: losses.PPO(beta=0.1, kl=value),
        "kind": lambda value: linear_divergence(hidden, weight, hidden, weight, kind=value),
        "divergence": lambda value: losses.DPO(divergence=value),
    }
    assert set(takes) == set(VALUES)
    for argument, words in VALUES.items():
        for theirs, ours in words.items():
            with pytest.raises(ValueError, match=re.escape(f"{theirs!r}; it is {ours!r} here")):
                takes[argument](theirs)
            takes[argument](ours)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("call", ["linear_cross_entropy", "linear_loss", "linear_logprobs", "linear_token_loss"])
def test_the_order_of_liger_is_refused(tensors: tuple[torch.Tensor, ...], call: str, flat: bool) -> None:
    hidden, weight, targets = tensors
    if flat:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
    with pytest.raises(ValueError, match="expected the order hidden, weight, targets"):
        CALLS[call](weight, hidden, targets)


def known_names() -> set[str]:
    """Every argument of ours: of functions, heads, losses, and of a patched model's call."""
    names = {*LossArguments.__annotations__, *Head._fields, "z_loss", "class_weight", "clip", "loss", "shift"}
    names |= {"hidden", "weight", "targets"}
    for loss in map(losses.get, losses.names()):
        names |= {field.name for field in dataclasses.fields(loss)}  # type: ignore[arg-type]
    return names | {"loss_inputs", "skip_logits", "hidden_only", "temperature"}


def test_the_table_leads_to_names_that_exist() -> None:
    """What is a name of ours is not in it, but for two that not every loss has."""
    known = known_names()
    assert set(RENAMED.values()) <= known, sorted(set(RENAMED.values()) - known)
    of_some_losses = {"loss_type", "epsilon"}  # fields of some, where a constructor takes them before it asks the table
    assert known & (set(RENAMED) | set(ADVICE)) == of_some_losses
    assert not set(RENAMED) & set(ADVICE)


def test_the_advice_names_losses_that_exist() -> None:
    for text in ADVICE.values():
        for name in re.findall(r"losses\.(\w+)", text):
            assert hasattr(losses, name), name
    assert peer_hint("hidden") == ""


def test_constructors_keep_their_signature_and_compile() -> None:
    assert list(inspect.signature(losses.DPO).parameters)[:2] == ["beta", "loss_type"]
    problem = make_problem((5,), 4, 9)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return linear_loss(losses.DFT(power=0.5), hidden, problem.weight.detach(), problem.targets)

    expected = linear_loss(losses.DFT(power=0.5), problem.hidden, problem.weight.detach(), problem.targets)
    torch.testing.assert_close(loss(problem.hidden), expected)
