"""The names of a call's arguments: which are the model's own, and where one of ours belongs that is misplaced.

A Transformers forward takes `**kwargs` and ignores what it does not know. A misspelt argument of a loss would vanish
there, and the model would train something else. So a name that is one of ours, or nearly, and that the model does not
have, is an error. Any other name is left to the model, because hosts hand it columns and settings that nothing reads.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from torch import nn

from .. import losses
from ..arguments import LossArguments
from ..losses import Loss
from ..losses.checks import near_words
from ..peers import ADVICE, RENAMED
from ..types import OPTION_NAMES
from .families import base_of
from .scoring import CALL_SETTINGS, REQUEST_ARGUMENTS, Patch

#: Options of `patch` itself.
_OF_PATCH = ("backend", "backward", "check", "eval_logits")
#: Arguments of the ops that have another place, or none, in a call of a model.
_ELSEWHERE = {
    "targets": "give it as labels=... (shifted inside) or shift_labels=... (aligned)",
    "outputs": "give it as token_outputs=(...)",
    "normalizer": "give it as num_items_in_batch=...",
    "class_weight": "give it to logitless.linear_cross_entropy, with the hidden states of hidden_only=True",
    "weight": 'the head\'s is read from the model; give those of tokens as loss_inputs={"token_weight": ...}',
    **dict.fromkeys(("hidden", "bias", "logit_scale", "softcap"), "it is read from the model"),
    **{name: f"give it as patch(model, {name}=...)" for name in _OF_PATCH},
}
#: Inputs of `linear_loss` that are tensors of every loss, or are refused by it with a reason.
_OF_EVERY_LOSS = ("token_weight", "among", "ref_hidden")
#: Losses that a hint names before others that have the same hyper-parameter.
_WELL_KNOWN = ("nll", "dpo", "ppo")
#: What hosts pass whatever the model takes, and what is like a name of ours: columns that `Trainer` keeps or makes, the
#: boundaries of packed rows, masks, settings of attention, and one that Transformers has renamed.
_OF_HOSTS = (
    *("label", "label_ids", "length", "lengths", "num_logits_to_keep"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k", "max_length_q", "max_length_k"),
    *("attention_mask", "completion_mask", "loss_mask", "response_mask", "row_mask", "softmax_scale", "chunk_size"),
    *("action_mask", "options"),
)
#: Arguments of the model's loss function that a patched model serves, or that the model itself gives.
_SERVED = ("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels")


#: The tensors of the ops, which a model's call has not; their other names may be columns of the data (`embeddings`).
_TENSORS = ("hidden", "weight", "targets")


def check_names(model: nn.Module, state: Patch, names: Iterable[str]) -> None:
    """Raises for a name of a call that is ours, or nearly, but stands in the wrong place.

    Raises:
        TypeError: the message has the nearest names, and where the argument belongs.
    """
    unknown = set(names) - {*REQUEST_ARGUMENTS, *state.names, *_OF_HOSTS}
    unknown = unknown and unknown - names_of_model(model) - _of_loss_function(model)
    advice = _advice_by_name(state.loss) if unknown else {}
    for name in sorted(unknown):
        own = name in advice or name not in ADVICE
        near = [name] if name in advice else _near(name, advice) if own else []
        if near or not own:
            hint = _hint(name, near, advice) if own else f"; {ADVICE[name]}"
            raise TypeError(f"{name}: no argument of a patched {type(model).__name__}'s call{hint}")


def _hint(name: str, near: list[str], advice: dict[str, str]) -> str:
    """The nearest names, and where each of them goes that is no argument of a call."""
    if near == [name]:
        return f"; {advice[name]}"
    meant = f" (did you mean {' or '.join(repr(other) for other in near)}?)"
    return meant + "".join(f"; {other}: {advice[other]}" for other in near if other in advice)


def check_loss_inputs(loss: Loss, given: Iterable[str]) -> None:
    """Raises for a key of `loss_inputs` that neither the loss nor `linear_loss` takes from there.

    Raises:
        TypeError: the message has the keys that the loss takes, the nearest ones, and the place of a misplaced one.
    """
    known = (*_inputs_of(loss), *CALL_SETTINGS, *_OF_EVERY_LOSS)
    for name in given:
        if name not in known:
            _refuse_input(loss.name, name, known)


def _refuse_input(loss: str, name: str, known: tuple[str, ...]) -> None:
    fields = [losses.get(loss)] if loss in losses.names() else []
    of_the_call = {argument: f"give it as {argument}=..." for argument in REQUEST_ARGUMENTS}
    place = {**_advice_by_name(*fields), **of_the_call}.get(name, "loss_inputs")
    raise TypeError(
        f"loss_inputs[{name!r}]: {loss!r} does not take it{near_words(name, known)}; it takes {', '.join(known)}"
        + ("" if place.startswith("loss_inputs") or 'loss_inputs={"' in place else f"; {place}")
    )


_refuse_input._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a compiler runs it, and raises its error


def check_loss_function(model: nn.Module, state: Patch, names: Iterable[str]) -> None:
    """Raises for an argument that only the model's own loss function reads, which the patch does not run."""
    for name in sorted(_of_loss_function(model).intersection(names) - {*state.names}):
        raise TypeError(
            f"{name}: an argument of the loss function of {type(model).__name__}, which a patched model does not run; "
            "give the loss as loss=..., or unpatch(model)"
        )


