"""Where each input of a loss comes from: a column of the rows, the reference model, or the run's own estimate.

A column comes before the other two. An input that no source gives is an error that names it, and so is a ratio to a
policy that the rows do not tell of: nothing is trained as something else.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from logitless.losses import Loss, PairLoss
from logitless.losses.whole_sequence import WholeSequenceLoss
from logitless.training.columns import OTHER_NAMES, TARGET_IDS, TOKEN_WEIGHT, present_columns
from logitless.training.data import Row
from logitless.training.errors import InputError

#: A loss's input and the statistic of the reference model that it is.
REFERENCE_FIELDS = {"ref_logprob": "logprob", "ref_lse": "lse"}
#: What the tokens of rows that are not the policy's own need; a loss can do without it on samples of today's policy.
OFF_POLICY = "old_logprob"
#: What a round of sampled completions gives (`rollouts/inputs.py`).
SAMPLED = (
    *("old_logprob", "sampling_logprob", "policy_weight", "advantages", "demonstration", "nll_weight"),
    *("group", "draw"),
)


@dataclass(frozen=True)
class InputSources:
    """The inputs of a loss by their source."""

    columns: tuple[str, ...]
    reference: tuple[str, ...]
    estimates: tuple[str, ...]


def input_sources(loss: Loss, rows: Sequence[Row], origin: str, estimated: Collection[str]) -> InputSources:
    """The source of every input that the loss needs, and of the optional ones that the rows have.

    Args:
        estimated: the inputs that a run can estimate.

    Raises:
        InputError: an input without a source, or one column for both sides of a pair.
    """
    needed = (*loss.inputs, *loss.sequence_inputs, *((TARGET_IDS,) if loss.lists else ()))
    sides = ("chosen", "rejected") if isinstance(loss, PairLoss) else ("",)
    names = dict.fromkeys((*needed, *loss.optional_inputs))
    columns = present_columns(names, rows, sides)
    if isinstance(loss, PairLoss) and (shared := present_columns(names, rows)):
        raise InputError(
            f"{origin}: {loss.name} reads {shared[0]} of either side of a pair; expected columns chosen_{shared[0]} "
            f"and rejected_{shared[0]}, got one for both"
        )
    missing = [name for name in needed if name not in columns]
    reference = tuple(name for name in missing if name in REFERENCE_FIELDS)
    estimates = tuple(name for name in missing if name in estimated)
    if loss.own_means:
        estimates = (*estimates, TOKEN_WEIGHT)
    if present_columns((TOKEN_WEIGHT,), rows, ("", *sides)):
        _require_weightless(loss, origin)
        columns = (*columns, TOKEN_WEIGHT)
    _require(loss, missing, (*reference, *estimates), origin)
    if OFF_POLICY in loss.optional_inputs and OFF_POLICY not in columns:
        raise InputError(
            f"{origin}: {loss.name} needs a column {OFF_POLICY}, the log-probabilities of the tokens under the policy "
            "that sampled them: without it every ratio is 1, which trains as --method reinforce does"
        )
    return InputSources(columns, reference, estimates)


def sampled_sources(loss: Loss, *, rewarded: bool) -> InputSources:
    """Where the inputs of a loss of sampled completions come from; the columns are those that a round gives.

    Raises:
        InputError: an input that neither a round nor a reference model gives, or rewards that the loss does not read,
            or needs and has not.
    """
    missing = [name for name in (*loss.inputs, *loss.sequence_inputs) if name not in (*SAMPLED, *REFERENCE_FIELDS)]
    if loss.compares_distributions:
        missing = [name for name in missing if name != "ref_hidden"]
    if missing:
        raise InputError(f"{loss.name} reads {missing[0]}, which sampling does not give; set on_policy to false and "
                         "give it as a column of the rows")  # fmt: skip
    reads = "advantages" in loss.inputs
    if reads and not rewarded:
        raise InputError(f"{loss.name} reads advantages, which come from rewards: name a function by reward_funcs, or "
                         "set on_policy to false and give a column advantages")  # fmt: skip
    if rewarded and not reads:
        raise InputError(f"reward_funcs: {loss.name} reads no advantages, so that rewards would train nothing")
    reference = tuple(name for name in loss.inputs if name in REFERENCE_FIELDS)
    read = (*loss.inputs, *loss.optional_inputs)
    estimates = (TOKEN_WEIGHT,) if loss.own_means else ()
    return InputSources(tuple(name for name in SAMPLED if name in read), reference, estimates)


def _require_weightless(loss: Loss, origin: str) -> None:
    """Raises InputError for a loss whose tokens a column cannot weight."""
    if isinstance(loss, WholeSequenceLoss):
        raise InputError(f"{origin}: the column {TOKEN_WEIGHT} multiplies losses of tokens, and {loss.name} has one of "
                         "whole sequences; leave the column out")  # fmt: skip
    if loss.own_means:
        raise InputError(f"{origin}: {loss.name} weights demonstrations and own tokens itself; leave the column "
                         f"{TOKEN_WEIGHT} out")  # fmt: skip


def _require(loss: Loss, missing: Collection[str], given: Collection[str], origin: str) -> None:
    for name in missing:
        if name not in given:
            called = " or ".join(dict.fromkeys((name, OTHER_NAMES.get(name, name))))
            columns = (
                f"columns chosen_{name} and rejected_{name}" if isinstance(loss, PairLoss) else f"a column {called}"
            )
            raise InputError(
                f"{origin}: {loss.name} needs {columns}: one number (true, false) a row, or a list with "
                "one for each token that counts"
            )
