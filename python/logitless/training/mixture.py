"""Which losses a run trains, each over data of its own: one, or the components of the option `mixture`.

A component is a run's options with some of its own: method, data, batch size. So whatever makes a loss, a loader or a
reference model from options makes it for a component too. A run without a mixture has one, of all its options.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from logitless.training.config import TrainOptions, coerce, convert
from logitless.training.errors import InputError, nearest
from logitless.training.other_names import ALIASES

_GROUPS = ("Method", "Data", "Reference", "Rollouts")
_SHARED = ("backend", "backward", "mixture")
_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")

#: The options that a component may have of its own; it has the run's where it names none.
OWN = (
    *(spec.name for spec in dataclasses.fields(TrainOptions)
      if spec.metadata["group"] in _GROUPS and spec.name not in _SHARED),
    *_BATCHES,
)  # fmt: skip
#: Those that say what is trained on which data: beside a mixture no component would read them.
_OF_COMPONENTS = ("method", "loss", "beta", "loss_type", "label_smoothing", "divergence", "alpha",
               "dataset_name", "dataset_config", "eval_dataset_name")  # fmt: skip


class ComponentOptions(NamedTuple):
    """One loss of a run over data of its own."""

    name: str  # in the metrics; empty without a mixture
    weight: float
    options: TrainOptions

    def named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values under keys that begin with the component's name, as metrics and checkpoints have them."""
        return prefixed(self.name, values) if self.name else dict(values)

    def unnamed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `named`, without the values of other components."""
        return without_prefix(self.name, values) if self.name else dict(values)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Puts the component's name before the message of an InputError."""
        try:
            yield
        except InputError as error:
            raise InputError(f"mixture, {self.name}: {error}" if self.name else str(error)) from error


def prefixed(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under keys that begin with the name and a slash."""
    return {f"{name}/{key}": value for key, value in values.items()}


def without_prefix(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `prefixed`, without the values of other names."""
    start = f"{name}/"
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def components_of(options: TrainOptions) -> list[ComponentOptions]:
    """The components of `options.mixture`, or the options themselves as the only one, of weight 1.

    Raises:
        InputError: a component without a method, data or a weight above 0; two of one name; options that only a
            component or only the run can have.
    """
    if options.mixture is None:
        return [ComponentOptions("", 1.0, options)]
    for spec in dataclasses.fields(options):
        if spec.name in _OF_COMPONENTS and getattr(options, spec.name) != spec.default:
            raise InputError(
                f"{spec.name} and mixture are both given: with a mixture, {spec.name} belongs to a component"
            )
    shared = dataclasses.replace(options, mixture=None)
    found = [
        _component(given, shared, f"mixture, component {number}") for number, given in enumerate(options.mixture, 1)
    ]
    if not found:
        raise InputError("mixture must have at least one component, got none")
    name, count = Counter(component.name for component in found).most_common(1)[0]
    if count > 1:
        raise InputError(f"mixture: {count} components are named {name!r}; give each a name of its own (name: ...)")
    return found


def _component(given: Mapping[str, Any], shared: TrainOptions, source: str) -> ComponentOptions:
    if not isinstance(given, Mapping):
        raise InputError(f"{source}: expected a mapping of option names to values, got {given!r}")
    values = dict(given)
    weight, name = values.pop("weight", 1.0), values.pop("name", None)
    for key in values:
        if ALIASES.get(key, key) not in OWN:
            raise InputError(f"{source}: {key} is no option of a component{nearest(key, ('name', 'weight', *OWN))}")
    own = convert(values, source)
    for key in ("method", "dataset_name"):
        if not own.get(key):
            raise InputError(f"{source}: {key} is required")
    weight = coerce("weight", weight, float, source)
    if not weight > 0:
        raise InputError(f"{source}: weight must be above 0, got {weight}; a loss that counts nothing is left out")
    name = own["method"] if name is None else coerce("name", name, str, source)
    component = ComponentOptions(name, weight, shared)
    with component.blamed():
        return component._replace(options=dataclasses.replace(shared, **own))