def _of_loss_function(model: nn.Module) -> set[str]:
    function: Any = getattr(model, "loss_function", None)
    return set() if function is None else {*_parameters(function)} - {*_SERVED, *REQUEST_ARGUMENTS}


def names_of_model(model: nn.Module) -> set[str]:
    """The names that a forward below the model's takes, or reads from its `**kwargs`.

    Below are the base model and every module whose forward takes `**kwargs`, because arguments are handed down by it.
    """
    found: set[str] = set()
    for cls in {type(module) for module in model.modules()}:
        forward = inspect.unwrap(cls.forward)
        parameters = _parameters(cls.forward)
        passing = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
        if passing or cls in (type(model), type(base_of(model))):
            found.update(parameters)
        for parameter in passing:
            found.update(_of_typed_dict(parameter.annotation, forward))
            found.update(_read_by_name(forward))
    return found


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # compiled code
        return {}


def _of_typed_dict(annotation: Any, function: Callable[..., Any]) -> Iterator[str]:
    """The keys of `**kwargs: Unpack[Keywords]`."""
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, function.__globals__)  # the way typing.get_type_hints reads it
        except Exception:  # a name that only type checkers import
            return
    for keywords in get_args(annotation):
        yield from getattr(keywords, "__annotations__", ())


def _read_by_name(function: Callable[..., Any]) -> Iterator[str]:
    """The strings in a function's code: `kwargs.get("name")` is one of them."""
    code = getattr(function, "__code__", None)
    yield from (value for value in getattr(code, "co_consts", ()) if isinstance(value, str) and value.isidentifier())


def _advice_by_name(*preferred: Loss) -> dict[str, str]:
    """Where each of our names belongs that is no argument of a call. Hints name the losses that are preferred."""
    advice: dict[str, str] = {}
    for cls in (type(loss) for loss in (*preferred, *_defaults())):
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            advice.setdefault(field.name, f"give it as loss={cls.__name__}({field.name}=...)")
    inputs = {name for loss in (*preferred, *_defaults()) for name in _inputs_of(loss)}
    own = {*LossArguments.__annotations__} - {*OPTION_NAMES, "cu_seqlens", "normalizer"}
    for name in (*CALL_SETTINGS, *own, *inputs):
        advice[name] = f'give it as loss_inputs={{"{name}": ...}}'
    by_hand = "give it to logitless.linear_loss, with the hidden states of hidden_only=True"
    advice |= dict.fromkeys(OPTION_NAMES, by_hand) | _ELSEWHERE
    return {name: place for name, place in advice.items() if name not in REQUEST_ARGUMENTS}


def _defaults() -> Iterator[Loss]:
    """Every registered loss that can be made without an argument, the well-known ones first."""
    for name in (*_WELL_KNOWN, *losses.names()):
        try:
            yield losses.get(name)
        except TypeError:
            continue


def _inputs_of(loss: Loss) -> tuple[str, ...]:
    return (*loss.inputs, *loss.sequence_inputs, *loss.optional_inputs)


def _near(name: str, advice: Iterable[str]) -> list[str]:
    """Up to three of our names that this one may be a slip of the pen for.

    A short hyper-parameter has to be nearer than the others, because many a word is like it ("height" and "weight").
    The words of one of our names in another order, or with others between them, are a slip too ("only_hidden").
    """
    renamed = RENAMED.get(name.lower(), _TENSORS[0])
    if renamed not in _TENSORS:
        return [renamed]
    words = set(name.lower().split("_"))
    same = [own for own in REQUEST_ARGUMENTS if "_" in own and words.issuperset(own.split("_"))]
    if same:
        return same
    by_letters = {_letters(other): other for other in (*advice, *REQUEST_ARGUMENTS) if len(other) > 2}
    if _letters(name) in by_letters:
        return [by_letters[_letters(name)]]
    found = difflib.get_close_matches(_letters(name), by_letters, 3, 0.8)
    nearer = difflib.get_close_matches(_letters(name), by_letters, 3, 0.86)
    return [by_letters[x] for x in found if x in nearer or len(x) > 6 or by_letters[x] in REQUEST_ARGUMENTS]


def _letters(name: str) -> str:
    """The name in one spelling: `old_per_token_logps` is `old_logprob`."""
    plain = name.lower().replace("_", "").replace("pertoken", "").replace("reference", "ref")
    return re.sub("log(probs|ps?)$", "logprob", plain)
